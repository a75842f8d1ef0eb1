// The 3 x 3 convolution of stride 1 with 2.25 times fewer multiplications (Winograd, F(2x2, 3x3); Lavin and Gray, "Fast
// Algorithms for Convolutional Neural Networks", 2016): a tile of 2 x 2 results comes from a tile of 4 x 4 values as
//
//     Y = A^T [ sum over channels of (G g G^T) * (B^T d B) ] A            *: element by element
//
// For each of the 16 elements the sum over channels is a GEMM, tiles by channels by results. All factors of the
// transforms are 0, 1 and 1/2, so that errors stay below those of one long chain of additions (PyTorch's: 0.4 to 1.3 of
// them, measured). A NaN or an infinity spreads to the whole tiles that read it.
//
// A band's values are transformed once, for all panels of results; a weight when it is packed. Float32 arithmetic only:
// in bfloat16 the transforms would round.
#pragma once

#include "dense_conv.h"
#include "epilogues.h"

namespace tinytl::cpu {

constexpr int64_t kWinogradTaps = 9;
constexpr int64_t kWinogradElements = 16;
constexpr int64_t kWinogradBytes = 512 * 1024; // transformed values of a band
// A weight is packed into about this much at a time before it is transformed: a band's values are, once for each piece.
constexpr int64_t kWinogradPackedBytes = 2 * 1024 * 1024;

// With shorter sums the transforms of the values, with fewer tiles those of the weight take longer than is saved.
constexpr int64_t kWinogradDepth = 32;
constexpr int64_t kWinogradTiles = 64;

// Whether results of height x width, sums over `depth` channels a group, are computed this way.
template <class Dot>
bool winograd_applies(const DenseShape& s, int64_t depth, int64_t height, int64_t width) {
  const auto side = [](const Side& side) { return side.kernel == 3 && side.stride == 1 && side.dilation == 1; };
  const int64_t tiles = s.batch * ceil_div(height, 2) * ceil_div(width, 2);
  return std::is_same_v<Dot, FloatDot> && side(s.rows) && side(s.columns) && depth % kLanes == 0 &&
      depth >= kWinogradDepth && tiles >= kWinogradTiles;
}

// How a band of results is cut into tiles.
struct WinogradTiles {
  int64_t rows, columns; // of tiles
  int64_t depth; // channels of a group

  WinogradTiles(int64_t result_rows, int64_t result_columns, int64_t depth)
      : rows(ceil_div(result_rows, 2)), columns(ceil_div(result_columns, 2)), depth(depth) {}

  int64_t count() const {
    return rows * columns;
  }
  int64_t source_rows() const { // of values
    return 2 * rows + 2;
  }
  // From element to element of the transformed values, and of the products with `width` channels: no multiple of a
  // page, so that the sixteen do not meet in one set of the cache.
  int64_t plane(int64_t width) const {
    return round_up(count() * width, 1024) + 80;
  }
  // Rows of results that a band takes at a time.
  static int64_t step(int64_t result_columns, int64_t depth) {
    const int64_t row = kWinogradElements * ceil_div(result_columns, 2) * depth * static_cast<int64_t>(sizeof(float));
    return 2 * std::max<int64_t>(kWinogradBytes / row, 1);
  }
};

// packed: [tap][term][width] of one panel; to: [element][term][width].
inline void winograd_weight(const float* packed, int64_t depth, int64_t width, float* to) {
  const int64_t plane = depth * width;
  for (int64_t i = 0; i < plane; i += kLanes) {
    Vec down[4][3]; // G g
    TINYTL_UNROLL
    for (int column = 0; column < 3; ++column) {
      const auto tap = [&](int row) TINYTL_LAMBDA_INLINE {
        return Vec::loadu(packed + (row * 3 + column) * plane + i);
      };
      const Vec outer = (tap(0) + tap(2)) * Vec(0.5f), middle = tap(1) * Vec(0.5f);
      down[0][column] = tap(0);
      down[1][column] = outer + middle;
      down[2][column] = outer - middle;
      down[3][column] = tap(2);
    }
    TINYTL_UNROLL
    for (int row = 0; row < 4; ++row) {
      const Vec outer = (down[row][0] + down[row][2]) * Vec(0.5f), middle = down[row][1] * Vec(0.5f);
      float* target = to + row * 4 * plane + i;
      down[row][0].store(target);
      (outer + middle).store(target + plane);
      (outer - middle).store(target + 2 * plane);
      down[row][2].store(target + 3 * plane);
    }
  }
}

// values: padded rows of `band`, from the group's first channel on; to: [element][tile][depth].
inline void winograd_values(
    const WinogradTiles& tiles, const BandRows<FloatDot>& band, const float* values, float* to) {
  const int64_t line = band.row(), pixel = band.pixel(), plane = tiles.plane(tiles.depth);
  for (int64_t tile = 0; tile < tiles.count(); ++tile) {
    const float* source = values + tile / tiles.columns * 2 * line + tile % tiles.columns * 2 * pixel;
    for (int64_t c = 0; c < tiles.depth; c += kLanes) {
      // Row i of B^T d is one row of d minus or plus another.
      const auto transform = [&](int i, int first, int second, bool minus) TINYTL_LAMBDA_INLINE {
        Vec t[4];
        TINYTL_UNROLL
        for (int j = 0; j < 4; ++j) {
          const Vec a = Vec::loadu(source + first * line + j * pixel + c);
          const Vec b = Vec::loadu(source + second * line + j * pixel + c);
          t[j] = minus ? a - b : a + b;
        }
        float* target = to + i * 4 * plane + tile * tiles.depth + c;
        (t[0] - t[2]).store(target);
        (t[1] + t[2]).store(target + plane);
        (t[2] - t[1]).store(target + 2 * plane);
        (t[1] - t[3]).store(target + 3 * plane);
      };
      transform(0, 0, 2, true);
      transform(1, 1, 2, false);
      transform(2, 2, 1, true);
      transform(3, 1, 3, true);
    }
  }
}

// One panel of results, groups of channels wide: init (null: zeros) + the convolution, rows of 2 * tiles.columns pixels
// of the panel's width. values, weight: transformed; products: kWinogradElements * tiles.plane(width) floats.
inline void winograd_panel(
    int groups,
    const WinogradTiles& tiles,
    const float* values,
    const float* weight,
    const float* init,
    float* products,
    float* results) {
  const int64_t width = static_cast<int64_t>(groups) * kGroup, depth = tiles.depth;
  const int64_t value_plane = tiles.plane(depth), plane = tiles.plane(width);
  const int64_t pieces = ceil_div(depth, kChainDepth);
  std::vector<Segment<float>> segments(pieces);
  for (int64_t e = 0; e < kWinogradElements; ++e) {
    for (int64_t i = 0; i < pieces; ++i) {
      const int64_t begin = depth * i / pieces, end = depth * (i + 1) / pieces;
      segments[i] = {values + e * value_plane + begin, depth, end - begin};
    }
    const AddToTensor<float> epilogue{products + e * plane, width, width};
    gemm_panel<FloatDot>(
        groups, tiles.count(), segments.data(), pieces, weight + e * depth * width, nullptr, epilogue);
  }
  const int64_t line = 2 * tiles.columns * width;
  for (int64_t tile = 0; tile < tiles.count(); ++tile) {
    float* target = results + tile / tiles.columns * 2 * line + tile % tiles.columns * 2 * width;
    for (int64_t c = 0; c < width; c += kLanes) {
      const float* source = products + tile * width + c;
      const Vec start = init != nullptr ? Vec::loadu(init + c) : Vec(0.f);
      Vec upper[4], lower[4];
      TINYTL_UNROLL
      for (int j = 0; j < 4; ++j) {
        const auto element = [&](int i) TINYTL_LAMBDA_INLINE { return Vec::loadu(source + (i * 4 + j) * plane); };
        const Vec inner = element(1) + element(2), outer = element(1) - element(2);
        upper[j] = element(0) + inner;
        lower[j] = outer - element(3);
      }
      (start + upper[0] + (upper[1] + upper[2])).store(target + c);
      (start + (upper[1] - upper[2]) - upper[3]).store(target + width + c);
      (start + lower[0] + (lower[1] + lower[2])).store(target + line + c);
      (start + (lower[1] - lower[2]) - lower[3]).store(target + line + width + c);
    }
  }
}

// The packed weights of units [first, last), transformed.
template <class Units>
at::Tensor winograd_weights(const Units& packing, int64_t first, int64_t last, const float* packed) {
  const auto& panels = packing.panels;
  const auto place = [&](int64_t unit) { return (packing.offset(unit) - packing.offset(first)) / kWinogradTaps; };
  const at::Tensor transformed = empty_tensor({kWinogradElements * place(last)}, at::kFloat);
  float* to = transformed.data_ptr<float>();
  parallel_pieces(first, last, 1, [&](int64_t begin, int64_t end) {
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t width = panels.width(unit % panels.count);
      winograd_weight(
          packed + kWinogradTaps * place(unit), packing.depth, width, to + kWinogradElements * place(unit));
    }
  });
  return transformed;
}

// Calls body(first unit, end unit, their packed weights, the same transformed) until all are done;
// transformed is undefined where `winograd` is false.
template <class Units, class Body>
void for_weights(const Units& packing, bool winograd, const Body& body) {
  const int64_t bytes = winograd ? kWinogradPackedBytes : kPackedBytes;
  packing.for_packed(bytes, [&](int64_t first, int64_t last, const typename Units::Element* packed) {
    at::Tensor transformed;
    if constexpr (std::is_same_v<typename Units::Element, float>) {
      if (winograd) {
        transformed = winograd_weights(packing, first, last, packed);
      }
    }
    body(first, last, packed, transformed);
  });
}

// A band of results of units [first, last): finish(group, panel, results), rows of 2 * tiles.columns pixels of the
// panel's width. rows: the band's padded values; init(group, panel): start values of the panel, or null.
template <class Units, class Init, class Finish>
void winograd_units(
    const Units& packing,
    int64_t first,
    int64_t last,
    const at::Tensor& weights,
    const BandRows<FloatDot>& band,
    const WinogradTiles& tiles,
    const float* rows,
    const Init& init,
    const Finish& finish) {
  const auto& panels = packing.panels;
  const int64_t widest = panels.width(0), products = kWinogradElements * tiles.plane(widest);
  float* values = scratch<float>(kOperand, kWinogradElements * tiles.plane(tiles.depth));
  float* sums = scratch<float>(kSums, products + 4 * tiles.count() * widest);
  int64_t transformed = -1; // the group that `values` are of
  const float* weight = weights.data_ptr<float>();
  for (int64_t unit = first; unit < last; ++unit) {
    const int64_t group = unit / panels.count, panel = unit % panels.count;
    if (group != transformed) {
      winograd_values(tiles, band, rows + group * band.depth(), values);
      transformed = group;
    }
    winograd_panel(panels.groups(panel), tiles, values, weight, init(group, panel), sums, sums + products);
    finish(group, panel, sums + products);
    weight += kWinogradElements * panels.width(panel) * tiles.depth;
  }
}

} // namespace tinytl::cpu
