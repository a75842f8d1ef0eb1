// Small float32 GEMM over runs of evenly spaced terms: the arithmetic of the trained convolutions.
//
//     C[m, n] = sum over runs, over k < depth of the run, of  a[shift + m * row_stride + k * a_step] * b[k * b_step + n]
//
// `shift` moves a list of runs from tile to tile, so that it is made once for all tiles that meet the same taps.
// A run is one tap of a convolution window. Forward and input gradient read A where it lies (rows are pixels, k
// channels) and B packed in panels; a weight gradient reads both where they lie (rows are channels, k pixels). A
// border is a run left out or zeros that the caller keeps in A.
//
// A tile of up to max_tile_rows(vecs) rows by `vecs` vectors stays in registers over a chain of runs. Accumulators,
// a row of B and one broadcast fill the registers: narrow panels get taller tiles, or the additions of one would wait
// for each other.
#pragma once

#include "vector.h"

#include <array>
#include <utility>

namespace tinytl::cpu {

#if defined(CPU_CAPABILITY_AVX512)
constexpr int kTileVecs = 3; // widest panel
constexpr int kTileSums = 24; // accumulators
#elif defined(CPU_CAPABILITY_AVX2)
constexpr int kTileVecs = 3;
constexpr int kTileSums = 12;
#elif defined(__aarch64__)
constexpr int kTileVecs = 4;
constexpr int kTileSums = 24;
#else
constexpr int kTileVecs = 1;
constexpr int kTileSums = 4;
#endif

constexpr int max_tile_rows(int vecs) {
  return kTileSums / vecs < 16 ? kTileSums / vecs : 16;
}

// At most this many floats in a tile.
constexpr int kTileElements = kTileSums * kLanes;

struct Run {
  const float* a;
  const float* b;
  int64_t depth;
};

// How the operands of every run are laid out, in elements.
struct Strides {
  int64_t row; // A, from row to row
  int64_t a_step; // A, from term to term
  int64_t b_step; // B, from term to term
};

namespace detail {

// tile[m][n] = or += the product; tile rows are VECS vectors wide, the last of them half computed if HALF.
template <int ROWS, int VECS, bool HALF>
void strided_tile(
    const Run* runs, int64_t num_runs, int64_t shift, const Strides& strides, bool accumulate, float* tile) {
  constexpr int WHOLE = VECS - (HALF ? 1 : 0);
  Vec sum[ROWS][VECS];
  HalfVec half[ROWS];
  const auto each = [&](const auto& body) TINYTL_LAMBDA_INLINE { each_sum<HALF>(sum, half, body); };
  each([](auto& value, int) TINYTL_LAMBDA_INLINE { set_zero(value); });
  const int64_t row = strides.row, a_step = strides.a_step, b_step = strides.b_step;
  for (const Run* run = runs; run < runs + num_runs; ++run) {
    const float* upper = run->a + shift;
    const float* lower = upper + 8 * row;
    const float* b = run->b;
    for (int64_t k = 0; k < run->depth; ++k) {
      Vec values[VECS];
      TINYTL_UNROLL
      for (int v = 0; v < WHOLE; ++v) {
        values[v] = load_once(b + v * kLanes);
      }
      [[maybe_unused]] HalfVec half_value;
      if constexpr (HALF) {
        load_into(half_value, b + WHOLE * kLanes);
      }
      TINYTL_UNROLL
      for (int m = 0; m < ROWS; ++m) {
        const float term = m < 8 ? upper[m * row] : lower[(m - 8) * row];
        if constexpr (WHOLE == 0) {
          half[m] = fmadd(half_of(term), half_value, half[m]);
        } else {
          const Vec value(term);
          TINYTL_UNROLL
          for (int v = 0; v < WHOLE; ++v) {
            sum[m][v] = at::vec::fmadd(value, values[v], sum[m][v]);
          }
          if constexpr (HALF) {
            half[m] = fmadd(lower_half(value), half_value, half[m]);
          }
        }
      }
      upper += a_step;
      lower += a_step;
      b += b_step;
    }
  }
  if (accumulate) {
    each([&](auto& value, int at) TINYTL_LAMBDA_INLINE { add_into(value, tile + at); });
  }
  each([&](auto& value, int at) TINYTL_LAMBDA_INLINE { store_from(value, tile + at); });
}

using TileFunction = void (*)(const Run*, int64_t, int64_t, const Strides&, bool, float*);

template <int VECS, bool HALF, size_t... I>
constexpr std::array<TileFunction, 16> tiles_of(std::index_sequence<I...>) {
  return {strided_tile<static_cast<int>(I) + 1, VECS, HALF>...};
}

template <bool HALF, size_t... V>
constexpr std::array<std::array<TileFunction, 16>, kTileVecs> all_tiles(std::index_sequence<V...>) {
  return {tiles_of<static_cast<int>(V) + 1, HALF>(
      std::make_index_sequence<max_tile_rows(static_cast<int>(V) + 1)>())...};
}

// Of whole vectors, and with half a last one.
inline constexpr std::array kTiles{
    all_tiles<false>(std::make_index_sequence<kTileVecs>()), all_tiles<kHalves>(std::make_index_sequence<kTileVecs>())};

} // namespace detail

// tile = the product over all runs, or tile += it. rows <= max_tile_rows(vecs); tile rows are vecs * kLanes floats, of
// which the first `columns` are wanted.
// Chains of additions end at a run's end after kChainTerms terms: rounding errors grow with their length.
constexpr int64_t kChainTerms = 96;

inline void strided_gemm(
    int rows,
    int vecs,
    int64_t columns,
    const Run* runs,
    int64_t num_runs,
    int64_t shift,
    const Strides& strides,
    bool accumulate,
    float* tile) {
  const bool half = kHalves && columns <= vecs * kLanes - kLanes / 2;
  const auto function = detail::kTiles[half][vecs - 1][rows - 1];
  int64_t begin = 0;
  do { // once for no run at all: the tile is zeros then
    int64_t end = begin, terms = 0;
    while (end < num_runs && terms < kChainTerms) {
      terms += runs[end++].depth;
    }
    function(runs + begin, end - begin, shift, strides, accumulate, tile);
    accumulate = true;
    begin = end;
  } while (begin < num_runs);
}

} // namespace tinytl::cpu
