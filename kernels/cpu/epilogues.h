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

  TINYTL_INLINE Byte* at(int64_t pixel, int group) const { // null where there is no mask
    return data != nullptr ? data + pixel * stride + group * kGroupBytes : nullptr;
  }
  TINYTL_INLINE int64_t left(int group) const {
    return channels - group * kGroup;
  }
};

// The mask bits of a pixel whose last group is not whole, or of groups beyond the last channel, which have none.
template <int GROUPS>
__attribute__((noinline)) void store_partial_bits(uint8_t* bytes, const uint32_t (&bits)[GROUPS], int64_t channels) {
  for (int g = 0; g < GROUPS && channels > g * kGroup; ++g) {
    store_group_bits(bytes + g * kGroupBytes, bits[g], channels - g * kGroup);
  }
}

// Activates a tile in place and, when bytes is not null, stores its mask bits. bytes: of the tile's first pixel and
// group; channels: from that group's first on. A byte written may alias anything, so everything is passed by value.
template <Activation A, int ROWS, int VECS>
TINYTL_INLINE void activate_tile(uint8_t* bytes, int64_t stride, int64_t channels, Vec (&sum)[ROWS][VECS]) {
  if constexpr (A != Activation::none) {
    constexpr int GROUPS = VECS / kGroupVecs;
    if (bytes != nullptr) {
      const bool whole = channels >= GROUPS * kGroup;
      TINYTL_UNROLL
      for (int m = 0; m < ROWS; ++m) {
        uint32_t bits[GROUPS];
        TINYTL_UNROLL
        for (int g = 0; g < GROUPS; ++g) {
          bits[g] = group_bits<A>(&sum[m][g * kGroupVecs]);
        }
        if (whole) {
          TINYTL_UNROLL
          for (int g = 0; g < GROUPS; ++g) {
            store_group_bits(bytes + g * kGroupBytes, bits[g], kGroup);
          }
        } else {
          store_partial_bits(bytes, bits, channels);
        }
        bytes += stride;
      }
    }
    TINYTL_UNROLL
    for (int m = 0; m < ROWS; ++m) {
      TINYTL_UNROLL
      for (int v = 0; v < VECS; ++v) {
        sum[m][v] = activate<A>(sum[m][v]);
      }
    }
  }
}

// Zeroes the blocked gradients of a tile in place; arguments as above, bytes not null.
template <int ROWS, int VECS>
TINYTL_INLINE void select_tile(const uint8_t* bytes, int64_t stride, int64_t channels, Vec (&sum)[ROWS][VECS]) {
  constexpr int GROUPS = VECS / kGroupVecs;
  if (channels >= GROUPS * kGroup) {
    TINYTL_UNROLL
    for (int m = 0; m < ROWS; ++m) {
      TINYTL_UNROLL
      for (int g = 0; g < GROUPS; ++g) {
        select_group(&sum[m][g * kGroupVecs], bytes + m * stride + g * kGroupBytes, kGroup);
      }
    }
  } else {
    TINYTL_UNROLL
    for (int m = 0; m < ROWS; ++m) {
      TINYTL_UNROLL
      for (int g = 0; g < GROUPS; ++g) {
        select_group(&sum[m][g * kGroupVecs], bytes + m * stride + g * kGroupBytes, channels - g * kGroup);
      }
    }
  }
}

// GEMM -> activation, mask bits -> ring, [group][pixel][kGroup]. offsets[m]: pixel m's place in the ring, in pixels.
struct ActivateToRing {
  float* ring;
  int64_t plane; // from group to group
  const int64_t* offsets;
  Activation activation;
  MaskRows<uint8_t> mask;

  template <int ROWS, int GROUPS, int VECS>
  TINYTL_INLINE void tile(int64_t m0, Vec (&sum)[ROWS][VECS]) const {
    with_activation(activation, [&](auto a) TINYTL_LAMBDA_INLINE {
      activate_tile<a.value>(mask.at(m0, 0), mask.stride, mask.left(0), sum);
    });
    TINYTL_UNROLL
    for (int m = 0; m < ROWS; ++m) {
      float* target = ring + offsets[m0 + m] * kGroup;
      TINYTL_UNROLL
      for (int v = 0; v < VECS; ++v) {
        sum[m][v].store(target + v / kGroupVecs * plane + v % kGroupVecs * kLanes);
      }
    }
  }
};

// GEMM -> gradient kept where the mask passes, summed over pixels -> ring.
struct SelectToRing {
  float* ring;
  int64_t plane;
  const int64_t* offsets;
  MaskRows<const uint8_t> mask; // null: everything passes
  float* sums; // += sum over pixels, one a channel of the panel; null: not wanted

  template <int ROWS, int GROUPS, int VECS>
  TINYTL_INLINE void tile(int64_t m0, Vec (&sum)[ROWS][VECS]) const {
    if (mask.data != nullptr) {
      select_tile(mask.at(m0, 0), mask.stride, mask.left(0), sum);
    }
    TINYTL_UNROLL
    for (int m = 0; m < ROWS; ++m) {
      float* target = ring + offsets[m0 + m] * kGroup;
      TINYTL_UNROLL
      for (int v = 0; v < VECS; ++v) {
        sum[m][v].store(target + v / kGroupVecs * plane + v % kGroupVecs * kLanes);
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
      activate_tile<a.value>(mask.at(m0, 0), mask.stride, mask.left(0), sum);
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
      activate_tile<a.value>(mask.at(j0, group), mask.stride, mask.left(group), sum);
    });
    Element* target = rows + j0 * width + group * kGroup;
    TINYTL_UNROLL
    for (int p = 0; p < PIXELS; ++p, target += width) {
      TINYTL_UNROLL
      for (int v = 0; v < kGroupVecs; ++v) {
        store_channels(target + v * kLanes, sum[p][v]);
      }
    }
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
      select_tile(mask.at(j0 * step, group), mask.stride * step, mask.left(group), sum);
    }
    Element* target = rows + j0 * step * width + group * kGroup;
    TINYTL_UNROLL
    for (int p = 0; p < PIXELS; ++p, target += step * width) {
      TINYTL_UNROLL
      for (int v = 0; v < kGroupVecs; ++v) {
        store_channels(target + v * kLanes, sum[p][v]);
      }
    }
    if (sums != nullptr) {
      TINYTL_UNROLL
      for (int v = 0; v < kGroupVecs; ++v) {
        Vec total = sum[0][v];
        TINYTL_UNROLL
        for (int p = 1; p < PIXELS; ++p) {
          total = total + sum[p][v];
        }
        float* channel_sums = sums + group * kGroup + v * kLanes;
        (Vec::loadu(channel_sums) + total).store(channel_sums);
      }
    }
  }
};

} // namespace tinytl::cpu
