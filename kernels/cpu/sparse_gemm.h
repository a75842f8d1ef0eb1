// Products with rows of which about half is zeros: what a ReLU leaves of its output and of its gradient.
//
// A tile of gemm.h multiplies several pixels by a row of B that is in registers, zeros included. Here a pixel is alone:
// a bit a channel says which of its values are not zero, and only their rows of B are read, each product with its
// operand from memory. That takes one load more than products, so that it pays where rows of B are wide and the pixel
// is sparse; each tile of pixels is counted and takes the cheaper way. Sums differ from the dense ones by rounding only:
// zero times a finite number is nothing, and where B is not finite nothing is left out.
#pragma once

#include "bitmask.h"
#include "gemm.h"
#include "scratch.h"

#include <bit>

namespace tinytl::cpu {

// Groups of output channels that one pixel's sums take in registers: panels of a B that sparse rows are multiplied by.
// AVX-512: 12 + 1 of 32. AVX2: 12 + 1 of 16. NEON: 24 + 1 of 32.
constexpr int kWideGroups = 12;

// Pixels that are counted and multiplied together. Their sums stay in the first-level cache from panel to panel, beside
// the rows of B of one panel.
constexpr int64_t kSparsePixels = 32;

// Where the values of up to kSparsePixels pixels are not zero: a word for each pixel and segment, a bit for each k.
class NonzeroBits {
 public:
  NonzeroBits(const Segment<float>* segments, int64_t num_segments, int64_t begin, int64_t end)
      : words_(scratch<uint64_t>(kBits, num_segments * kSparsePixels)) {
    for (int64_t s = 0; s < num_segments; ++s) {
      const float* row = segments[s].data + begin * segments[s].stride;
      uint64_t* word = words_ + s * kSparsePixels;
      for (int64_t m = begin; m < end; ++m, row += segments[s].stride) {
        *word = bits_of(row, segments[s].depth);
        count_ += std::popcount(*word++);
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

  static TINYTL_INLINE uint64_t bits_of(const float* row, int64_t depth) {
    uint64_t bits = 0;
    for (int64_t k = 0; k < depth; k += kLanes) {
      bits |= static_cast<uint64_t>(nonzero_bits(load_channels(row + k, depth - k))) << k;
    }
    return bits;
  }
};

// Narrower products are waits for sums, and loads: they are not worth counting zeros for.
constexpr int kFewestSparseVecs = kLanes == 16 ? 2 : 4;

// Whether leaving zeros out takes less time than multiplying by them: instructions of one pixel that the processor's
// one or two multipliers and loads wait for. vectors: of a row of C.
inline bool sparse_pays(int64_t nonzero, int64_t pixels, int64_t depth, int64_t num_segments, double vectors) {
  constexpr double kRate = kLanes == 16 ? 1 : 2; // products a cycle
  constexpr double kDenseRate = 0.88; // of what the processor could do, what tiles do
  constexpr double kBranch = 25; // cycles that the end of a row's loop costs, which cannot be predicted
  const double rows = static_cast<double>(pixels * num_segments);
  const double sparse = static_cast<double>(nonzero) * (vectors + 1) + rows * (kBranch * kRate + 3 * vectors);
  const double dense = static_cast<double>(pixels * depth) * vectors / kDenseRate;
  return sparse < dense;
}

namespace detail {

// Pixels [begin, end), one panel of GROUPS groups.
template <int GROUPS, class Epilogue>
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
  constexpr int64_t WIDTH = GROUPS * kGroup;
  alignas(64) float totals[kSparsePixels * WIDTH];
  for (int64_t s = 0; s < num_segments; ++s) {
    const float* a = segments[s].data + begin * segments[s].stride;
    const uint64_t* words = nonzero.of(s);
    float* total = totals;
    for (int64_t m = begin; m < end; ++m, a += segments[s].stride, total += WIDTH) {
      Vec sum[1][VECS];
      TINYTL_UNROLL
      for (int v = 0; v < VECS; ++v) {
        sum[0][v] = Vec(0.f);
      }
      for (uint64_t word = *words++; word != 0; word &= word - 1) {
        const int k = std::countr_zero(word);
        const Vec value(a[k]);
        const float* row = b + k * WIDTH;
        TINYTL_UNROLL
        for (int v = 0; v < VECS; ++v) {
          sum[0][v] = at::vec::fmadd(value, Vec::loadu(row + v * kLanes), sum[0][v]);
        }
      }
      // A segment is a chain of additions of its own: sums of sums are more exact than long ones.
      const float* before = s > 0 ? total : init;
      if (before != nullptr) {
        TINYTL_UNROLL
        for (int v = 0; v < VECS; ++v) {
          sum[0][v] = sum[0][v] + Vec::loadu(before + v * kLanes);
        }
      }
      if (s + 1 < num_segments) {
        TINYTL_UNROLL
        for (int v = 0; v < VECS; ++v) {
          sum[0][v].store(total + v * kLanes);
        }
      } else {
        epilogue.template tile<1, GROUPS>(m, sum);
      }
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
      sparse_groups<GROUPS>(begin, end, segments, num_segments, nonzero, b, init, epilogue);
    } else {
      sparse_dispatch<GROUPS - 1>(groups, begin, end, segments, num_segments, nonzero, b, init, epilogue);
    }
  }
}

} // namespace detail

// Panels [first, last) of C for `pixels` pixels, of rows that may be sparse. b: those panels, of up to kWideGroups groups,
// b_depth rows each; finite: it is, so that products with zero may be left out; init: start values of all channels, or
// null for zeros; epilogue_at(channel): what happens to the columns from that channel on.
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
  if constexpr (std::is_same_v<Dot, FloatDot>) {
    static_assert(kPanelGroups * kGroup <= 64); // a segment's channels are bits of a word
    const bool worth_counting = finite && panels.groups(first) * kGroupVecs >= kFewestSparseVecs;
    for (int64_t begin = 0; worth_counting && begin < pixels; begin += kSparsePixels) {
      const int64_t end = std::min(begin + kSparsePixels, pixels);
      const NonzeroBits nonzero(segments, num_segments, begin, end);
      for (int64_t q = first; q < last; ++q) {
        const int64_t start = panels.start(q);
        if (sparse_pays(nonzero.count(), end - begin, depth, num_segments, panels.groups(q) * kGroupVecs)) {
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
        } else {
          dense(q, begin, end);
        }
      }
    }
    if (worth_counting) {
      return;
    }
  }
  for (int64_t q = first; q < last; ++q) {
    dense(q, 0, pixels);
  }
}

} // namespace tinytl::cpu
