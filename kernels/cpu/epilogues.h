// What happens to a tile of results while it is still in registers. GEMM tiles arrive as (first pixel, sum[ROWS]
// [vectors]); depthwise tiles as (first pixel of the row, group, sum[PIXELS][vectors of one group]).
#pragma once

#include "bitmask.h"
#include "vector.h"

#include <algorithm>
#include <array>
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
    default: // none: the others are a pass behind the convolution (conv_activation.h)
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
  TINYTL_INLINE MaskRows after(int64_t depth) const { // seen from so many channels, whole bytes, further on
    return {data != nullptr ? data + depth / 8 : nullptr, stride, channels - depth};
  }
  // The bits of `groups` groups, no more than are in a word.
  TINYTL_INLINE uint64_t word(int64_t pixel, int groups) const {
    uint64_t bits = 0;
    for (int g = 0; g < groups && left(g) > 0; ++g) {
      bits |= static_cast<uint64_t>(load_group_bits(at(pixel, g), left(g))) << (g * kGroup);
    }
    return bits;
  }
};

// The mask bits of a pixel whose last group is not whole, or of groups beyond the last channel, which have none.
template <int GROUPS>
__attribute__((noinline)) void store_partial_bits(uint8_t* bytes, std::array<uint32_t, GROUPS> bits, int64_t channels) {
  for (int g = 0; g < GROUPS && channels > g * kGroup; ++g) {
    store_group_bits(bytes + g * kGroupBytes, bits[g], channels - g * kGroup);
  }
}

// Activates a tile, stores its mask bits where bytes is not null, and hands it on row by row, store(m, values): what is
// done with a row frees its registers for the next one. bytes: of the tile's first pixel and group; channels: from that
// group's first on. A byte written may alias anything, so everything is passed by value.
template <Activation A, int ROWS, int VECS, class Store>
TINYTL_INLINE void activate_tile(
    uint8_t* bytes, int64_t stride, int64_t channels, Vec (&sum)[ROWS][VECS], const Store& store) {
  constexpr int GROUPS = VECS / kGroupVecs;
  const auto rows = [&](const auto& store_bits) TINYTL_LAMBDA_INLINE {
    TINYTL_UNROLL
    for (int m = 0; m < ROWS; ++m) {
      store_bits(m);
      TINYTL_UNROLL
      for (int v = 0; v < VECS; ++v) {
        sum[m][v] = activate<A>(sum[m][v]);
      }
      store(m, sum[m]);
    }
  };
  if (A == Activation::none || bytes == nullptr) {
    rows([](int) TINYTL_LAMBDA_INLINE {});
  } else if (channels >= GROUPS * kGroup) {
    rows([&](int m) TINYTL_LAMBDA_INLINE {
      TINYTL_UNROLL
      for (int g = 0; g < GROUPS; ++g) {
        store_group_bits(bytes + m * stride + g * kGroupBytes, group_bits<A>(&sum[m][g * kGroupVecs]), kGroup);
      }
    });
  } else {
    rows([&](int m) TINYTL_LAMBDA_INLINE {
      std::array<uint32_t, GROUPS> bits;
      TINYTL_UNROLL
      for (int g = 0; g < GROUPS; ++g) {
        bits[g] = group_bits<A>(&sum[m][g * kGroupVecs]);
      }
      store_partial_bits<GROUPS>(bytes + m * stride, bits, channels);
    });
  }
}

// Zeroes the blocked gradients of a tile and hands it on, as above; where bytes is null, everything passes.
template <int ROWS, int VECS, class Store>
TINYTL_INLINE void select_tile(
    const uint8_t* bytes, int64_t stride, int64_t channels, Vec (&sum)[ROWS][VECS], const Store& store) {
  constexpr int GROUPS = VECS / kGroupVecs;
  const auto rows = [&](int64_t left) TINYTL_LAMBDA_INLINE {
    TINYTL_UNROLL
    for (int m = 0; m < ROWS; ++m, bytes += stride) {
      TINYTL_UNROLL
      for (int g = 0; g < GROUPS; ++g) {
        select_group(&sum[m][g * kGroupVecs], bytes + g * kGroupBytes, left - g * kGroup);
      }
      store(m, sum[m]);
    }
  };
  if (bytes == nullptr) {
    TINYTL_UNROLL
    for (int m = 0; m < ROWS; ++m) {
      store(m, sum[m]);
    }
  } else if (channels >= GROUPS * kGroup) {
    rows(GROUPS * kGroup);
  } else {
    rows(channels);
  }
}

template <int VECS>
TINYTL_INLINE void add_to(float* target, const Vec (&values)[VECS]) {
  TINYTL_UNROLL
  for (int v = 0; v < VECS; ++v) {
    (Vec::loadu(target + v * kLanes) + values[v]).store(target + v * kLanes);
  }
}

// The channels of a pixel to their places in the ring.
template <int VECS>
TINYTL_INLINE void store_ring_row(const Vec (&row)[VECS], float* target, int64_t plane) {
  TINYTL_UNROLL
  for (int v = 0; v < VECS; ++v) {
    row[v].store(target + v / kGroupVecs * plane + v % kGroupVecs * kLanes);
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
    const auto store = [&](int m, const Vec(&row)[VECS]) TINYTL_LAMBDA_INLINE {
      store_ring_row(row, ring + offsets[m0 + m] * kGroup, plane);
    };
    with_activation(activation, [&](auto a) TINYTL_LAMBDA_INLINE {
      activate_tile<a.value>(mask.at(m0, 0), mask.stride, mask.left(0), sum, store);
    });
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
    Vec total[VECS];
    select_tile(mask.at(m0, 0), mask.stride, mask.left(0), sum, [&](int m, const Vec(&row)[VECS]) TINYTL_LAMBDA_INLINE {
      store_ring_row(row, ring + offsets[m0 + m] * kGroup, plane);
      TINYTL_UNROLL
      for (int v = 0; v < VECS; ++v) {
        total[v] = m == 0 ? row[v] : total[v] + row[v];
      }
    });
    if (sums != nullptr) {
      add_to(sums, total);
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

  TINYTL_INLINE int64_t columns() const {
    return valid;
  }

  template <int ROWS, int GROUPS, int VECS>
  TINYTL_INLINE void tile(int64_t m0, Vec (&sum)[ROWS][VECS]) const {
    const auto write_all = [&](int64_t last) TINYTL_LAMBDA_INLINE {
      TINYTL_UNROLL
      for (int m = 0; m < ROWS; ++m) {
        TINYTL_UNROLL
        for (int v = 0; v < VECS; ++v) {
          write(m0 + m, v, sum[m][v], v + 1 < VECS ? kLanes : last);
        }
      }
    };
    if (valid >= VECS * kLanes) {
      write_all(kLanes);
    } else if (kHalves && valid == VECS * kLanes - kLanes / 2) {
      write_all(kLanes / 2);
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

// GEMM -> + addend -> activation, mask bits -> tensor of T.
template <class T>
struct ActivateToTensor {
  T* out;
  int64_t stride; // elements from pixel to pixel
  int64_t valid; // channels left from this panel's first on
  Activation activation;
  MaskRows<uint8_t> mask;
  const T* addend = nullptr; // laid out as out; may be null

  TINYTL_INLINE int64_t columns() const {
    return valid;
  }

  template <int ROWS, int GROUPS, int VECS>
  TINYTL_INLINE void tile(int64_t m0, Vec (&sum)[ROWS][VECS]) const {
    if (addend != nullptr) {
      add(m0, sum);
    }
    with_activation(activation, [&](auto a) TINYTL_LAMBDA_INLINE {
      activate_tile<a.value>(
          mask.at(m0, 0), mask.stride, mask.left(0), sum, [](int, const Vec(&)[VECS]) TINYTL_LAMBDA_INLINE {});
    });
    // What is left is an addition without addends.
    AddToTensor<T>{out, stride, valid}.template tile<ROWS, GROUPS>(m0, sum);
  }

  template <int ROWS, int VECS>
  TINYTL_INLINE void add(int64_t m0, Vec (&sum)[ROWS][VECS]) const {
    alignas(64) float tails[ROWS * VECS * kLanes];
    const bool whole = valid >= VECS * kLanes;
    if (!whole) {
      load_tails(m0, tails, ROWS, VECS);
    }
    TINYTL_UNROLL
    for (int m = 0; m < ROWS; ++m) {
      TINYTL_UNROLL
      for (int v = 0; v < VECS; ++v) {
        sum[m][v] = sum[m][v] +
            (whole ? load_channels(addend + (m0 + m) * stride + v * kLanes)
                   : Vec::loadu(tails + (m * VECS + v) * kLanes));
      }
    }
  }

  // Not inlined: every tile would carry it.
  __attribute__((noinline)) void load_tails(int64_t m0, float* values, int rows, int vecs) const {
    for (int m = 0; m < rows; ++m) {
      for (int v = 0; v < vecs; ++v, values += kLanes) {
        const int64_t count = std::clamp<int64_t>(valid - v * kLanes, 0, kLanes);
        const T* from = addend + (m0 + m) * stride + v * kLanes;
        (count > 0 ? load_channels(from, count) : Vec(0.f)).store(values);
      }
    }
  }
};

// One group of a pixel to a row of a GEMM operand.
template <class Element>
TINYTL_INLINE void store_pixel(const Vec (&pixel)[kGroupVecs], Element* target) {
  TINYTL_UNROLL
  for (int v = 0; v < kGroupVecs; ++v) {
    store_channels(target + v * kLanes, pixel[v]);
  }
}

// Depthwise -> activation, mask bits -> rows of a GEMM operand, [pixel][channel of the panel].
template <class Element>
struct ActivateToRows {
  Element* rows;
  int64_t width;
  Activation activation;
  MaskRows<uint8_t> mask;

  template <int PIXELS>
  TINYTL_INLINE void tile(int64_t j0, int group, Vec (&sum)[PIXELS][kGroupVecs]) const {
    Element* target = rows + j0 * width + group * kGroup;
    const auto store = [&](int p, const Vec(&pixel)[kGroupVecs]) TINYTL_LAMBDA_INLINE {
      store_pixel(pixel, target + p * width);
    };
    with_activation(activation, [&](auto a) TINYTL_LAMBDA_INLINE {
      activate_tile<a.value>(mask.at(j0, group), mask.stride, mask.left(group), sum, store);
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
    Element* target = rows + j0 * step * width + group * kGroup;
    Vec total[kGroupVecs];
    select_tile(
        mask.at(j0 * step, group),
        mask.stride * step,
        mask.left(group),
        sum,
        [&](int p, const Vec(&pixel)[kGroupVecs]) TINYTL_LAMBDA_INLINE {
          store_pixel(pixel, target);
          target += step * width;
          TINYTL_UNROLL
          for (int v = 0; v < kGroupVecs; ++v) {
            total[v] = p == 0 ? pixel[v] : total[v] + pixel[v];
          }
        });
    if (sums != nullptr) {
      add_to(sums + group * kGroup, total);
    }
  }
};

} // namespace tinytl::cpu
