// Implicit GEMM of the dense and grouped k x k convolutions.
//
//     C[m, n] = init[n] + sum over runs, over k < depth of the run, of  rows[offset[m] + run.offset + k] * B[k, n]
//
// m: pixels, in any order; n: channels of a panel (gemm.h). A run is a tap of the window, or neighbouring taps where
// their channels lie side by side: a 3 x 3 window over three channels is three runs of nine terms. The input is read
// through offsets from rows padded with zeros, so that no im2col matrix exists and no border is tested.
#pragma once

#include "gemm.h"

#include <array>
#include <utility>
#include <vector>

namespace tinytl::cpu {

struct WindowRun {
  int64_t offset; // elements, from the pixel's own offset
  int64_t depth; // a multiple of Dot::kStep
  int64_t before; // terms before it
  int64_t row; // of the padded rows, from the pixel's own row
};

// The runs that some pixel of a tile finds inside the image; the others would meet zeros alone.
struct RunRange {
  int64_t first, last;
};

constexpr int64_t kWindowTileElements = kTileRows * kPanelGroups * kGroup;

namespace detail {

// tile[m][n] = init[n] (null: zeros) + the product, or with `accumulate` tile[m][n] += that. Chains of additions
// end at a run's end after kChainDepth terms; their sums meet in the tile, which stays in the first-level cache.
template <class Dot, int ROWS, int GROUPS>
void window_tile(
    const typename Dot::Element* rows,
    const int64_t* offsets,
    const WindowRun* runs,
    int64_t num_runs,
    const typename Dot::Element* b,
    const float* init,
    bool accumulate,
    float* tile) {
  constexpr int VECS = GROUPS * kGroupVecs;
  Vec sum[ROWS][VECS];
  TINYTL_UNROLL
  for (int v = 0; v < VECS; ++v) {
    const Vec start = init != nullptr ? Vec::loadu(init + v * kLanes) : Vec(0.f);
    TINYTL_UNROLL
    for (int m = 0; m < ROWS; ++m) {
      sum[m][v] = start;
    }
  }
  int64_t chain = 0;
  for (int64_t r = 0; r < num_runs; ++r) {
    if (chain >= kChainDepth) {
      TINYTL_UNROLL
      for (int m = 0; m < ROWS; ++m) {
        TINYTL_UNROLL
        for (int v = 0; v < VECS; ++v) {
          float* target = tile + (m * VECS + v) * kLanes;
          (accumulate ? Vec::loadu(target) + sum[m][v] : sum[m][v]).store(target);
          sum[m][v] = Vec(0.f);
        }
      }
      accumulate = true;
      chain = 0;
    }
    const int64_t depth = runs[r].depth;
    chain += depth;
    const typename Dot::Element* a[ROWS];
    TINYTL_UNROLL
    for (int m = 0; m < ROWS; ++m) {
      a[m] = rows + offsets[m] + runs[r].offset;
    }
    for (int64_t k = 0; k < depth; k += Dot::kStep) {
      Vec row[VECS];
      TINYTL_UNROLL
      for (int v = 0; v < VECS; ++v) {
        row[v] = Dot::row(b + v * kLanes * Dot::kStep);
      }
      TINYTL_UNROLL
      for (int m = 0; m < ROWS; ++m) {
        const Vec value = Dot::broadcast(a[m] + k);
        TINYTL_UNROLL
        for (int v = 0; v < VECS; ++v) {
          sum[m][v] = Dot::accumulate(sum[m][v], value, row[v]);
        }
      }
      b += VECS * kLanes * Dot::kStep;
    }
  }
  TINYTL_UNROLL
  for (int m = 0; m < ROWS; ++m) {
    TINYTL_UNROLL
    for (int v = 0; v < VECS; ++v) {
      float* target = tile + (m * VECS + v) * kLanes;
      (accumulate ? Vec::loadu(target) + sum[m][v] : sum[m][v]).store(target);
    }
  }
}

template <class Dot>
using WindowTile = void (*)(
    const typename Dot::Element*,
    const int64_t*,
    const WindowRun*,
    int64_t,
    const typename Dot::Element*,
    const float*,
    bool,
    float*);

template <class Dot, int GROUPS, size_t... I>
constexpr std::array<WindowTile<Dot>, kTileRows> window_tiles_of(std::index_sequence<I...>) {
  return {window_tile<Dot, static_cast<int>(I) + 1, GROUPS>...};
}

template <class Dot, size_t... G>
constexpr std::array<std::array<WindowTile<Dot>, kTileRows>, kPanelGroups> all_window_tiles(
    std::index_sequence<G...>) {
  return {window_tiles_of<Dot, static_cast<int>(G) + 1>(std::make_index_sequence<kTileRows>())...};
}

template <class Dot>
inline constexpr auto kWindowTiles = all_window_tiles<Dot>(std::make_index_sequence<kPanelGroups>());

} // namespace detail

// One panel of C for all `pixels`, handed over tile by tile as epilogue(first pixel, rows, sums), the sums in rows of
// the panel's width. range(first pixel, rows) names the runs that a tile needs. The runs are worked off in `chunks`, so
// that a chunk of B stays in cache while the tiles pass by; `sums` then keeps pixels * width floats between them, and
// one tile (kWindowTileElements) for a single chunk.
template <class Dot, class Range, class Epilogue>
void window_gemm(
    int groups,
    int64_t pixels,
    const typename Dot::Element* rows,
    const int64_t* offsets,
    const std::vector<WindowRun>& runs,
    int64_t chunks,
    const typename Dot::Element* b,
    const float* init,
    float* sums,
    const Range& range,
    const Epilogue& epilogue) {
  const int64_t width = static_cast<int64_t>(groups) * kGroup;
  const int64_t num_runs = static_cast<int64_t>(runs.size());
  // Tiles of nearly equal height: 49 pixels are seven tiles of 7.
  const int64_t tiles = ceil_div(pixels, kTileRows);
  for (int64_t c = 0; c < chunks; ++c) {
    const int64_t first = num_runs * c / chunks, last = num_runs * (c + 1) / chunks;
    for (int64_t t = 0; t < tiles; ++t) {
      const int64_t m0 = pixels * t / tiles;
      const int height = static_cast<int>(pixels * (t + 1) / tiles - m0);
      float* tile = chunks > 1 ? sums + m0 * width : sums;
      const RunRange needed = range(m0, height);
      const int64_t from = std::max(first, needed.first), to = std::min(last, needed.last);
      if (from < to || c == 0) {
        detail::kWindowTiles<Dot>[groups - 1][height - 1](
            rows,
            offsets + m0,
            runs.data() + from,
            std::max<int64_t>(to - from, 0),
            from < to ? b + runs[from].before * width : b,
            c == 0 ? init : nullptr,
            c > 0,
            tile);
      }
      if (c + 1 == chunks) {
        epilogue(m0, height, tile);
      }
    }
  }
}

} // namespace tinytl::cpu
