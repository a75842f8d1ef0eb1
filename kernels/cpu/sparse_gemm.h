// Products with rows of which about half is zeros: what a ReLU leaves of its output and of its gradient.
//
// A tile of gemm.h multiplies several pixels by a row of B that is in registers, zeros included. Here a pixel is alone:
// a bit a channel says which of its values are not zero, and only their rows of B are read, each product with its
// operand from memory. That takes one load more than products, so that it pays where rows of B are wide and the pixel
// is sparse; each tile of pixels is counted and takes the cheaper way. Sums differ from the dense ones by rounding only:
// zero times a finite number is nothing, and where B is not finite nothing is left out.
#pragma once

#include "bitmask.h"
#include "epilogues.h"
#include "gemm.h"
#include "scratch.h"

#include <bit>
#include <cmath>

namespace tinytl::cpu {

// Groups of output channels that one pixel's sums take in registers: panels of a B that sparse rows are multiplied by.
// AVX-512: 12 + 1 of 32. AVX2: 12 + 1 of 16. NEON: 24 + 1 of 32.
constexpr int kWideGroups = 12;

// Pixels that are counted and multiplied together. Their sums stay in the first-level cache from panel to panel, beside
// the rows of B of one panel.
constexpr int64_t kSparsePixels = 32;

// Where the values of up to kSparsePixels pixels are not zero: a word for each pixel and segment, a bit for each k. mask:
// where they may be anything but zero, if that is known; else they are looked at.
class NonzeroBits {
 public:
  NonzeroBits(
      const Segment<float>* segments,
      int64_t num_segments,
      int64_t begin,
      int64_t end,
      MaskRows<const uint8_t> mask)
      : words_(scratch<uint64_t>(kBits, num_segments * kSparsePixels)) {
    for (int64_t s = 0; s < num_segments; ++s) {
      const int64_t depth = segments[s].depth;
      uint64_t* word = words_ + s * kSparsePixels;
      if (mask.data != nullptr) {
        for (int64_t m = begin; m < end; ++m) {
          *word++ = mask.word(m, static_cast<int>(ceil_div(depth, kGroup)));
        }
        mask = {mask.data + depth / 8, mask.stride, mask.channels - depth};
      } else {
        const float* row = segments[s].data + begin * segments[s].stride;
        for (int64_t m = begin; m < end; ++m, row += segments[s].stride) {
          *word++ = word_of(row, depth);
        }
      }
      for (int64_t m = begin; m < end; ++m) {
        count_ += std::popcount(*--word);
      }
    }
  }
  const uint64_t* of(int64_t segment) const { // one for each pixel
    return words_ + segment * kSparsePixels;
  }
  int64_t count() const {
    return count_;
  }

 private:
  uint64_t* words_;
  int64_t count_ = 0;

  static TINYTL_INLINE uint64_t word_of(const float* row, int64_t depth) {
    uint64_t word = 0;
    for (int64_t k = 0; k < depth; k += kLanes) {
      word |= static_cast<uint64_t>(nonzero_bits(load_channels(row + k, depth - k))) << k;
    }
    return word;
  }
};

// Whether leaving zeros out takes clearly less time than multiplying by them, in vectors that the processor multiplies or
// loads. nonzero: of `depth` values of a pixel, on average; num_segments: that they are in; vectors: of a row of C.
inline bool sparse_pays(double nonzero, int64_t depth, int64_t num_segments, double vectors) {
  constexpr double kRate = kLanes == 16 ? 1 : 2; // vectors a cycle
  constexpr double kDenseRate = 0.88; // of what the processor could do, what tiles do
  constexpr double kBranch = 25; // cycles that the end of a segment's loop costs, which cannot be predicted
  constexpr double kClearly = 0.9;
  const double sparse = nonzero * (vectors + 1) + static_cast<double>(num_segments) * (kBranch * kRate + 3 * vectors);
  const double dense = static_cast<double>(depth) * vectors / kDenseRate;
  return sparse < kClearly * dense;
}

// The share of values that are not zero where it is worth looking: about as few as there ever are.
constexpr double kSparseShare = 0.4;

namespace detail {

// Pixels [begin, end), one panel of GROUPS groups, half of the last vector if HALF.
template <int GROUPS, bool HALF, class Epilogue>
__attribute__((noinline)) void sparse_groups(
    int64_t begin,
    int64_t end,
    const Segment<float>* segments,
    int64_t num_segments,
    const NonzeroBits& nonzero,
    const float* b,
    const float* init,
    Epilogue epilogue) {
  constexpr int VECS = GROUPS * kGroupVecs;
  constexpr int WHOLE = VECS - (HALF ? 1 : 0);
  constexpr int64_t WIDTH = GROUPS * kGroup;
  alignas(64) float totals[kSparsePixels * WIDTH];
  for (int64_t s = 0; s < num_segments; ++s) {
    const float* a = segments[s].data + begin * segments[s].stride;
    const uint64_t* words = nonzero.of(s);
    float* total = totals;
    for (int64_t m = begin; m < end; ++m, a += segments[s].stride, total += WIDTH) {
      Vec sum[1][VECS];
      HalfVec half[1];
      const auto each = [&](const auto& body) TINYTL_LAMBDA_INLINE { each_sum<HALF>(sum, half, body); };
      each([](auto& value, int) TINYTL_LAMBDA_INLINE { set_zero(value); });
      for (uint64_t word = *words++; word != 0; word &= word - 1) {
        const int k = std::countr_zero(word);
        const Vec value(a[k]);
        const float* row = b + k * WIDTH;
        TINYTL_UNROLL
        for (int v = 0; v < WHOLE; ++v) {
          sum[0][v] = at::vec::fmadd(value, Vec::loadu(row + v * kLanes), sum[0][v]);
        }
        if constexpr (HALF) {
          HalfVec half_row;
          load_into(half_row, row + WHOLE * kLanes);
          half[0] = fmadd(lower_half(value), half_row, half[0]);
        }
      }
      // A segment is a chain of additions of its own: sums of sums are more exact than long ones.
      if (const float* before = s > 0 ? total : init; before != nullptr) {
        each([&](auto& value, int at) TINYTL_LAMBDA_INLINE { add_into(value, before + at); });
      }
      if (s + 1 < num_segments) {
        each([&](auto& value, int at) TINYTL_LAMBDA_INLINE { store_from(value, total + at); });
        continue;
      }
      if constexpr (HALF) {
        sum[0][WHOLE] = with_zeros_above(half[0]);
      }
      epilogue.template tile<1, GROUPS>(m, sum);
    }
    b += segments[s].depth * WIDTH;
  }
}

template <int GROUPS, class Epilogue>
TINYTL_INLINE void sparse_dispatch(
    int groups,
    int64_t begin,
    int64_t end,
    const Segment<float>* segments,
    int64_t num_segments,
    const NonzeroBits& nonzero,
    const float* b,
    const float* init,
    const Epilogue& epilogue) {
  if constexpr (GROUPS > 0) {
    if (groups == GROUPS) {
      // Of a wide panel half a vector is nothing.
      if constexpr (kHalves && GROUPS > 1 && GROUPS <= kPanelGroups && requires { epilogue.columns(); }) {
        if (epilogue.columns() <= GROUPS * kGroup - kLanes / 2) {
          return sparse_groups<GROUPS, true>(begin, end, segments, num_segments, nonzero, b, init, epilogue);
        }
      }
      sparse_groups<GROUPS, false>(begin, end, segments, num_segments, nonzero, b, init, epilogue);
    } else {
      sparse_dispatch<GROUPS - 1>(groups, begin, end, segments, num_segments, nonzero, b, init, epilogue);
    }
  }
}

} // namespace detail

// Panels [first, last) of C for `pixels` pixels, of rows that may be sparse. b: those panels, of up to kWideGroups groups,
// b_depth rows each; finite: it is, so that products with zero may be left out; init: start values of all channels, or
// null for zeros; mask: as of NonzeroBits, from the first channel of the rows on; epilogue_at(channel): what happens to
// the columns from that channel on.
template <class Dot, class EpilogueAt>
void gemm_of_rows(
    int64_t pixels,
    const Segment<typename Dot::Element>* segments,
    int64_t num_segments,
    const Panels& panels,
    int64_t first,
    int64_t last,
    const typename Dot::Element* b,
    int64_t b_depth,
    bool finite,
    const float* init,
    [[maybe_unused]] const MaskRows<const uint8_t>& mask,
    const EpilogueAt& epilogue_at) {
  int64_t depth = 0;
  for (int64_t s = 0; s < num_segments; ++s) {
    depth += segments[s].depth;
  }
  const auto panel_of = [&](int64_t q) { return b + (panels.start(q) - panels.start(first)) * b_depth; };
  const auto start_of = [&](int64_t channel) { return init != nullptr ? init + channel : nullptr; };
  const auto dense = [&](int64_t q, int64_t begin, int64_t end) {
    const Panels columns(panels.width(q));
    for (int64_t c = 0; c < columns.count; ++c) {
      const int64_t column = columns.start(c), channel = panels.start(q) + column;
      gemm_columns<Dot>(
          columns.groups(c),
          begin,
          end,
          segments,
          num_segments,
          panel_of(q) + column * Dot::kStep,
          panels.width(q) * Dot::kStep,
          start_of(channel),
          epilogue_at(channel));
    }
  };
  const auto pays = [&](double nonzero, int64_t q) {
    const int64_t columns = std::min(panels.width(q), panels.channels - panels.start(q));
    const auto halves = static_cast<double>(ceil_div(2 * columns, kLanes));
    return sparse_pays(nonzero, depth, num_segments, kHalves ? halves / 2 : std::ceil(halves / 2));
  };
  // Two bfloat16 are rarely zero together.
  const bool worth_counting =
      std::is_same_v<Dot, FloatDot> && finite && pays(kSparseShare * static_cast<double>(depth), first);
  if (!worth_counting) {
    for (int64_t q = first; q < last; ++q) {
      dense(q, 0, pixels);
    }
    return;
  }
  if constexpr (std::is_same_v<Dot, FloatDot>) {
    static_assert(kPanelGroups * kGroup <= 64); // a segment's channels are bits of a word
    for (int64_t begin = 0; begin < pixels; begin += kSparsePixels) {
      const int64_t end = std::min(begin + kSparsePixels, pixels);
      const NonzeroBits nonzero(segments, num_segments, begin, end, mask);
      const double of_a_pixel = static_cast<double>(nonzero.count()) / static_cast<double>(end - begin);
      for (int64_t q = first; q < last; ++q) {
        if (!pays(of_a_pixel, q)) {
          dense(q, begin, end);
          continue;
        }
        const int64_t start = panels.start(q);
        detail::sparse_dispatch<kWideGroups>(
            panels.groups(q),
            begin,
            end,
            segments,
            num_segments,
            nonzero,
            panel_of(q),
            start_of(start),
            epilogue_at(start));
      }
    }
  }
}

} // namespace tinytl::cpu
