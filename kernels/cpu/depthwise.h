// One row of a depthwise convolution, forward or transposed, as a list of runs of taps.
//
//     out[j, c] = init[c] + sum over taps of source_tap[j * stride, c] * weight_tap[c]        j < count
//
// A tap is one position of the kernel window: where its first source pixel lies and its weights, one a channel. Taps
// whose sources are neighbouring pixels form a *run* and share their loads: three taps of eight pixels read ten
// vectors, not twenty-four. Rows outside the image are runs left out; columns outside it are zeros that the caller
// keeps in the source row, so the inner loop knows no borders. Forward with any stride and dilation, and each stride
// phase of the transposed convolution, are the same loop with different runs.
//
// Up to kRowPixels neighbouring pixels share each weight load and stay in registers until the epilogue takes them.
#pragma once

#include "vector.h"

#include <algorithm>
#include <vector>

namespace tinytl::cpu {

#if defined(CPU_CAPABILITY_AVX512) || defined(CPU_CAPABILITY_AVX2) || defined(__aarch64__)
constexpr int kRowPixels = 8;
#else
constexpr int kRowPixels = 2;
#endif

constexpr int kRunTaps = 3; // taps in a run: as many weights as registers hold beside the pixels of a tile

struct Window {
  int64_t kernel_height, kernel_width;
  int64_t stride_height = 1, stride_width = 1;
  int64_t dilation_height = 1, dilation_width = 1;
  int64_t pad_top, pad_left;

  int64_t taps() const {
    return kernel_height * kernel_width;
  }
};

// Rows of one group of channels kept in a ring, [row][column][kGroup]: image row r lies at ring row r % rows, its
// column 0 after `left` zeros. A group has its rows to itself, so that the distance from pixel to pixel is known to the
// compiler.
struct RingView {
  const float* data;
  int64_t rows, pitch, left;

  const float* row(int64_t row) const {
    return data + (row % rows * pitch + left) * kGroup;
  }
};

// Taps of one run: sources at source, source + one pixel, ...; weights at weight, weight + weight_step, ...
struct TapRun {
  const float* source;
  const float* weight;
  int64_t taps;
};

// The runs of one row of the first group; those of group g lie g planes and g times `taps` weights further.
struct RowRuns {
  const TapRun* runs;
  int64_t count;
  int64_t kernel_step; // kernel columns from tap to tap of a run
  int64_t plane; // elements from group to group of the source
  int64_t taps; // of the window
};

// The taps of one kernel row as runs, the same for every row of the image.
struct ColumnRuns {
  struct Columns {
    int64_t source; // column of the source row, for pixel 0
    int64_t kernel; // column of the kernel
    int64_t taps;
  };
  std::vector<Columns> runs;
  int64_t kernel_step; // kernel columns from tap to tap of a run

  void add(int64_t source, int64_t kernel) {
    if (!runs.empty()) {
      Columns& last = runs.back();
      if (last.taps < kRunTaps && source == last.source + last.taps && kernel == last.kernel + last.taps * kernel_step) {
        ++last.taps;
        return;
      }
    }
    runs.push_back({source, kernel, 1});
  }
};

// Pixel j of an output row reads pixel j * stride_width of each run.
inline ColumnRuns forward_columns(const Window& window) {
  ColumnRuns columns{{}, 1};
  for (int64_t j = 0; j < window.kernel_width; ++j) {
    columns.add(j * window.dilation_width - window.pad_left, j);
  }
  return columns;
}

// One stride phase of the transposed convolution: columns phase, phase + stride_width, ... of a row of the input's
// gradient; its pixel j reads pixel j of each run.
inline ColumnRuns transposed_columns(const Window& window, int64_t phase) {
  ColumnRuns columns{{}, -window.stride_width};
  for (int64_t j = window.kernel_width - 1; j >= 0; --j) {
    const int64_t shifted = phase + window.pad_left - j * window.dilation_width;
    const int64_t source = floor_div(shifted, window.stride_width);
    if (source * window.stride_width == shifted) {
      columns.add(source, j);
    }
  }
  return columns;
}

// Those of all phases of a row of `width` columns.
inline std::vector<ColumnRuns> transposed_phases(const Window& window, int64_t width) {
  std::vector<ColumnRuns> phases;
  for (int64_t phase = 0; phase < std::min(window.stride_width, width); ++phase) {
    phases.push_back(transposed_columns(window, phase));
  }
  return phases;
}

namespace detail {

// Kernel row i of every run, with its sources in image row `source`.
inline int64_t row_runs(
    const Window& window,
    const ColumnRuns& columns,
    const RingView& ring,
    int64_t source,
    int64_t i,
    const float* weight,
    TapRun* runs) {
  const float* row = ring.row(source);
  const float* kernel_row = weight + i * window.kernel_width * kGroup;
  for (const auto& run : columns.runs) {
    *runs++ = {row + run.source * kGroup, kernel_row + run.kernel * kGroup, run.taps};
  }
  return static_cast<int64_t>(columns.runs.size());
}

} // namespace detail

// Runs of output row `row`; at most window.taps(). weight: [tap][kGroup].
inline int64_t forward_runs(
    const Window& window,
    const ColumnRuns& columns,
    const RingView& input,
    int64_t input_height,
    int64_t row,
    const float* weight,
    TapRun* runs) {
  int64_t count = 0;
  for (int64_t i = 0; i < window.kernel_height; ++i) {
    const int64_t source = row * window.stride_height - window.pad_top + i * window.dilation_height;
    if (source >= 0 && source < input_height) {
      count += detail::row_runs(window, columns, input, source, i, weight, runs + count);
    }
  }
  return count;
}

// Runs of row `row` of the input's gradient, for the stride phase that `columns` belongs to.
inline int64_t transposed_runs(
    const Window& window,
    const ColumnRuns& columns,
    const RingView& grad,
    int64_t grad_height,
    int64_t row,
    const float* weight,
    TapRun* runs) {
  int64_t count = 0;
  for (int64_t i = 0; i < window.kernel_height; ++i) {
    const int64_t shifted = row + window.pad_top - i * window.dilation_height;
    const int64_t source = floor_div(shifted, window.stride_height);
    if (source * window.stride_height == shifted && source >= 0 && source < grad_height) {
      count += detail::row_runs(window, columns, grad, source, i, weight, runs + count);
    }
  }
  return count;
}

namespace detail {

// sum[p] += run of TAPS taps at pixel p * STRIDE. Each source vector is loaded once and meets every tap that reads it.
template <int PIXELS, int TAPS, int STRIDE>
TINYTL_INLINE void add_run(
    Vec (&sum)[PIXELS][kGroupVecs], const float* source, const float* weight, int64_t weight_step) {
  TINYTL_UNROLL
  for (int v = 0; v < kGroupVecs; ++v) {
    Vec w[TAPS];
    TINYTL_UNROLL
    for (int t = 0; t < TAPS; ++t) {
      w[t] = load_once(weight + t * weight_step + v * kLanes);
    }
    TINYTL_UNROLL
    for (int column = 0; column < (PIXELS - 1) * STRIDE + TAPS; ++column) {
      const Vec value = load_once(source + column * kGroup + v * kLanes);
      TINYTL_UNROLL
      for (int t = 0; t < TAPS; ++t) {
        const int p = (column - t) / STRIDE;
        if (column >= t && (column - t) % STRIDE == 0 && p < PIXELS) {
          sum[p][v] = at::vec::fmadd(value, w[t], sum[p][v]);
        }
      }
    }
  }
}

template <int PIXELS, int STRIDE>
TINYTL_INLINE void add_taps(
    Vec (&sum)[PIXELS][kGroupVecs], int64_t taps, const float* source, const float* weight, int64_t weight_step) {
  static_assert(kRunTaps == 3);
  if (taps == 3) {
    add_run<PIXELS, 3, STRIDE>(sum, source, weight, weight_step);
  } else if (taps == 2) {
    add_run<PIXELS, 2, STRIDE>(sum, source, weight, weight_step);
  } else {
    add_run<PIXELS, 1, STRIDE>(sum, source, weight, weight_step);
  }
}

// PIXELS pixels from j0, all groups. The epilogue gets (j0, group, accumulators[PIXELS][kGroupVecs]).
template <int PIXELS, class Epilogue>
TINYTL_INLINE void correlate_tile(
    int64_t j0, int groups, const RowRuns& row, int64_t stride, const float* init, const Epilogue& epilogue) {
  const int64_t weight_step = row.kernel_step * kGroup;
  for (int g = 0; g < groups; ++g) {
    Vec sum[PIXELS][kGroupVecs];
    TINYTL_UNROLL
    for (int v = 0; v < kGroupVecs; ++v) {
      const Vec start = init != nullptr ? Vec::loadu(init + g * kGroup + v * kLanes) : Vec(0.f);
      TINYTL_UNROLL
      for (int p = 0; p < PIXELS; ++p) {
        sum[p][v] = start;
      }
    }
    const int64_t offset = g * row.plane + j0 * stride * kGroup;
    for (int64_t r = 0; r < row.count; ++r) {
      const int64_t taps = row.runs[r].taps;
      const float* source = row.runs[r].source + offset;
      const float* weight = row.runs[r].weight + g * row.taps * kGroup;
      if (stride == 1) {
        add_taps<PIXELS, 1>(sum, taps, source, weight, weight_step);
      } else if (stride == 2) {
        add_taps<PIXELS, 2>(sum, taps, source, weight, weight_step);
      } else {
        for (int64_t t = 0; t < taps; ++t) {
          TINYTL_UNROLL
          for (int v = 0; v < kGroupVecs; ++v) {
            const Vec w = load_once(weight + t * weight_step + v * kLanes);
            TINYTL_UNROLL
            for (int p = 0; p < PIXELS; ++p) {
              sum[p][v] = at::vec::fmadd(Vec::loadu(source + (p * stride + t) * kGroup + v * kLanes), w, sum[p][v]);
            }
          }
        }
      }
    }
    epilogue.template tile<PIXELS>(j0, g, sum);
  }
}

template <int PIXELS, class Epilogue>
TINYTL_INLINE void correlate_pixels(
    int pixels,
    int64_t j0,
    int groups,
    const RowRuns& row,
    int64_t stride,
    const float* init,
    const Epilogue& epilogue) {
  if constexpr (PIXELS > 0) {
    if (pixels == PIXELS) {
      correlate_tile<PIXELS>(j0, groups, row, stride, init, epilogue);
    } else {
      correlate_pixels<PIXELS - 1>(pixels, j0, groups, row, stride, init, epilogue);
    }
  }
}

} // namespace detail

// One row of all groups. stride: source pixels from output pixel to output pixel; init: start values, one a channel, or
// null for zeros. Row and epilogue are copied, so that no store can be thought to change them.
template <class Epilogue>
void correlate_row(
    int64_t count, int groups, const RowRuns row, int64_t stride, const float* init, const Epilogue epilogue) {
  const int64_t tiles = ceil_div(count, kRowPixels);
  const int64_t small = tiles > 0 ? count / tiles : 0;
  const int64_t large = tiles > 0 ? count % tiles : 0;
  for (int64_t t = 0, j0 = 0; t < tiles; ++t) {
    const int pixels = static_cast<int>(small + (t < large ? 1 : 0));
    detail::correlate_pixels<kRowPixels>(pixels, j0, groups, row, stride, init, epilogue);
    j0 += pixels;
  }
}

} // namespace tinytl::cpu
