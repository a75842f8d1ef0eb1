// Max and average pooling over channels_last tensors.
//
//     max_pool2d   y = max over the window; the winner's place in the window, i * kw + j, in 4 bits
//     avg_pool2d   y = sum over the window / divisor
//
// Positions: uint8 (N, H', W', ceil(C / 2)), channel 2 j in the low nibble of byte j. Ties and NaN as in PyTorch: the
// first maximum wins, a NaN beats everything and a later NaN an earlier one. Both backwards gather: a task owns rows of
// dx and reads the windows that reach them, so that no two threads add to one value.
#include "operators.h"

#include <ATen/Parallel.h>

#include <limits>

namespace tinytl::cpu {
namespace {

struct PoolShape {
  int64_t batch, channels, height, width, out_height, out_width;
  int64_t kernel[2], stride[2], padding[2], dilation[2];

  PoolShape(
      at::IntArrayRef input,
      at::IntArrayRef kernel_size,
      at::IntArrayRef strides,
      at::IntArrayRef paddings,
      at::IntArrayRef dilations,
      bool ceil_mode) {
    TORCH_CHECK(input.size() == 4, "input: expected 4 dimensions (N, C, H, W), got ", input);
    TORCH_CHECK(
        kernel_size.size() == 2 && strides.size() == 2 && paddings.size() == 2 && dilations.size() == 2,
        "kernel_size, stride, padding, dilation: expected two numbers each");
    batch = input[0];
    channels = input[1];
    height = input[2];
    width = input[3];
    int64_t out[2];
    for (int d = 0; d < 2; ++d) {
      kernel[d] = kernel_size[d];
      stride[d] = strides[d];
      padding[d] = paddings[d];
      dilation[d] = dilations[d];
      TORCH_CHECK(kernel[d] >= 1 && stride[d] >= 1 && dilation[d] >= 1, "kernel_size, stride, dilation: expected >= 1");
      TORCH_CHECK(
          padding[d] >= 0 && padding[d] <= kernel[d] / 2,
          "padding: expected at most half of kernel_size ",
          kernel_size,
          ", got ",
          paddings);
      const int64_t span = input[2 + d] + 2 * padding[d] - dilation[d] * (kernel[d] - 1) - 1;
      out[d] = floor_div(span + (ceil_mode ? stride[d] - 1 : 0), stride[d]) + 1;
      if (ceil_mode && (out[d] - 1) * stride[d] >= input[2 + d] + padding[d]) {
        --out[d]; // the last window would start beyond the image
      }
      TORCH_CHECK(out[d] >= 1, "input: expected at least one window, got ", input, " with kernel_size ", kernel_size);
    }
    out_height = out[0];
    out_width = out[1];
  }
};

// Calls body(image, row) for every row of every image.
template <class Body>
void for_rows(int64_t images, int64_t rows, int64_t row_values, const Body& body) {
  at::parallel_for(
      0, images * rows, std::max<int64_t>(16384 / std::max<int64_t>(row_values, 1), 1), [&](int64_t begin, int64_t end) {
        for (int64_t r = begin; r < end; ++r) {
          body(r / rows, r % rows);
        }
      });
}

// Two positions a byte, from kGroup positions held as floats.
void store_nibbles(uint8_t* target, const Vec* positions, int64_t channels) {
  float lanes[kGroup];
  for (int v = 0; v < kGroupVecs; ++v) {
    positions[v].store(lanes + v * kLanes);
  }
  uint8_t bytes[kGroup / 2];
  for (int i = 0; i < kGroup / 2; ++i) {
    bytes[i] = static_cast<uint8_t>(static_cast<int>(lanes[2 * i]) | static_cast<int>(lanes[2 * i + 1]) << 4);
  }
  if (channels < kGroup && channels % 2 == 1) {
    bytes[channels / 2] &= 15; // the nibble after the last channel is 0
  }
  if (channels >= kGroup) {
    std::memcpy(target, bytes, kGroup / 2);
  } else {
    std::memcpy(target, bytes, (channels + 1) / 2);
  }
}

void load_nibbles(const uint8_t* source, Vec* positions, int64_t channels) {
  uint8_t bytes[kGroup / 2] = {};
  if (channels >= kGroup) { // a copy of constant size is one instruction
    std::memcpy(bytes, source, kGroup / 2);
  } else {
    std::memcpy(bytes, source, (channels + 1) / 2);
  }
  float lanes[kGroup];
  for (int i = 0; i < kGroup; ++i) {
    lanes[i] = static_cast<float>((bytes[i / 2] >> (4 * (i % 2))) & 15);
  }
  for (int v = 0; v < kGroupVecs; ++v) {
    positions[v] = Vec::loadu(lanes + v * kLanes);
  }
}

// Valid taps [begin, end) of the window that starts at `start`.
struct TapRange {
  int64_t begin, end;
  TapRange(int64_t start, int64_t kernel, int64_t dilation, int64_t size)
      : begin(start < 0 ? ceil_div(-start, dilation) : 0), end(std::min(kernel, ceil_div(size - start, dilation))) {}
};

// Along one side: which windows hold position `at`, and at which tap, in the order of the windows. Made once a call,
// because finding a window takes a division.
struct Covers {
  struct Cover {
    int64_t window, tap;
  };
  std::vector<int64_t> first; // covers of `at` are [first[at], first[at + 1])
  std::vector<Cover> covers;

  Covers(const PoolShape& s, int side, int64_t size, int64_t windows) {
    for (int64_t at = 0; at < size; ++at) {
      first.push_back(static_cast<int64_t>(covers.size()));
      for (int64_t tap = s.kernel[side] - 1; tap >= 0; --tap) {
        const int64_t start = at + s.padding[side] - tap * s.dilation[side];
        const int64_t window = floor_div(start, s.stride[side]);
        if (window * s.stride[side] == start && window >= 0 && window < windows) {
          covers.push_back({window, tap});
        }
      }
    }
    first.push_back(static_cast<int64_t>(covers.size()));
  }
  const Cover* begin(int64_t at) const {
    return covers.data() + first[at];
  }
  const Cover* end(int64_t at) const {
    return covers.data() + first[at + 1];
  }
};

} // namespace

std::tuple<at::Tensor, at::Tensor> max_pool2d_forward(
    const at::Tensor& x,
    at::IntArrayRef kernel_size,
    at::IntArrayRef stride,
    at::IntArrayRef padding,
    at::IntArrayRef dilation,
    bool ceil_mode,
    bool needs_positions) {
  const PoolShape s(x.sizes(), kernel_size, stride, padding, dilation, ceil_mode);
  TORCH_CHECK(
      !needs_positions || s.kernel[0] * s.kernel[1] <= 16,
      "kernel_size: expected a window of at most 16 values, whose position fits in 4 bits, got ",
      kernel_size);
  const at::Tensor input = x.contiguous(at::MemoryFormat::ChannelsLast);
  at::Tensor out =
      at::empty({s.batch, s.channels, s.out_height, s.out_width}, x.options(), at::MemoryFormat::ChannelsLast);
  const int64_t position_bytes = (s.channels + 1) / 2;
  const auto byte_options = x.options().dtype(at::kByte);
  at::Tensor positions = needs_positions ? at::empty({s.batch, s.out_height, s.out_width, position_bytes}, byte_options)
                                         : at::empty({0}, byte_options);
  uint8_t* places = needs_positions ? positions.data_ptr<uint8_t>() : nullptr;
  with_storage_type(x.scalar_type(), "input", [&](auto zero) {
    using T = decltype(zero);
    const T* source = input.data_ptr<T>();
    T* target = out.data_ptr<T>();
    for_rows(s.batch, s.out_height, s.out_width * s.channels * s.kernel[0] * s.kernel[1], [&](int64_t image, int64_t row) {
      const int64_t top = row * s.stride[0] - s.padding[0];
      const TapRange rows(top, s.kernel[0], s.dilation[0], s.height);
      for (int64_t column = 0; column < s.out_width; ++column) {
        const int64_t left = column * s.stride[1] - s.padding[1];
        const TapRange columns(left, s.kernel[1], s.dilation[1], s.width);
        const int64_t pixel = (image * s.out_height + row) * s.out_width + column;
        for (int64_t c = 0; c < s.channels; c += kGroup) {
          Vec best[kGroupVecs], place[kGroupVecs];
          for (int v = 0; v < kGroupVecs; ++v) {
            best[v] = Vec(-std::numeric_limits<float>::infinity());
            place[v] = Vec(static_cast<float>(rows.begin * s.kernel[1] + columns.begin));
          }
          for (int64_t i = rows.begin; i < rows.end; ++i) {
            for (int64_t j = columns.begin; j < columns.end; ++j) {
              const T* from = source +
                  ((image * s.height + top + i * s.dilation[0]) * s.width + left + j * s.dilation[1]) * s.channels + c;
              const Vec here(static_cast<float>(i * s.kernel[1] + j));
              for (int v = 0; v < kGroupVecs; ++v) {
                const int64_t count = std::clamp<int64_t>(s.channels - c - v * kLanes, 0, kLanes);
                const Vec value = count > 0 ? load_channels(from + v * kLanes, count) : Vec(0.f);
                const Vec wins = (value > best[v]) | (value != value);
                best[v] = Vec::blendv(best[v], value, wins);
                place[v] = Vec::blendv(place[v], here, wins);
              }
            }
          }
          for (int v = 0; v < kGroupVecs; ++v) {
            const int64_t at = c + v * kLanes;
            if (at < s.channels) {
              store_channels(target + pixel * s.channels + at, best[v], s.channels - at);
            }
          }
          if (places != nullptr) {
            store_nibbles(places + pixel * position_bytes + c / 2, place, s.channels - c);
          }
        }
      }
    });
  });
  return {out, positions};
}

at::Tensor max_pool2d_backward(
    const at::Tensor& grad_output,
    const at::Tensor& positions,
    at::IntArrayRef input_size,
    at::IntArrayRef kernel_size,
    at::IntArrayRef stride,
    at::IntArrayRef padding,
    at::IntArrayRef dilation,
    bool ceil_mode) {
  const PoolShape s(input_size, kernel_size, stride, padding, dilation, ceil_mode);
  check_size(
      grad_output, "grad_output", {s.batch, s.channels, s.out_height, s.out_width}, grad_output.scalar_type());
  const int64_t position_bytes = (s.channels + 1) / 2;
  check_size(positions, "positions", {s.batch, s.out_height, s.out_width, position_bytes}, at::kByte);
  TORCH_CHECK(positions.is_contiguous(), "positions: expected a contiguous tensor, as the forward returns it");
  const at::Tensor grad = grad_output.contiguous(at::MemoryFormat::ChannelsLast);
  at::Tensor grad_input = at::empty(input_size, grad.options(), at::MemoryFormat::ChannelsLast);
  const uint8_t* places = positions.data_ptr<uint8_t>();
  const Covers rows(s, 0, s.height, s.out_height), columns(s, 1, s.width, s.out_width);
  with_storage_type(grad.scalar_type(), "grad_output", [&](auto zero) {
    using T = decltype(zero);
    const T* source = grad.data_ptr<T>();
    T* target = grad_input.data_ptr<T>();
    for_rows(s.batch, s.height, s.width * s.channels * 4, [&](int64_t image, int64_t row) {
      for (int64_t column = 0; column < s.width; ++column) {
        T* to = target + ((image * s.height + row) * s.width + column) * s.channels;
        for (int64_t c = 0; c < s.channels; c += kGroup) {
          Vec sum[kGroupVecs];
          for (int v = 0; v < kGroupVecs; ++v) {
            sum[v] = Vec(0.f);
          }
          for (const auto* r = rows.begin(row); r != rows.end(row); ++r) {
            for (const auto* q = columns.begin(column); q != columns.end(column); ++q) {
              const int64_t pixel = (image * s.out_height + r->window) * s.out_width + q->window;
              const Vec here(static_cast<float>(r->tap * s.kernel[1] + q->tap));
              Vec place[kGroupVecs];
              load_nibbles(places + pixel * position_bytes + c / 2, place, s.channels - c);
              for (int v = 0; v < kGroupVecs; ++v) {
                const int64_t at = c + v * kLanes;
                if (at < s.channels) {
                  const Vec value = load_channels(source + pixel * s.channels + at, s.channels - at);
                  sum[v] = sum[v] + (value & (place[v] == here));
                }
              }
            }
          }
          for (int v = 0; v < kGroupVecs; ++v) {
            const int64_t at = c + v * kLanes;
            if (at < s.channels) {
              store_channels(to + at, sum[v], s.channels - at);
            }
          }
        }
      }
    });
  });
  return grad_input;
}

namespace {

// What PyTorch divides the sum of output pixel (row, column) by.
float average_divisor(const PoolShape& s, int64_t row, int64_t column, bool count_include_pad, int64_t divisor_override) {
  if (divisor_override != 0) {
    return static_cast<float>(divisor_override);
  }
  int64_t area = 1;
  const int64_t at[2] = {row, column};
  const int64_t size[2] = {s.height, s.width};
  for (int d = 0; d < 2; ++d) {
    const int64_t start = at[d] * s.stride[d] - s.padding[d];
    const int64_t end = std::min(start + s.kernel[d], size[d] + s.padding[d]);
    area *= count_include_pad ? end - start : std::min(end, size[d]) - std::max<int64_t>(start, 0);
  }
  return static_cast<float>(area);
}

} // namespace

at::Tensor avg_pool2d_forward(
    const at::Tensor& x,
    at::IntArrayRef kernel_size,
    at::IntArrayRef stride,
    at::IntArrayRef padding,
    bool ceil_mode,
    bool count_include_pad,
    int64_t divisor_override) {
  const PoolShape s(x.sizes(), kernel_size, stride, padding, {1, 1}, ceil_mode);
  const at::Tensor input = x.contiguous(at::MemoryFormat::ChannelsLast);
  at::Tensor out =
      at::empty({s.batch, s.channels, s.out_height, s.out_width}, x.options(), at::MemoryFormat::ChannelsLast);
  with_storage_type(x.scalar_type(), "input", [&](auto zero) {
    using T = decltype(zero);
    const T* source = input.data_ptr<T>();
    T* target = out.data_ptr<T>();
    for_rows(s.batch, s.out_height, s.out_width * s.channels * s.kernel[0] * s.kernel[1], [&](int64_t image, int64_t row) {
      const int64_t top = row * s.stride[0] - s.padding[0];
      const TapRange rows(top, s.kernel[0], 1, s.height);
      for (int64_t column = 0; column < s.out_width; ++column) {
        const int64_t left = column * s.stride[1] - s.padding[1];
        const TapRange columns(left, s.kernel[1], 1, s.width);
        const Vec divisor(average_divisor(s, row, column, count_include_pad, divisor_override));
        T* to = target + ((image * s.out_height + row) * s.out_width + column) * s.channels;
        for (int64_t c = 0; c < s.channels; c += kLanes) {
          Vec sum(0.f);
          for (int64_t i = rows.begin; i < rows.end; ++i) {
            const T* from = source + ((image * s.height + top + i) * s.width + left) * s.channels + c;
            for (int64_t j = columns.begin; j < columns.end; ++j) {
              sum = sum + load_channels(from + j * s.channels, s.channels - c);
            }
          }
          store_channels(to + c, sum / divisor, s.channels - c);
        }
      }
    });
  });
  return out;
}

at::Tensor avg_pool2d_backward(
    const at::Tensor& grad_output,
    at::IntArrayRef input_size,
    at::IntArrayRef kernel_size,
    at::IntArrayRef stride,
    at::IntArrayRef padding,
    bool ceil_mode,
    bool count_include_pad,
    int64_t divisor_override) {
  const PoolShape s(input_size, kernel_size, stride, padding, {1, 1}, ceil_mode);
  check_size(
      grad_output, "grad_output", {s.batch, s.channels, s.out_height, s.out_width}, grad_output.scalar_type());
  const at::Tensor grad = grad_output.contiguous(at::MemoryFormat::ChannelsLast);
  at::Tensor grad_input = at::empty(input_size, grad.options(), at::MemoryFormat::ChannelsLast);
  with_storage_type(grad.scalar_type(), "grad_output", [&](auto zero) {
    using T = decltype(zero);
    const T* source = grad.data_ptr<T>();
    T* target = grad_input.data_ptr<T>();
    for_rows(s.batch, s.height, s.width * s.channels * 4, [&](int64_t image, int64_t row) {
      // Windows [first, last) along each side hold this pixel.
      const auto first = [&](int64_t at, int d) {
        return std::max<int64_t>(ceil_div(at + s.padding[d] - s.kernel[d] + 1, s.stride[d]), 0);
      };
      const int64_t last_row = std::min(floor_div(row + s.padding[0], s.stride[0]) + 1, s.out_height);
      for (int64_t column = 0; column < s.width; ++column) {
        const int64_t last_column = std::min(floor_div(column + s.padding[1], s.stride[1]) + 1, s.out_width);
        T* to = target + ((image * s.height + row) * s.width + column) * s.channels;
        for (int64_t c = 0; c < s.channels; c += kLanes) {
          Vec sum(0.f);
          for (int64_t r = first(row, 0); r < last_row; ++r) {
            for (int64_t q = first(column, 1); q < last_column; ++q) {
              const T* from = source + ((image * s.out_height + r) * s.out_width + q) * s.channels + c;
              const Vec divisor(average_divisor(s, r, q, count_include_pad, divisor_override));
              sum = sum + load_channels(from, s.channels - c) / divisor;
            }
          }
          store_channels(to + c, sum, s.channels - c);
        }
      }
    });
  });
  return grad_input;
}

} // namespace tinytl::cpu
