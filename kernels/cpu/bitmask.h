// Activations and their one-bit saved state.
//
//     y = activation(x);   bit = 1 where the gradient passes;   dx = bit ? dy : 0
//
//     relu          y = max(x, 0)                      bit = !(x <= 0)
//     relu6         y = min(max(x, 0), 6)              bit = 0 < x && x < 6
//     leaky_relu    y = x > 0 ? x : slope x            bit = x > 0
//     hardsigmoid   y = min(max(x + 3, 0), 6) / 6      bit = -3 < x && x < 3
//
// The last two are a pass of their own, alone (activation.cpp) or behind a convolution (conv_activation.h), and so is
// the backward of each. The comparisons decide what a NaN
// does, as in PyTorch's vectorised backward and the reference backend: it passes relu and no other. The value itself
// keeps a NaN: the operand order of clamp() lets it through the min and max instructions. A blocked gradient is a
// select, never a product: an infinite one becomes exactly 0.
//
// Layout of a mask: uint8, (N, H, W, ceil(C / 8)); bit k of byte j belongs to channel 8 j + k. One vector comparison
// yields the bits of kLanes channels at once.
#pragma once

#include "vector.h"

#include <array>
#include <type_traits>

namespace tinytl::cpu {

enum class Activation { none, relu, relu6, leaky_relu, hardsigmoid };

namespace detail {

// The bits of a comparison result (all ones or all zeros a lane) where it is *false*.
TINYTL_INLINE uint32_t bits_where_false(Vec comparison) {
  return static_cast<uint32_t>(comparison.zero_mask());
}

#if !defined(CPU_CAPABILITY_AVX512)
// kSelect[bits][lane] is all ones where the bit is set: a table, because only AVX-512 can use bits directly.
struct SelectTable {
  alignas(64) uint32_t rows[1 << kLanes][kLanes];
  constexpr SelectTable() : rows() {
    for (int bits = 0; bits < (1 << kLanes); ++bits) {
      for (int lane = 0; lane < kLanes; ++lane) {
        rows[bits][lane] = (bits >> lane) & 1 ? 0xffffffffu : 0u;
      }
    }
  }
};
inline constexpr SelectTable kSelect{};
#endif

} // namespace detail

template <Activation A>
TINYTL_INLINE Vec activate(Vec x, float slope = 0.f) {
  if constexpr (A == Activation::relu) {
    return at::vec::clamp_min(x, Vec(0.f));
  } else if constexpr (A == Activation::relu6) {
    return at::vec::clamp(x, Vec(0.f), Vec(6.f));
  } else if constexpr (A == Activation::leaky_relu) {
    return Vec::blendv(x * Vec(slope), x, x > Vec(0.f));
  } else if constexpr (A == Activation::hardsigmoid) {
    return at::vec::clamp(x + Vec(3.f), Vec(0.f), Vec(6.f)) / Vec(6.f);
  } else {
    return x;
  }
}

// Bit i is 1 where the gradient of lane i passes. x is the value before the activation.
template <Activation A>
TINYTL_INLINE uint32_t pass_bits(Vec x) {
#if defined(CPU_CAPABILITY_AVX512)
  const auto compare = [&](auto predicate, float bound) {
    return _mm512_cmp_ps_mask(x, _mm512_set1_ps(bound), decltype(predicate)::value);
  };
  using NotLessEqual = std::integral_constant<int, _CMP_NLE_UQ>;
  using Greater = std::integral_constant<int, _CMP_GT_OQ>;
  using Less = std::integral_constant<int, _CMP_LT_OQ>;
  if constexpr (A == Activation::relu) {
    return compare(NotLessEqual(), 0.f);
  } else if constexpr (A == Activation::relu6) {
    // Positive floats are ordered as their bits are; 0, negative numbers and NaN less one lie beyond those of 6.
    const __m512i below = _mm512_sub_epi32(_mm512_castps_si512(x), _mm512_set1_epi32(1));
    return _mm512_cmplt_epu32_mask(below, _mm512_set1_epi32(0x40C00000 - 1));
  } else if constexpr (A == Activation::leaky_relu) {
    return compare(Greater(), 0.f);
  } else {
    return compare(Greater(), -3.f) & compare(Less(), 3.f);
  }
#else
  constexpr uint32_t LANES = (1u << kLanes) - 1;
  if constexpr (A == Activation::relu) {
    return detail::bits_where_false(x <= Vec(0.f));
#if defined(CPU_CAPABILITY_AVX2)
  } else if constexpr (A == Activation::relu6) {
    // As above; the comparison here is one of signed numbers, which adding 2^31 on both sides makes of it.
    const __m256i below = _mm256_add_epi32(_mm256_castps_si256(x), _mm256_set1_epi32(0x7FFFFFFF));
    const __m256i pass = _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(0xC0BFFFFFu)), below);
    return _mm256_movemask_ps(_mm256_castsi256_ps(pass));
#else
  } else if constexpr (A == Activation::relu6) {
    return ~detail::bits_where_false((x > Vec(0.f)) & (x < Vec(6.f))) & LANES;
#endif
  } else if constexpr (A == Activation::leaky_relu) {
    return ~detail::bits_where_false(x > Vec(0.f)) & LANES;
  } else {
    return ~detail::bits_where_false((x > Vec(-3.f)) & (x < Vec(3.f))) & LANES;
  }
#endif
}

// Bit i is 1 where lane i is anything but zero.
TINYTL_INLINE uint32_t nonzero_bits(Vec x) {
#if defined(CPU_CAPABILITY_AVX512)
  return _mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_NEQ_UQ);
#else
  return detail::bits_where_false(x == Vec(0.f));
#endif
}

// bit ? value : 0
TINYTL_INLINE Vec select(Vec value, uint32_t bits) {
#if defined(CPU_CAPABILITY_AVX512)
  return _mm512_maskz_mov_ps(static_cast<__mmask16>(bits), value);
#else
  return value & Vec::loadu(detail::kSelect.rows[bits]);
#endif
}

// The mask bits of one group. channels: from this group's first to the last there is, at least 1.
TINYTL_INLINE uint32_t load_group_bits(const uint8_t* mask, int64_t channels) {
  if constexpr (kGroupBytes == 1) {
    return *mask;
  } else {
    uint16_t bits = *mask;
    if (channels > 8) {
      std::memcpy(&bits, mask, 2);
    }
    return bits;
  }
}

// Bits past the last channel are stored as 0, whatever a NaN or an infinity times the zeros of padding has made there.
TINYTL_INLINE void store_group_bits(uint8_t* mask, uint32_t bits, int64_t channels) {
  if (channels < kGroup) {
    bits &= (1u << channels) - 1;
  }
  if constexpr (kGroupBytes == 1) {
    *mask = static_cast<uint8_t>(bits);
  } else if (channels > 8) {
    const uint16_t wide = static_cast<uint16_t>(bits);
    std::memcpy(mask, &wide, 2);
  } else {
    *mask = static_cast<uint8_t>(bits);
  }
}

// The mask bits of one group that is not activated yet.
template <Activation A>
TINYTL_INLINE uint32_t group_bits(const Vec* group) {
  uint32_t bits = 0;
  TINYTL_UNROLL
  for (int v = 0; v < kGroupVecs; ++v) {
    bits |= pass_bits<A>(group[v]) << (v * kLanes);
  }
  return bits;
}

// Activates one group in place and stores its mask bits when mask is not null.
template <Activation A>
TINYTL_INLINE void activate_group(Vec* group, uint8_t* mask, int64_t channels, float slope = 0.f) {
  if constexpr (A != Activation::none) {
    if (mask != nullptr) {
      store_group_bits(mask, group_bits<A>(group), channels);
    }
    TINYTL_UNROLL
    for (int v = 0; v < kGroupVecs; ++v) {
      group[v] = activate<A>(group[v], slope);
    }
  }
}

// Zeroes the blocked gradients of one group in place.
TINYTL_INLINE void select_group(Vec* group, const uint8_t* mask, int64_t channels) {
  const uint32_t bits = load_group_bits(mask, channels);
  TINYTL_UNROLL
  for (int v = 0; v < kGroupVecs; ++v) {
    group[v] = select(group[v], (bits >> (v * kLanes)) & ((1u << kLanes) - 1));
  }
}

} // namespace tinytl::cpu
