// Products with rows of which about half is zeros: what a ReLU leaves of its output and of its gradient.
//
// A tile of gemm.h multiplies several pixels by a row of B that is in registers, zeros included. Here a pixel is alone:
// a bit a channel says which of its values are not zero, and only their rows of B are read, each product with its
// operand from memory. That takes one load more than products, so that it pays where rows of B are wide and the pixel
// is sparse; of each tile of pixels a sample is counted, and it takes the cheaper way. Sums differ from the dense ones by
// rounding only: zero times a finite number is nothing, and where B is not finite nothing is left out.
#pragma once

#include "bitmask.h"
#include "epilogues.h"
#include "gemm.h"

#include <bit>
#include <cmath>

namespace tinytl::cpu {

// Groups of output channels that one pixel's sums take in registers: panels of a B that sparse rows are multiplied by.
// AVX-512: 12 + 1 of 32. AVX2: 12 + 1 of 16. NEON: 24 + 1 of 32.
constexpr int kWideGroups = 12;

// Pixels that are multiplied together, at most: an image of 7 x 7. More of them fetch B's rows less often, but their own
// sums, from panel to panel, from further away.
constexpr int64_t kSparsePixels = 56;

// Where the values of pixels [begin, end) of a segment are not zero: a word a pixel, a bit for each k. mask: where they
// may be anything but zero, seen from the segment's first channel, if that is known; else they are looked at.
inline void find_nonzeros(
    const Segment<float>& segment,
    int64_t begin,
    int64_t end,
    const MaskRows<const uint8_t>& mask,
    uint64_t* words) {
  static_assert(kPanelGroups * kGroup <= 64); // a segment's channels are bits of a word
  if (mask.data != nullptr) {
    const int groups = static_cast<int>(ceil_div(segment.depth, kGroup));
    for (int64_t m = begin; m < end; ++m) {
      *words++ = mask.word(m, groups);
    }
    return;
  }
  const float* row = segment.data + begin * segment.stride;
  for (int64_t m = begin; m < end; ++m, row += segment.stride) {
    uint64_t word = 0;
    for (int64_t k = 0; k < segment.depth; k += kLanes) {
      word |= static_cast<uint64_t>(nonzero_bits(load_channels(row + k, segment.depth - k))) << k;
    }
    *words++ = word;
  }
}

// Calls body with the number of groups, 1 to MOST, as a compile-time value.
template <int MOST, class Body>
TINYTL_INLINE void with_groups(int groups, const Body& body) {
  if constexpr (MOST > 0) {
    if (groups == MOST) {
      body(std::integral_constant<int, MOST>());
    } else {
      with_groups<MOST - 1>(groups, body);
    }
  }
}

// Vectors that the processor multiplies a cycle, and what tiles reach of that.
constexpr double kVectorRate = kLanes == 16 ? 1 : 2;
constexpr double kDenseRate = 0.88;

// Whether leaving zeros out takes clearly less time than multiplying by them, in vectors that the processor multiplies or
// loads. share: of a pixel's `depth` values, in so many segments, that is not zero; vectors: of a row of C.
inline bool sparse_pays(double share, int64_t depth, int64_t num_segments, double vectors) {
  constexpr double kBranch = 25; // cycles that the end of a segment's loop costs, which cannot be predicted
  constexpr double kClearly = 0.9;
  const auto terms = static_cast<double>(depth), ends = static_cast<double>(num_segments);
  const double sparse = share * terms * (vectors + 1) + ends * (kBranch * kVectorRate + 3 * vectors);
  const double dense = terms * vectors / kDenseRate;
  return sparse < kClearly * dense;
}

// The share of values that are not zero where it is worth looking: what half of the inputs have, if not fewer.
constexpr double kSparseShare = 0.5;

namespace detail {

// Pixels [begin, end), one panel of GROUPS groups, half of the last vector if HALF.
template <int GROUPS, bool HALF, class Epilogue>
__attribute__((noinline)) void sparse_groups(
    int64_t begin,
    int64_t end,
    const Segment<float>* segments,
    int64_t num_segments,
    MaskRows<const uint8_t> mask,
    const float* b,
    const float* init,
    Epilogue epilogue) {
  constexpr int VECS = GROUPS * kGroupVecs;
  constexpr int WHOLE = VECS - (HALF ? 1 : 0);
  constexpr int64_t WIDTH = GROUPS * kGroup;
  alignas(64) float totals[kSparsePixels * WIDTH];
  uint64_t words[kSparsePixels];
  for (int64_t s = 0; s < num_segments; ++s) {
    find_nonzeros(segments[s], begin, end, mask, words);
    const float* a = segments[s].data + begin * segments[s].stride;
    const uint64_t* next = words;
    float* total = totals;
    for (int64_t m = begin; m < end; ++m, a += segments[s].stride, total += WIDTH) {
      Vec sum[1][VECS];
      HalfVec half[1];
      const auto each = [&](const auto& body) TINYTL_LAMBDA_INLINE { each_sum<HALF>(sum, half, body); };
      each([](auto& value, int) TINYTL_LAMBDA_INLINE { set_zero(value); });
      for (uint64_t word = *next++; word != 0; word &= word - 1) {
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
    mask = mask.after(segments[s].depth);
  }
}

} // namespace detail

// Packed panels [first, last) of a B, of up to kWideGroups groups each.
template <class Element>
struct WideB {
  const Element* data; // from the first of them on
  int64_t depth; // rows of each
  bool finite; // so that products with zero may be left out
  Panels panels;
  int64_t first, last;

  const Element* panel(int64_t p) const {
    return data + (panels.start(p) - panels.start(first)) * depth;
  }
};

// Panels of C for `pixels` pixels, of rows that may be sparse. init: start values of all channels, or null for zeros;
// mask: as find_nonzeros takes it, from the first channel on; epilogue_at(channel): what happens to the columns from that
// channel on.
template <class Dot, class EpilogueAt>
void gemm_of_rows(
    int64_t pixels,
    const Segment<typename Dot::Element>* segments,
    int64_t num_segments,
    const WideB<typename Dot::Element>& b,
    const float* init,
    [[maybe_unused]] const MaskRows<const uint8_t>& mask,
    const EpilogueAt& epilogue_at) {
  int64_t depth = 0, sample_channel = 0;
  for (int64_t s = 0; s < num_segments; ++s) {
    sample_channel = s == num_segments / 2 ? depth : sample_channel;
    depth += segments[s].depth;
  }
  const Panels& panels = b.panels;
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
          b.panel(q) + column * Dot::kStep,
          panels.width(q) * Dot::kStep,
          start_of(channel),
          epilogue_at(channel));
    }
  };
  const auto pays = [&](double share, int64_t q) {
    const int64_t columns = std::min(panels.width(q), panels.channels - panels.start(q));
    const auto halves = static_cast<double>(ceil_div(2 * columns, kLanes));
    return sparse_pays(share, depth, num_segments, kHalves ? halves / 2 : std::ceil(halves / 2));
  };
  // Two bfloat16 are rarely zero together.
  const bool worth_counting =
      std::is_same_v<Dot, FloatDot> && b.finite && num_segments > 0 && pays(kSparseShare, b.first);
  if (!worth_counting) {
    for (int64_t q = b.first; q < b.last; ++q) {
      dense(q, 0, pixels);
    }
    return;
  }
  if constexpr (std::is_same_v<Dot, FloatDot>) {
    // The segment in the middle stands for all.
    const Segment<float>& sample = segments[num_segments / 2];
    const auto sample_mask = mask.after(sample_channel);
    const int64_t tiles = ceil_div(pixels, kSparsePixels);
    for (int64_t tile = 0; tile < tiles; ++tile) {
      const int64_t begin = pixels * tile / tiles, end = pixels * (tile + 1) / tiles;
      uint64_t words[kSparsePixels];
      find_nonzeros(sample, begin, end, sample_mask, words);
      int64_t count = 0;
      std::for_each(words, words + (end - begin), [&](uint64_t word) { count += std::popcount(word); });
      const double share = static_cast<double>(count) / static_cast<double>((end - begin) * sample.depth);
      for (int64_t q = b.first; q < b.last; ++q) {
        if (!pays(share, q)) {
          dense(q, begin, end);
          continue;
        }
        const int64_t start = panels.start(q);
        const auto epilogue = epilogue_at(start);
        with_groups<kWideGroups>(panels.groups(q), [&](auto number) TINYTL_LAMBDA_INLINE {
          constexpr int GROUPS = number;
          const auto multiply = [&](auto half) TINYTL_LAMBDA_INLINE {
            detail::sparse_groups<GROUPS, half>(
                begin, end, segments, num_segments, mask, b.panel(q), start_of(start), epilogue);
          };
          // Of a wide panel half a vector is nothing.
          if constexpr (kHalves && GROUPS > 1 && GROUPS <= kPanelGroups && requires { epilogue.columns(); }) {
            if (epilogue.columns() <= GROUPS * kGroup - kLanes / 2) {
              return multiply(std::true_type());
            }
          }
          multiply(std::false_type());
        });
      }
    }
  }
}

} // namespace tinytl::cpu
