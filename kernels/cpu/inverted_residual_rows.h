// What the tasks of a block are made of: rows of one panel of expanded channels, forward and backward. The inverted
// residual (formula in inverted_residual.h) goes down the rows of an image with them, and so does the block with
// squeeze-and-excite (mbconv.h), which stops between depthwise and projection.
#pragma once

#include "inverted_residual.h"

#include <algorithm>
#include <array>
#include <vector>

namespace tinytl::cpu {

template <class T>
struct Stem;

// Bands of rows of h2, and of rows of h1 in backward.
inline Bands output_bands(const BlockShape& s) {
  return {s.batch, s.out_height, ceil_div(std::max<int64_t>(s.kernel_height - s.stride, 0), s.stride)};
}
inline Bands input_bands(const BlockShape& s) {
  return {s.batch, s.height, ceil_div(s.kernel_height - 1, s.stride)};
}

// Rows [first, end) of one side, not cut to those that there are.
struct Reads {
  int64_t first, end;
};

// The images of a tensor, one behind the other; or each at a place of its own, in a buffer that has fewer places than
// there are images.
template <class T>
struct Images {
  T* data = nullptr; // null: not wanted
  int64_t elements = 0; // from place to place
  const int64_t* places = nullptr; // of each image

  T* at(int64_t image) const {
    return data + (places != nullptr ? places[image] : image) * elements;
  }
};

template <class T>
struct BlockForward {
  using Dot = typename DotFor<T>::type;
  using Element = typename Dot::Element;

  BlockShape s;
  Panels panels; // of the expanded channels
  Panels out_panels; // wide
  Images<const T> x;
  const Element* expand;
  const float* depthwise;
  const Element* project;
  const uint8_t* spoiled; // 1: `project` has values that are not finite
  const float *expand_bias, *depthwise_bias, *project_bias; // null: zeros
  Images<T> out;
  uint8_t *mask_expand, *mask_depthwise; // null: not wanted
  T* pooled; // null: not wanted
  const Stem<T>* stem; // null: the expansion is 1x1
  ColumnRuns columns = forward_columns(s.window());

  // How a task goes down that many output rows, and the rows of h1 that some of them read.
  Walk walk(int64_t task_rows) const;
  Reads reads(int64_t row, int64_t row_end) const {
    return {row * s.stride - s.pad_top, (row_end - 1) * s.stride - s.pad_top + s.kernel_height};
  }
  // Rows [begin, end) of h1, one panel, into the ring. Mask bits are written for rows before mask_end only: the rows
  // after it belong to the next band.
  void expand_rows(
      int64_t image,
      int64_t panel,
      int64_t begin,
      int64_t end,
      int64_t mask_end,
      float* ring,
      int64_t plane,
      const int64_t* offsets,
      const Segment<Element>& operand,
      Segment<Element>* segments) const;
  // Rows [begin, end) of h2, one panel, from the ring into `rows`.
  void depthwise_rows(
      int64_t image, int64_t panel, int64_t begin, int64_t end, const float* ring, Element* rows, const Walk& walk, TapRun* runs)
      const;
  // Rows [begin, end) of y from all panels of h2. row_pixels: pixels that each panel of `rows` has room for; first: the
  // one of row `begin`.
  void project_rows(
      int64_t image,
      int64_t begin,
      int64_t end,
      const Element* rows,
      int64_t row_pixels,
      Segment<Element>* segments,
      int64_t first = 0) const;
  // Output rows [begin, end) of an image. Input rows [own_begin, own_end) are this task's to mask and to pool.
  void task(int64_t image, int64_t begin, int64_t end, int64_t own_begin, int64_t own_end) const;
  void task(int64_t image) const { // all of it
    task(image, 0, s.out_height, 0, s.height);
  }
  // All images, or bands of their rows, on all threads.
  void run() const;
};

// Of expand, depthwise and project; empty where they are not wanted.
using BiasGradients = std::array<at::Tensor, 3>;

template <class T>
struct BlockBackward {
  using Dot = typename DotFor<T>::type;
  using Element = typename Dot::Element;

  BlockShape s;
  Panels panels; // of the expanded channels
  Panels in_panels; // wide
  Images<const T> grad_output;
  const uint8_t *mask_expand, *mask_depthwise; // null: everything passes
  const Element* project;
  bool dots; // it is packed for gemm_to_selected
  const float* depthwise;
  const Element* expand;
  const uint8_t* spoiled; // 1: `expand` has values that are not finite
  const T* grad_pooled; // null: none
  Images<T> grad_input;
  bool need_expand_bias, need_depthwise_bias, need_project_bias;
  std::vector<ColumnRuns> columns = transposed_phases(s.window(), s.width); // of each stride phase

  bool needs_g1() const {
    return grad_input.data != nullptr || (need_expand_bias && s.has_expand);
  }
  bool needs_g2() const {
    return needs_g1() || need_depthwise_bias;
  }
  // How a task goes down that many input rows, and the rows of g2 that some of them read.
  Walk walk(int64_t task_rows) const;
  Reads reads(int64_t row, int64_t row_end) const {
    return {
        ceil_div(row + s.pad_top - s.kernel_height + 1, s.stride), floor_div(row_end - 1 + s.pad_top, s.stride) + 1};
  }
  // Rows [begin, end) of g2, one panel, into the ring. Rows before sum_end count in the bias gradient; those after it
  // belong to the next band.
  void project_rows(
      int64_t image,
      int64_t panel,
      int64_t begin,
      int64_t end,
      int64_t sum_end,
      float* ring,
      int64_t plane,
      const int64_t* offsets,
      const Segment<Element>& operand,
      float* sums) const;
  // Rows [begin, end) of g1, one panel, from the ring into `rows`. Each stride phase of a row has its own taps.
  void transposed_depthwise_rows(
      int64_t image,
      int64_t panel,
      int64_t begin,
      int64_t end,
      const float* ring,
      Element* rows,
      const Walk& walk,
      TapRun* runs,
      float* sums) const;
  // Element offset in grad_pooled of every pixel of input rows [begin, end), -1 for an odd last row or column.
  const int64_t* pooled_offsets(int64_t image, int64_t begin, int64_t end) const;
  // Rows [begin, end) of dx from all panels of g1.
  void expand_rows(
      int64_t image,
      int64_t begin,
      int64_t end,
      const Element* rows,
      int64_t row_pixels,
      Segment<Element>* segments) const;
  // sums += dy over the pixels of output rows [begin, end), a row at a time.
  void sum_output_rows(int64_t image, int64_t begin, int64_t end, float* sums) const;
  // Input rows [begin, end) of an image. Output rows [own_begin, own_end) are this task's to sum. partial: zeros on
  // entry; bias gradients of the expanded channels (depthwise, expand), then of the output channels.
  void task(int64_t image, int64_t begin, int64_t end, int64_t own_begin, int64_t own_end, float* partial) const;
  void task(int64_t image, float* partial) const { // all of it
    task(image, 0, s.height, 0, s.out_height, partial);
  }

  // All images, or bands of their rows, on all threads. partial: of every task, (tasks, sums).
  void run(const at::Tensor& partial) const;
  at::Tensor partial() const { // zeros
    return zero_tensor({input_bands(s).tasks(), 2 * panels.padded() + padded_channels(s.out_channels)}, at::kFloat);
  }
  BiasGradients bias_gradients(const at::Tensor& partial) const {
    return {
        reduce_partial(partial, panels.padded(), s.expanded, need_expand_bias && s.has_expand),
        reduce_partial(partial, 0, s.expanded, need_depthwise_bias),
        reduce_partial(partial, 2 * panels.padded(), s.out_channels, need_project_bias)};
  }
};

// A block's forward without masks and without a pooled image. x: channels_last; weights, biases: packed and padded;
// out: null where nothing is projected.
template <class T>
BlockForward<T> block_forward(
    const BlockShape& s,
    const T* x,
    const at::Tensor& weights,
    const at::Tensor& expand_bias,
    const at::Tensor& depthwise_bias,
    const at::Tensor& project_bias,
    T* out) {
  const auto layout = BlockPack<typename DotFor<T>::type>::forward(s);
  const auto values = [](const at::Tensor& bias) { return bias.defined() ? bias.data_ptr<float>() : nullptr; };
  return {
      s,
      Panels(s.expanded),
      Panels(s.out_channels, kWideGroups),
      {x, s.input_elements()},
      layout.into(weights),
      layout.depthwise(weights),
      layout.out(weights),
      layout.spoiled(weights),
      values(expand_bias),
      values(depthwise_bias),
      values(project_bias),
      {out, s.output_elements()},
      nullptr,
      nullptr,
      nullptr,
      nullptr};
}

// Its backward, of everything that passed. weights: their mask_depthwise is to be set where they were packed for one;
// need_biases: expand, depthwise, project.
template <class T>
BlockBackward<T> block_backward(
    const BlockShape& s,
    const T* grad_output,
    const PackedWeights& weights,
    T* grad_input,
    const std::array<bool, 3>& need_biases) {
  using Element = typename DotFor<T>::type::Element;
  const auto layout = BlockPack<typename DotFor<T>::type>::backward(s, weights.stored_expand == nullptr);
  const Element* expand = layout.out(weights.data);
  if constexpr (std::is_same_v<Element, float>) {
    expand = weights.stored_expand != nullptr ? weights.stored_expand : expand;
  }
  return {
      s,
      Panels(s.expanded),
      Panels(s.in_channels, kWideGroups),
      {grad_output, s.output_elements()},
      nullptr,
      nullptr,
      layout.into(weights.data),
      weights.dots,
      layout.depthwise(weights.data),
      expand,
      layout.spoiled(weights.data),
      nullptr,
      {grad_input, s.input_elements()},
      need_biases[0],
      need_biases[1],
      need_biases[2]};
}

// Which rows of h1 a band of rows of h2 owns, and the other way round in backward: from the first that the band's first
// row reads to where the next band starts.
inline int64_t first_owned_input(const BlockShape& s, const Bands& bands, int64_t band) {
  if (band == 0 || band == bands.per_image) {
    return band == 0 ? int64_t(0) : s.height;
  }
  // Even numbers, so that a pooled row has one owner.
  return std::clamp<int64_t>(floor_div(bands.begin(band) * s.stride - s.pad_top, 2) * 2, 0, s.height);
}

inline int64_t first_owned_output(const BlockShape& s, const Bands& bands, int64_t band) {
  if (band == 0 || band == bands.per_image) {
    return band == 0 ? int64_t(0) : s.out_height;
  }
  const int64_t row = ceil_div(bands.begin(band) + s.pad_top - s.kernel_height + 1, s.stride);
  return std::clamp<int64_t>(row, 0, s.out_height);
}

// Goes down rows [begin, end) of an image: advance(from, to, row, row_end) brings the side that is read, `height` rows,
// from row `from` to row `to`, and the other with it from `row` to `row_end`; finish(row, row_end) is called when those
// are complete. All rows [own_begin, own_end) that are read are passed, also those that nobody needs (a stride beyond
// the kernel, an odd last row). block: its reads(row, row_end).
template <class Block, class Advance, class Finish>
void walk_down(
    const Block& block,
    const Walk& walk,
    int64_t height,
    int64_t begin,
    int64_t end,
    int64_t own_begin,
    int64_t own_end,
    const Advance& advance,
    const Finish& finish) {
  int64_t next = own_begin;
  const auto advance_to = [&](int64_t to, int64_t row, int64_t row_end) {
    advance(next, to, row, row_end);
    next = to;
  };
  const auto skip_to = [&](int64_t to) {
    while (next < to) {
      advance_to(std::min(to, next + walk.ring_rows), 0, 0);
    }
  };
  for (int64_t row = begin; row < end; row += walk.step_rows) {
    const int64_t row_end = std::min(row + walk.step_rows, end);
    const Reads read = block.reads(row, row_end);
    skip_to(std::min(read.first, height));
    advance_to(std::clamp(read.end, next, height), row, row_end);
    finish(row, row_end);
  }
  skip_to(own_end);
}

extern template struct BlockForward<float>;
extern template struct BlockForward<c10::BFloat16>;
extern template struct BlockForward<c10::Half>;
extern template struct BlockBackward<float>;
extern template struct BlockBackward<c10::BFloat16>;
extern template struct BlockBackward<c10::Half>;

} // namespace tinytl::cpu
