// Inverted residual blocks in a row, image by image: an image goes through all of them while others are elsewhere, and
// no thread waits until a block is complete. Block by block, threads of unequal speed wait a tenth of the time.
//
// What lies between two blocks is not kept, and lives in two buffers that the blocks use in turn, of the few images that
// are under way at a time: of a network's first blocks it never leaves a core's cache. The weights of all blocks are
// packed beside each other, and the masks of none are freed before all have had their backward. So that this takes no
// memory, a chain is cut into segments, none of which needs more than the chain's largest block does alone.
#pragma once

#include "dense_conv.h"
#include "inverted_residual.h"

#include <array>
#include <optional>
#include <tuple>
#include <vector>

namespace tinytl::cpu {

struct ChainedBlock {
  BlockShape shape;
  // The first block's expansion may be a network's stem (stem.h); the chain's input is an image without a gradient then.
  std::optional<DenseShape> stem;
  // Of expand, depthwise and project. Scales: of weights in 8 bits.
  std::array<OptionalTensor, 3> weights, biases, scales;
  bool needs_masks;

  int64_t input_elements() const { // of an image
    return stem.has_value() ? stem->image_elements() : shape.input_elements();
  }
};

// Where the segments of one block or more end: the index behind the last block of each. dtype: of the activations.
std::vector<size_t> chain_segments(const std::vector<ChainedBlock>& blocks, at::ScalarType dtype);

// The last block's output; the masks of all blocks, in one tensor of bytes; and, where it is wanted, the 2x2 average of x,
// of a single block.
std::tuple<at::Tensor, at::Tensor, at::Tensor> chain_forward(
    const at::Tensor& x, const std::vector<ChainedBlock>& blocks, bool want_pooled);

struct ChainGradients {
  at::Tensor input; // undefined where it is not wanted
  std::vector<std::array<at::Tensor, 3>> biases; // of each block; empty tensors, or none at all, where not wanted
};

// need_biases: of each block, of expand, depthwise and project. grad_pooled: of a single block.
ChainGradients chain_backward(
    const at::Tensor& grad_output,
    const std::vector<ChainedBlock>& blocks,
    const at::Tensor& masks,
    bool need_input,
    const std::vector<std::array<bool, 3>>& need_biases,
    const OptionalTensor& grad_pooled);

} // namespace tinytl::cpu
