// The vector type every kernel here is written in, and what a row of channels looks like in it.
//
// One source serves AVX-512, AVX2, NEON and plain C++: at::vec::Vectorized<float> is chosen by the flags
// CPU_CAPABILITY and CPU_CAPABILITY_<name>. All arithmetic is float32; float16 and bfloat16 are converted on load
// and on store.
//
// A *group* is the smallest run of channels that fills whole vectors and whole bytes of a bit mask: 16 channels on
// AVX-512, 8 elsewhere. Scratch buffers are padded to whole groups, so that only code that touches a user's tensor
// has to think about tails.
#pragma once

#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

#define TINYTL_INLINE inline __attribute__((always_inline))
#define TINYTL_UNROLL _Pragma("GCC unroll 32")
#define TINYTL_LAMBDA_INLINE __attribute__((always_inline))

namespace tinytl::cpu {

using Vec = at::vec::Vectorized<float>;

constexpr int kLanes = Vec::size();
constexpr int kGroup = kLanes < 8 ? 8 : kLanes; // channels in a group
constexpr int kGroupVecs = kGroup / kLanes; // vectors in a group
constexpr int kGroupBytes = kGroup / 8; // mask bytes in a group

constexpr int64_t round_up(int64_t value, int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

constexpr int64_t floor_div(int64_t a, int64_t b) { // b > 0
  return a >= 0 ? a / b : -((-a + b - 1) / b);
}

constexpr int64_t ceil_div(int64_t a, int64_t b) { // b > 0
  return -floor_div(-a, b);
}

// Channels rounded up to whole groups: the padded length of a bias, a packed weight, a scratch row.
constexpr int64_t padded_channels(int64_t channels) {
  return round_up(channels, kGroup);
}

constexpr int64_t mask_bytes(int64_t channels) {
  return (channels + 7) / 8;
}

// Vec::loadu into a register that stays one. A compiler that sees a vector used two or three times may read it from
// memory as often, as an operand of the arithmetic: an inner loop is then bound by its loads.
TINYTL_INLINE Vec load_once(const float* source) {
#if defined(CPU_CAPABILITY_AVX512)
  __m512 value = _mm512_loadu_ps(source);
  asm("" : "+v"(value));
  return value;
#elif defined(CPU_CAPABILITY_AVX2)
  __m256 value = _mm256_loadu_ps(source);
  asm("" : "+x"(value));
  return value;
#else
  return Vec::loadu(source);
#endif
}

// The lower half of a vector: all that is computed where the last channels fill no more of theirs. Only a 512-bit vector
// is worth halving, on processors that compute two halves in the time of one; elsewhere nothing below is defined.
#if defined(CPU_CAPABILITY_AVX512)
constexpr bool kHalves = true;
using HalfVec = __m256;
#else
constexpr bool kHalves = false;
struct HalfVec {};
#endif

HalfVec lower_half(Vec value);
HalfVec half_of(float value); // in all lanes: two of them are loaded in the time of one whole vector
Vec with_zeros_above(HalfVec value);
HalfVec fmadd(HalfVec a, HalfVec b, HalfVec sum);

// The same for a tile's whole vectors and for halves.
void load_into(HalfVec& value, const float* from);
void store_from(HalfVec value, float* to);
void add_into(HalfVec& value, const float* from);
void set_zero(HalfVec& value);
TINYTL_INLINE void load_into(Vec& value, const float* from) {
  value = Vec::loadu(from);
}
TINYTL_INLINE void store_from(Vec value, float* to) {
  value.store(to);
}
TINYTL_INLINE void add_into(Vec& value, const float* from) {
  value = value + Vec::loadu(from);
}
TINYTL_INLINE void set_zero(Vec& value) {
  value = Vec(0.f);
}

#if defined(CPU_CAPABILITY_AVX512)
TINYTL_INLINE HalfVec lower_half(Vec value) {
  return _mm512_castps512_ps256(value);
}
TINYTL_INLINE HalfVec half_of(float value) {
  return _mm256_set1_ps(value);
}
TINYTL_INLINE Vec with_zeros_above(HalfVec value) {
  return _mm512_zextps256_ps512(value);
}
TINYTL_INLINE HalfVec fmadd(HalfVec a, HalfVec b, HalfVec sum) {
  return _mm256_fmadd_ps(a, b, sum);
}
TINYTL_INLINE void load_into(HalfVec& value, const float* from) {
  value = _mm256_loadu_ps(from);
}
TINYTL_INLINE void store_from(HalfVec value, float* to) {
  _mm256_storeu_ps(to, value);
}
TINYTL_INLINE void add_into(HalfVec& value, const float* from) {
  value = _mm256_add_ps(value, _mm256_loadu_ps(from));
}
TINYTL_INLINE void set_zero(HalfVec& value) {
  value = _mm256_setzero_ps();
}
#endif

// Calls body(accumulators, their offset in the tile of floats) for each vector of a tile, halves in the place of the last
// ones if HALF.
template <bool HALF, int ROWS, int VECS, class Body>
TINYTL_INLINE void each_sum(Vec (&sum)[ROWS][VECS], HalfVec (&half)[ROWS], const Body& body) {
  TINYTL_UNROLL
  for (int m = 0; m < ROWS; ++m) {
    TINYTL_UNROLL
    for (int v = 0; v < VECS - (HALF ? 1 : 0); ++v) {
      body(sum[m][v], (m * VECS + v) * kLanes);
    }
    if constexpr (HALF) {
      body(half[m], (m * VECS + VECS - 1) * kLanes);
    }
  }
}

// count <= kLanes values from memory; lanes past count are zero.
template <class T>
TINYTL_INLINE Vec load_channels(const T* source, int64_t count = kLanes) {
  if constexpr (std::is_same_v<T, float>) {
    if constexpr (kHalves) {
      if (count == kLanes / 2) {
        HalfVec half;
        load_into(half, source);
        return with_zeros_above(half);
      }
    }
    return count >= kLanes ? Vec::loadu(source) : Vec::loadu(source, count);
  } else {
    alignas(64) T lanes[kLanes];
    if (count < kLanes) {
      std::memset(lanes, 0, sizeof(lanes));
      std::memcpy(lanes, source, sizeof(T) * count);
      source = lanes;
    }
#if defined(__aarch64__)
    // Here ATen converts lane by lane.
    const uint16x4_t bits = vld1_u16(reinterpret_cast<const uint16_t*>(source));
    if constexpr (std::is_same_v<T, c10::Half>) {
      return vcvt_f32_f16(vreinterpret_f16_u16(bits));
    } else {
      return vreinterpretq_f32_u32(vshll_n_u16(bits, 16));
    }
#else
    Vec value;
    at::vec::load_to_float(source, value);
    return value;
#endif
  }
}

// The first count < kLanes lanes.
TINYTL_INLINE void store_part(float* target, Vec value, int64_t count) {
#if defined(CPU_CAPABILITY_AVX2)
  // Half, quarter and single: AMD's processors take a masked store apart lane by lane.
  const __m256 lanes = value;
  __m128 rest = _mm256_castps256_ps128(lanes);
  if (count & 4) {
    _mm_storeu_ps(target, rest);
    rest = _mm256_extractf128_ps(lanes, 1);
    target += 4;
  }
  if (count & 2) {
    _mm_storel_pi(reinterpret_cast<__m64*>(target), rest);
    rest = _mm_movehl_ps(rest, rest);
    target += 2;
  }
  if (count & 1) {
    _mm_store_ss(target, rest);
  }
#else
  if constexpr (kHalves) {
    if (count == kLanes / 2) {
      return store_from(lower_half(value), target);
    }
  }
  value.store(target, static_cast<int>(count));
#endif
}

// The first count <= kLanes lanes to memory, rounded to nearest even. On processors with instructions for bfloat16 a
// denormal becomes zero, as those that multiply take it.
template <class T>
TINYTL_INLINE void store_channels(T* target, Vec value, int64_t count = kLanes) {
  if constexpr (std::is_same_v<T, float>) {
    if (count >= kLanes) {
      value.store(target);
    } else {
      store_part(target, value, count);
    }
#if defined(CPU_CAPABILITY_AVX512) && defined(__AVX512BF16__)
  } else if constexpr (std::is_same_v<T, c10::BFloat16>) {
    const auto narrow = (__m256i)_mm512_cvtneps_pbh(value);
    if (count >= kLanes) {
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(target), narrow);
    } else {
      _mm256_mask_storeu_epi16(target, static_cast<__mmask16>((1u << count) - 1), narrow);
    }
#endif
  } else {
    const auto narrow = at::vec::convert_from_float<T>(value, value);
    narrow.store(target, static_cast<int>(count < kLanes ? count : kLanes));
  }
}

// A whole aligned vector to memory past the caches, for what nobody will read before it would have left them: memory is
// not read first. Plain stores where there is no such instruction. A thread calls fence_past_caches before others read.
TINYTL_INLINE void store_past_caches(float* target, Vec value) {
#if defined(CPU_CAPABILITY_AVX512)
  _mm512_stream_ps(target, value);
#elif defined(CPU_CAPABILITY_AVX2)
  _mm256_stream_ps(target, value);
#else
  value.store(target);
#endif
}

TINYTL_INLINE void fence_past_caches() {
#if defined(CPU_CAPABILITY_AVX512) || defined(CPU_CAPABILITY_AVX2)
  _mm_sfence();
#endif
}

// `count` values, by vectors, rounded where `to` is narrower: short rows, for which a call of memmove takes longer than the
// copy.
template <class From, class To>
TINYTL_INLINE void copy_row(const From* from, int64_t count, To* to) {
  for (int64_t c = 0; c < count; c += kLanes) {
    store_channels(to + c, load_channels(from + c, count - c), count - c);
  }
}

#if defined(CPU_CAPABILITY_AVX512)
// A block of 4 LANES rows and 4 columns of what `transpose` does: lane l of a vector takes the four values of row
// 4 l + i, so that four transpositions within the lanes are left. (ATen's passes its block through memory.)
template <int LANES>
TINYTL_INLINE void transpose_lanes(const float* source, int64_t source_stride, float* target, int64_t target_stride) {
  __m512 row[4];
  TINYTL_UNROLL
  for (int i = 0; i < 4; ++i) {
    const auto values = [&](int lane) { return _mm_loadu_ps(source + (4 * lane + i) * source_stride); };
    row[i] = _mm512_castps128_ps512(values(0));
    if constexpr (LANES > 1) {
      row[i] = _mm512_mask_broadcast_f32x4(row[i], 0x00f0, values(1));
    }
    if constexpr (LANES > 2) {
      row[i] = _mm512_mask_broadcast_f32x4(row[i], 0x0f00, values(2));
    }
    if constexpr (LANES > 3) {
      row[i] = _mm512_mask_broadcast_f32x4(row[i], 0xf000, values(3));
    }
  }
  const auto pairs = [](__m512 a, __m512 b) { return _mm512_castps_pd(_mm512_unpacklo_ps(a, b)); };
  const auto more_pairs = [](__m512 a, __m512 b) { return _mm512_castps_pd(_mm512_unpackhi_ps(a, b)); };
  const __m512d first = pairs(row[0], row[1]), first_below = pairs(row[2], row[3]);
  const __m512d last = more_pairs(row[0], row[1]), last_below = more_pairs(row[2], row[3]);
  const __m512d columns[4] = {
      _mm512_unpacklo_pd(first, first_below),
      _mm512_unpackhi_pd(first, first_below),
      _mm512_unpacklo_pd(last, last_below),
      _mm512_unpackhi_pd(last, last_below)};
  constexpr __mmask16 stored = (1 << 4 * LANES) - 1;
  TINYTL_UNROLL
  for (int n = 0; n < 4; ++n) {
    _mm512_mask_storeu_ps(target + n * target_stride, stored, _mm512_castpd_ps(columns[n]));
  }
}

template <int LANES>
inline void transpose_lanes(
    const float* source, int64_t source_stride, float* target, int64_t target_stride, int64_t columns) {
  for (int64_t n = 0; n < columns; n += 4) {
    transpose_lanes<LANES>(source + n, source_stride, target + n * target_stride, target_stride);
  }
}
#endif

// target[n * target_stride + m] = source[m * source_stride + n] for m < rows, n < columns.
inline void transpose(
    const float* source, int64_t source_stride, float* target, int64_t target_stride, int64_t rows, int64_t columns) {
  int64_t whole_rows = 0, whole_columns = 0;
#if defined(CPU_CAPABILITY_AVX512)
  whole_rows = rows / 4 * 4;
  whole_columns = columns / 4 * 4;
  const auto lanes = [&](auto count, int64_t m) {
    transpose_lanes<count.value>(source + m * source_stride, source_stride, target + m, target_stride, whole_columns);
  };
  int64_t m = 0;
  for (; m + 16 <= whole_rows; m += 16) {
    lanes(std::integral_constant<int, 4>{}, m);
  }
  switch (whole_rows - m) {
    case 12:
      lanes(std::integral_constant<int, 3>{}, m);
      break;
    case 8:
      lanes(std::integral_constant<int, 2>{}, m);
      break;
    case 4:
      lanes(std::integral_constant<int, 1>{}, m);
      break;
  }
#elif defined(CPU_CAPABILITY_AVX2)
  // Of 256-bit vectors ATen transposes this block in registers, and any other size element by element.
  constexpr int BLOCK = 8;
  whole_rows = rows / BLOCK * BLOCK;
  whole_columns = columns / BLOCK * BLOCK;
  for (int64_t m = 0; m < whole_rows; m += BLOCK) {
    for (int64_t n = 0; n < whole_columns; n += BLOCK) {
      at::vec::transpose_mxn<float, BLOCK, BLOCK>(
          source + m * source_stride + n, source_stride, target + n * target_stride + m, target_stride);
    }
  }
#endif
  const auto rest = [&](int64_t m, int64_t n, int64_t height, int64_t width) {
    if (height > 0 && width > 0) {
      at::vec::transpose_mxn<float>(
          source + m * source_stride + n,
          source_stride,
          target + n * target_stride + m,
          target_stride,
          static_cast<int>(height),
          static_cast<int>(width));
    }
  };
  rest(0, whole_columns, whole_rows, columns - whole_columns);
  rest(whole_rows, 0, rows - whole_rows, columns);
}

} // namespace tinytl::cpu
