// Frozen 1x1 weights (O, I) as the B of a GEMM (gemm.h): what lies together in the weight goes along k forward,
// B[k, n] = w[n, k], and along n backward, B[k, n] = w[k, n]. A weight comes from memory, so that tasks are cut to read
// it as it lies, rows of it from their first value to their last.
#pragma once

#include "frozen_weight.h"
#include "gemm.h"
#include "parallel.h"
#include "sparse_gemm.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <vector>

namespace tinytl::cpu {

// Rows of B that a task packs at least, where they are rows of the weight.
constexpr int64_t kPackedRows = 16;

// Sets *spoiled where one of `rows` rows of `width` values (whole vectors), `stride` apart, is not finite: only with
// finite ones is a product with zero nothing. Null: nobody asks.
inline void find_spoiled(const float* values, int64_t rows, int64_t width, int64_t stride, uint8_t* spoiled) {
  if (spoiled == nullptr) {
    return;
  }
  Vec sum(0.f);
  for (int64_t row = 0; row < rows; ++row, values += stride) {
    for (int64_t i = 0; i < width; i += kLanes) {
      sum = at::vec::fmadd(Vec::loadu(values + i), Vec(0.f), sum);
    }
  }
  alignas(64) float lanes[kLanes];
  sum.store(lanes);
  if (std::any_of(lanes, lanes + kLanes, [](float lane) { return lane != 0.f; })) {
    std::atomic_ref(*spoiled).store(1, std::memory_order_relaxed);
  }
}

// One group of B's channels, `valid` of them there, in rows of `width` elements a term: a channel's values become a
// column. What a step of the dot product takes from a channel, one float or a pair of bfloat16, is a word, and words are
// transposed in registers.
template <class Dot, class Values>
void pack_group(
    const Values& values,
    int64_t channel,
    int64_t valid,
    int64_t depth,
    int64_t padded_depth,
    int64_t width,
    typename Dot::Element* target) {
  using Element = typename Dot::Element;
  constexpr int STEP = Dot::kStep;
  static_assert(sizeof(Element) * STEP == sizeof(float));
  const auto zeros = [&](int64_t begin) {
    for (int64_t k = begin; k < padded_depth; k += STEP) {
      std::memset(static_cast<void*>(target + k * width), 0, sizeof(Element) * STEP * kGroup);
    }
  };
  zeros(valid < kGroup ? 0 : depth / STEP * STEP);
  const auto columns = [&](const Element* rows, int64_t row, int64_t k, int64_t count) {
    transpose(
        reinterpret_cast<const float*>(rows),
        row / STEP,
        reinterpret_cast<float*>(target + k * width),
        width,
        valid,
        ceil_div(count, STEP));
  };
  const Element* plain = plain_values<Element>(values);
  if (plain != nullptr && depth % STEP == 0 && reinterpret_cast<uintptr_t>(plain) % sizeof(float) == 0) {
    return columns(plain + channel * depth, depth, 0, depth);
  }
  constexpr int64_t DEPTH = 64;
  alignas(64) Element rows[kGroup * DEPTH];
  for (int64_t k = 0; k < depth; k += DEPTH) {
    const int64_t count = std::min(DEPTH, depth - k);
    for (int64_t n = 0; n < valid; ++n) {
      copy_values(values, channel + n, k, count, rows + n * DEPTH);
      std::fill(rows + n * DEPTH + count, rows + n * DEPTH + round_up(count, STEP), Element(0));
    }
    columns(rows, DEPTH, k, count);
  }
}

// to[2 n] = even[n], to[2 n + 1] = odd[n]
inline void interleave(
    const c10::BFloat16* __restrict even, const c10::BFloat16* __restrict odd, int64_t count, c10::BFloat16* __restrict to) {
  for (int64_t n = 0; n < count; ++n) {
    to[2 * n].x = even[n].x;
    to[2 * n + 1].x = odd[n].x;
  }
}

// Panels [first, last) of B[k, n] = w[n, k], rows beyond the weight's filled with zeros up to padded_depth. The weight
// must outlive the tasks. spoiled (null: nobody asks): becomes 1 if any value is not finite, of float32.
template <class Dot, class T>
Tasks pack_forward(
    const FrozenWeight& weight,
    int64_t padded_depth,
    const Panels& panels,
    int64_t first,
    int64_t last,
    typename Dot::Element* packed,
    uint8_t* spoiled = nullptr) {
  constexpr int STEP = Dot::kStep;
  const int64_t origin = panels.start(first), groups = (panels.start(last) - origin) / kGroup, depth = weight.inner;
  const int64_t grain = std::max<int64_t>(kPackedElements / std::max<int64_t>(kGroup * padded_depth, 1), 1);
  return with_values<T>(weight, [&](const auto& values) {
    return pieces_of(groups, grain, [=](int64_t begin, int64_t end) {
      int64_t p = first;
      for (int64_t g = begin; g < end; ++g) {
        const int64_t channel = origin + g * kGroup;
        while (channel >= panels.start(p) + panels.width(p)) {
          ++p;
        }
        const int64_t start = panels.start(p), width = panels.width(p);
        const int64_t valid = std::min<int64_t>(panels.channels - channel, kGroup);
        typename Dot::Element* target = packed + (start - origin) * padded_depth + (channel - start) * STEP;
        pack_group<Dot>(values, channel, valid, depth, padded_depth, width, target);
        if constexpr (std::is_same_v<Dot, FloatDot>) {
          find_spoiled(target, padded_depth, kGroup, width, spoiled);
        }
      }
    });
  });
}

// The same of B[k, n] = w[k, n].
template <class Dot, class T>
Tasks pack_backward(
    const FrozenWeight& weight,
    int64_t padded_depth,
    const Panels& panels,
    int64_t first,
    int64_t last,
    typename Dot::Element* packed,
    uint8_t* spoiled = nullptr) {
  using Element = typename Dot::Element;
  constexpr int STEP = Dot::kStep;
  const int64_t origin = panels.start(first), depth = weight.out_channels;
  const int64_t width = panels.start(last) - origin, channels = std::min(width, panels.channels - origin);
  const int64_t grain = round_up(std::max<int64_t>(kPackedElements / std::max<int64_t>(width, 1), 1), kPackedRows);
  static_assert(kPackedRows % STEP == 0);
  return with_values<T>(weight, [&](const auto& values) {
    return pieces_of(padded_depth, grain, [=](int64_t begin, int64_t end) {
      // Channels [start, start + count) of row k, zeros for those that there are not.
      const auto copy = [&](int64_t k, int64_t start, int64_t count, Element* to) {
        const int64_t there = k < depth ? std::min(count, channels - start) : 0;
        if (there > 0) {
          copy_values(values, k, origin + start, there, to);
        }
        std::fill(to + there, to + count, Element(0));
      };
      std::vector<Element> rows(STEP > 1 ? STEP * width : 0); // of a step
      for (int64_t k = begin; k < end; k += STEP) {
        for (int64_t i = 0; STEP > 1 && i < STEP; ++i) {
          copy(k + i, 0, width, rows.data() + i * width);
        }
        for (int64_t p = first; p < last; ++p) {
          const int64_t start = panels.start(p) - origin, panel_width = panels.width(p);
          Element* target = packed + start * padded_depth + k * panel_width;
          if constexpr (STEP == 1) {
            copy(k, start, panel_width, target);
          } else {
            static_assert(STEP == 2);
            interleave(rows.data() + start, rows.data() + width + start, panel_width, target);
          }
        }
      }
      if constexpr (std::is_same_v<Dot, FloatDot>) {
        for (int64_t p = first; p < last; ++p) {
          const int64_t panel_width = panels.width(p);
          const float* target = packed + (panels.start(p) - origin) * padded_depth + begin * panel_width;
          find_spoiled(target, 1, (end - begin) * panel_width, 0, spoiled);
        }
      }
    });
  });
}

// The values of a weight that pack_backward would make one wide panel of without changing anything, else null.
template <class T>
const float* packed_as_stored(const FrozenWeight& weight) {
  if (!std::is_same_v<T, float> || weight.values.scalar_type() != at::kFloat) {
    return nullptr;
  }
  const float* values = weight.values.data_ptr<float>();
  const bool aligned = reinterpret_cast<uintptr_t>(values) % 64 == 0;
  return aligned && weight.inner % kGroup == 0 && weight.inner <= kWideGroups * kGroup ? values : nullptr;
}

// What is left of packing it.
inline Tasks look_for_spoiled(const FrozenWeight& weight, uint8_t* spoiled) {
  const float* rows = weight.values.data_ptr<float>();
  const int64_t grain = std::max<int64_t>(kPackedElements / weight.inner, 1), width = weight.inner;
  return pieces_of(weight.out_channels, grain, [=](int64_t begin, int64_t end) {
    find_spoiled(rows + begin * width, 1, (end - begin) * width, 0, spoiled);
  });
}

} // namespace tinytl::cpu
