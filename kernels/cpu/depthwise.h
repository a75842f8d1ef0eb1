// One row of a depthwise convolution, forward or transposed, as a list of taps.
//
//     out[j, c] = init[c] + sum over taps of source_tap[j * source_step + c] * weight_tap[c]        j < count
//
// A tap is one position of the kernel window: where its first source pixel lies and its weights, one a channel.
// Rows outside the image are taps left out; columns outside it are zeros that the caller keeps in the source row, so
// the inner loop knows no borders. Forward with any stride and dilation, and each stride phase of the transposed
// convolution, are the same loop with different taps.
//
// Up to kRowPixels neighbouring pixels share each weight load and stay in registers until the epilogue takes them.
#pragma once

#include "vector.h"

namespace tinytl::cpu {

#if defined(CPU_CAPABILITY_AVX512) || defined(CPU_CAPABILITY_AVX2) || defined(__aarch64__)
constexpr int kRowPixels = 8;
#else
constexpr int kRowPixels = 2;
#endif

struct Tap {
  const float* source;
  const float* weight;
};

struct Window {
  int64_t kernel_height, kernel_width;
  int64_t stride_height = 1, stride_width = 1;
  int64_t dilation_height = 1, dilation_width = 1;
  int64_t pad_top, pad_left;

  int64_t taps() const {
    return kernel_height * kernel_width;
  }
};

// Rows of `width` channels kept in a ring: image row r lies at ring row r % rows, its column 0 after `left` zeros.
struct RingView {
  const float* data;
  int64_t rows, pitch, left, width;

  const float* pixel(int64_t row, int64_t column) const {
    return data + (row % rows * pitch + left + column) * width;
  }
};

// Taps of output row `row`; its pixel j reads pixel j * stride_width of each. weight: [tap][width].
inline int64_t forward_taps(
    const Window& window, const RingView& input, int64_t input_height, int64_t row, const float* weight, Tap* taps) {
  int64_t count = 0;
  for (int64_t i = 0; i < window.kernel_height; ++i) {
    const int64_t source = row * window.stride_height - window.pad_top + i * window.dilation_height;
    if (source < 0 || source >= input_height) {
      continue;
    }
    for (int64_t j = 0; j < window.kernel_width; ++j) {
      taps[count++] = {
          input.pixel(source, j * window.dilation_width - window.pad_left),
          weight + (i * window.kernel_width + j) * input.width};
    }
  }
  return count;
}

// Taps of one stride phase of row `row` of the transposed convolution: columns phase, phase + stride_width, ...; its
// pixel j reads pixel j of each.
inline int64_t transposed_taps(
    const Window& window,
    const RingView& grad,
    int64_t grad_height,
    int64_t row,
    int64_t phase,
    const float* weight,
    Tap* taps) {
  int64_t count = 0;
  for (int64_t i = 0; i < window.kernel_height; ++i) {
    const int64_t shifted_row = row + window.pad_top - i * window.dilation_height;
    const int64_t source = floor_div(shifted_row, window.stride_height);
    if (source * window.stride_height != shifted_row || source < 0 || source >= grad_height) {
      continue;
    }
    for (int64_t j = 0; j < window.kernel_width; ++j) {
      const int64_t shifted_column = phase + window.pad_left - j * window.dilation_width;
      const int64_t column = floor_div(shifted_column, window.stride_width);
      if (column * window.stride_width == shifted_column) {
        taps[count++] = {grad.pixel(source, column), weight + (i * window.kernel_width + j) * grad.width};
      }
    }
  }
  return count;
}

namespace detail {

// PIXELS pixels from j0, all groups. The epilogue gets (j0, group, accumulators[PIXELS][kGroupVecs]).
template <int PIXELS, class Epilogue>
TINYTL_INLINE void correlate_tile(
    int64_t j0,
    int groups,
    const Tap* taps,
    int64_t num_taps,
    int64_t source_step,
    const float* init,
    Epilogue& epilogue) {
  for (int g = 0; g < groups; ++g) {
    Vec sum[PIXELS][kGroupVecs];
    TINYTL_UNROLL
    for (int v = 0; v < kGroupVecs; ++v) {
      const Vec start = init != nullptr ? Vec::loadu(init + g * kGroup + v * kLanes) : Vec(0.f);
      TINYTL_UNROLL
      for (int p = 0; p < PIXELS; ++p) {
        sum[p][v] = start;
      }
    }
    const int64_t offset = j0 * source_step + g * kGroup;
    for (int64_t t = 0; t < num_taps; ++t) {
      const float* source = taps[t].source + offset;
      const float* weight = taps[t].weight + g * kGroup;
      TINYTL_UNROLL
      for (int v = 0; v < kGroupVecs; ++v) {
        const Vec w = Vec::loadu(weight + v * kLanes);
        TINYTL_UNROLL
        for (int p = 0; p < PIXELS; ++p) {
          sum[p][v] = at::vec::fmadd(Vec::loadu(source + p * source_step + v * kLanes), w, sum[p][v]);
        }
      }
    }
    epilogue.template tile<PIXELS>(j0, g, sum);
  }
}

template <int PIXELS, class Epilogue>
TINYTL_INLINE void correlate_pixels(
    int pixels,
    int64_t j0,
    int groups,
    const Tap* taps,
    int64_t num_taps,
    int64_t source_step,
    const float* init,
    Epilogue& epilogue) {
  if constexpr (PIXELS > 0) {
    if (pixels == PIXELS) {
      correlate_tile<PIXELS>(j0, groups, taps, num_taps, source_step, init, epilogue);
    } else {
      correlate_pixels<PIXELS - 1>(pixels, j0, groups, taps, num_taps, source_step, init, epilogue);
    }
  }
}

} // namespace detail

template <class Epilogue>
void correlate_row(
    int64_t count,
    int groups,
    const Tap* taps,
    int64_t num_taps,
    int64_t source_step,
    const float* init,
    Epilogue& epilogue) {
  const int64_t tiles = ceil_div(count, kRowPixels);
  const int64_t small = tiles > 0 ? count / tiles : 0;
  const int64_t large = tiles > 0 ? count % tiles : 0;
  for (int64_t t = 0, j0 = 0; t < tiles; ++t) {
    const int pixels = static_cast<int>(small + (t < large ? 1 : 0));
    detail::correlate_pixels<kRowPixels>(pixels, j0, groups, taps, num_taps, source_step, init, epilogue);
    j0 += pixels;
  }
}

} // namespace tinytl::cpu
