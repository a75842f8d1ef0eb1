// Geometry and packed weights of the dense and grouped k x k convolutions (dense_conv.cpp).
#pragma once

#include "dense_gemm.h"

#include "frozen_weight.h"
#include "operators.h"
#include "parallel.h"

namespace tinytl::cpu {

// A weight is packed into about this much at a time, or one panel.
constexpr int64_t kPackedBytes = 1024 * 1024;

// One side of the image.
struct Side {
  int64_t length, positions, kernel, stride, dilation, before;

  int64_t reach() const {
    return (kernel - 1) * dilation;
  }
  // The output positions that reach input positions [begin, end), some of them outside of the output.
  int64_t first_reaching(int64_t begin) const {
    return ceil_div(begin + before - reach(), stride);
  }
  int64_t last_reaching(int64_t end) const {
    return floor_div(end - 1 + before, stride);
  }
};

struct DenseShape {
  int64_t batch, in_channels, out_channels, groups;
  Side rows, columns;

  DenseShape(
      at::IntArrayRef input,
      const at::Tensor& weight,
      at::IntArrayRef stride,
      at::IntArrayRef padding,
      at::IntArrayRef dilation,
      int64_t groups)
      : groups(groups) {
    TORCH_CHECK(input.size() == 4, "input: expected 4 dimensions (N, C, H, W), got ", input);
    TORCH_CHECK(
        groups >= 1 && weight.dim() == 4 && weight.size(1) * groups == input[1] && weight.size(0) % groups == 0 &&
            weight.numel() > 0,
        "weight: expected (C_out, ",
        input[1],
        " / groups, kh, kw) with C_out a multiple of groups (",
        groups,
        "), got ",
        weight.sizes());
    for (const auto& [values, argument] : {std::pair{stride, "stride"}, std::pair{dilation, "dilation"}}) {
      TORCH_CHECK(
          values.size() == 2 && values[0] >= 1 && values[1] >= 1,
          argument,
          ": expected two numbers >= 1, got ",
          values);
    }
    TORCH_CHECK(
        padding.size() == 4 && *std::min_element(padding.begin(), padding.end()) >= 0,
        "padding: expected (top, bottom, left, right), none negative, got ",
        padding);
    batch = input[0];
    in_channels = input[1];
    out_channels = weight.size(0);
    const auto side = [&](int i) {
      Side s{input[2 + i], 0, weight.size(2 + i), stride[i], dilation[i], padding[2 * i]};
      const int64_t span = s.length + padding[2 * i] + padding[2 * i + 1] - s.reach() - 1;
      TORCH_CHECK(
          s.length > 0 && span >= 0,
          "input: expected padded height and width of at least the dilated kernel ",
          weight.sizes(),
          ", got ",
          input,
          " with padding ",
          padding);
      s.positions = span / s.stride + 1;
      return s;
    };
    rows = side(0);
    columns = side(1);
  }

  int64_t group_in() const {
    return in_channels / groups;
  }
  int64_t group_out() const {
    return out_channels / groups;
  }
  int64_t taps() const {
    return rows.kernel * columns.kernel;
  }
  int64_t image_elements() const { // of the input
    return rows.length * columns.length * in_channels;
  }
};

struct WindowTap {
  int64_t window; // row of the window * kernel width + column
  int64_t row, column; // in the padded rows, from the pixel's own place
};

// Results that the same taps reach: all of them forward, one remainder of rows and columns backward.
struct Phase {
  int64_t row, column;
  std::vector<WindowTap> taps; // in the order of their places
};

inline std::vector<Phase> forward_phases(const DenseShape& s) {
  std::vector<Phase> phases(1, Phase{0, 0, {}});
  for (int64_t w = 0; w < s.taps(); ++w) {
    phases[0].taps.push_back(
        {w, w / s.columns.kernel * s.rows.dilation, w % s.columns.kernel * s.columns.dilation});
  }
  return phases;
}

inline std::vector<Phase> backward_phases(const DenseShape& s) {
  std::vector<Phase> phases;
  for (int64_t row = 0; row < s.rows.stride; ++row) {
    for (int64_t column = 0; column < s.columns.stride; ++column) {
      phases.push_back({row, column, {}});
      for (int64_t w = s.taps() - 1; w >= 0; --w) {
        const int64_t down = row - w / s.columns.kernel * s.rows.dilation;
        const int64_t right = column - w % s.columns.kernel * s.columns.dilation;
        if (down % s.rows.stride == 0 && right % s.columns.stride == 0) {
          phases.back().taps.push_back({w, down / s.rows.stride, right / s.columns.stride});
        }
      }
    }
  }
  return phases;
}

// Rows of `width` pixels of `groups` runs of `depth` elements, each padded to whole steps of the dot product.
template <class Dot>
struct BandRows {
  int64_t groups, channels, width; // channels: of a group

  int64_t depth() const {
    return packed_depth<Dot>(channels);
  }
  int64_t pixel() const {
    return groups * depth();
  }
  int64_t row() const {
    return width * pixel();
  }
  int64_t row_bytes() const {
    return row() * static_cast<int64_t>(sizeof(typename Dot::Element));
  }
};

// The rows of the input that results read.
template <class Dot>
BandRows<Dot> input_rows(const DenseShape& s) {
  return {s.groups, s.group_in(), (s.columns.positions - 1) * s.columns.stride + s.columns.reach() + 1};
}

// Pixels of a tensor to the rows of a band, every group of channels padded to its depth.
template <class Dot, class T>
void copy_pixels(const BandRows<Dot>& band, const T* from, int64_t pixels, typename Dot::Element* to) {
  using Element = typename Dot::Element;
  const int64_t channels = band.channels, depth = band.depth();
  if (channels == depth) {
    const int64_t count = pixels * band.pixel();
    if constexpr (std::is_same_v<T, Element>) {
      std::memcpy(static_cast<void*>(to), from, sizeof(T) * count);
    } else {
      copy_row(from, count, to);
    }
    return;
  }
  const auto padded_runs = [&](auto channels, auto depth) TINYTL_LAMBDA_INLINE {
    for (int64_t run = 0; run < pixels * band.groups; ++run, from += channels, to += depth) {
      for (int64_t c = 0; c < depth; ++c) {
        to[c] = c < channels ? static_cast<Element>(from[c]) : Element(0);
      }
    }
  };
  if (channels == 3 && depth == 4) { // an image's, the most pixels of all
    padded_runs(std::integral_constant<int64_t, 3>(), std::integral_constant<int64_t, 4>());
  } else {
    padded_runs(channels, depth);
  }
}

template <class Element>
void zero(Element* to, int64_t count) {
  if (count > 0) {
    std::memset(static_cast<void*>(to), 0, sizeof(Element) * count);
  }
}

// Rows [first, first + count) of an image, channels_last, with zeros around them.
template <class Dot, class T>
void pad_rows(
    const DenseShape& s,
    const BandRows<Dot>& band,
    const T* image,
    int64_t first,
    int64_t count,
    typename Dot::Element* to) {
  const int64_t left = std::min(s.columns.before, band.width);
  const int64_t inner = std::clamp<int64_t>(band.width - left, 0, s.columns.length);
  for (int64_t row = first; row < first + count; ++row, to += band.row()) {
    if (row < 0 || row >= s.rows.length) {
      zero(to, band.row());
      continue;
    }
    zero(to, left * band.pixel());
    copy_pixels(band, image + row * s.columns.length * s.in_channels, inner, to + left * band.pixel());
    zero(to + (left + inner) * band.pixel(), (band.width - left - inner) * band.pixel());
  }
}

// The taps of a phase as runs of terms: neighbours joined, long ones cut where a chain of additions should end.
template <class Dot>
std::vector<WindowRun> window_runs(const Phase& phase, const BandRows<Dot>& band) {
  std::vector<WindowRun> joined, runs;
  for (const WindowTap& tap : phase.taps) {
    const int64_t offset = tap.row * band.row() + tap.column * band.pixel();
    if (!joined.empty() && joined.back().row == tap.row && joined.back().offset + joined.back().depth == offset) {
      joined.back().depth += band.depth();
    } else {
      joined.push_back({offset, band.depth(), 0, tap.row});
    }
  }
  int64_t before = 0;
  for (const WindowRun& run : joined) {
    const int64_t pieces = ceil_div(run.depth, kChainDepth), steps = run.depth / Dot::kStep;
    for (int64_t i = 0; i < pieces; ++i) {
      const int64_t begin = steps * i / pieces * Dot::kStep, end = steps * (i + 1) / pieces * Dot::kStep;
      runs.push_back({run.offset + begin, end - begin, before, run.row});
      before += end - begin;
    }
  }
  return runs;
}

// The runs of a tile whose pixels lie on rows [top, bottom] of a band whose rows [begin, end) are inside the image.
inline RunRange runs_inside(
    const std::vector<WindowRun>& runs, int64_t top, int64_t bottom, int64_t begin, int64_t end) {
  RunRange range{0, static_cast<int64_t>(runs.size())};
  while (range.first < range.last && bottom + runs[range.first].row < begin) {
    ++range.first;
  }
  while (range.first < range.last && top + runs[range.last - 1].row >= end) {
    --range.last;
  }
  return range;
}

// Terms packed at a time: whole steps of every dot product, whole squares to turn.
constexpr int64_t kTermBlock = 16;

// The weight of one direction, unit after unit: a unit is one panel of one group, [phase][tap][term][channel].
template <class Dot, class T>
struct PackedUnits {
  using Element = typename Dot::Element;
  const DenseShape& shape;
  const FrozenWeight& weight;
  const std::vector<Phase>& phases;
  bool transposed; // backward: terms are output channels
  bool window_major; // stored as (O, kh, kw, I)
  Panels panels;
  int64_t terms, depth;

  PackedUnits(
      const DenseShape& shape,
      const FrozenWeight& weight,
      const std::vector<Phase>& phases,
      bool transposed,
      bool window_major)
      : shape(shape),
        weight(weight),
        phases(phases),
        transposed(transposed),
        window_major(window_major),
        panels(transposed ? shape.group_in() : shape.group_out()),
        terms(transposed ? shape.group_out() : shape.group_in()),
        depth(packed_depth<Dot>(terms)) {}

  int64_t units() const {
    return shape.groups * panels.count;
  }
  // Elements before a unit.
  int64_t offset(int64_t unit) const {
    return (unit / panels.count * panels.padded() + panels.start(unit % panels.count)) * shape.taps() * depth;
  }
  // Calls body(first unit, end unit, their packed weights) until all are done, about `bytes` of them at a time.
  template <class Body>
  void for_packed(int64_t bytes, const Body& body) const {
    const int64_t largest = kPanelGroups * kGroup * shape.taps() * depth;
    const int64_t step = std::max<int64_t>(bytes / (largest * static_cast<int64_t>(sizeof(Element))), 1);
    const int64_t elements = std::min(step * largest, shape.groups * panels.padded() * shape.taps() * depth);
    const at::Tensor storage =
        empty_tensor({elements}, weight.values.options().dtype(c10::CppTypeToScalarType<Element>::value));
    Element* packed = storage.data_ptr<Element>();
    for (int64_t first = 0; first < units(); first += step) {
      const int64_t last = std::min(first + step, units());
      const int64_t blocks = ceil_div(depth, kTermBlock);
      const int64_t grain = ceil_div(16384, shape.taps() * kTermBlock * kGroup);
      parallel_pieces(first * blocks, last * blocks, grain, [&](int64_t begin, int64_t end) {
        std::vector<float> buffer(shape.taps() * kTermBlock * kGroup + kGroup * kGroup);
        with_values<T>(weight, [&](const auto& values) {
          if constexpr (std::is_same_v<Element, float>) {
            if (const float* plain = plain_values<float>(values); plain != nullptr && window_major) {
              for (int64_t i = begin, next; i < end; i = next) {
                const int64_t unit = i / blocks;
                next = std::min((unit + 1) * blocks, end);
                const int64_t term = i % blocks * kTermBlock;
                const int64_t count = std::min((next - i) * kTermBlock, terms - term);
                pack_plain(plain, unit, term, count, packed + offset(unit) - offset(first));
              }
              return;
            }
          }
          for (int64_t i = begin; i < end; ++i) {
            const int64_t unit = i / blocks;
            pack(values, unit, i % blocks * kTermBlock, buffer.data(), packed + offset(unit) - offset(first));
          }
        });
      });
      body(first, last, packed);
    }
  }

 private:
  // buffer[j][n] = the value `j` places after at(n) = (output channel, place), for n < rows; the other lanes are zeros.
  template <class Values, class At>
  static void transpose_values(const Values& values, const At& at, int64_t rows, int64_t count, float* buffer) {
    alignas(64) float lines[kGroup * kGroup] = {};
    for (int64_t first = 0; first < count; first += kGroup) {
      const int64_t length = std::min<int64_t>(count - first, kGroup);
      for (int64_t n = 0; n < rows; ++n) {
        const auto [channel, place] = at(n);
        copy_values(values, channel, place + first, length, lines + n * kGroup);
      }
      transpose(lines, kGroup, buffer + first * kGroup, kGroup, kGroup, kGroup);
    }
  }

  // `count` terms of a unit from `term` on, of a float32 weight (O, kh, kw, I).
  void pack_plain(const float* plain, int64_t unit, int64_t term, int64_t count, float* target) const {
    const int64_t group = unit / panels.count, panel = unit % panels.count;
    const int64_t start = panels.start(panel), width = panels.width(panel);
    const int64_t valid = std::min(width, panels.channels - start);
    const int64_t inputs = shape.group_in(), output = group * shape.group_out() + (transposed ? term : start);
    std::vector<int64_t> windows; // of the taps, in their order
    for (const Phase& phase : phases) {
      for (const WindowTap& tap : phase.taps) {
        windows.push_back(tap.window);
      }
    }
    const float* from = plain + output * weight.inner + (transposed ? start : term);
    float* to = target + term * width;
    const int64_t taps = shape.taps();
    if (transposed) {
      // An output channel's values lie together: its taps first.
      for (int64_t i = 0; i < count; ++i) {
        for (int64_t t = 0; t < taps; ++t) {
          const float* row = from + i * weight.inner + windows[t] * inputs;
          if (i + 2 < count) {
            __builtin_prefetch(row + 2 * weight.inner);
            __builtin_prefetch(row + 2 * weight.inner + 16);
          }
          copy_row(row, valid, to + (t * depth + i) * width);
        }
      }
    } else {
      for (int64_t t = 0; t < taps; ++t) {
        transpose(from + windows[t] * inputs, weight.inner, to + t * depth * width, width, valid, count);
      }
    }
    for (int64_t line = 0; line < taps * count && valid < width; ++line) {
      float* end = to + (line / count * depth + line % count + 1) * width;
      std::fill(end - (width - valid), end, 0.f);
    }
  }

  // kTermBlock terms of a unit from `term` on, a group of channels at a time: first into vectors of channels, in the
  // order of the weight, [term][tap] or [tap][term], then to their places.
  template <class Values>
  void pack(const Values& values, int64_t unit, int64_t term, float* buffer, Element* target) const {
    constexpr int STEP = Dot::kStep;
    const int64_t group = unit / panels.count, panel = unit % panels.count;
    const int64_t start = panels.start(panel), width = panels.width(panel);
    const int64_t inputs = shape.group_in(), outputs = shape.group_out(), taps = shape.taps();
    const int64_t count = std::min(kTermBlock, terms - term);
    const int64_t first = transposed ? group * outputs + term : term; // output channel, or place among the inputs
    for (int64_t n0 = 0; n0 < width; n0 += kGroup) {
      const int64_t rows = std::min<int64_t>(kGroup, panels.channels - start - n0);
      const int64_t channel = transposed ? start + n0 : group * outputs + start + n0;
      int64_t term_step = 1, tap_step = 1; // vectors
      if (transposed && window_major) {
        tap_step = kTermBlock;
        for (int64_t i = 0; i < count; ++i) {
          for (int64_t w = 0; w < taps; ++w) {
            for (int64_t n = 0; n < kGroup; ++n) {
              buffer[(w * kTermBlock + i) * kGroup + n] =
                  n < rows ? static_cast<float>(values(first + i, w * inputs + channel + n)) : 0.f;
            }
          }
        }
      } else if (transposed) {
        // Windows of nine values are too short to turn as blocks: three times slower, measured.
        term_step = taps;
        for (int64_t i = 0; i < count; ++i) {
          for (int64_t n = 0; n < kGroup; ++n) {
            for (int64_t w = 0; w < taps; ++w) {
              buffer[(i * taps + w) * kGroup + n] =
                  n < rows ? static_cast<float>(values(first + i, (channel + n) * taps + w)) : 0.f;
            }
          }
        }
      } else if (window_major) {
        tap_step = kTermBlock;
        for (int64_t w = 0; w < taps; ++w) {
          const auto at = [&](int64_t n) { return std::pair(channel + n, w * inputs + first); };
          transpose_values(values, at, rows, count, buffer + w * kTermBlock * kGroup);
        }
      } else {
        term_step = taps;
        const auto at = [&](int64_t n) { return std::pair(channel + n, first * taps); };
        transpose_values(values, at, rows, count * taps, buffer);
      }
      Element* to = target;
      for (const Phase& phase : phases) {
        for (const WindowTap& tap : phase.taps) {
          const float* from = buffer + tap.window * tap_step * kGroup;
          for (int64_t i = 0; i < std::min(kTermBlock, depth - term); i += STEP) {
            Element* line = to + ((term + i) * width + n0 * STEP);
            for (int64_t n = 0; n < kGroup; ++n) {
              for (int j = 0; j < STEP; ++j) {
                line[n * STEP + j] =
                    static_cast<Element>(i + j < count ? from[(i + j) * term_step * kGroup + n] : 0.f);
              }
            }
          }
          to += depth * width;
        }
      }
    }
  }
};

} // namespace tinytl::cpu
