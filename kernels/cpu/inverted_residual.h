// The inverted residual block as one operator: shapes, packed weights, and how the work is cut.
//
//     h1 = act(x We + be)               1x1 expand        (N, H, W, E);   absent when E == C_in and no weight is given
//     h2 = act(depthwise(h1, Wd) + bd)  k x k, stride s   (N, H', W', E)
//     y  = h2 Wp + bp [+ x]             1x1 project       (N, H', W', C_out)
//
// h1 and h2 never reach memory: a task walks down the rows of one image (or of a band of it), and for one panel of
// expanded channels at a time computes the new rows of h1 into a ring, the rows of h2 that they complete into a row
// buffer, and, once all panels are there, those rows of y. Backward is the mirror image with the weights transposed.
#pragma once

#include "bitmask.h"
#include "common.h"
#include "depthwise.h"
#include "frozen_weight.h"
#include "gemm.h"
#include "parallel.h"
#include "scratch.h"
#include "sparse_gemm.h"

#include <cstring>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

namespace tinytl::cpu {

struct BlockShape {
  int64_t batch, in_channels, height, width; // x
  int64_t expanded; // E
  int64_t out_channels, out_height, out_width; // y
  int64_t kernel_height, kernel_width, stride;
  int64_t pad_top, pad_left;
  bool has_expand, residual;
  Activation activation;

  int64_t taps() const {
    return kernel_height * kernel_width;
  }
  bool masks() const { // whether an activation blocks anything
    return activation != Activation::none;
  }
  bool masks_expand() const {
    return masks() && has_expand;
  }
  int64_t expand_mask_size() const { // bytes
    return masks_expand() ? batch * height * width * mask_bytes(expanded) : 0;
  }
  int64_t depthwise_mask_size() const {
    return masks() ? batch * out_height * out_width * mask_bytes(expanded) : 0;
  }
  int64_t masks_size() const {
    return expand_mask_size() + depthwise_mask_size();
  }
  int64_t input_elements() const { // of an image
    return height * width * in_channels;
  }
  int64_t output_elements() const {
    return out_height * out_width * out_channels;
  }
  Window window() const {
    return {kernel_height, kernel_width, stride, stride, 1, 1, pad_top, pad_left};
  }
};

// Checks everything that the kernels rely on and raises an error that names the argument otherwise.
BlockShape block_shape(
    at::IntArrayRef input_size,
    const OptionalTensor& expand_weight,
    const at::Tensor& depthwise_weight,
    const at::Tensor& project_weight,
    int64_t stride,
    at::IntArrayRef padding,
    const std::string& activation,
    bool residual);

// Packed weights of one direction, in one byte tensor: the GEMM into the expanded channels, the depthwise taps as
// [group][tap][kGroup], the GEMM out of them (in wide panels), and whether that has anything that is not finite.
template <class Dot>
struct BlockPack {
  using Element = typename Dot::Element;
  int64_t into_elements, depthwise_elements, out_elements;

  static BlockPack forward(const BlockShape& s) {
    return {
        s.has_expand ? packed_elements<Dot>(s.in_channels, s.expanded) : 0,
        s.taps() * padded_channels(s.expanded),
        packed_elements<Dot>(padded_channels(s.expanded), s.out_channels)};
  }
  // with_out: the GEMM out of them is packed, too.
  static BlockPack backward(const BlockShape& s, bool with_out) {
    return {
        // Either way round: as columns of a product, or as rows that dot products are made with.
        std::max(
            packed_elements<Dot>(s.out_channels, s.expanded),
            padded_channels(s.expanded) * padded_channels(s.out_channels)),
        s.taps() * padded_channels(s.expanded),
        s.has_expand && with_out ? packed_elements<Dot>(padded_channels(s.expanded), s.in_channels) : 0};
  }

  int64_t depthwise_at() const { // byte offsets, 64-byte aligned
    return round_up(into_elements * sizeof(Element), 64);
  }
  int64_t out_at() const {
    return depthwise_at() + round_up(depthwise_elements * sizeof(float), 64);
  }
  int64_t spoiled_at() const {
    return out_at() + out_elements * sizeof(Element);
  }
  int64_t bytes() const {
    return spoiled_at() + 1;
  }
  Element* into(const at::Tensor& packed) const {
    return reinterpret_cast<Element*>(packed.data_ptr<uint8_t>());
  }
  float* depthwise(const at::Tensor& packed) const {
    return reinterpret_cast<float*>(packed.data_ptr<uint8_t>() + depthwise_at());
  }
  Element* out(const at::Tensor& packed) const {
    return reinterpret_cast<Element*>(packed.data_ptr<uint8_t>() + out_at());
  }
  uint8_t* spoiled(const at::Tensor& packed) const {
    return packed.data_ptr<uint8_t>() + spoiled_at();
  }
};

// How many rows a task advances at a time, and the ring that this takes.
struct Walk {
  int64_t step_rows; // rows of the walked side a step
  int64_t ring_rows; // rows of the other side alive at once
  int64_t ring_pitch; // pixels of a ring row, zero columns included
  int64_t ring_left; // zero columns at the left

  int64_t area() const { // pixels of one group's ring
    return ring_rows * ring_pitch;
  }
  int64_t plane() const { // elements of it
    return area() * kGroup;
  }
  int64_t pixel(int64_t row) const { // where a row begins, without the zeros beside it
    return row % ring_rows * ring_pitch + ring_left;
  }
  RingView view(const float* ring) const {
    return {ring, ring_rows, ring_pitch, ring_left};
  }

  bool shared_ring; // a task is a single step, so one panel's ring serves all panels in turn

  // As many rows a step as leave the scratch memory within its budget. rows_of(rows): rows of the ring that a step of so
  // many takes; row_bytes: of a row of the walked side.
  template <class RowsOf>
  void fit(const Panels& panels, int64_t task_rows, int64_t row_bytes, const RowsOf& rows_of) {
    const auto bytes = [&](int64_t rows, int64_t ring_channels) {
      return rows_of(rows) * ring_pitch * ring_channels * int64_t(sizeof(float)) + rows * row_bytes;
    };
    shared_ring = bytes(task_rows, panels.width(0)) <= kScratchBudget;
    step_rows = task_rows;
    while (!shared_ring && step_rows > 1 && bytes(step_rows, panels.padded()) > kScratchBudget) {
      --step_rows;
    }
    ring_rows = rows_of(step_rows);
  }
};

// The two buffers of a task in one piece of scratch memory: a block with a large ring has few rows, and the other way
// round, and two pieces would each keep the largest of their kind.
template <class Element>
std::pair<float*, Element*> rings_and_rows(int64_t ring_elements, int64_t row_elements) {
  const int64_t ring_bytes = round_up(ring_elements * sizeof(float), 64);
  uint8_t* piece = scratch<uint8_t>(kRows, ring_bytes + row_elements * sizeof(Element));
  return {reinterpret_cast<float*>(piece), reinterpret_cast<Element*>(piece + ring_bytes)};
}

// Zeroes the border columns of the rings of `groups` groups, inner columns [left, left + inner).
inline void clear_borders(float* ring, int64_t groups, const Walk& walk, int64_t inner) {
  // A few columns a row: calls of memset, which a compiler makes of zeros that it knows, cost more than storing them.
  alignas(64) static const float zeros[kLanes] = {};
  const Vec zero = load_once(zeros);
  const auto clear = [&](float* from, int64_t columns) {
    for (int64_t c = 0; c < columns * kGroup; c += kLanes) {
      zero.store(from + c);
    }
  };
  const int64_t right = walk.ring_left + inner;
  for (int64_t r = 0; r < groups * walk.ring_rows; ++r) {
    float* row = ring + r * walk.ring_pitch * kGroup;
    clear(row, walk.ring_left);
    clear(row + right * kGroup, walk.ring_pitch - right);
  }
}

// The rings of a task's panels: one each, or one that serves all in turn. inner: columns between the zeros.
class PanelRings {
 public:
  PanelRings(float* data, const Panels& panels, const Walk& walk, int64_t inner)
      : data_(data), panels_(panels), walk_(walk), inner_(inner) {
    for (int64_t p = 0; !walk.shared_ring && p < panels.count; ++p) {
      clear_borders(of(p), panels.groups(p), walk, inner);
    }
  }
  // Elements that this takes.
  static int64_t elements(const Panels& panels, const Walk& walk) {
    return walk.area() * (walk.shared_ring ? panels.width(0) : panels.padded());
  }
  // The ring of a panel whose rows come next. read: what they complete is read, zeros included.
  float* next(int64_t panel, bool read) const {
    float* ring = of(panel);
    if (walk_.shared_ring && read) {
      clear_borders(ring, panels_.groups(panel), walk_, inner_);
    }
    return ring;
  }

 private:
  float* data_;
  const Panels& panels_;
  const Walk& walk_;
  int64_t inner_;

  float* of(int64_t panel) const {
    return walk_.shared_ring ? data_ : data_ + panels_.start(panel) * walk_.area();
  }
};

// Ring position, in pixels, of every pixel of rows [begin, end).
inline const int64_t* ring_offsets(int64_t begin, int64_t end, int64_t width, const Walk& walk) {
  int64_t* offsets = scratch<int64_t>(kOffsets, (end - begin) * width);
  int64_t* next = offsets;
  for (int64_t row = begin; row < end; ++row) {
    const int64_t base = walk.pixel(row);
    for (int64_t column = 0; column < width; ++column) {
      *next++ = base + column;
    }
  }
  return offsets;
}

// The three weights as they are stored.
struct BlockWeights {
  std::optional<FrozenWeight> expand;
  FrozenWeight depthwise, project;

  BlockWeights(
      const OptionalTensor& expand_weight,
      const OptionalTensor& expand_scale,
      const at::Tensor& depthwise_weight,
      const OptionalTensor& depthwise_scale,
      const at::Tensor& project_weight,
      const OptionalTensor& project_scale);
};

// One bit an expanded value, twice: what a block's forward leaves its backward. Empty where there is nothing to know.
struct BlockMasks {
  at::Tensor expand, depthwise;

  BlockMasks(at::Tensor expand, at::Tensor depthwise) : expand(std::move(expand)), depthwise(std::move(depthwise)) {}
  // Fresh ones beside `x`, if `wanted`.
  BlockMasks(const BlockShape& s, const at::Tensor& x, bool wanted)
      : expand(empty_mask(x, wanted && s.masks_expand(), s.batch, s.height, s.width, s.expanded)),
        depthwise(empty_mask(x, wanted && s.masks(), s.batch, s.out_height, s.out_width, s.expanded)) {}
  // Where a forward writes them; null where it does not.
  static uint8_t* bytes(const at::Tensor& mask) {
    return data_or_null<uint8_t>(mask);
  }
  // Where a backward reads them, checked; null where everything passes.
  const uint8_t* checked_expand(const BlockShape& s) const {
    return checked_mask(expand, "mask_expand", s.masks_expand(), s.batch, s.height, s.width, s.expanded);
  }
  const uint8_t* checked_depthwise(const BlockShape& s) const {
    return checked_mask(depthwise, "mask_depthwise", s.masks(), s.batch, s.out_height, s.out_width, s.expanded);
  }
};

// Packed weights of one direction, laid out as BlockPack says: once `packing` is done, for which the weights that they
// are made of must still be there.
struct PackedWeights {
  at::Tensor data;
  std::vector<Tasks> packing;
  // Of a backward: whether the projection is packed for gemm_to_selected; the expansion's weight where it serves as it is
  // stored, else null.
  bool dots = false;
  const float* stored_expand = nullptr;
};

// For activations of `dtype`. The projection only where `with_project`.
PackedWeights pack_block_forward(
    const BlockShape& s, const BlockWeights& weights, at::ScalarType dtype, bool with_project = true);
// The expansion only where the input's gradient is wanted: nothing else multiplies by it. mask_depthwise: what of the
// projection's input gradient passes; null: all.
PackedWeights pack_block_backward(
    const BlockShape& s,
    const BlockWeights& weights,
    at::ScalarType dtype,
    bool need_input,
    const uint8_t* mask_depthwise);

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> inverted_residual_forward(
    const at::Tensor& x,
    const OptionalTensor& expand_weight,
    const OptionalTensor& expand_scale,
    const OptionalTensor& expand_bias,
    const at::Tensor& depthwise_weight,
    const OptionalTensor& depthwise_scale,
    const OptionalTensor& depthwise_bias,
    const at::Tensor& project_weight,
    const OptionalTensor& project_scale,
    const OptionalTensor& project_bias,
    int64_t stride,
    at::IntArrayRef padding,
    const std::string& activation,
    bool residual,
    bool needs_mask,
    bool want_pooled);

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> inverted_residual_backward(
    const at::Tensor& grad_output,
    const at::Tensor& mask_expand,
    const at::Tensor& mask_depthwise,
    const OptionalTensor& expand_weight,
    const OptionalTensor& expand_scale,
    const at::Tensor& depthwise_weight,
    const OptionalTensor& depthwise_scale,
    const at::Tensor& project_weight,
    const OptionalTensor& project_scale,
    at::IntArrayRef input_size,
    int64_t stride,
    at::IntArrayRef padding,
    const std::string& activation,
    bool residual,
    bool need_input,
    bool need_expand_bias,
    bool need_depthwise_bias,
    bool need_project_bias,
    const OptionalTensor& grad_pooled);

} // namespace tinytl::cpu
