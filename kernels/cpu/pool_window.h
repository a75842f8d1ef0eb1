// Where pooling windows lie, seen from both sides, and how channels are walked: for max_pool.cpp and avg_pool.cpp.
//
// Everything that takes a division is tabulated once a call: for each window the positions it covers (Span), for each
// position the windows that cover it (Covers). The innermost loops run over vectors of channels of one pixel, four
// groups at a time: enough independent chains to hide the latency of an addition or a comparison, and few enough
// registers for AVX2.
#pragma once

#include "operators.h"
#include "parallel.h"

#include <vector>

namespace tinytl::cpu {

// Sizes of one call, checked; windows as PyTorch counts them.
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

// One side of a window: where its tap 0 lies (perhaps in the padding) and its taps inside the image, [begin, end).
struct Span {
  int64_t start, begin, end;
};

// The windows along one side (0: rows, 1: columns).
inline std::vector<Span> window_spans(const PoolShape& s, int side) {
  const int64_t size = side == 0 ? s.height : s.width;
  std::vector<Span> spans(side == 0 ? s.out_height : s.out_width);
  for (int64_t w = 0; w < static_cast<int64_t>(spans.size()); ++w) {
    const int64_t start = w * s.stride[side] - s.padding[side];
    spans[w] = {
        start,
        start < 0 ? ceil_div(-start, s.dilation[side]) : 0,
        std::min(s.kernel[side], ceil_div(size - start, s.dilation[side]))};
  }
  return spans;
}

// The inverse along one side: which windows cover a position, and with which tap, in the order of the windows.
class Covers {
 public:
  struct Cover {
    int64_t window, tap;
  };

  Covers(const PoolShape& s, int side) {
    const int64_t size = side == 0 ? s.height : s.width;
    const int64_t windows = side == 0 ? s.out_height : s.out_width;
    first_.reserve(size + 1);
    for (int64_t at = 0; at < size; ++at) {
      first_.push_back(static_cast<int64_t>(covers_.size()));
      for (int64_t tap = s.kernel[side] - 1; tap >= 0; --tap) {
        const int64_t start = at + s.padding[side] - tap * s.dilation[side];
        const int64_t window = floor_div(start, s.stride[side]);
        if (window * s.stride[side] == start && window >= 0 && window < windows) {
          covers_.push_back({window, tap});
        }
      }
    }
    first_.push_back(static_cast<int64_t>(covers_.size()));
  }
  const Cover* begin(int64_t at) const {
    return covers_.data() + first_[at];
  }
  const Cover* end(int64_t at) const {
    return covers_.data() + first_[at + 1];
  }

 private:
  std::vector<int64_t> first_; // covers of `at` are [first_[at], first_[at + 1])
  std::vector<Cover> covers_;
};

// Calls body(image, row) for every row of every image, in tasks of at least 16384 values.
template <class Body>
void for_rows(int64_t images, int64_t rows, int64_t row_values, const Body& body) {
  const int64_t task_rows = std::max<int64_t>(16384 / std::max<int64_t>(row_values, 1), 1);
  parallel_pieces(0, images * rows, task_rows, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      body(r / rows, r % rows);
    }
  });
}

// GROUPS groups of channels of a pixel, from channel `start`. Only the last block of a pixel can be cut (one group,
// `count` channels), so that the others load and store whole vectors without a test. Pointers point at the block.
template <int GROUPS_, bool WHOLE_>
struct ChannelBlock {
  static constexpr int GROUPS = GROUPS_;
  static constexpr int VECS = GROUPS * kGroupVecs;
  static constexpr bool WHOLE = WHOLE_;
  int64_t start, count;

  template <class T>
  TINYTL_INLINE Vec load(const T* source, int v) const {
    if constexpr (WHOLE) {
      return load_channels(source + v * kLanes);
    } else {
      const int64_t left = count - v * kLanes;
      return left > 0 ? load_channels(source + v * kLanes, left) : Vec(0.f);
    }
  }
  template <class T>
  TINYTL_INLINE void store(T* target, int v, Vec value) const {
    if constexpr (WHOLE) {
      store_channels(target + v * kLanes, value);
    } else if (count > v * kLanes) {
      store_channels(target + v * kLanes, value, count - v * kLanes);
    }
  }
};

// Calls body(block) for the channels of a pixel. A remainder is computed as the last whole group, some of whose
// channels come out a second time with the same values: with 24 channels that makes max pooling's backward 2 to 6 times
// faster. From an even channel, because two positions share a byte.
template <class Body>
TINYTL_INLINE void for_channel_blocks(int64_t channels, const Body& body) {
  int64_t c = 0;
  for (; c + 4 * kGroup <= channels; c += 4 * kGroup) {
    body(ChannelBlock<4, true>{c, 4 * kGroup});
  }
  for (; c + kGroup <= channels; c += kGroup) {
    body(ChannelBlock<1, true>{c, kGroup});
  }
  if (c < channels && channels > kGroup && channels % 2 == 0) {
    body(ChannelBlock<1, true>{channels - kGroup, kGroup});
  } else if (c < channels) {
    body(ChannelBlock<1, false>{c, channels - c});
  }
}

} // namespace tinytl::cpu
