// Small GEMM with packed weights and a free epilogue: the arithmetic of every 1x1 convolution here.
//
//     C[m, n] = init[n] + sum_k A[m, k] B[k, n]        m: pixels, k: input channels, n: output channels
//
// A is read where it lies (pixels are rows of channels), in one or more *segments* along k, because scratch buffers
// are stored panel after panel. B is packed into *panels*: runs of 1 to kPanelGroups groups of output channels, each
// panel stored as [k][channel], so that the inner loop reads it as one stream. A tile of kTileRows pixels by one
// panel stays in registers over the whole of k, and is then handed to the epilogue, which adds, clamps, masks, sums
// and stores it while it is still there. C itself need not exist.
//
// Register budget: kTileRows x panel vectors of accumulators + a panel row of B + one broadcast.
// AVX-512: 8 x 3 + 3 + 1 of 32. AVX2: 4 x 3 + 3 + 1 of 16. NEON: 6 x 4 + 4 + 1 of 32.
#pragma once

#include "vector.h"

#include <c10/util/BFloat16.h>

#include <algorithm>
#include <vector>

namespace tinytl::cpu {

#if defined(CPU_CAPABILITY_AVX512)
constexpr int kTileRows = 8;
constexpr int kPanelGroups = 3;
#elif defined(CPU_CAPABILITY_AVX2)
constexpr int kTileRows = 4;
constexpr int kPanelGroups = 3;
#elif defined(__aarch64__)
constexpr int kTileRows = 6;
constexpr int kPanelGroups = 2;
#else
constexpr int kTileRows = 4;
constexpr int kPanelGroups = 1;
#endif

// Terms in one chain of additions. Longer sums are made of several: rounding errors grow with the length of a chain,
// and 960 terms in one were four times less exact than PyTorch's convolution.
constexpr int64_t kChainDepth = 96;

// How `channels` are cut into panels: as few as possible, as equal as possible, whole groups.
struct Panels {
  int64_t channels = 0;
  int64_t count = 0;
  int64_t small = 0; // groups in a small panel
  int64_t large = 0; // the first `large` panels have one group more

  explicit Panels(int64_t channels, int64_t most_groups = kPanelGroups) : channels(channels) {
    const int64_t groups = ceil_div(channels, kGroup);
    count = ceil_div(groups, most_groups);
    small = count > 0 ? groups / count : 0;
    large = count > 0 ? groups % count : 0;
  }
  int64_t padded() const {
    return padded_channels(channels);
  }
  int groups(int64_t panel) const {
    return static_cast<int>(small + (panel < large ? 1 : 0));
  }
  int64_t width(int64_t panel) const {
    return static_cast<int64_t>(groups(panel)) * kGroup;
  }
  int64_t start(int64_t panel) const { // first channel
    return (small * panel + (panel < large ? panel : large)) * kGroup;
  }
};

// float32 operands: one channel of A times one row of B.
struct FloatDot {
  using Element = float;
  static constexpr int kStep = 1;
  static TINYTL_INLINE Vec broadcast(const float* a) {
    return Vec(*a);
  }
  static TINYTL_INLINE Vec row(const float* b) {
    return load_once(b);
  }
  static TINYTL_INLINE Vec accumulate(Vec sum, Vec a, Vec b) {
    return at::vec::fmadd(a, b, sum);
  }
  static TINYTL_INLINE HalfVec accumulate(HalfVec sum, Vec a, HalfVec b) {
    return fmadd(lower_half(a), b, sum);
  }
};

#if defined(CPU_CAPABILITY_AVX512) && defined(__AVX512BF16__)
#define TINYTL_BFLOAT16_DOT 1
// bfloat16 operands, float32 sums: two channels of A times two rows of B an instruction. A vector holds raw pairs.
struct BFloat16Dot {
  using Element = c10::BFloat16;
  static constexpr int kStep = 2;
  static TINYTL_INLINE Vec broadcast(const c10::BFloat16* a) {
    int32_t pair;
    std::memcpy(&pair, a, sizeof(pair));
    return _mm512_castsi512_ps(_mm512_set1_epi32(pair));
  }
  static TINYTL_INLINE Vec row(const c10::BFloat16* b) {
    return _mm512_loadu_ps(reinterpret_cast<const float*>(b));
  }
  static TINYTL_INLINE Vec accumulate(Vec sum, Vec a, Vec b) {
    return _mm512_dpbf16_ps(sum, (__m512bh)(__m512)a, (__m512bh)(__m512)b);
  }
  static TINYTL_INLINE HalfVec accumulate(HalfVec sum, Vec a, HalfVec b) {
    return _mm256_dpbf16_ps(sum, (__m256bh)lower_half(a), (__m256bh)b);
  }
};
#endif

// A[:, k0 : k0 + depth]: row m starts at data + m * stride.
template <class T>
struct Segment {
  const T* data;
  int64_t stride;
  int64_t depth; // a multiple of Dot::kStep
};

// One tile: ROWS pixels from m0 by GROUPS groups, half of the last vector if HALF. The epilogue gets (m0,
// accumulators[ROWS][vectors]), zeros in what was not computed.
template <class Dot, int ROWS, int GROUPS, bool HALF, class Epilogue>
TINYTL_INLINE void gemm_tile(
    int64_t m0,
    const Segment<typename Dot::Element>* segments,
    int64_t num_segments,
    const typename Dot::Element* b,
    int64_t b_stride,
    const float* init,
    const Epilogue& epilogue) {
  constexpr int VECS = GROUPS * kGroupVecs;
  constexpr int WHOLE = VECS - (HALF ? 1 : 0);
  Vec sum[ROWS][VECS];
  HalfVec half[ROWS];
  const auto each = [&](const auto& body) TINYTL_LAMBDA_INLINE { each_sum<HALF>(sum, half, body); };
  if (init != nullptr) {
    each([&](auto& value, int at) TINYTL_LAMBDA_INLINE { load_into(value, init + at % (VECS * kLanes)); });
  } else {
    each([](auto& value, int) TINYTL_LAMBDA_INLINE { set_zero(value); });
  }
  alignas(64) float total[ROWS * VECS * kLanes]; // touched once every kChainDepth terms; no Vec, which starts as zeros
  bool flushed = false;
  int64_t chain = 0;
  const auto add_total = [&]() TINYTL_LAMBDA_INLINE {
    each([&](auto& value, int at) TINYTL_LAMBDA_INLINE { add_into(value, total + at); });
  };
  for (int64_t s = 0; s < num_segments; ++s) {
    if (chain >= kChainDepth) {
      if (flushed) {
        add_total();
      }
      each([&](auto& value, int at) TINYTL_LAMBDA_INLINE {
        store_from(value, total + at);
        set_zero(value);
      });
      flushed = true;
      chain = 0;
    }
    chain += segments[s].depth;
    const int64_t stride = segments[s].stride;
    const int64_t depth = segments[s].depth;
    const typename Dot::Element* a = segments[s].data + m0 * stride;
    for (int64_t k = 0; k < depth; k += Dot::kStep) {
      Vec row[VECS];
      TINYTL_UNROLL
      for (int v = 0; v < WHOLE; ++v) {
        row[v] = Dot::row(b + v * kLanes * Dot::kStep);
      }
      [[maybe_unused]] HalfVec half_row;
      if constexpr (HALF) {
        load_into(half_row, reinterpret_cast<const float*>(b + WHOLE * kLanes * Dot::kStep));
      }
      TINYTL_UNROLL
      for (int m = 0; m < ROWS; ++m) {
        const Vec value = Dot::broadcast(a + m * stride + k);
        TINYTL_UNROLL
        for (int v = 0; v < WHOLE; ++v) {
          sum[m][v] = Dot::accumulate(sum[m][v], value, row[v]);
        }
        if constexpr (HALF) {
          half[m] = Dot::accumulate(half[m], value, half_row);
        }
      }
      b += b_stride;
    }
  }
  if (flushed) {
    add_total();
  }
  if constexpr (HALF) {
    TINYTL_UNROLL
    for (int m = 0; m < ROWS; ++m) {
      sum[m][WHOLE] = with_zeros_above(half[m]);
    }
  }
  epilogue.template tile<ROWS, GROUPS>(m0, sum);
}

namespace detail {

template <class Dot, int GROUPS, bool HALF, int ROWS, class Epilogue>
TINYTL_INLINE void gemm_rows(
    int rows,
    int64_t m0,
    const Segment<typename Dot::Element>* segments,
    int64_t num_segments,
    const typename Dot::Element* b,
    int64_t b_stride,
    const float* init,
    const Epilogue& epilogue) {
  if constexpr (ROWS > 0) {
    if (rows == ROWS) {
      gemm_tile<Dot, ROWS, GROUPS, HALF>(m0, segments, num_segments, b, b_stride, init, epilogue);
    } else {
      gemm_rows<Dot, GROUPS, HALF, ROWS - 1>(rows, m0, segments, num_segments, b, b_stride, init, epilogue);
    }
  }
}

template <class Dot, int GROUPS, bool HALF, class Epilogue>
void gemm_groups(
    int64_t begin,
    int64_t end,
    const Segment<typename Dot::Element>* segments,
    int64_t num_segments,
    const typename Dot::Element* b,
    int64_t b_stride,
    const float* init,
    Epilogue epilogue) { // a copy, so that no store can be thought to change it
  // Tiles of nearly equal height: 9 pixels are 5 + 4, not 8 + 1.
  const int64_t tiles = ceil_div(end - begin, kTileRows);
  const int64_t small = tiles > 0 ? (end - begin) / tiles : 0;
  const int64_t large = tiles > 0 ? (end - begin) % tiles : 0;
  for (int64_t t = 0, m0 = begin; t < tiles; ++t) {
    const int rows = static_cast<int>(small + (t < large ? 1 : 0));
    gemm_rows<Dot, GROUPS, HALF, kTileRows>(rows, m0, segments, num_segments, b, b_stride, init, epilogue);
    m0 += rows;
  }
}

template <class Dot, int GROUPS, class Epilogue>
TINYTL_INLINE void gemm_dispatch(
    int groups,
    int64_t begin,
    int64_t end,
    const Segment<typename Dot::Element>* segments,
    int64_t num_segments,
    const typename Dot::Element* b,
    int64_t b_stride,
    const float* init,
    const Epilogue& epilogue) {
  if constexpr (GROUPS > 0) {
    if (groups == GROUPS) {
      if constexpr (kHalves && GROUPS > 1 && requires { epilogue.columns(); }) {
        if (epilogue.columns() <= GROUPS * kGroup - kLanes / 2) {
          return gemm_groups<Dot, GROUPS, true>(begin, end, segments, num_segments, b, b_stride, init, epilogue);
        }
      }
      gemm_groups<Dot, GROUPS, false>(begin, end, segments, num_segments, b, b_stride, init, epilogue);
    } else {
      gemm_dispatch<Dot, GROUPS - 1>(groups, begin, end, segments, num_segments, b, b_stride, init, epilogue);
    }
  }
}

} // namespace detail

// At most kPanelGroups groups of C for pixels [begin, end). b: their columns of B, whose steps of k are b_stride
// elements apart; init: their start values or null for zeros. An epilogue that says how many columns there are gets no
// more computed, to half a vector.
template <class Dot, class Epilogue>
TINYTL_INLINE void gemm_columns(
    int groups,
    int64_t begin,
    int64_t end,
    const Segment<typename Dot::Element>* segments,
    int64_t num_segments,
    const typename Dot::Element* b,
    int64_t b_stride,
    const float* init,
    const Epilogue& epilogue) {
  detail::gemm_dispatch<Dot, kPanelGroups>(
      groups, begin, end, segments, num_segments, b, b_stride, init, epilogue);
}

// One packed panel of C for all `pixels`.
template <class Dot, class Epilogue>
TINYTL_INLINE void gemm_panel(
    int groups,
    int64_t pixels,
    const Segment<typename Dot::Element>* segments,
    int64_t num_segments,
    const typename Dot::Element* b,
    const float* init,
    const Epilogue& epilogue) {
  gemm_columns<Dot>(groups, 0, pixels, segments, num_segments, b, groups * kGroup * Dot::kStep, init, epilogue);
}

// Packed B: panel after panel, [k / kStep][channel][k % kStep], k and channels padded with zeros.
template <class Dot>
constexpr int64_t packed_depth(int64_t depth) {
  return round_up(depth, Dot::kStep);
}

template <class Dot>
constexpr int64_t packed_elements(int64_t depth, int64_t channels) {
  return packed_depth<Dot>(depth) * padded_channels(channels);
}

// Elements of a B that a task packs, about.
constexpr int64_t kPackedElements = 8192;

} // namespace tinytl::cpu
