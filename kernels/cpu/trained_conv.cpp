// See trained_conv.h.
#include "trained_conv.h"

#include "parallel.h"

#include <c10/util/SmallVector.h>

namespace tinytl::cpu {
namespace {

// Pixels that one chain of a weight gradient adds up, about.
constexpr int64_t kWeightTerms = 128;

// Sums of a weight gradient that a thread holds while the images stream by, in floats: the images pass several times
// rather than a large weight exist twice.
constexpr int64_t kHeldSums = 64 * 1024;

// A row of the kernel window whose pixels lie inside the image: where it begins in the image and in the packed weight.
struct WindowRow {
  const float* a;
  const float* b;
};

// Up to this many taps no memory is allocated for their list.
constexpr size_t kUsualTaps = 25;

// A packed weight up to this many bytes stays in a core's cache beside the images.
constexpr int64_t kSmallWeight = 128 * 1024;

// What a task computes: a row of pixels, for one panel of the weight.
struct Unit {
  int64_t group, panel, row;
};

// One weight as a (columns x terms) matrix per group and tap, packed as [group][panel][tap][term][column].
struct PackedWeight {
  int64_t groups, taps, terms;
  ColumnPanels panels;
  at::Tensor storage;

  PackedWeight(const TrainedConv& conv, const at::Tensor& weight, bool transposed)
      : groups(conv.groups),
        taps(conv.taps()),
        terms(transposed ? conv.group_out() : conv.group_in()),
        panels(transposed ? conv.group_in() : conv.group_out()) {
    const at::Tensor source = weight.to(at::kFloat);
    const float* from = source.data_ptr<float>();
    const int64_t out_stride = source.stride(0), in_stride = source.stride(1);
    const int64_t group_stride = conv.group_out() * out_stride;
    const int64_t term_stride = transposed ? out_stride : in_stride;
    const int64_t column_stride = transposed ? in_stride : out_stride;
    storage = empty_tensor({groups * taps * terms * panels.padded()}, source.options().memory_format(std::nullopt));
    float* to = storage.data_ptr<float>();
    const int64_t units = groups * panels.count * conv.kernel;
    parallel_pieces(0, units, ceil_div(16384, conv.kernel * terms * kLanes), [&](int64_t begin, int64_t end) {
      for (int64_t unit = begin; unit < end; ++unit) {
        const int64_t ky = unit % conv.kernel, panel = unit / conv.kernel % panels.count;
        const int64_t group = unit / conv.kernel / panels.count;
        const int64_t width = panels.width_vecs(panel) * kLanes, valid = panels.valid(panel);
        for (int64_t kx = 0; kx < conv.kernel; ++kx) {
          const float* source_tap = from + group * group_stride + panels.start(panel) * column_stride +
              ky * source.stride(2) + kx * source.stride(3);
          float* target = to + offset(group, panel) + (ky * conv.kernel + kx) * terms * width;
          if (term_stride == 1) {
            transpose(source_tap, column_stride, target, width, valid, terms);
          }
          for (int64_t k = 0; k < terms; ++k) {
            if (term_stride == 1) {
              // transposed above
            } else if (column_stride == 1) {
              copy_row(source_tap + k * term_stride, valid, target + k * width);
            } else {
              for (int64_t n = 0; n < valid; ++n) {
                target[k * width + n] = source_tap[k * term_stride + n * column_stride];
              }
            }
            std::fill(target + k * width + valid, target + (k + 1) * width, 0.f);
          }
        }
      }
    });
  }

  int64_t offset(int64_t group, int64_t panel) const {
    return (group * panels.padded() + panels.start(panel)) * taps * terms;
  }
  const float* panel(int64_t group, int64_t panel) const {
    return storage.data_ptr<float>() + offset(group, panel);
  }
  // Calls body(unit) for `rows` rows of pixels. A thread keeps its rows from kernel to kernel; of a large weight it
  // keeps its part instead.
  template <class Body>
  void for_units(int64_t rows, const Body& body) const {
    const bool rows_outermost = storage.numel() * static_cast<int64_t>(sizeof(float)) <= kSmallWeight;
    const int64_t parts = groups * panels.count;
    parallel_tasks(parts * rows, [&](int64_t task) {
      const int64_t part = rows_outermost ? task % parts : task / rows;
      body(Unit{part / panels.count, part % panels.count, rows_outermost ? task / parts : task % rows});
    });
  }
};

// Output positions [first, last) along one side at which tap k falls inside the image.
std::pair<int64_t, int64_t> inside(int64_t k, int64_t length, int64_t positions, const TrainedConv& conv) {
  const int64_t first = std::max<int64_t>(ceil_div(conv.padding - k, conv.stride), 0);
  const int64_t last = std::min(floor_div(length - 1 + conv.padding - k, conv.stride) + 1, positions);
  return {first, std::max(first, last)};
}

} // namespace

TrainedConv::TrainedConv(at::IntArrayRef input, const at::Tensor& weight, int64_t stride, int64_t groups)
    : stride(stride), groups(groups) {
  TORCH_CHECK(input.size() == 4, "pooled: expected 4 dimensions (N, C, H, W), got ", input);
  TORCH_CHECK(
      weight.dim() == 4 && weight.size(2) == weight.size(3) && weight.size(2) % 2 == 1,
      "weight: expected (C_out, C_in / groups, k, k) with odd k, got ",
      weight.sizes());
  batch = input[0];
  in_channels = input[1];
  height = input[2];
  width = input[3];
  out_channels = weight.size(0);
  kernel = weight.size(2);
  padding = kernel / 2;
  TORCH_CHECK(
      stride >= 1 && groups >= 1 && out_channels > 0 && out_channels % groups == 0 && in_channels > 0 &&
          in_channels == weight.size(1) * groups && height > 0 && width > 0,
      "weight: ",
      weight.sizes(),
      " in ",
      groups,
      " groups with stride ",
      stride,
      " does not fit pooled ",
      input);
  out_height = (height - 1) / stride + 1;
  out_width = (width - 1) / stride + 1;
  phase_width = ceil_div(width + 2 * padding, stride);
  left = std::max<int64_t>((kernel - 1) / stride - padding / stride, 0);
  const int64_t right = std::max<int64_t>((width - 1 + padding) / stride - (out_width - 1), 0);
  gradient_width = left + out_width + right;
}

TrainedPointwise::TrainedPointwise(const at::Tensor& weight, bool transposed)
    : in_channels(weight.size(transposed ? 0 : 1)),
      out_channels(weight.size(transposed ? 1 : 0)),
      panels(out_channels),
      packed(PackedWeight(TrainedConv({1, weight.size(1), 1, 1}, weight, 1, 1), weight, transposed).storage) {}

void TrainedPointwise::rows(const float* x, int64_t count, float* y) const {
  alignas(64) float tile[kTileElements];
  for (int64_t p = 0; p < panels.count; ++p) {
    const int vecs = panels.width_vecs(p);
    const Run run{x, packed.data_ptr<float>() + panels.start(p) * in_channels, in_channels};
    const Strides strides{in_channels, 1, vecs * kLanes};
    for_row_tiles(count, 1, vecs, [&](int64_t row, int rows) {
      strided_gemm(rows, vecs, &run, 1, row * in_channels, strides, false, tile);
      store_tile(tile, rows, vecs, panels.valid(p), y + row * out_channels + panels.start(p), out_channels);
    });
  }
}

template <class T>
void pad_input(const TrainedConv& conv, const T* input, float* padded) {
  const int64_t channels = conv.in_channels, phase = conv.phase_width;
  const int64_t grain = ceil_div(16384, std::max<int64_t>(conv.width * conv.batch * channels, 1));
  parallel_pieces(0, conv.height, grain, [&](int64_t begin, int64_t end) {
    for (int64_t y = begin; y < end; ++y) {
      for (int64_t q = 0; q < conv.stride; ++q) {
        for (int64_t u = 0; u < phase; ++u) {
          const int64_t x = u * conv.stride + q - conv.padding;
          float* target = padded + ((y * conv.stride + q) * phase + u) * conv.batch * channels;
          if (x < 0 || x >= conv.width) {
            std::fill(target, target + conv.batch * channels, 0.f);
            continue;
          }
          for (int64_t n = 0; n < conv.batch; ++n, target += channels) {
            const T* source = input + ((n * conv.height + y) * conv.width + x) * channels;
            for (int64_t c = 0; c < channels; c += kLanes) {
              store_channels(target + c, load_channels(source + c, channels - c), channels - c);
            }
          }
        }
      }
    }
  });
}

template <class T>
void trained_conv_forward(const TrainedConv& conv, const float* padded, const at::Tensor& weight, T* y) {
  const PackedWeight packed(conv, weight, false);
  const auto& panels = packed.panels;
  const int64_t line = conv.out_width * conv.batch, phase_line = conv.phase_width * conv.batch;
  std::vector<int64_t> column_offsets(conv.kernel); // of column kx of the window
  for (int64_t kx = 0; kx < conv.kernel; ++kx) {
    column_offsets[kx] = (kx % conv.stride * phase_line + kx / conv.stride * conv.batch) * conv.in_channels;
  }
  packed.for_units(conv.out_height, [&](const Unit& unit) {
    const int64_t group = unit.group, panel = unit.panel, oy = unit.row;
    c10::SmallVector<Run, kUsualTaps> runs(conv.taps());
    c10::SmallVector<WindowRow, kUsualTaps> window(conv.kernel);
    alignas(64) float tile[kTileElements];
    const int vecs = panels.width_vecs(panel);
    const Strides strides{conv.in_channels, 1, vecs * kLanes};
    const int64_t tap_elements = packed.terms * strides.b_step;
    int64_t window_rows = 0;
    for (int64_t ky = 0; ky < conv.kernel; ++ky) {
      const int64_t iy = oy * conv.stride - conv.padding + ky;
      if (iy >= 0 && iy < conv.height) {
        window[window_rows++] = {
            padded + iy * conv.stride * phase_line * conv.in_channels + group * conv.group_in(),
            packed.panel(group, panel) + ky * conv.kernel * tap_elements};
      }
    }
    T* target = y + oy * line * conv.out_channels + group * conv.group_out() + panels.start(panel);
    int64_t count = 0;
    std::pair<int64_t, int64_t> columns(0, 0); // of the window, that `runs` are for
    for_row_tiles(line, conv.batch, vecs, [&](int64_t row, int rows) {
      const int64_t first = row / conv.batch, last = (row + rows - 1) / conv.batch; // columns of the tile
      const std::pair inside_image(
          std::max<int64_t>(conv.padding - last * conv.stride, 0),
          std::min(conv.padding + conv.width - first * conv.stride, conv.kernel));
      if (inside_image != columns) {
        columns = inside_image;
        count = 0;
        for (int64_t w = 0; w < window_rows; ++w) {
          for (int64_t kx = columns.first; kx < columns.second; ++kx) {
            runs[count++] = {window[w].a + column_offsets[kx], window[w].b + kx * tap_elements, packed.terms};
          }
        }
      }
      strided_gemm(rows, vecs, runs.data(), count, row * conv.in_channels, strides, false, tile);
      store_tile(tile, rows, vecs, panels.valid(panel), target + row * conv.out_channels, conv.out_channels);
    });
  });
}

template <class T>
void trained_conv_backward_input(const TrainedConv& conv, const float* grad, const at::Tensor& weight, T* dx) {
  const PackedWeight packed(conv, weight, true);
  const auto& panels = packed.panels;
  const int64_t grad_line = conv.gradient_width * conv.batch, left = conv.left;
  packed.for_units(conv.height, [&](const Unit& unit) {
    const int64_t group = unit.group, panel = unit.panel, iy = unit.row;
    c10::SmallVector<Run, kUsualTaps> runs(conv.taps());
    c10::SmallVector<WindowRow, kUsualTaps> window(conv.kernel);
    alignas(64) float tile[kTileElements];
    const int vecs = panels.width_vecs(panel);
    const Strides strides{conv.out_channels, 1, vecs * kLanes};
    const int64_t tap_elements = packed.terms * strides.b_step;
    int64_t window_rows = 0;
    for (int64_t ky = 0; ky < conv.kernel; ++ky) {
      const int64_t reached = iy + conv.padding - ky;
      if (reached >= 0 && reached % conv.stride == 0 && reached / conv.stride < conv.out_height) {
        window[window_rows++] = {
            grad + reached / conv.stride * grad_line * conv.out_channels + group * conv.group_out(),
            packed.panel(group, panel) + ky * conv.kernel * tap_elements};
      }
    }
    T* target = dx + iy * conv.width * conv.in_channels + group * conv.group_in() + panels.start(panel);
    // Columns ix = v * stride + q - padding of one remainder q are reached by the taps kx = q + j * stride, from the
    // output columns v - j.
    for (int64_t q = 0; q < conv.stride; ++q) {
      const int64_t v0 = ceil_div(conv.padding - q, conv.stride);
      const int64_t v1 = floor_div(conv.width - 1 + conv.padding - q, conv.stride) + 1;
      int64_t count = 0;
      std::pair<int64_t, int64_t> columns(0, 0); // j that `runs` are for
      for_row_tiles((v1 - v0) * conv.batch, conv.batch, vecs, [&](int64_t row, int rows) {
        const int64_t first = v0 + row / conv.batch, last = v0 + (row + rows - 1) / conv.batch;
        const std::pair inside_image(
            std::max<int64_t>(first - conv.out_width + 1, 0),
            std::min(last + 1, ceil_div(conv.kernel - q, conv.stride)));
        if (inside_image != columns) {
          columns = inside_image;
          count = 0;
          for (int64_t w = 0; w < window_rows; ++w) {
            for (int64_t j = columns.first; j < columns.second; ++j) {
              runs[count++] = {
                  window[w].a + (left + v0 - j) * conv.batch * conv.out_channels,
                  window[w].b + (q + j * conv.stride) * tap_elements,
                  packed.terms};
            }
          }
        }
        strided_gemm(rows, vecs, runs.data(), count, row * conv.out_channels, strides, false, tile);
        // Row by row: an image's pixels lie far from the next image's.
        int64_t column = first * conv.stride + q - conv.padding, image = row % conv.batch;
        for (int m = 0; m < rows; ++m) {
          T* pixel = target + (image * conv.height * conv.width + column) * conv.in_channels;
          store_tile(tile + m * vecs * kLanes, 1, vecs, panels.valid(panel), pixel, 0);
          if (++image == conv.batch) {
            image = 0;
            column += conv.stride;
          }
        }
      });
    }
  });
}

void zero_padding(const TrainedConv& conv, float* grad) {
  const int64_t pixel = conv.batch * conv.out_channels, line = conv.gradient_width * pixel;
  const int64_t end = (conv.left + conv.out_width) * pixel;
  for (int64_t y = 0; y < conv.out_height; ++y, grad += line) {
    std::fill(grad, grad + conv.left * pixel, 0.f);
    std::fill(grad + end, grad + line, 0.f);
  }
}

void trained_conv_backward_weight(
    const TrainedConv& conv, const float* padded, const float* grad, at::Tensor& grad_weight) {
  // Tiles of out channels (rows) by in channels (vectors), one tap each, some of them held while chunks of image rows
  // stream by; neighbouring tiles read the same input. No two tasks share a tile: nothing is summed over threads.
  const ColumnPanels panels(conv.group_in());
  const int64_t phase_line = conv.phase_width * conv.batch;
  const int64_t grad_line = conv.gradient_width * conv.batch;
  const int64_t chunk = ceil_div(kWeightTerms, conv.out_width * conv.batch); // output lines
  const Strides strides{1, conv.out_channels, conv.in_channels};
  const bool in_place = grad_weight.scalar_type() == at::kFloat;
  at::Tensor sums = in_place ? grad_weight : empty_like(grad_weight, grad_weight.options().dtype(at::kFloat));
  float* target = sums.data_ptr<float>();
  const int64_t out_stride = sums.stride(0), in_stride = sums.stride(1);
  const int64_t row_stride = sums.stride(2), column_stride = sums.stride(3);
  std::vector<std::pair<int64_t, int64_t>> inside_columns, inside_rows; // of each tap
  for (int64_t k = 0; k < conv.kernel; ++k) {
    inside_columns.push_back(inside(k, conv.width, conv.out_width, conv));
    inside_rows.push_back(inside(k, conv.height, conv.out_height, conv));
  }
  // A unit is a tile; unit = (group, tap, tile) of one panel, the tile of rows fastest.
  const auto tiles_of = [&](int vecs) { return ceil_div(conv.group_out(), max_tile_rows(vecs)); };
  const int64_t most_units = conv.groups * tiles_of(panels.width_vecs(0)) * conv.taps();
  const int64_t pieces = ceil_div(piece_count(most_units * panels.count), panels.count); // of each panel
  parallel_tasks(panels.count * pieces, [&](int64_t task) {
    const int64_t p = task / pieces;
    const int vecs = panels.width_vecs(p);
    const int64_t tiles = tiles_of(vecs), units = conv.groups * tiles * conv.taps();
    const int64_t tile_elements = max_tile_rows(vecs) * vecs * kLanes;
    const auto row_of = [&](int64_t tile) { return conv.group_out() * tile / tiles; };
    const auto sum_units = [&](int64_t begin, int64_t end, float* sum, std::vector<Run>& runs) {
      for (int64_t y = 0; y < conv.out_height; y += chunk) {
        int64_t count = 0, runs_for = -1; // the (group, tap) of `runs`
        for (int64_t unit = begin; unit < end; ++unit) {
          const int64_t t = unit % tiles, group_tap = unit / tiles;
          if (group_tap != runs_for) {
            runs_for = group_tap;
            count = 0;
            const int64_t tap = group_tap % conv.taps(), group = group_tap / conv.taps();
            const int64_t ky = tap / conv.kernel, kx = tap % conv.kernel;
            const auto [x0, x1] = inside_columns[kx];
            const auto [y0, y1] = inside_rows[ky];
            for (int64_t oy = std::max(y, y0); oy < std::min(y + chunk, y1) && x0 < x1; ++oy) {
              const int64_t iy = oy * conv.stride - conv.padding + ky;
              const int64_t from = oy * grad_line + (conv.left + x0) * conv.batch;
              const int64_t pixel =
                  (iy * conv.stride + kx % conv.stride) * phase_line + (x0 + kx / conv.stride) * conv.batch;
              runs[count++] = {
                  grad + from * conv.out_channels + group * conv.group_out(),
                  padded + pixel * conv.in_channels + group * conv.group_in() + panels.start(p),
                  (x1 - x0) * conv.batch};
            }
          }
          if (count > 0 || y == 0) {
            const int rows = static_cast<int>(row_of(t + 1) - row_of(t));
            float* tile = sum + (unit - begin) * tile_elements;
            strided_gemm(rows, vecs, runs.data(), count, row_of(t), strides, y > 0, tile);
          }
        }
      }
    };
    const auto store_units = [&](int64_t begin, int64_t end, const float* sum) {
      for (int64_t unit = begin; unit < end; ++unit) {
        const int64_t t = unit % tiles, tap = unit / tiles % conv.taps(), group = unit / tiles / conv.taps();
        const float* tile = sum + (unit - begin) * tile_elements;
        const int64_t o0 = group * conv.group_out() + row_of(t), o1 = group * conv.group_out() + row_of(t + 1);
        for (int64_t o = o0; o < o1; ++o, tile += vecs * kLanes) {
          float* to = target + o * out_stride + panels.start(p) * in_stride + tap / conv.kernel * row_stride +
              tap % conv.kernel * column_stride;
          if (in_stride == 1) {
            copy_row(tile, panels.valid(p), to);
            continue;
          }
          for (int64_t i = 0; i < panels.valid(p); ++i) {
            to[i * in_stride] = tile[i];
          }
        }
      }
    };
    const int64_t begin = units * (task % pieces) / pieces, end = units * (task % pieces + 1) / pieces;
    const int64_t held = std::min(std::max<int64_t>(kHeldSums / tile_elements, 1), std::max<int64_t>(end - begin, 1));
    float* sum = scratch<float>(kRows, held * tile_elements);
    std::vector<Run> runs(chunk);
    for (int64_t first = begin; first < end; first += held) {
      const int64_t last = std::min(first + held, end);
      sum_units(first, last, sum, runs);
      store_units(first, last, sum);
    }
  });
  if (!in_place) {
    grad_weight.copy_(sums);
  }
}

#define TINYTL_TRAINED_CONV(T)                                                                               \
  template void pad_input<T>(const TrainedConv&, const T*, float*);                                          \
  template void trained_conv_forward<T>(const TrainedConv&, const float*, const at::Tensor&, T*);            \
  template void trained_conv_backward_input<T>(const TrainedConv&, const float*, const at::Tensor&, T*);
TINYTL_TRAINED_CONV(float)
TINYTL_TRAINED_CONV(c10::BFloat16)
TINYTL_TRAINED_CONV(c10::Half)
#undef TINYTL_TRAINED_CONV

} // namespace tinytl::cpu
