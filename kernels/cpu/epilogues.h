// What happens to a tile of results while it is still in registers. GEMM tiles arrive as (first pixel, sum[ROWS]
// [vectors]); depthwise tiles as (first pixel of the row, group, sum[PIXELS][vectors of one group]).
#pragma once

#include "bitmask.h"
#include "vector.h"

#include <utility>

namespace tinytl::cpu {

// Calls body with the activation as a compile-time value.
template <class Body>
TINYTL_INLINE void with_activation(Activation activation, Body&& body) {
  switch (activation) {
    case Activation::relu6:
      return body(std::integral_constant<Activation, Activation::relu6>());
    case Activation::relu:
      return body(std::integral_constant<Activation, Activation::relu>());
    default: // none: the others stand alone and never reach a convolution's epilogue
      return body(std::integral_constant<Activation, Activation::none>());
  }
}

// A row of mask bytes a pixel, seen from one panel of channels.
template <class Byte>
struct MaskRows {
  Byte* data = nullptr; // null: no mask
  int64_t stride = 0; // bytes from pixel to pixel
  int64_t channels = 0; // channels left from this panel's first on

  TINYTL_INLINE Byte* at(int64_t pixel, int group) const {
    return data + pixel * stride + group * kGroupBytes;
  }
  TINYTL_INLINE int64_t left(int group) const {
    return channels - group * kGroup;
  }
};

// GEMM -> activation, mask bits -> ring. offsets[m]: pixel m's place in the ring, in pixels.
struct ActivateToRing {
  float* ring;
  int64_t width; // channels in the panel
  const int64_t* offsets;
  Activation activation;
  MaskRows<uint8_t> mask;

  template <int ROWS, int GROUPS, int VECS>
  TINYTL_INLINE void tile(int64_t m0, Vec (&sum)[ROWS][VECS]) const {
    with_activation(activation, [&](auto a) TINYTL_LAMBDA_INLINE {
      TINYTL_UNROLL
      for (int m = 0; m < ROWS; ++m) {
        float* target = ring + offsets[m0 + m] * width;
        TINYTL_UNROLL
        for (int g = 0; g < GROUPS; ++g) {
          activate_group<a.value>(
              &sum[m][g * kGroupVecs], mask.data != nullptr ? mask.at(m0 + m, g) : nullptr, mask.left(g));
        }
        TINYTL_UNROLL
        for (int v = 0; v < VECS; ++v) {
          sum[m][v].store(target + v * kLanes);
        }
      }
    });
  }
};

// GEMM -> gradient kept where the mask passes, summed over pixels -> ring.
struct SelectToRing {
  float* ring;
  int64_t width;
  const int64_t* offsets;
  MaskRows<const uint8_t> mask; // null: everything passes
  float* sums; // += sum over pixels, one a channel of the panel; null: not wanted

  template <int ROWS, int GROUPS, int VECS>
  TINYTL_INLINE void tile(int64_t m0, Vec (&sum)[ROWS][VECS]) const {
    if (mask.data != nullptr) {
      TINYTL_UNROLL
      for (int m = 0; m < ROWS; ++m) {
        TINYTL_UNROLL
        for (int g = 0; g < GROUPS; ++g) {
          select_group(&sum[m][g * kGroupVecs], mask.at(m0 + m, g), mask.left(g));
        }
      }
    }
    TINYTL_UNROLL
    for (int m = 0; m < ROWS; ++m) {
      float* target = ring + offsets[m0 + m] * width;
      TINYTL_UNROLL
      for (int v = 0; v < VECS; ++v) {
        sum[m][v].store(target + v * kLanes);
      }
    }
    if (sums != nullptr) {
      TINYTL_UNROLL
      for (int v = 0; v < VECS; ++v) {
        Vec total = sum[0][v];
        TINYTL_UNROLL
        for (int m = 1; m < ROWS; ++m) {
          total = total + sum[m][v];
        }
        (Vec::loadu(sums + v * kLanes) + total).store(sums + v * kLanes);
      }
    }
  }
};

// GEMM -> + addend + pooled / 4 -> tensor of T. Both addends are read at the same pixel and channel as is written.
template <class T>
struct AddToTensor {
  T* out;
  int64_t stride; // channels of the tensor
  int64_t valid; // channels left from this panel's first on
  const T* addend = nullptr; // laid out as out; may be null
  const T* pooled = nullptr; // (N, H / 2, W / 2, C), from this panel's first channel on; may be null
  const int64_t* pooled_offsets = nullptr; // element offset of pixel m's cell in pooled, or -1

  template <int ROWS, int GROUPS, int VECS>
  TINYTL_INLINE void tile(int64_t m0, Vec (&sum)[ROWS][VECS]) const {
    if (valid >= VECS * kLanes) {
      TINYTL_UNROLL
      for (int m = 0; m < ROWS; ++m) {
        TINYTL_UNROLL
        for (int v = 0; v < VECS; ++v) {
          write(m0 + m, v, sum[m][v], kLanes);
        }
      }
    } else {
      // The last panel takes the detour through memory, so that tails are compiled once and not in every tile.
      alignas(64) float values[ROWS * VECS * kLanes];
      TINYTL_UNROLL
      for (int m = 0; m < ROWS; ++m) {
        TINYTL_UNROLL
        for (int v = 0; v < VECS; ++v) {
          sum[m][v].store(values + (m * VECS + v) * kLanes);
        }
      }
      write_partial(m0, values, ROWS, VECS);
    }
  }

  __attribute__((noinline)) void write_partial(int64_t m0, const float* values, int rows, int vecs) const {
    const int full = static_cast<int>(valid / kLanes);
    const int64_t tail = valid % kLanes;
    for (int m = 0; m < rows; ++m, values += vecs * kLanes) {
      for (int v = 0; v < full; ++v) {
        write(m0 + m, v, Vec::loadu(values + v * kLanes), kLanes);
      }
      if (tail > 0) {
        write(m0 + m, full, Vec::loadu(values + full * kLanes), tail);
      }
    }
  }

  // The first count <= kLanes lanes of vector v of pixel m.
  TINYTL_INLINE void write(int64_t m, int v, Vec value, int64_t count) const {
    const int64_t at = m * stride + v * kLanes;
    if (addend != nullptr) {
      value = value + load_channels(addend + at, count);
    }
    if (pooled != nullptr && pooled_offsets[m] >= 0) {
      value = at::vec::fmadd(load_channels(pooled + pooled_offsets[m] + v * kLanes, count), Vec(0.25f), value);
    }
    store_channels(out + at, value, count);
  }
};

// GEMM -> activation, mask bits -> tensor of T.
template <class T>
struct ActivateToTensor {
  T* out;
  int64_t stride; // elements from pixel to pixel
  int64_t valid; // channels left from this panel's first on
  Activation activation;
  MaskRows<uint8_t> mask;

  template <int ROWS, int GROUPS, int VECS>
  TINYTL_INLINE void tile(int64_t m0, Vec (&sum)[ROWS][VECS]) const {
    with_activation(activation, [&](auto a) TINYTL_LAMBDA_INLINE {
      TINYTL_UNROLL
      for (int m = 0; m < ROWS; ++m) {
        TINYTL_UNROLL
        for (int g = 0; g < GROUPS; ++g) {
          activate_group<a.value>(
              &sum[m][g * kGroupVecs], mask.data != nullptr && mask.left(g) > 0 ? mask.at(m0 + m, g) : nullptr, mask.left(g));
        }
      }
    });
    // What is left is an addition without addends.
    AddToTensor<T>{out, stride, valid}.template tile<ROWS, GROUPS>(m0, sum);
  }
};

// Depthwise -> activation, mask bits -> rows of a GEMM operand, [pixel][channel of the panel].
template <class Element>
struct ActivateToRows {
  Element* rows;
  int64_t width;
  Activation activation;
  MaskRows<uint8_t> mask;

  template <int PIXELS>
  TINYTL_INLINE void tile(int64_t j0, int group, Vec (&sum)[PIXELS][kGroupVecs]) const {
    with_activation(activation, [&](auto a) TINYTL_LAMBDA_INLINE {
      TINYTL_UNROLL
      for (int p = 0; p < PIXELS; ++p) {
        activate_group<a.value>(
            sum[p], mask.data != nullptr ? mask.at(j0 + p, group) : nullptr, mask.left(group));
        TINYTL_UNROLL
        for (int v = 0; v < kGroupVecs; ++v) {
          store_channels(rows + (j0 + p) * width + group * kGroup + v * kLanes, sum[p][v]);
        }
      }
    });
  }
};

// Transposed depthwise -> gradient kept where the mask passes, summed over pixels -> rows of a GEMM operand. One
// stride phase of a row: its pixel j is pixel j * step of the row.
template <class Element>
struct SelectToRows {
  Element* rows;
  int64_t width;
  int64_t step;
  MaskRows<const uint8_t> mask; // null: everything passes
  float* sums; // null: not wanted

  template <int PIXELS>
  TINYTL_INLINE void tile(int64_t j0, int group, Vec (&sum)[PIXELS][kGroupVecs]) const {
    if (mask.data != nullptr) {
      TINYTL_UNROLL
      for (int p = 0; p < PIXELS; ++p) {
        select_group(sum[p], mask.at((j0 + p) * step, group), mask.left(group));
      }
    }
    TINYTL_UNROLL
    for (int v = 0; v < kGroupVecs; ++v) {
      TINYTL_UNROLL
      for (int p = 0; p < PIXELS; ++p) {
        store_channels(rows + (j0 + p) * step * width + group * kGroup + v * kLanes, sum[p][v]);
      }
      if (sums != nullptr) {
        Vec total = sum[0][v];
        TINYTL_UNROLL
        for (int p = 1; p < PIXELS; ++p) {
          total = total + sum[p][v];
        }
        float* target = sums + group * kGroup + v * kLanes;
        (Vec::loadu(target) + total).store(target);
      }
    }
  }
};

} // namespace tinytl::cpu
