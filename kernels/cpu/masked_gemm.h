// Products of which not all results are wanted: a gradient that a ReLU's mask lets pass in about half of the channels.
//
// A tile of gemm.h computes whole vectors of results, the blocked ones included. Here every wanted result is a dot
// product along a pixel's row of A, which stays in registers, and a row of the weights as they are stored, so that B is
// packed the other way round; a few dot products are added up across their lanes together. That pays where rows are long
// and few results are wanted. Sums differ from the dense ones by rounding only.
#pragma once

#include "bitmask.h"
#include "epilogues.h"
#include "gemm.h"
#include "sparse_gemm.h"

#include <bit>
#include <cstring>

namespace tinytl::cpu {

#if defined(CPU_CAPABILITY_AVX512)
constexpr int kDots = 8; // dot products at a time: beside kWideGroups vectors of A in registers
#elif defined(CPU_CAPABILITY_AVX2)
constexpr int kDots = 4;
#else
constexpr int kDots = 0; // adding up across lanes is left to the dense product
#endif

// Whether computing a share `wanted` of the results one by one takes less time than all of them. depth: of a row of A.
inline bool dots_pay(double wanted, int64_t depth) {
  if (kDots == 0) {
    return false;
  }
  constexpr double kAcrossLanes = 3; // cycles that a sum across lanes takes
  constexpr double kBranches = 45; // cycles a pixel and panel: ends of loops that cannot be predicted, places
  const auto vectors = static_cast<double>(ceil_div(depth, kLanes));
  const double dots = wanted * (vectors + kAcrossLanes * kVectorRate) + kBranches * kVectorRate / (kPanelGroups * kGroup);
  return dots < vectors / kDenseRate;
}

#if defined(CPU_CAPABILITY_AVX512) || defined(CPU_CAPABILITY_AVX2)
namespace detail {

// Dot products of a pixel of one panel, one after the other: no more than bits in a word, and a vector to read beyond.
constexpr int64_t kDotRoom = kPanelGroups * kGroup + kDots + kLanes;

// The sums across lanes of kDots vectors.
#if defined(CPU_CAPABILITY_AVX512)
TINYTL_INLINE void store_lane_sums(const Vec (&dots)[kDots], float* to, bool add) {
  __m256 halves[kDots];
  TINYTL_UNROLL
  for (int i = 0; i < kDots; ++i) {
    halves[i] = _mm256_add_ps(lower_half(dots[i]), _mm512_extractf32x8_ps(dots[i], 1));
  }
  const __m256 low = _mm256_hadd_ps(_mm256_hadd_ps(halves[0], halves[1]), _mm256_hadd_ps(halves[2], halves[3]));
  const __m256 high = _mm256_hadd_ps(_mm256_hadd_ps(halves[4], halves[5]), _mm256_hadd_ps(halves[6], halves[7]));
  __m256 sums = _mm256_add_ps(_mm256_permute2f128_ps(low, high, 0x20), _mm256_permute2f128_ps(low, high, 0x31));
  if (add) {
    sums = _mm256_add_ps(sums, _mm256_loadu_ps(to));
  }
  _mm256_storeu_ps(to, sums);
}
#else
TINYTL_INLINE void store_lane_sums(const Vec (&dots)[kDots], float* to, bool add) {
  const __m256 pairs = _mm256_hadd_ps(_mm256_hadd_ps(dots[0], dots[1]), _mm256_hadd_ps(dots[2], dots[3]));
  __m128 sums = _mm_add_ps(_mm256_castps256_ps128(pairs), _mm256_extractf128_ps(pairs, 1));
  if (add) {
    sums = _mm_add_ps(sums, _mm_loadu_ps(to));
  }
  _mm_storeu_ps(to, sums);
}

// kSpread[bits][lane]: which of the values in a row lane takes if its bit is set.
struct SpreadTable {
  alignas(64) uint8_t rows[1 << kLanes][kLanes];
  constexpr SpreadTable() : rows() {
    for (int bits = 0; bits < (1 << kLanes); ++bits) {
      uint8_t next = 0;
      for (int lane = 0; lane < kLanes; ++lane) {
        rows[bits][lane] = next;
        next = static_cast<uint8_t>(next + ((bits >> lane) & 1));
      }
    }
  }
};
inline constexpr SpreadTable kSpread{};
#endif

// Values in a row to the lanes whose bits are set, zeros to the others.
TINYTL_INLINE Vec spread(const float* values, uint32_t bits) {
#if defined(CPU_CAPABILITY_AVX512)
  return _mm512_maskz_expand_ps(static_cast<__mmask16>(bits), _mm512_loadu_ps(values));
#else
  const __m128i places = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(kSpread.rows[bits]));
  const Vec lanes = _mm256_permutevar8x32_ps(_mm256_loadu_ps(values), _mm256_cvtepu8_epi32(places));
  return select(lanes, bits);
#endif
}

// results[pixel] = or, where `add`, += dot products of the rows of b whose bits are set with that pixel's row of A, of
// GROUPS groups, the last vector of which has `last` lanes.
template <int GROUPS>
__attribute__((noinline)) void dot_rows(
    int64_t pixels,
    const float* a,
    int64_t a_stride,
    int64_t last,
    const uint64_t* words,
    const float* b,
    bool add,
    float* results) {
  constexpr int VECS = GROUPS * kGroupVecs;
  constexpr int64_t WIDTH = GROUPS * kGroup;
  for (int64_t m = 0; m < pixels; ++m, a += a_stride, results += kDotRoom) {
    Vec row[VECS];
    TINYTL_UNROLL
    for (int v = 0; v < VECS; ++v) {
      row[v] = load_channels(a + v * kLanes, v + 1 < VECS ? kLanes : last);
    }
    float* to = results;
    int k = 0;
    for (uint64_t word = *words++; word != 0; to += kDots) {
      const float* weights[kDots];
      TINYTL_UNROLL
      for (int i = 0; i < kDots; ++i) {
        k = word != 0 ? std::countr_zero(word) : k; // the last one again where there are no more
        word &= word - 1;
        weights[i] = b + k * WIDTH;
      }
      Vec dots[kDots];
      TINYTL_UNROLL
      for (int i = 0; i < kDots; ++i) {
        dots[i] = row[0] * Vec::loadu(weights[i]);
      }
      TINYTL_UNROLL
      for (int v = 1; v < VECS; ++v) {
        TINYTL_UNROLL
        for (int i = 0; i < kDots; ++i) {
          dots[i] = at::vec::fmadd(row[v], Vec::loadu(weights[i] + v * kLanes), dots[i]);
        }
      }
      store_lane_sums(dots, to, add);
    }
  }
}

// Results to their places in the ring, zeros to the others, and their sums.
template <int GROUPS>
void spread_to_ring(int64_t begin, int64_t end, const uint64_t* words, const float* results, const SelectToRing& to) {
  Vec total[GROUPS * kGroupVecs];
  TINYTL_UNROLL
  for (int v = 0; v < GROUPS * kGroupVecs; ++v) {
    total[v] = Vec(0.f);
  }
  for (int64_t m = begin; m < end; ++m, results += kDotRoom) {
    Vec row[GROUPS * kGroupVecs];
    const float* next = results;
    uint64_t word = *words++;
    TINYTL_UNROLL
    for (int v = 0; v < GROUPS * kGroupVecs; ++v) {
      const uint32_t bits = word & ((uint64_t(1) << kLanes) - 1);
      row[v] = spread(next, bits);
      total[v] = total[v] + row[v];
      next += std::popcount(bits);
      word >>= kLanes;
    }
    store_ring_row(row, to.ring + to.offsets[m] * kGroup, to.plane);
  }
  if (to.sums != nullptr) {
    add_to(to.sums, total);
  }
}

} // namespace detail
#endif

// What gemm_panel with this epilogue computes, only where its mask, which there is, lets it pass. groups: of the panel of
// results; b: rows of weights, b_depth of them packed in `panels` of up to kWideGroups groups of A's columns; first: the
// panel's first row.
inline void gemm_to_selected(
    [[maybe_unused]] int groups,
    [[maybe_unused]] int64_t pixels,
    [[maybe_unused]] const Segment<float>& a,
    [[maybe_unused]] const Panels& panels,
    [[maybe_unused]] const float* b,
    [[maybe_unused]] int64_t first,
    [[maybe_unused]] int64_t b_depth,
    [[maybe_unused]] const SelectToRing& epilogue) {
#if defined(CPU_CAPABILITY_AVX512) || defined(CPU_CAPABILITY_AVX2)
  using namespace detail;
  uint64_t words[kSparsePixels];
  alignas(64) float results[kSparsePixels * kDotRoom];
  const int64_t tiles = ceil_div(pixels, kSparsePixels);
  for (int64_t tile = 0; tile < tiles; ++tile) {
    const int64_t begin = pixels * tile / tiles, end = pixels * (tile + 1) / tiles;
    for (int64_t m = begin; m < end; ++m) {
      words[m - begin] = epilogue.mask.word(m, groups);
    }
    for (int64_t q = 0; q < panels.count; ++q) {
      const int64_t start = panels.start(q), valid = std::min(panels.width(q), panels.channels - start);
      with_groups<kWideGroups>(panels.groups(q), [&](auto number) TINYTL_LAMBDA_INLINE {
        dot_rows<number>(
            end - begin,
            a.data + begin * a.stride + start,
            a.stride,
            valid - (panels.width(q) - kLanes),
            words,
            b + start * b_depth + first * panels.width(q),
            q > 0,
            results);
      });
    }
    with_groups<kPanelGroups>(groups, [&](auto number) TINYTL_LAMBDA_INLINE {
      spread_to_ring<number>(begin, end, words, results, epilogue);
    });
  }
#else
  TORCH_INTERNAL_ASSERT(false, "dots_pay() says no here");
#endif
}

// The share of bits that are set, in a sample of `count` bytes.
inline double share_of_bits(const uint8_t* bytes, int64_t count) {
  constexpr int64_t kSamples = 512;
  const int64_t words = count / 8, step = std::max<int64_t>(words / kSamples, 1);
  int64_t bits = 0, seen = 0;
  for (int64_t i = 0; i < words; i += step, ++seen) {
    uint64_t word;
    std::memcpy(&word, bytes + i * 8, sizeof(word));
    bits += std::popcount(word);
  }
  return seen > 0 ? static_cast<double>(bits) / static_cast<double>(64 * seen) : 1.;
}

} // namespace tinytl::cpu
