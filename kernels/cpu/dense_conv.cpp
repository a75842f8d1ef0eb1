// Frozen dense or grouped k x k convolution with bias and activation (conv_activation.h), and its backward:
//
//     y  = act(conv(x, W) + b)          any kernel, stride, dilation, four paddings
//     g  = act'(..) dy,  db = sum g,  dx = conv^T(g, W)
//
// A task takes bands of rows that fit in a core's cache: the rows that a band's results need are copied once, padded
// with zeros (backward: masked and summed on the way), and every tile of results is an implicit GEMM over them
// (dense_gemm.h), finished while it is in the first-level cache. Forward reads x and writes y and the mask once,
// backward reads dy and the mask once and writes dx, but for the rows that neighbouring bands share.
//
// Backward is the same GEMM. With stride s, the input rows of one remainder (row + pad) % s are reached by the taps of
// one remainder only, each of them from one output row: s_h s_w *phases*, each a convolution of stride 1 over g with
// its share of the taps. No zero is stuffed in between.
//
// The weight is packed a few panels at a time, into at most kPackedBytes (or one panel), and the tensors are walked
// once for each: more than once only for a weight larger than that, which belongs to small images. A weight in 8 bits
// is unpacked there.
//
// Where winograd.h applies, the tiles of a band are computed its way instead, in both directions.
#include "dense_conv.h"

#include "conv_activation.h"
#include "epilogues.h"
#include "operators.h"
#include "parallel.h"
#include "winograd.h"

namespace tinytl::cpu {
namespace {

constexpr int64_t kBandBytes = 256 * 1024; // padded rows that a band keeps
constexpr int64_t kChunkBytes = 256 * 1024; // of a panel, while all tiles of a band pass by
constexpr int64_t kSumBytes = 128 * 1024; // results between two chunks

// Rows of results that a band takes at a time: their padded rows and sums fit.
template <class Dot>
int64_t band_step(const BandRows<Dot>& band, int64_t reach, int64_t advance, int64_t columns, bool chunked) {
  const int64_t rows = kBandBytes / band.row_bytes() - reach;
  int64_t step = std::max<int64_t>(rows / advance, 1);
  if (chunked) {
    const int64_t row_sums = columns * kPanelGroups * kGroup * static_cast<int64_t>(sizeof(float));
    step = std::min(step, std::max<int64_t>(kSumBytes / row_sums, 1));
  }
  return step;
}

// Pieces that the runs of a panel are worked off in.
template <class Dot>
int64_t chunks_of(const std::vector<WindowRun>& runs, int64_t width) {
  int64_t depth = 0;
  for (const WindowRun& run : runs) {
    depth += run.depth;
  }
  const int64_t bytes = depth * width * static_cast<int64_t>(sizeof(typename Dot::Element));
  return std::clamp<int64_t>(ceil_div(bytes, kChunkBytes), 1, std::max<int64_t>(runs.size(), 1));
}

// Activation and mask bits of a tile of sums, to the tensor. valid: channels from the panel's first on.
template <Activation A, class T>
void finish_tile(
    const float* tile,
    int rows,
    int64_t lanes,
    int64_t valid,
    T* target,
    int64_t target_stride,
    uint8_t* bits,
    int64_t bits_stride) {
  const auto group = [&](int m, int64_t c, int64_t left) TINYTL_LAMBDA_INLINE {
    Vec values[kGroupVecs];
    TINYTL_UNROLL
    for (int v = 0; v < kGroupVecs; ++v) {
      values[v] = Vec::loadu(tile + m * lanes + c + v * kLanes);
    }
    activate_group<A>(values, bits != nullptr ? bits + m * bits_stride + c / 8 : nullptr, left);
    TINYTL_UNROLL
    for (int v = 0; v < kGroupVecs; ++v) {
      if (v * kLanes < left) {
        store_channels(target + m * target_stride + c + v * kLanes, values[v], left - v * kLanes);
      }
    }
  };
  const int64_t whole = std::min(valid, lanes) / kGroup * kGroup;
  for (int m = 0; m < rows; ++m) {
    for (int64_t c = 0; c < whole; c += kGroup) {
      group(m, c, kGroup); // known to be whole at compile time: a fifth of the time of a stem
    }
    if (whole < std::min(valid, lanes)) {
      group(m, whole, valid - whole);
    }
  }
}

// One pixel's gradient where the mask passes, zeros elsewhere, and added to `sums` unless it is null.
template <class T, class Element>
void mask_pixel(const T* from, int64_t channels, const uint8_t* pass, float* sums, Element* to) {
  const auto group = [&](int64_t c, int64_t left) TINYTL_LAMBDA_INLINE {
    Vec values[kGroupVecs];
    TINYTL_UNROLL
    for (int v = 0; v < kGroupVecs; ++v) {
      const int64_t count = std::clamp<int64_t>(left - v * kLanes, 0, kLanes);
      values[v] = count > 0 ? load_channels(from + c + v * kLanes, count) : Vec(0.f);
    }
    if (pass != nullptr) {
      select_group(values, pass + c / 8, left);
    }
    TINYTL_UNROLL
    for (int v = 0; v < kGroupVecs; ++v) {
      if (sums != nullptr) {
        (Vec::loadu(sums + c + v * kLanes) + values[v]).store(sums + c + v * kLanes);
      }
      if (v * kLanes < left) {
        store_channels(to + c + v * kLanes, values[v], left - v * kLanes);
      }
    }
  };
  const int64_t whole = channels / kGroup * kGroup;
  for (int64_t c = 0; c < whole; c += kGroup) {
    group(c, kGroup);
  }
  if (whole < channels) {
    group(whole, channels - whole);
  }
}

// A weight that is contiguous as (O, kh, kw, I) is read so, without a copy.
bool stored_window_major(const at::Tensor& weight) {
  return !weight.is_contiguous() && weight.is_contiguous(at::MemoryFormat::ChannelsLast);
}

FrozenWeight frozen_weight(const at::Tensor& weight, const OptionalTensor& scale) {
  return {stored_window_major(weight) ? weight.permute({0, 2, 3, 1}) : weight, scale, "weight"};
}

} // namespace

std::tuple<at::Tensor, at::Tensor> dense_forward(
    const at::Tensor& x,
    const at::Tensor& weight,
    const OptionalTensor& weight_scale,
    const OptionalTensor& bias,
    at::IntArrayRef stride,
    at::IntArrayRef padding,
    at::IntArrayRef dilation,
    int64_t groups,
    const std::string& activation,
    bool needs_saved) {
  const DenseShape s(x.sizes(), weight, stride, padding, dilation, groups);
  const FrozenWeight frozen = frozen_weight(weight, weight_scale);
  const int64_t group_out = s.group_out(), height = s.rows.positions, width = s.columns.positions;
  TORCH_CHECK(
      groups == 1 || group_out % 8 == 0,
      "weight: expected a multiple of 8 output channels a group, so that no two groups share a byte of the mask, got ",
      group_out);
  const at::Tensor input = in_channels_last(x);
  const ConvOutput output(activation, {s.batch, s.out_channels, height, width}, x.options(), needs_saved);
  uint8_t* bits = output.tile_bits();
  const int64_t mask_stride = mask_bytes(s.out_channels);
  // A bias as the panels read it: every group padded to whole vectors.
  const Panels panels(group_out);
  const at::Tensor flat = padded_bias(bias, s.out_channels, "bias");
  at::Tensor padded = zero_tensor({groups, panels.padded()}, x.options().dtype(at::kFloat).memory_format(std::nullopt));
  if (flat.defined()) {
    padded.narrow(1, 0, group_out).copy_(flat.narrow(0, 0, s.out_channels).view({groups, group_out}));
  }
  const float* init = padded.data_ptr<float>();
  const Bands bands(s.batch, height, ceil_div(std::max<int64_t>(s.rows.reach() + 1 - s.rows.stride, 0), s.rows.stride));

  with_storage_type(x.scalar_type(), "input", [&](auto type) {
    using T = decltype(type);
    using Dot = typename DotFor<T>::type;
    using Element = typename Dot::Element;
    auto band = input_rows<Dot>(s);
    const bool winograd = winograd_applies<Dot>(s, band.depth(), height, width);
    if (winograd) {
      band.width = round_up(width, 2) + 2;
    }
    const auto phases = forward_phases(s);
    const auto runs = window_runs(phases[0], band);
    const PackedUnits<Dot, T> packing(s, frozen, phases, false, stored_window_major(weight));
    const int64_t chunks = chunks_of<Dot>(runs, panels.width(0));
    const int64_t step = winograd
        ? WinogradTiles::step(width, band.depth())
        : band_step(band, s.rows.reach() + 1 - s.rows.stride, s.rows.stride, width, chunks > 1);
    const T* source = input.data_ptr<T>();
    T* target = output.values<T>();
    const auto with_weights = [&](int64_t first_unit, int64_t last_unit, const Element* packed,
                                  const at::Tensor& transformed) {
      for_bands(bands, [&](int64_t, int64_t image, int64_t task_band) {
        const int64_t end = bands.begin(task_band + 1);
        for (int64_t begin = bands.begin(task_band); begin < end; begin += step) {
          const int64_t count = std::min(step, end - begin), pixels = count * width;
          const WinogradTiles tiles(count, width, band.depth());
          const int64_t needed = winograd ? tiles.source_rows() : (count - 1) * s.rows.stride + s.rows.reach() + 1;
          Element* rows = scratch<Element>(kRows, needed * band.row());
          const int64_t first_row = begin * s.rows.stride - s.rows.before;
          pad_rows(s, band, source + image * s.image_elements(), first_row, needed, rows);
          // Activation and mask of neighbouring pixels from `pixel` on, of one panel.
          const auto finish = [&](int64_t group, int64_t panel, int64_t pixel, int tile_rows, const float* tile) {
            const int64_t start = panels.start(panel), channel = group * group_out + start;
            with_activation(output.tile_activation(), [&](auto a) {
              finish_tile<a.value>(
                  tile,
                  tile_rows,
                  panels.width(panel),
                  group_out - start,
                  target + pixel * s.out_channels + channel,
                  s.out_channels,
                  bits != nullptr ? bits + pixel * mask_stride + channel / 8 : nullptr,
                  mask_stride);
            });
          };
          const auto complete = [&](int64_t first_pixel, int64_t pixels) {
            if (last_unit == packing.units()) {
              output.finish<T>(first_pixel, pixels);
            }
          };
          const int64_t first_pixel = (image * height + begin) * width;
          if constexpr (std::is_same_v<Dot, FloatDot>) {
            if (winograd) {
              const auto start = [&](int64_t group, int64_t panel) {
                return init + group * panels.padded() + panels.start(panel);
              };
              winograd_units(
                  packing, first_unit, last_unit, transformed, band, tiles, rows, start,
                  [&](int64_t group, int64_t panel, const float* results) {
                    for (int64_t row = 0; row < count; ++row) {
                      const float* line = results + row * 2 * tiles.columns * panels.width(panel);
                      finish(group, panel, first_pixel + row * width, static_cast<int>(width), line);
                    }
                  });
              complete(first_pixel, pixels);
              continue;
            }
          }
          int64_t* offsets = scratch<int64_t>(kOffsets, pixels);
          for (int64_t row = 0; row < count; ++row) {
            for (int64_t column = 0; column < width; ++column) {
              offsets[row * width + column] =
                  row * s.rows.stride * band.row() + column * s.columns.stride * band.pixel();
            }
          }
          float* sums = scratch<float>(
              kSums, chunks > 1 ? pixels * kPanelGroups * kGroup : kWindowTileElements);
          const auto range = [&](int64_t m0, int tile_rows) {
            const int64_t top = m0 / width * s.rows.stride, bottom = (m0 + tile_rows - 1) / width * s.rows.stride;
            return runs_inside(runs, top, bottom, -first_row, s.rows.length - first_row);
          };
          for (int64_t unit = first_unit; unit < last_unit; ++unit) {
            const int64_t group = unit / panels.count, panel = unit % panels.count;
            window_gemm<Dot>(
                panels.groups(panel),
                pixels,
                rows + group * band.depth(),
                offsets,
                runs,
                chunks,
                packed + packing.offset(unit) - packing.offset(first_unit),
                init + group * panels.padded() + panels.start(panel),
                sums,
                range,
                [&](int64_t m0, int tile_rows, const float* tile) {
                  finish(group, panel, first_pixel + m0, tile_rows, tile);
                });
          }
          complete(first_pixel, pixels);
        }
      });
    };
    for_weights(packing, winograd, with_weights);
  });
  return output.result();
}

std::tuple<at::Tensor, at::Tensor> dense_backward(
    const at::Tensor& grad_output,
    const at::Tensor& saved,
    const at::Tensor& weight,
    const OptionalTensor& weight_scale,
    at::IntArrayRef input_size,
    at::IntArrayRef stride,
    at::IntArrayRef padding,
    at::IntArrayRef dilation,
    int64_t groups,
    const std::string& activation,
    bool need_input,
    bool need_bias) {
  const DenseShape s(input_size, weight, stride, padding, dilation, groups);
  const FrozenWeight frozen = frozen_weight(weight, weight_scale);
  const int64_t height = s.rows.positions, width = s.columns.positions;
  const ConvGradient gradient(activation, grad_output, saved, {s.batch, s.out_channels, height, width});
  if (!need_input) {
    return {empty_tensor({0}, gradient.options()), gradient.sum(need_bias)};
  }
  const uint8_t* bits = gradient.loop_bits();
  const int64_t mask_stride = mask_bytes(s.out_channels);
  at::Tensor grad_input = empty_tensor(input_size, gradient.options(), at::MemoryFormat::ChannelsLast);
  const Panels panels(s.group_in());
  const Bands bands(s.batch, s.rows.length, ceil_div(s.rows.reach(), s.rows.stride));
  const int64_t sums_length = padded_channels(s.out_channels);
  at::Tensor partial =
      zero_tensor({bands.tasks(), sums_length}, gradient.options().dtype(at::kFloat).memory_format(std::nullopt));
  float* partials = partial.data_ptr<float>();

  with_storage_type(gradient.dtype(), "grad_output", [&](auto type) {
    using T = decltype(type);
    using Dot = typename DotFor<T>::type;
    using Element = typename Dot::Element;
    const int64_t first_column = s.columns.first_reaching(0);
    BandRows<Dot> band{
        groups, s.group_out(), std::max<int64_t>(s.columns.last_reaching(s.columns.length) - first_column + 1, 1)};
    const bool winograd = winograd_applies<Dot>(s, band.depth(), s.rows.length, s.columns.length);
    if (winograd) {
      band.width = round_up(s.columns.length, 2) + 2;
    }
    const auto phases = backward_phases(s);
    const PackedUnits<Dot, T> packing(s, frozen, phases, true, stored_window_major(weight));
    std::vector<std::vector<WindowRun>> runs;
    int64_t chunks = 1;
    for (const Phase& phase : phases) {
      runs.push_back(window_runs(phase, band));
      chunks = std::max(chunks, chunks_of<Dot>(runs.back(), panels.width(0)));
    }
    // Rows of dx at a time: whole strides.
    const int64_t halo = ceil_div(s.rows.reach(), s.rows.stride);
    const int64_t step = winograd
        ? WinogradTiles::step(s.columns.length, band.depth())
        : s.rows.stride * band_step(band, halo, 1, s.columns.length * s.rows.stride, chunks > 1);
    T* target = grad_input.data_ptr<T>();

    // g of output rows [first, last], zeros around them; sums += the rows in [sum_begin, sum_end).
    const auto fill = [&](int64_t image, int64_t first, int64_t last, int64_t sum_begin, int64_t sum_end, float* sums,
                          Element* to) {
      const bool flat = band.channels == band.depth();
      Element* pixel_values = scratch<Element>(kOperand, sums_length);
      for (int64_t row = first; row <= last; ++row, to += band.row()) {
        zero(to, band.row());
        if (row < 0 || row >= height) {
          continue;
        }
        const bool summed = sums != nullptr && row >= sum_begin && row < sum_end;
        const int64_t begin = summed ? 0 : std::max<int64_t>(first_column, 0);
        const int64_t end = summed ? width : std::min(first_column + band.width, width);
        const int64_t first_pixel = (image * height + row) * width + begin;
        const T* from = gradient.pixels<T>(first_pixel, std::max<int64_t>(end - begin, 0));
        for (int64_t column = begin; column < end; ++column, from += s.out_channels) {
          const int64_t pixel = first_pixel + column - begin;
          const int64_t place = column - first_column;
          const bool kept = place >= 0 && place < band.width;
          Element* own = flat && kept ? to + place * band.pixel() : pixel_values;
          mask_pixel(
              from,
              s.out_channels,
              bits != nullptr ? bits + pixel * mask_stride : nullptr,
              summed ? sums : nullptr,
              own);
          if (kept && !flat) {
            copy_pixels(band, pixel_values, 1, to + place * band.pixel());
          }
        }
        if (summed) {
          flush_sums(sums, sums + sums_length, sums_length);
        }
      }
    };
    const auto with_weights = [&](int64_t first_unit, int64_t last_unit, const Element* packed,
                                  const at::Tensor& transformed) {
      for_bands(bands, [&](int64_t t, int64_t image, int64_t task_band) {
        const int64_t task_end = bands.begin(task_band + 1);
        // Output rows from here on are this task's to sum, up to where the next band's begin.
        const auto own_row = [&](int64_t i) {
          if (i == 0 || i == bands.per_image) {
            return i == 0 ? 0 : height;
          }
          return std::clamp<int64_t>(s.rows.first_reaching(bands.begin(i)), 0, height);
        };
        int64_t next = own_row(task_band);
        const int64_t own_end = own_row(task_band + 1);
        const bool summing = need_bias && first_unit == 0;
        // A row's sums, then the task's.
        std::vector<float> sums(summing ? 2 * sums_length : 0, 0.f);
        // Output rows whose windows lie in the padding altogether only count for the bias.
        const auto sum_unreached = [&](int64_t row) {
          for (; summing && next < std::min(row, own_end); ++next) {
            fill(image, next, next, next, own_end, sums.data(), scratch<Element>(kRows, band.row()));
          }
        };
        for (int64_t begin = bands.begin(task_band); begin < task_end; begin += step) {
          const int64_t end = std::min(begin + step, task_end);
          const WinogradTiles tiles(end - begin, s.columns.length, band.depth());
          const int64_t first = s.rows.first_reaching(begin);
          const int64_t last = winograd ? first + tiles.source_rows() - 1 : std::max(s.rows.last_reaching(end), first);
          sum_unreached(first);
          Element* rows = scratch<Element>(kRows, (last - first + 1) * band.row());
          fill(image, first, last, next, own_end, summing ? sums.data() : nullptr, rows);
          next = std::max(next, last + 1);
          // Neighbouring channels of one pixel of dx.
          const auto store = [&](int64_t panel, const float* sums_of_pixel, T* to) {
            const int64_t valid = std::min(s.group_in() - panels.start(panel), panels.width(panel));
            for (int64_t c = 0; c < valid; c += kLanes) {
              store_channels(to + c, Vec::loadu(sums_of_pixel + c), valid - c);
            }
          };
          if constexpr (std::is_same_v<Dot, FloatDot>) {
            if (winograd) {
              const auto none = [](int64_t, int64_t) { return static_cast<const float*>(nullptr); };
              winograd_units(
                  packing, first_unit, last_unit, transformed, band, tiles, rows, none,
                  [&](int64_t group, int64_t panel, const float* results) {
                    const int64_t lanes = panels.width(panel), channel = group * s.group_in() + panels.start(panel);
                    for (int64_t row = begin; row < end; ++row) {
                      const float* line = results + (row - begin) * 2 * tiles.columns * lanes;
                      T* to = target + (image * s.rows.length + row) * s.columns.length * s.in_channels + channel;
                      for (int64_t column = 0; column < s.columns.length; ++column) {
                        store(panel, line + column * lanes, to + column * s.in_channels);
                      }
                    }
                  });
              continue;
            }
          }
          const int64_t most = (end - begin) * s.columns.length;
          int64_t* offsets = scratch<int64_t>(kOffsets, 3 * most);
          int64_t* places = offsets + most;
          float* products = scratch<float>(kSums, chunks > 1 ? most * kPanelGroups * kGroup : kWindowTileElements);
          int64_t phase_start = 0; // elements of a unit for one channel
          for (size_t p = 0; p < phases.size(); ++p) {
            const auto aligned = [](int64_t from, const Side& side, int64_t remainder) {
              const int64_t off = (from + side.before - remainder) % side.stride;
              return from + (off == 0 ? 0 : off < 0 ? -off : side.stride - off);
            };
            int64_t pixels = 0;
            int64_t* tops = places + most; // the row of the band of each pixel
            for (int64_t row = aligned(begin, s.rows, phases[p].row); row < end; row += s.rows.stride) {
              const int64_t down = floor_div(row + s.rows.before, s.rows.stride) - first;
              for (int64_t column = aligned(0, s.columns, phases[p].column); column < s.columns.length;
                   column += s.columns.stride) {
                const int64_t right = floor_div(column + s.columns.before, s.columns.stride) - first_column;
                tops[pixels] = down;
                offsets[pixels] = down * band.row() + right * band.pixel();
                places[pixels++] = ((image * s.rows.length + row) * s.columns.length + column) * s.in_channels;
              }
            }
            const auto range = [&](int64_t m0, int tile_rows) {
              return runs_inside(runs[p], tops[m0], tops[m0 + tile_rows - 1], -first, height - first);
            };
            const int64_t phase_chunks = chunks_of<Dot>(runs[p], panels.width(0));
            for (int64_t unit = first_unit; unit < last_unit; ++unit) {
              const int64_t group = unit / panels.count, panel = unit % panels.count, lanes = panels.width(panel);
              const int64_t channel = group * s.group_in() + panels.start(panel);
              window_gemm<Dot>(
                  panels.groups(panel),
                  pixels,
                  rows + group * band.depth(),
                  offsets,
                  runs[p],
                  phase_chunks,
                  packed + packing.offset(unit) - packing.offset(first_unit) + phase_start * lanes,
                  nullptr,
                  products,
                  range,
                  [&](int64_t m0, int tile_rows, const float* tile) {
                    for (int m = 0; m < tile_rows; ++m, tile += lanes) {
                      store(panel, tile, target + places[m0 + m] + channel);
                    }
                  });
            }
            phase_start += static_cast<int64_t>(phases[p].taps.size()) * band.depth();
          }
        }
        if (summing) {
          sum_unreached(own_end);
          std::copy_n(sums.data() + sums_length, sums_length, partials + t * sums_length);
        }
      });
    };
    for_weights(packing, winograd, with_weights);
  });
  return {grad_input, reduce_partial(partial, 0, s.out_channels, need_bias)};
}

} // namespace tinytl::cpu
