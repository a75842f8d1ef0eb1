// Blocks in a row, with or without lite residuals, in one call: the operators frozen_conv, frozen_inverted_residual,
// lite_branch and upsample_add with their derivatives, without the interpreter between them.
#include "autograd.h"

#include "dispatcher.h"
#include "inverted_residual_chain.h"
#include "stem.h"

#include <torch/library.h>

#include <array>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

namespace tinytl::cpu {
namespace {

// frozen_inverted_residual several times in a row, one node of autograd's graph; the first one's expansion may be a
// frozen_conv of an image, which gets no gradient.
struct InvertedResiduals : Function<InvertedResiduals> {
  struct State {
    std::vector<ChainedBlock> blocks; // without tensors
    std::vector<std::array<int64_t, 3>> edges; // to each block's biases, -1: none
    size_t arguments;
  };

  // biases: biases_of(blocks), for autograd. want_pooled: of a single block, (output, its pooled input).
  static variable_list forward(
      AutogradContext* ctx,
      const at::Tensor& input,
      at::TensorList biases,
      const std::vector<ChainedBlock>& blocks,
      bool want_pooled) {
    TORCH_CHECK(
        !blocks[0].stem.has_value() || !input.requires_grad(),
        "input: a stem in a chain computes no gradient of its image, which requires one");
    Edges edges;
    edges.of(input);
    State state;
    state.arguments = biases.size() + 3;
    for (const ChainedBlock& block : blocks) {
      const auto& [weights, block_biases, scales] = std::tie(block.weights, block.biases, block.scales);
      const auto& [expand, depthwise, project] = block_biases;
      refuse_trained_block(
          block.stem.has_value() ? "stem" : "expand", weights[0], scales[0], *weights[1], scales[1], *weights[2],
          scales[2]);
      state.blocks.push_back({block.shape, block.stem, {}, {}, {}, block.needs_masks});
      state.edges.push_back({edges.of(expand), edges.of(depthwise), edges.of(project)});
    }
    TINYTL_RECORDED("inverted_residual_forward");
    auto [output, masks, pooled] = chain_forward(input, blocks, want_pooled);
    variable_list saved{masks};
    for (const ChainedBlock& block : blocks) {
      for (size_t layer = 0; layer < 3; ++layer) {
        saved.push_back(or_undefined(block.weights[layer]));
        saved.push_back(or_undefined(block.scales[layer]));
      }
    }
    ctx->save_for_backward(std::move(saved));
    keep(ctx, std::move(state));
    ctx->set_materialize_grads(false); // a frozen branch gives the pooled image none
    return want_pooled ? variable_list{output, pooled} : variable_list{output};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto saved = ctx->get_saved_variables();
    const State& state = kept<State>(ctx);
    std::vector<ChainedBlock> blocks = state.blocks;
    std::vector<std::array<bool, 3>> need;
    auto next = saved.begin();
    const at::Tensor& masks = *next++;
    for (size_t k = 0; k < blocks.size(); ++k) {
      for (size_t layer = 0; layer < 3; ++layer) {
        blocks[k].weights[layer] = or_none(*next++);
        blocks[k].scales[layer] = or_none(*next++);
      }
      need.push_back(needed(ctx, state.edges[k]));
    }
    const at::Tensor grad_pooled = grads.size() > 1 ? grads[1] : at::Tensor();
    at::Tensor grad_output = grads[0];
    if (!grad_output.defined()) {
      const BlockShape& last = blocks.back().shape;
      grad_output =
          zero_tensor({last.batch, last.out_channels, last.out_height, last.out_width}, grad_pooled.options());
    }
    TINYTL_RECORDED("inverted_residual_backward");
    ChainGradients gradients =
        chain_backward(grad_output, blocks, masks, ctx->needs_input_grad(0), need, or_none(grad_pooled));
    variable_list results(state.arguments);
    results[0] = std::move(gradients.input);
    for (size_t k = 0; k < need.size(); ++k) {
      for (size_t layer = 0; layer < 3; ++layer) {
        if (need[k][layer]) {
          results[state.edges[k][layer]] = std::move(gradients.biases[k][layer]);
        }
      }
    }
    return once("frozen_inverted_residual", std::move(results), grads);
  }
};

// A branch, upsampled and added to what its block makes.
struct Branch : Function<Branch> {
  static constexpr int kArguments = 14;

  // statistics: of the two norms, (2, channels) each, not differentiated.
  static at::Tensor forward(
      AutogradContext* ctx,
      const OptionalTensor& main,
      const at::Tensor& pooled,
      const at::Tensor& weight1,
      const OptionalTensor& norm_weight1,
      const OptionalTensor& norm_bias1,
      const OptionalTensor& running_mean1,
      const OptionalTensor& running_var1,
      const at::Tensor& weight2,
      const OptionalTensor& norm_weight2,
      const OptionalTensor& norm_bias2,
      const OptionalTensor& running_mean2,
      const OptionalTensor& running_var2,
      const BranchOptions& options,
      std::array<at::Tensor, 2>* statistics) {
    BranchOutputs made = branch_forward(
        ctx,
        main,
        {pooled, weight1, norm_weight1, norm_bias1, running_mean1, running_var1, weight2, norm_weight2, norm_bias2,
         running_mean2, running_var2},
        options);
    *statistics = {made.statistics1, made.statistics2};
    return made.output;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    variable_list results = branch_backward(ctx, grads);
    results.resize(kArguments);
    return results;
  }
};

// Counts a batch in the running statistics of a BatchNorm, as nn.BatchNorm2d does. running: mean, variance and, where
// it counts batches, their number; nothing for a norm that keeps none. statistics: mean and biased variance of `values`
// values a channel.
void track(at::TensorList running, double momentum, const at::Tensor& statistics, int64_t values) {
  if (running.empty()) {
    return;
  }
  const int64_t channels = statistics.size(1);
  const float unbiased = values > 1 ? static_cast<float>(values) / static_cast<float>(values - 1) : 1.f;
  const float share = static_cast<float>(momentum);
  for (size_t i = 0; i < 2; ++i) {
    TORCH_CHECK(
        running[i].scalar_type() == at::kFloat && running[i].is_contiguous() && running[i].numel() == channels,
        "running: expected ",
        channels,
        " contiguous float32 values, got ",
        running[i].sizes());
    float* kept = running[i].data_ptr<float>();
    const float* measured = statistics.data_ptr<float>() + static_cast<int64_t>(i) * channels;
    for (int64_t c = 0; c < channels; ++c) {
      kept[c] = kept[c] * (1.f - share) + measured[c] * (i == 0 ? share : share * unbiased);
    }
    torch::autograd::impl::bump_version(running[i]);
  }
  if (running.size() > 2) {
    ++*running[2].data_ptr<int64_t>();
    torch::autograd::impl::bump_version(running[2]);
  }
}

// The lists that the arguments of a chain come in, each read from its first element on.
class ChainArguments {
 public:
  ChainArguments(
      const c10::List<OptionalTensor>& tensors,
      at::IntArrayRef numbers,
      at::ArrayRef<double> reals,
      const c10::List<std::string>& activations,
      at::TensorList running)
      : tensors_(tensors), numbers_(numbers), reals_(reals), activations_(activations), running_(running) {}

  size_t tensors_left() const {
    return tensors_.size() - next_tensor_;
  }
  OptionalTensor optional() {
    TORCH_CHECK(next_tensor_ < tensors_.size(), "tensors: expected more than ", tensors_.size());
    return tensors_.get(next_tensor_++);
  }
  at::Tensor tensor() {
    const OptionalTensor tensor = optional();
    TORCH_CHECK(tensor.has_value(), "tensors: expected a weight, got None");
    return *tensor;
  }
  at::IntArrayRef numbers(size_t count) {
    return take(numbers_, count, "numbers");
  }
  int64_t number() {
    return numbers(1)[0];
  }
  double real() {
    return take(reals_, 1, "reals")[0];
  }
  std::string activation() {
    TORCH_CHECK(next_activation_ < activations_.size(), "activations: expected more than ", activations_.size());
    return activations_.get(next_activation_++);
  }
  at::TensorList running(size_t count) {
    return take(running_, count, "running");
  }

 private:
  template <class T>
  static at::ArrayRef<T> take(at::ArrayRef<T>& list, size_t count, const char* name) {
    TORCH_CHECK(list.size() >= count, name, ": expected more of them");
    const at::ArrayRef<T> taken = list.slice(0, count);
    list = list.slice(count);
    return taken;
  }

  const c10::List<OptionalTensor>& tensors_;
  at::IntArrayRef numbers_;
  at::ArrayRef<double> reals_;
  const c10::List<std::string>& activations_;
  at::TensorList running_;
  size_t next_tensor_ = 0, next_activation_ = 0;
};

// Of the convolution behind the last block.
constexpr size_t kLastTensors = 3;

// The biases of `blocks` that are there, in order.
variable_list biases_of(const std::vector<ChainedBlock>& blocks) {
  variable_list biases;
  for (const ChainedBlock& block : blocks) {
    for (const OptionalTensor& bias : block.biases) {
      if (bias.has_value()) {
        biases.push_back(*bias);
      }
    }
  }
  return biases;
}

// All of `blocks`, none of which has a branch.
at::Tensor apply_blocks(at::Tensor output, const std::vector<ChainedBlock>& blocks) {
  if (blocks.empty()) {
    return output;
  }
  size_t first = 0;
  for (const size_t end : chain_segments(blocks, output.scalar_type())) {
    const std::vector<ChainedBlock> segment(blocks.begin() + first, blocks.begin() + end);
    output = InvertedResiduals::apply(output, at::TensorList(biases_of(segment)), segment, false)[0];
    first = end;
  }
  return output;
}

// Blocks in a row, with or without lite residuals: of each frozen_inverted_residual and, with a branch, its pooled
// input, lite_branch and upsample_add. They are the nodes of autograd's graph that they are from Python, so that what
// one has kept and made is freed before the next one runs; but for blocks without a branch that need no more memory
// together (chain_segments). Behind the last block there may be a 1x1 convolution. backends/cpu/block_chain.py writes the
// lists.
at::Tensor block_chain(
    const at::Tensor& input,
    const c10::List<OptionalTensor>& tensors,
    at::IntArrayRef numbers,
    at::ArrayRef<double> reals,
    const c10::List<std::string>& activations,
    at::TensorList running) {
  ChainArguments next(tensors, numbers, reals, activations, running);
  at::Tensor output = input;
  std::vector<int64_t> size = input.sizes().vec(); // of the next block's input
  std::vector<ChainedBlock> row; // without branches, not yet applied to `output`
  bool has_stem = next.number();
  const bool has_last = next.number();
  while (next.tensors_left() > (has_last ? kLastTensors : 0)) {
    ChainedBlock block;
    auto [weights, biases, scales] = std::tie(block.weights, block.biases, block.scales);
    for (size_t layer = 0; layer < 3; ++layer) {
      weights[layer] = layer == 0 ? next.optional() : OptionalTensor(next.tensor());
      biases[layer] = next.optional();
    }
    for (OptionalTensor& scale : scales) {
      scale = next.optional();
    }
    if (has_stem) {
      TORCH_CHECK(weights[0].has_value(), "tensors: expected a stem's weight, got None");
      const at::IntArrayRef stride = next.numbers(2), padding = next.numbers(4);
      const DenseShape& stem = block.stem.emplace(size, *weights[0], stride, padding, at::IntArrayRef({1, 1}), 1);
      size = {stem.batch, stem.out_channels, stem.rows.positions, stem.columns.positions};
    }
    const at::IntArrayRef stride = next.numbers(2), padding = next.numbers(4);
    const bool residual = next.number();
    block.needs_masks = next.number();
    const bool has_branch = next.number();
    TORCH_CHECK(!has_stem || !has_branch, "numbers: expected a stem's block without a branch");
    const std::string activation = next.activation();
    BlockShape& shape = block.shape;
    shape = block_shape(
        size, has_stem ? std::nullopt : weights[0], *weights[1], *weights[2], stride[0], padding, activation, residual);
    if (std::exchange(has_stem, false)) {
      shape.has_expand = true;
      shape.in_channels = stem_terms(*block.stem, input.scalar_type());
    }
    size = {shape.batch, shape.out_channels, shape.out_height, shape.out_width};
    if (!has_branch) {
      row.push_back(std::move(block));
      continue;
    }
    output = apply_blocks(std::move(output), std::exchange(row, {}));
    variable_list main = InvertedResiduals::apply(
        output, at::TensorList(biases_of({block})), std::vector<ChainedBlock>{block}, true);
    output.reset(); // autograd keeps what it needs of it
    at::Tensor pooled = std::move(main[1]);
    const auto weight1 = next.tensor();
    const auto norm_weight1 = next.optional(), norm_bias1 = next.optional();
    const auto running_mean1 = next.optional(), running_var1 = next.optional();
    const auto weight2 = next.tensor();
    const auto norm_weight2 = next.optional(), norm_bias2 = next.optional();
    const auto running_mean2 = next.optional(), running_var2 = next.optional();
    BranchOptions options;
    options.stride = next.number(), options.groups = next.number();
    options.norm_groups1 = next.number(), options.norm_groups2 = next.number();
    options.keep_conv = next.number();
    options.eps1 = next.real(), options.eps2 = next.real();
    options.activation = next.activation();
    std::array<at::Tensor, 2> measured;
    output = Branch::apply(
        OptionalTensor(main[0]), pooled, weight1, norm_weight1, norm_bias1, running_mean1, running_var1, weight2,
        norm_weight2, norm_bias2, running_mean2, running_var2, options, &measured);
    const auto pooled_length = [&](int64_t side) { return (pooled.size(side) - 1) / options.stride + 1; };
    const int64_t values = pooled.size(0) * pooled_length(2) * pooled_length(3);
    pooled.reset(); // a frozen branch does not keep it
    for (const at::Tensor& statistics : measured) {
      const double momentum = next.real();
      track(next.running(next.number()), momentum, statistics, values);
    }
  }
  output = apply_blocks(std::move(output), row);
  if (has_last) {
    const auto weight = next.tensor();
    const auto bias = next.optional(), scale = next.optional();
    const bool needs_saved = next.number();
    output = frozen_pointwise(output, weight, bias, scale, next.activation(), needs_saved);
  }
  return output;
}

} // namespace

TORCH_LIBRARY_FRAGMENT(tinytl_cpu, m) {
  m.def(
      "block_chain(Tensor input, Tensor?[] tensors, int[] numbers, float[] reals, str[] activations, "
      "Tensor(a!)[] running) -> Tensor",
      TORCH_FN(block_chain));
}

} // namespace tinytl::cpu
