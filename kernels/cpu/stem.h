// The first two layers of a network as one block: its stem, a dense k x k convolution of an image's few channels, is
// the expansion of the inverted residual behind it, so that what the stem makes, the largest tensor of many a network,
// never reaches memory.
//
//     h1[p, n] = act(be[n] + sum over window positions w, channels c of  image[s p + w, c] We[n, w, c])
//
// This is the 1x1 GEMM of the expansion with the values of the window as its terms: the pixels of a row of h1 read runs
// of the same padded rows, one stride apart, so that a run is a segment of A (gemm.h) and no im2col matrix exists.
#pragma once

#include "dense_conv.h"

#include <vector>

namespace tinytl::cpu {

template <class T>
struct Stem {
  using Dot = typename DotFor<T>::type;
  using Element = typename Dot::Element;

  DenseShape shape;
  const T* images; // channels_last
  BandRows<Dot> band;
  std::vector<WindowRun> runs;

  Stem(const DenseShape& shape, const T* images)
      : shape(shape), images(images), band(input_rows<Dot>(shape)), runs(window_runs(forward_phases(shape)[0], band)) {}

  int64_t segments() const {
    return static_cast<int64_t>(runs.size());
  }
  // The rows that rows [begin, end) of h1 read, padded.
  const Element* rows(int64_t image, int64_t begin, int64_t end) const {
    const int64_t count = (end - begin - 1) * shape.rows.stride + shape.rows.kernel;
    Element* padded = scratch<Element>(kOperand, count * band.row());
    const int64_t first = begin * shape.rows.stride - shape.rows.before;
    pad_rows(shape, band, images + image * shape.image_elements(), first, count, padded);
    return padded;
  }
  // A of the row of h1 that is `row` behind the first one that `padded` is for.
  void operands(const Element* padded, int64_t row, Segment<Element>* to) const {
    for (const WindowRun& run : runs) {
      const Element* first = padded + row * shape.rows.stride * band.row() + run.offset;
      *to++ = {first, shape.columns.stride * band.pixel(), run.depth};
    }
  }
};

// How many terms a result of it has, for activations of `dtype`: what the block behind it takes for its input channels.
inline int64_t stem_terms(const DenseShape& stem, at::ScalarType dtype) {
  int64_t depth = 0;
  with_storage_type(dtype, "image", [&](auto zero) {
    depth = packed_depth<typename DotFor<decltype(zero)>::type>(stem.in_channels);
  });
  return stem.taps() * depth;
}

// The weight (O, C, kh, kw) of a stem as that of the expansion, (O, terms, 1, 1), the terms in the order of `runs`.
inline at::Tensor stem_matrix(const DenseShape& stem, const at::Tensor& weight, at::ScalarType dtype) {
  const int64_t terms = stem_terms(stem, dtype), depth = terms / stem.taps();
  at::Tensor matrix = zero_tensor(
      {stem.out_channels, stem.rows.kernel, stem.columns.kernel, depth}, weight.options().memory_format(std::nullopt));
  matrix.narrow(3, 0, stem.in_channels).copy_(weight.permute({0, 2, 3, 1}));
  return matrix.view({stem.out_channels, terms, 1, 1});
}

} // namespace tinytl::cpu
