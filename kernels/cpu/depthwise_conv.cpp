// Frozen depthwise convolution with bias and activation (conv_activation.h), and its backward:
//
//     y  = act(depthwise(x, W) + b)          any kernel, stride, dilation, four paddings
//     g  = act'(..) dy,  db = sum g,  dx = depthwise^T(g, W)
//
// A task walks down the rows of an image (or a band of it) and keeps the rows that one result row needs, all channels
// wide, in a ring of float32 with zero columns at both ends. Every value is read once and written once.
#include "operators.h"

#include "conv_activation.h"
#include "epilogues.h"
#include "frozen_weight.h"
#include "parallel.h"

namespace tinytl::cpu {
namespace {

struct DepthwiseShape {
  int64_t batch, channels, height, width, out_height, out_width;
  Window window;

  DepthwiseShape(
      at::IntArrayRef input,
      const at::Tensor& weight,
      at::IntArrayRef stride,
      at::IntArrayRef padding,
      at::IntArrayRef dilation) {
    TORCH_CHECK(input.size() == 4, "input: expected 4 dimensions (N, C, H, W), got ", input);
    TORCH_CHECK(
        weight.dim() == 4 && weight.size(0) == input[1] && weight.size(1) == 1,
        "weight: expected (",
        input[1],
        ", 1, kh, kw), got ",
        weight.sizes());
    const auto pair = [](at::IntArrayRef values, const char* argument) {
      TORCH_CHECK(
          values.size() == 2 && values[0] >= 1 && values[1] >= 1, argument, ": expected two numbers >= 1, got ", values);
    };
    pair(stride, "stride");
    pair(dilation, "dilation");
    TORCH_CHECK(padding.size() == 4, "padding: expected (top, bottom, left, right), got ", padding);
    for (const int64_t pad : padding) {
      TORCH_CHECK(pad >= 0, "padding: expected no negative number, got ", padding);
    }
    batch = input[0];
    channels = input[1];
    height = input[2];
    width = input[3];
    window = {
        weight.size(2), weight.size(3), stride[0], stride[1], dilation[0], dilation[1], padding[0], padding[2]};
    const int64_t span_height = height + padding[0] + padding[1] - reach_height() - 1;
    const int64_t span_width = width + padding[2] + padding[3] - reach_width() - 1;
    TORCH_CHECK(
        channels > 0 && height > 0 && width > 0 && window.taps() > 0 && span_height >= 0 && span_width >= 0,
        "input: expected padded height and width of at least the dilated kernel ",
        weight.sizes(),
        ", got ",
        input,
        " with padding ",
        padding);
    out_height = span_height / stride[0] + 1;
    out_width = span_width / stride[1] + 1;
  }

  // Rows and columns between the first and the last tap.
  int64_t reach_height() const {
    return (window.kernel_height - 1) * window.dilation_height;
  }
  int64_t reach_width() const {
    return (window.kernel_width - 1) * window.dilation_width;
  }
};

template <class T>
at::Tensor pack_taps(const FrozenWeight& weight) {
  at::Tensor packed = empty_tensor(
      {weight.inner * padded_channels(weight.out_channels)}, weight.values.options().dtype(at::kFloat));
  pack_depthwise<T>(weight, packed.data_ptr<float>());
  return packed;
}

// The ring of a task, [group][row][column][kGroup].
struct Ring {
  std::vector<TapRun> runs;
  float* data;
  int64_t rows, pitch, left;

  Ring(int64_t num_taps, int64_t rows, int64_t pitch, int64_t left, int64_t inner, int64_t groups)
      : runs(num_taps), rows(rows), pitch(pitch), left(left) {
    data = scratch<float>(kRows, groups * plane());
    for (int64_t r = 0; r < groups * rows; ++r) {
      float* row = data + r * pitch * kGroup;
      std::memset(row, 0, sizeof(float) * left * kGroup);
      std::memset(row + (left + inner) * kGroup, 0, sizeof(float) * (pitch - left - inner) * kGroup);
    }
  }
  int64_t plane() const {
    return rows * pitch * kGroup;
  }
  RingView view() const {
    return {data, rows, pitch, left};
  }
  // Column 0 of image row r, first group.
  float* row(int64_t r) {
    return data + (r % rows * pitch + left) * kGroup;
  }
};

// Depthwise row -> activation, mask bits -> tensor row.
template <class T>
struct RowToTensor {
  T* out;
  int64_t channels;
  Activation activation;
  MaskRows<uint8_t> mask;

  template <int PIXELS>
  TINYTL_INLINE void tile(int64_t j0, int group, Vec (&sum)[PIXELS][kGroupVecs]) const {
    const auto store = [&](int p, const Vec(&pixel)[kGroupVecs]) TINYTL_LAMBDA_INLINE {
      TINYTL_UNROLL
      for (int v = 0; v < kGroupVecs; ++v) {
        const int64_t at = group * kGroup + v * kLanes;
        if (at < channels) {
          store_channels(out + (j0 + p) * channels + at, pixel[v], channels - at);
        }
      }
    };
    with_activation(activation, [&](auto a) TINYTL_LAMBDA_INLINE {
      activate_tile<a.value>(mask.at(j0, group), mask.stride, mask.left(group), sum, store);
    });
  }
};

// Row of one stride phase of dx -> tensor row.
template <class T>
struct PhaseToTensor {
  T* out;
  int64_t channels;
  int64_t step;

  template <int PIXELS>
  TINYTL_INLINE void tile(int64_t j0, int group, Vec (&sum)[PIXELS][kGroupVecs]) const {
    TINYTL_UNROLL
    for (int p = 0; p < PIXELS; ++p) {
      TINYTL_UNROLL
      for (int v = 0; v < kGroupVecs; ++v) {
        const int64_t at = group * kGroup + v * kLanes;
        if (at < channels) {
          store_channels(out + (j0 + p) * step * channels + at, sum[p][v], channels - at);
        }
      }
    }
  }
};

} // namespace

std::tuple<at::Tensor, at::Tensor> depthwise_forward(
    const at::Tensor& x,
    const at::Tensor& weight,
    const OptionalTensor& weight_scale,
    const OptionalTensor& bias,
    at::IntArrayRef stride,
    at::IntArrayRef padding,
    at::IntArrayRef dilation,
    const std::string& activation,
    bool needs_saved) {
  const DepthwiseShape s(x.sizes(), weight, stride, padding, dilation);
  const FrozenWeight frozen(weight, weight_scale, "weight");
  const at::Tensor input = in_channels_last(x);
  const ConvOutput output(activation, {s.batch, s.channels, s.out_height, s.out_width}, x.options(), needs_saved);
  uint8_t* bits = output.tile_bits();
  const at::Tensor padded = padded_bias(bias, s.channels, "bias");
  const float* init = padded.defined() ? padded.data_ptr<float>() : nullptr;
  const int64_t mask_stride = mask_bytes(s.channels);
  const int64_t width = padded_channels(s.channels);
  const Window& w = s.window;
  const Bands bands(s.batch, s.out_height, ceil_div(std::max<int64_t>(s.reach_height() + 1 - w.stride_height, 0), w.stride_height));

  with_storage_type(x.scalar_type(), "input", [&](auto zero) {
    using T = decltype(zero);
    const at::Tensor packed = pack_taps<T>(frozen);
    const float* weights = packed.data_ptr<float>();
    const T* source = input.data_ptr<T>();
    T* target = output.values<T>();
    const ColumnRuns columns = forward_columns(w);
    const auto task = [&](int64_t image, int64_t begin, int64_t end) {
      Ring ring(
          w.taps(),
          s.reach_height() + 1,
          std::max(w.pad_left + s.width, (s.out_width - 1) * w.stride_width + s.reach_width() + 1),
          w.pad_left,
          s.width,
          width / kGroup);
      int64_t next = 0;
      for (int64_t row = begin; row < end; ++row) {
        const int64_t first = row * w.stride_height - w.pad_top;
        next = std::max(next, first);
        for (; next < std::min(first + s.reach_height() + 1, s.height); ++next) {
          const T* from = source + (image * s.height + next) * s.width * s.channels;
          float* to = ring.row(next);
          for (int64_t column = 0; column < s.width; ++column) {
            for (int64_t c = 0; c < s.channels; c += kLanes) {
              load_channels(from + column * s.channels + c, s.channels - c)
                  .store(to + c / kGroup * ring.plane() + column * kGroup + c % kGroup);
            }
          }
        }
        const int64_t first_pixel = (image * s.out_height + row) * s.out_width;
        RowToTensor<T> epilogue{target + first_pixel * s.channels, s.channels, output.tile_activation(), {}};
        if (bits != nullptr) {
          epilogue.mask = {bits + first_pixel * mask_stride, mask_stride, s.channels};
        }
        const RowRuns row_runs{
            ring.runs.data(),
            forward_runs(w, columns, ring.view(), s.height, row, weights, ring.runs.data()),
            columns.kernel_step,
            ring.plane(),
            w.taps()};
        correlate_row(
            s.out_width, static_cast<int>(width / kGroup), row_runs, w.stride_width, init, epilogue);
        output.finish<T>(first_pixel, s.out_width);
      }
    };
    for_bands(bands, [&](int64_t, int64_t image, int64_t band) {
      task(image, bands.begin(band), bands.begin(band + 1));
    });
  });
  return output.result();
}

std::tuple<at::Tensor, at::Tensor> depthwise_backward(
    const at::Tensor& grad_output,
    const at::Tensor& saved,
    const at::Tensor& weight,
    const OptionalTensor& weight_scale,
    at::IntArrayRef input_size,
    at::IntArrayRef stride,
    at::IntArrayRef padding,
    at::IntArrayRef dilation,
    const std::string& activation,
    bool need_input,
    bool need_bias) {
  const DepthwiseShape s(input_size, weight, stride, padding, dilation);
  const FrozenWeight frozen(weight, weight_scale, "weight");
  const ConvGradient gradient(activation, grad_output, saved, {s.batch, s.channels, s.out_height, s.out_width});
  if (!need_input) {
    return {empty_tensor({0}, gradient.options()), gradient.sum(need_bias)};
  }
  const uint8_t* bits = gradient.loop_bits();
  at::Tensor grad_input = empty_tensor(input_size, gradient.options(), at::MemoryFormat::ChannelsLast);
  const int64_t mask_stride = mask_bytes(s.channels);
  const int64_t width = padded_channels(s.channels);
  const Window& w = s.window;
  const Bands bands(s.batch, s.height, ceil_div(s.reach_height(), w.stride_height));
  at::Tensor partial = zero_tensor({bands.tasks(), width}, gradient.options().dtype(at::kFloat));
  float* partials = partial.data_ptr<float>();
  // Input row r meets output rows from first_row(r) to last_row(r).
  const auto first_row = [&](int64_t row) {
    return std::clamp<int64_t>(ceil_div(row + w.pad_top - s.reach_height(), w.stride_height), 0, s.out_height);
  };
  const auto last_row = [&](int64_t row) {
    return std::min(floor_div(row + w.pad_top, w.stride_height), s.out_height - 1);
  };

  with_storage_type(gradient.dtype(), "grad_output", [&](auto zero) {
    using T = decltype(zero);
    const at::Tensor packed = pack_taps<T>(frozen);
    const float* weights = packed.data_ptr<float>();
    T* target = grad_input.data_ptr<T>();
    const std::vector<ColumnRuns> columns = transposed_phases(w, s.width);
    // Output rows [own_begin, own_end) are this task's to sum; the others that it reads are its neighbours'.
    const auto task = [&](int64_t image, int64_t begin, int64_t end, int64_t own_begin, int64_t own_end, float* total) {
      const int64_t left = std::max<int64_t>(floor_div(s.reach_width() - w.pad_left, w.stride_width), 0);
      Ring ring(
          w.taps(),
          s.reach_height() / w.stride_height + 1,
          left + std::max(s.out_width, floor_div(s.width - 1 + w.pad_left, w.stride_width) + 1),
          left,
          s.out_width,
          width / kGroup);
      float* sums = scratch<float>(kSums, width);
      std::memset(sums, 0, sizeof(float) * width);
      int64_t next = own_begin;
      // g of output rows up to `to`, into the ring, and their sums.
      const auto advance = [&](int64_t to) {
        for (; next < to; ++next) {
          const int64_t first_pixel = (image * s.out_height + next) * s.out_width;
          const bool summed = need_bias && next < own_end;
          const T* source = gradient.pixels<T>(first_pixel, s.out_width);
          float* row = ring.row(next);
          for (int64_t column = 0; column < s.out_width; ++column) {
            const T* from = source + column * s.channels;
            for (int64_t c = 0; c < s.channels; c += kGroup) {
              Vec group[kGroupVecs];
              for (int v = 0; v < kGroupVecs; ++v) {
                const int64_t count = std::clamp<int64_t>(s.channels - c - v * kLanes, 0, kLanes);
                group[v] = count > 0 ? load_channels(from + c + v * kLanes, count) : Vec(0.f);
              }
              if (bits != nullptr) {
                select_group(group, bits + (first_pixel + column) * mask_stride + c / 8, s.channels - c);
              }
              for (int v = 0; v < kGroupVecs; ++v) {
                group[v].store(row + c / kGroup * ring.plane() + column * kGroup + v * kLanes);
                if (summed) {
                  (Vec::loadu(sums + c + v * kLanes) + group[v]).store(sums + c + v * kLanes);
                }
              }
            }
          }
          if (summed) {
            flush_sums(sums, total, width);
          }
        }
      };
      for (int64_t row = begin; row < end; ++row) {
        advance(last_row(row) + 1);
        for (int64_t phase = 0; phase < static_cast<int64_t>(columns.size()); ++phase) {
          PhaseToTensor<T> epilogue{
              target + ((image * s.height + row) * s.width + phase) * s.channels, s.channels, w.stride_width};
          const RowRuns row_runs{
              ring.runs.data(),
              transposed_runs(w, columns[phase], ring.view(), s.out_height, row, weights, ring.runs.data()),
              columns[phase].kernel_step,
              ring.plane(),
              w.taps()};
          correlate_row(
              ceil_div(s.width - phase, w.stride_width),
              static_cast<int>(width / kGroup),
              row_runs,
              1,
              nullptr,
              epilogue);
        }
      }
      advance(own_end);
    };
    const auto own = [&](int64_t band) {
      return band == 0 ? 0 : band == bands.per_image ? s.out_height : first_row(bands.begin(band));
    };
    for_bands(bands, [&](int64_t t, int64_t image, int64_t band) {
      task(image, bands.begin(band), bands.begin(band + 1), own(band), own(band + 1), partials + t * width);
    });
  });
  return {grad_input, reduce_partial(partial, 0, s.channels, need_bias)};
}

} // namespace tinytl::cpu
