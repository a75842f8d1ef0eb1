// See inverted_residual_chain.h.
#include "inverted_residual_chain.h"

#include "inverted_residual_rows.h"
#include "parallel.h"
#include "stem.h"

#include <algorithm>
#include <tuple>
#include <type_traits>
#include <utility>

namespace tinytl::cpu {
namespace {

// Packed weights of all blocks, in one pass.
template <class Pack>
std::vector<PackedWeights> pack_all(size_t count, const Pack& pack) {
  std::vector<PackedWeights> packed;
  std::vector<Tasks> packing;
  for (size_t k = 0; k < count; ++k) {
    packed.push_back(pack(k));
    packing.insert(packing.end(), packed.back().packing.begin(), packed.back().packing.end());
  }
  parallel_tasks(packing);
  return packed;
}

// As the kernels of either direction take them. Nothing is multiplied by a stem backward.
std::vector<BlockWeights> stored_weights(const std::vector<ChainedBlock>& blocks, at::ScalarType dtype, bool backward) {
  std::vector<BlockWeights> stored;
  for (const ChainedBlock& block : blocks) {
    const auto& [weights, scales] = std::tie(block.weights, block.scales);
    OptionalTensor expand = weights[0], expand_scale = scales[0];
    if (block.stem.has_value()) {
      expand = backward ? std::nullopt : OptionalTensor(stem_matrix(*block.stem, *expand, dtype));
      expand_scale = backward ? std::nullopt : expand_scale;
    }
    stored.emplace_back(expand, expand_scale, *weights[1], scales[1], *weights[2], scales[2]);
  }
  return stored;
}

std::array<int64_t, 4> pooled_size(const BlockShape& s) {
  return {s.batch, s.in_channels, s.height / 2, s.width / 2};
}

// Images that a thread has under way at once. As few as can be, so that what lies between blocks stays in cache and takes
// little memory; but a thread reads the packed weights of all blocks, that many bytes, again for every wave of images, and
// where they do not stay in its cache, they are to be read seldom.
int64_t images_under_way(int64_t packed_bytes) {
  return std::max<int64_t>(ceil_div(packed_bytes, kScratchBudget), 1);
}

// What one block after the other makes and the next one reads, between a first and a last tensor: two buffers in turn,
// with a place for every image; with waves, for every image that is under way.
class Between {
 public:
  // elements: of an image of each tensor.
  Between(
      int64_t images, std::optional<Waves>& waves, const std::vector<int64_t>& elements, const at::TensorOptions& options)
      : place_(waves.has_value() ? waves->place() : nullptr) {
    const int64_t places = waves.has_value() ? waves->places() : images;
    for (size_t i = 0; i < elements.size(); ++i) {
      image_[i % 2] = std::max(image_[i % 2], elements[i]);
    }
    for (int side = 0; side < 2; ++side) {
      buffers_[side] = empty_tensor({places, image_[side]}, options);
    }
  }
  template <class T>
  Images<T> images(size_t i) const {
    return {buffers_[i % 2].data_ptr<std::remove_const_t<T>>(), image_[i % 2], place_};
  }

 private:
  const int64_t* place_; // of each image; null: one behind the other
  std::array<int64_t, 2> image_{};
  std::array<at::Tensor, 2> buffers_;
};

// Whether blocks [first, last] are computed image by image: where there is more than one, and whole images are what
// threads share. Else they share bands of rows, and wait for each other between two blocks.
bool by_image(const std::vector<ChainedBlock>& blocks, size_t first, size_t last) {
  return last > first && std::all_of(blocks.begin() + first, blocks.begin() + last + 1, [](const ChainedBlock& block) {
    return output_bands(block.shape).per_image == 1 && input_bands(block.shape).per_image == 1;
  });
}

// Of `blocks`, where they are computed image by image.
std::optional<Waves> waves_of(const std::vector<ChainedBlock>& blocks, const std::vector<PackedWeights>& packed) {
  if (!by_image(blocks, 0, blocks.size() - 1)) {
    return std::nullopt;
  }
  int64_t bytes = 0;
  for (const PackedWeights& weights : packed) {
    bytes += static_cast<int64_t>(weights.data.nbytes());
  }
  return Waves(blocks[0].shape.batch, images_under_way(bytes));
}

// Where the masks of blocks are in one tensor, beside each other. expand, depthwise: -1 where there is none.
struct MaskPlaces {
  struct Pair {
    int64_t expand = -1, depthwise = -1;
  };
  std::vector<Pair> of;
  int64_t bytes = 0;

  explicit MaskPlaces(const std::vector<ChainedBlock>& blocks) {
    const auto place = [&](int64_t size) { return size > 0 ? std::exchange(bytes, bytes + size) : -1; };
    for (const ChainedBlock& block : blocks) {
      Pair& pair = of.emplace_back();
      if (block.needs_masks) {
        pair.expand = place(block.shape.expand_mask_size());
        pair.depthwise = place(block.shape.depthwise_mask_size());
      }
    }
  }
  static uint8_t* at(const at::Tensor& masks, int64_t place) {
    return place >= 0 ? masks.data_ptr<uint8_t>() + place : nullptr;
  }
};

// Bytes that blocks [first, last] need at once, beside the masks of the blocks before them and the chain's input: in
// backward, and in forward if that is not less. An image is always the caller's, and has no gradient.
int64_t segment_bytes(const std::vector<ChainedBlock>& blocks, size_t first, size_t last, at::ScalarType dtype) {
  const int64_t element = static_cast<int64_t>(c10::elementSize(dtype));
  const auto images = [&](int64_t elements) { return blocks[first].shape.batch * elements * element; };
  int64_t bytes = images(blocks[last].shape.output_elements());
  if (!blocks[first].stem.has_value()) {
    bytes += images(blocks[first].shape.input_elements());
  }
  int64_t packed = 0;
  std::array<int64_t, 2> between{};
  for (size_t k = first; k <= last; ++k) {
    const BlockShape& s = blocks[k].shape;
    if (k < last) {
      between[k % 2] = std::max(between[k % 2], s.output_elements() * element);
    }
    if (blocks[k].needs_masks) {
      bytes += s.masks_size();
    }
    with_storage_type(dtype, "input", [&](auto zero) {
      packed += BlockPack<typename DotFor<decltype(zero)>::type>::forward(s).bytes();
    });
  }
  const int64_t batch = blocks[first].shape.batch;
  const int64_t places = by_image(blocks, first, last) ? Waves(batch, images_under_way(packed)).places() : batch;
  return bytes + packed + (between[0] + between[1]) * places;
}

} // namespace

std::vector<size_t> chain_segments(const std::vector<ChainedBlock>& blocks, at::ScalarType dtype) {
  // In forward the chain's input is there, too: it is the caller's, and stays. In backward, if there is one, there are
  // gradients of what the caller trains, so that forward may need what backward needs.
  const bool trained = std::any_of(blocks.begin(), blocks.end(), [](const ChainedBlock& b) { return b.needs_masks; });
  const int64_t input = blocks[0].shape.batch * blocks[0].input_elements() * int64_t(c10::elementSize(dtype));
  const auto beside = [&](size_t first) { return first > 0 || blocks[0].stem.has_value() ? input : 0; };
  std::vector<int64_t> masks_before{0}; // bytes
  int64_t forward_limit = 0, backward_limit = 0;
  for (size_t k = 0; k < blocks.size(); ++k) {
    const int64_t bytes = masks_before.back() + segment_bytes(blocks, k, k, dtype);
    backward_limit = std::max(backward_limit, bytes);
    forward_limit = std::max(forward_limit, bytes + beside(k));
    masks_before.push_back(masks_before.back() + (blocks[k].needs_masks ? blocks[k].shape.masks_size() : 0));
  }
  const auto fits = [&](size_t first, size_t last) {
    const int64_t bytes = masks_before[first] + segment_bytes(blocks, first, last, dtype);
    return (!trained || bytes <= backward_limit) && bytes + beside(first) <= forward_limit;
  };
  std::vector<size_t> ends;
  for (size_t first = 0; first < blocks.size();) {
    size_t end = first + 1;
    while (end < blocks.size() && fits(first, end)) {
      ++end;
    }
    ends.push_back(end);
    first = end;
  }
  return ends;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> chain_forward(
    const at::Tensor& input, const std::vector<ChainedBlock>& blocks, bool want_pooled) {
  const at::Tensor x = in_channels_last(input);
  const BlockShape& last = blocks.back().shape;
  at::Tensor out = empty_tensor(
      {last.batch, last.out_channels, last.out_height, last.out_width}, x.options(), at::MemoryFormat::ChannelsLast);
  at::Tensor pooled;
  if (want_pooled) {
    TORCH_CHECK(blocks.size() == 1, "blocks: expected one that pools its input, got ", blocks.size());
    pooled = empty_tensor(pooled_size(last), x.options(), at::MemoryFormat::ChannelsLast);
  }
  const MaskPlaces places(blocks);
  at::Tensor masks = empty_tensor({places.bytes}, x.options().dtype(at::kByte));
  std::vector<std::array<at::Tensor, 3>> biases;
  std::vector<int64_t> elements;
  for (const ChainedBlock& block : blocks) {
    const BlockShape& s = block.shape;
    biases.push_back(
        {padded_bias(block.biases[0], s.expanded, "expand_bias"),
         padded_bias(block.biases[1], s.expanded, "depthwise_bias"),
         padded_bias(block.biases[2], s.out_channels, "project_bias")});
    elements.push_back(s.output_elements());
  }
  elements.pop_back();
  const std::vector<BlockWeights> stored = stored_weights(blocks, x.scalar_type(), false);
  with_storage_type(x.scalar_type(), "input", [&](auto zero) {
    using T = decltype(zero);
    const auto packed = pack_all(
        blocks.size(), [&](size_t k) { return pack_block_forward(blocks[k].shape, stored[k], x.scalar_type()); });
    std::optional<Waves> waves = waves_of(blocks, packed);
    const Between between(last.batch, waves, elements, x.options());
    std::optional<Stem<T>> stem;
    std::vector<BlockForward<T>> stages;
    for (size_t k = 0; k < blocks.size(); ++k) {
      const bool is_first = k == 0, is_last = k + 1 == blocks.size();
      const auto& [expand_bias, depthwise_bias, project_bias] = biases[k];
      BlockForward<T> stage = block_forward<T>(
          blocks[k].shape,
          x.data_ptr<T>(),
          packed[k].data,
          expand_bias,
          depthwise_bias,
          project_bias,
          out.data_ptr<T>());
      stage.mask_expand = MaskPlaces::at(masks, places.of[k].expand);
      stage.mask_depthwise = MaskPlaces::at(masks, places.of[k].depthwise);
      stage.pooled = data_or_null<T>(pooled);
      if (blocks[k].stem.has_value()) {
        stage.stem = &stem.emplace(*blocks[k].stem, x.data_ptr<T>());
      }
      if (!is_first) {
        stage.x = between.images<const T>(k - 1);
      }
      if (!is_last) {
        stage.out = between.images<T>(k);
      }
      stages.push_back(std::move(stage));
    }
    if (!waves.has_value()) {
      for (const BlockForward<T>& stage : stages) {
        stage.run();
      }
      return;
    }
    parallel_stages(*waves, static_cast<int64_t>(stages.size()), [&](int64_t stage, int64_t image) {
      stages[stage].task(image);
    });
  });
  return {out, masks, pooled};
}

ChainGradients chain_backward(
    const at::Tensor& grad_output,
    const std::vector<ChainedBlock>& blocks,
    const at::Tensor& masks,
    bool need_input,
    const std::vector<std::array<bool, 3>>& need_biases,
    const OptionalTensor& grad_pooled) {
  const BlockShape& first = blocks.front().shape;
  const BlockShape& last = blocks.back().shape;
  check_size(
      grad_output,
      "grad_output",
      {last.batch, last.out_channels, last.out_height, last.out_width},
      grad_output.scalar_type());
  const at::Tensor grad = in_channels_last(grad_output);
  at::Tensor pooled;
  if (need_input && grad_pooled.has_value()) {
    TORCH_CHECK(blocks.size() == 1, "blocks: expected one that pools its input, got ", blocks.size());
    check_size(*grad_pooled, "grad_pooled", pooled_size(first), grad.scalar_type());
    pooled = in_channels_last(*grad_pooled);
  }
  ChainGradients gradients;
  gradients.biases.resize(blocks.size());
  if (need_input) {
    gradients.input = empty_tensor(
        {first.batch, first.in_channels, first.height, first.width}, grad.options(), at::MemoryFormat::ChannelsLast);
  }
  // Blocks from the last one on, as far as anything before them wants a gradient.
  size_t earliest = 0;
  const auto wants = [](const std::array<bool, 3>& need) { return need[0] || need[1] || need[2]; };
  while (!need_input && earliest < blocks.size() && !wants(need_biases[earliest])) {
    ++earliest;
  }
  const size_t count = blocks.size() - earliest;
  if (count == 0) {
    return gradients;
  }
  const MaskPlaces places(blocks);
  TORCH_CHECK(masks.numel() == places.bytes, "masks: expected ", places.bytes, " bytes, got ", masks.numel());
  for (size_t k = earliest; k < blocks.size(); ++k) {
    TORCH_CHECK(
        blocks[k].needs_masks || !blocks[k].shape.masks(),
        "needs_masks: a gradient is asked for, so expected True, got False");
  }
  const auto block_of = [&](size_t stage) { return blocks.size() - 1 - stage; };
  std::vector<int64_t> elements;
  for (size_t stage = 0; stage + 1 < count; ++stage) {
    elements.push_back(blocks[block_of(stage)].shape.input_elements());
  }
  const std::vector<BlockWeights> stored = stored_weights(blocks, grad.scalar_type(), true);
  with_storage_type(grad.scalar_type(), "grad_output", [&](auto zero) {
    using T = decltype(zero);
    const auto packed = pack_all(count, [&](size_t stage) {
      const size_t k = block_of(stage);
      const BlockShape& s = blocks[k].shape;
      return pack_block_backward(
          s, stored[k], grad.scalar_type(), need_input || k > earliest, MaskPlaces::at(masks, places.of[k].depthwise));
    });
    std::optional<Waves> waves = waves_of(blocks, packed);
    const Between between(last.batch, waves, elements, grad.options());
    std::vector<BlockBackward<T>> stages;
    std::vector<at::Tensor> partials;
    for (size_t i = 0; i < count; ++i) {
      const size_t k = block_of(i);
      const bool is_first = i == 0, is_last = i + 1 == count;
      T* const to_input = need_input ? gradients.input.template data_ptr<T>() : nullptr;
      BlockBackward<T> stage = block_backward<T>(
          blocks[k].shape,
          grad.data_ptr<T>(),
          packed[i],
          to_input,
          need_biases[k]);
      stage.mask_expand = MaskPlaces::at(masks, places.of[k].expand);
      stage.mask_depthwise = MaskPlaces::at(masks, places.of[k].depthwise);
      stage.grad_pooled = data_or_null<T>(pooled);
      if (!is_first) {
        stage.grad_output = between.images<const T>(i - 1);
      }
      if (!is_last) {
        stage.grad_input = between.images<T>(i);
      }
      partials.push_back(stage.partial());
      stages.push_back(std::move(stage));
    }
    for (size_t i = 0; i < count && !waves.has_value(); ++i) {
      stages[i].run(partials[i]);
    }
    if (waves.has_value()) {
      parallel_stages(*waves, static_cast<int64_t>(count), [&](int64_t stage, int64_t image) {
        const at::Tensor& partial = partials[stage];
        stages[stage].task(image, partial.data_ptr<float>() + image * partial.size(1));
      });
    }
    for (size_t i = 0; i < count; ++i) {
      gradients.biases[block_of(i)] = stages[i].bias_gradients(partials[i]);
    }
  });
  return gradients;
}

} // namespace tinytl::cpu
