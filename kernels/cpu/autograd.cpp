// The operators of a training step's many small calls with their derivatives in C++: the rules of the same name in
// tinytl_kernels/ops, without the interpreter in forward's bookkeeping and in backward at all. A small block's forward
// and backward take 400 us through Python's autograd on a 2.8 GHz core, and 240 here.
//
// For channels_last inputs that the kernels take; everything else keeps to Python's. What is kept for backward is the
// same, and so is the answer to a second derivative: an error where one is asked for, never a silent zero.
#include "activation_pixels.h"
#include "conv_activation.h"
#include "dispatcher.h"
#include "inverted_residual.h"
#include "inverted_residual_chain.h"
#include "lite_branch.h"
#include "mbconv.h"
#include "operators.h"
#include "stem.h"

#include <ATen/record_function.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <iterator>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

namespace tinytl::cpu {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::Function;
using torch::autograd::variable_list;
using OptionalString = std::optional<std::string>;

at::Tensor or_undefined(const OptionalTensor& tensor) {
  return tensor.value_or(at::Tensor());
}

OptionalTensor or_none(const at::Tensor& tensor) {
  return tensor.defined() ? OptionalTensor(tensor) : std::nullopt;
}

// Profilers show a kernel that is called from here by the name that it is registered with.
#define TINYTL_RECORDED(name) RECORD_FUNCTION("tinytl_cpu::" name, c10::ArrayRef<const c10::IValue>())

// Counts autograd's edges as torch::autograd::Function does: one for every tensor argument that is there.
class Edges {
 public:
  int64_t of(const OptionalTensor& tensor) {
    return tensor.has_value() && tensor->defined() ? next_++ : -1;
  }

 private:
  int64_t next_ = 0;
};

// Which of the edges that forward kept are asked for.
template <size_t N>
std::array<bool, N> needed(AutogradContext* ctx) {
  const auto edges = ctx->saved_data["edges"].toIntVector();
  std::array<bool, N> need{};
  for (size_t i = 0; i < N; ++i) {
    need[i] = edges[i] >= 0 && ctx->needs_input_grad(static_cast<size_t>(edges[i]));
  }
  return need;
}

// The gradients that are needed, each at the place of its argument among `arguments`.
template <size_t N, class Gradients>
variable_list by_argument(
    int arguments, const Gradients& gradients, const std::array<int, N>& places, const std::array<bool, N>& need) {
  const auto computed = std::apply([](const auto&... g) { return std::array<at::Tensor, N>{g...}; }, gradients);
  variable_list results(arguments);
  for (size_t i = 0; i < N; ++i) {
    if (need[i]) {
      results[places[i]] = computed[i];
    }
  }
  return results;
}

[[noreturn]] void refuse_second_derivative(const std::string& operator_name) {
  TORCH_CHECK(
      false,
      "tinytl::",
      operator_name,
      " has no second derivative: the operators of tinytl_kernels keep too little for one. Differentiate twice through "
      "the plain PyTorch model that tinytl_kernels.to_torch(model) gives.");
}

// Hands gradients on with a history that refuses to be differentiated.
struct Once : Function<Once> {
  static variable_list forward(AutogradContext* ctx, const std::string& name, at::TensorList gradients, at::TensorList) {
    ctx->saved_data["name"] = name;
    return gradients.vec();
  }
  static variable_list backward(AutogradContext* ctx, const variable_list&) {
    refuse_second_derivative(ctx->saved_data["name"].toStringRef() + "_backward");
  }
};

// results: by argument of the forward, undefined where there is none. They depend on grad_outputs.
variable_list once(const std::string& name, variable_list results, const variable_list& grad_outputs) {
  const auto differentiated = [](const at::Tensor& t) { return t.defined() && t.requires_grad(); };
  const auto given = [](const at::Tensor& t) { return t.defined(); };
  if (!at::GradMode::is_enabled() || std::none_of(grad_outputs.begin(), grad_outputs.end(), differentiated) ||
      std::none_of(results.begin(), results.end(), given)) {
    return results;
  }
  variable_list defined, sources;
  std::copy_if(results.begin(), results.end(), std::back_inserter(defined), given);
  std::copy_if(grad_outputs.begin(), grad_outputs.end(), std::back_inserter(sources), differentiated);
  const variable_list wrapped = Once::apply(name, at::TensorList(defined), at::TensorList(sources));
  auto next = wrapped.begin();
  for (at::Tensor& result : results) {
    if (result.defined()) {
      result = *next++;
    }
  }
  return results;
}

void refuse_trained(const OptionalTensor& weight, const char* name) {
  TORCH_CHECK(
      !weight.has_value() || !weight->requires_grad(),
      name,
      "_weight: a frozen block computes no weight gradient, but this has requires_grad=True. Keep it frozen, or train "
      "it in the plain PyTorch model that tinytl_kernels.to_torch(model) gives.");
}

// The same for the three weights of a block and what scales them; `first` is what its expansion is called.
void refuse_trained_block(
    const char* first,
    const OptionalTensor& expand_weight,
    const OptionalTensor& expand_scale,
    const at::Tensor& depthwise_weight,
    const OptionalTensor& depthwise_scale,
    const at::Tensor& project_weight,
    const OptionalTensor& project_scale) {
  for (const auto& [weight, scale, name] :
       {std::tuple(expand_weight, expand_scale, first),
        std::tuple(OptionalTensor(depthwise_weight), depthwise_scale, "depthwise"),
        std::tuple(OptionalTensor(project_weight), project_scale, "project")}) {
    refuse_trained(weight, name);
    refuse_trained(scale, name);
  }
}

// What computes a convolution, as backends/cpu/frozen_conv.py decides: "pointwise", "depthwise" or "dense".
std::tuple<at::Tensor, at::Tensor> conv_forward(
    const std::string& kernel,
    const at::Tensor& input,
    const OptionalTensor& shortcut,
    const at::Tensor& weight,
    const OptionalTensor& weight_scale,
    const OptionalTensor& bias,
    at::IntArrayRef stride,
    at::IntArrayRef padding,
    at::IntArrayRef dilation,
    int64_t groups,
    const std::string& activation,
    bool needs_saved) {
  if (kernel == "pointwise") {
    TINYTL_RECORDED("pointwise_forward");
    return pointwise_forward(input, weight, weight_scale, bias, shortcut, stride, activation, needs_saved);
  }
  if (shortcut.has_value()) {
    at::Tensor output = std::get<0>(conv_forward(
        kernel, input, std::nullopt, weight, weight_scale, bias, stride, padding, dilation, groups, "none", false));
    TINYTL_RECORDED("bias_activation_");
    const at::Tensor bits = bias_activation_(output, std::nullopt, shortcut, activation, kLeakySlope, needs_saved);
    return {output, bits};
  }
  if (kernel == "depthwise") {
    TINYTL_RECORDED("depthwise_forward");
    return depthwise_forward(
        input, weight, weight_scale, bias, stride, padding, dilation, activation, needs_saved);
  }
  TORCH_CHECK(kernel == "dense", "kernel: expected \"pointwise\", \"depthwise\" or \"dense\", got \"", kernel, "\"");
  TINYTL_RECORDED("dense_forward");
  return dense_forward(
      input, weight, weight_scale, bias, stride, padding, dilation, groups, activation, needs_saved);
}

std::tuple<at::Tensor, at::Tensor> conv_backward(
    const std::string& kernel,
    const at::Tensor& grad_output,
    const at::Tensor& saved,
    const at::Tensor& weight,
    const OptionalTensor& weight_scale,
    at::IntArrayRef input_size,
    at::IntArrayRef stride,
    at::IntArrayRef padding,
    at::IntArrayRef dilation,
    int64_t groups,
    const std::string& activation,
    bool need_input,
    bool need_bias) {
  if (kernel == "pointwise") {
    TINYTL_RECORDED("pointwise_backward");
    return pointwise_backward(
        grad_output, saved, weight, weight_scale, input_size, stride, activation, need_input, need_bias);
  }
  if (kernel == "depthwise") {
    TINYTL_RECORDED("depthwise_backward");
    return depthwise_backward(
        grad_output, saved, weight, weight_scale, input_size, stride, padding, dilation, activation, need_input,
        need_bias);
  }
  TORCH_CHECK(kernel == "dense", "kernel: expected \"pointwise\", \"depthwise\" or \"dense\", got \"", kernel, "\"");
  TINYTL_RECORDED("dense_backward");
  return dense_backward(
      grad_output, saved, weight, weight_scale, input_size, stride, padding, dilation, groups, activation, need_input,
      need_bias);
}

// frozen_conv or, with a shortcut, frozen_conv_add.
struct FrozenConv : Function<FrozenConv> {
  static constexpr int kArguments = 13;
  static constexpr size_t kOutputs = 2;

  static variable_list forward(
      AutogradContext* ctx,
      const at::Tensor& input,
      const OptionalTensor& shortcut,
      const at::Tensor& weight,
      const OptionalTensor& bias,
      at::IntArrayRef stride,
      at::IntArrayRef padding,
      at::IntArrayRef dilation,
      int64_t groups,
      const OptionalString& activation,
      bool needs_saved,
      const OptionalTensor& weight_scale,
      const std::string& forward_kernel,
      const std::string& backward_kernel) {
    for (const OptionalTensor& frozen : {OptionalTensor(weight), weight_scale}) {
      TORCH_CHECK(
          !frozen.has_value() || !frozen->requires_grad(),
          "weight: a frozen convolution computes no weight gradient, but its weight has requires_grad=True. Keep it "
          "frozen, or train it in the plain PyTorch model that tinytl_kernels.to_torch(model) gives.");
    }
    TORCH_CHECK(
        needs_saved || !activation.has_value(),
        "needs_saved: a gradient can be asked for, so expected True, got False");
    const std::string act = activation.value_or("none");
    Edges edges;
    const int64_t to_input = edges.of(input), to_shortcut = edges.of(shortcut);
    edges.of(weight);
    const int64_t to_bias = edges.of(bias);
    auto [out, saved] = conv_forward(
        forward_kernel, input, shortcut, weight, weight_scale, bias, stride, padding, dilation, groups, act, needs_saved);
    ctx->save_for_backward({weight, saved, or_undefined(weight_scale)});
    ctx->saved_data["edges"] = std::vector<int64_t>{to_input, to_shortcut, to_bias};
    ctx->saved_data["input_size"] = input.sizes().vec();
    ctx->saved_data["stride"] = stride.vec();
    ctx->saved_data["padding"] = padding.vec();
    ctx->saved_data["dilation"] = dilation.vec();
    ctx->saved_data["groups"] = groups;
    ctx->saved_data["activation"] = act;
    ctx->saved_data["kernel"] = backward_kernel;
    ctx->set_materialize_grads(false); // no zeros for what is saved
    ctx->mark_non_differentiable({saved});
    return {out, saved};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    if (!grads[0].defined()) {
      return variable_list(kArguments);
    }
    auto& data = ctx->saved_data;
    std::string activation = data["activation"].toStringRef();
    // The value before a smooth activation is kept as a number without history: its part of a second derivative could
    // only be lost in silence.
    if (at::GradMode::is_enabled() && ConvActivation(activation).is_smooth()) {
      refuse_second_derivative("frozen_conv");
    }
    const auto saved = ctx->get_saved_variables();
    const auto [need_input, need_shortcut, need_bias] = needed<3>(ctx);
    at::Tensor grad = grads[0], handed_on;
    variable_list results(kArguments);
    if (need_shortcut && activation == "none") {
      grad = handed_on = grad.contiguous(at::MemoryFormat::ChannelsLast);
    } else if (need_shortcut) {
      TINYTL_RECORDED("activation_backward");
      grad = std::get<0>(activation_backward(grad, saved[1], activation, kLeakySlope, true, false));
      activation = "none";
      results[1] = grad;
    }
    if (need_input || need_bias) {
      const auto [grad_input, grad_bias] = conv_backward(
          data["kernel"].toStringRef(), grad, saved[1], saved[0], or_none(saved[2]), data["input_size"].toIntVector(),
          data["stride"].toIntVector(), data["padding"].toIntVector(), data["dilation"].toIntVector(),
          data["groups"].toInt(), activation, need_input, need_bias);
      results[0] = need_input ? grad_input : at::Tensor();
      results[3] = need_bias ? grad_bias : at::Tensor();
    }
    results = once("frozen_conv", std::move(results), grads);
    if (handed_on.defined()) {
      results[1] = handed_on;
    }
    return results;
  }
};

struct FrozenInvertedResidual : Function<FrozenInvertedResidual> {
  static constexpr int kArguments = 16;
  static constexpr size_t kOutputs = 4;

  static variable_list forward(
      AutogradContext* ctx,
      const at::Tensor& input,
      const OptionalTensor& expand_weight,
      const OptionalTensor& expand_bias,
      const at::Tensor& depthwise_weight,
      const OptionalTensor& depthwise_bias,
      const at::Tensor& project_weight,
      const OptionalTensor& project_bias,
      at::IntArrayRef stride,
      at::IntArrayRef padding,
      const OptionalString& activation,
      bool residual,
      bool needs_masks,
      bool want_pooled,
      const OptionalTensor& expand_scale,
      const OptionalTensor& depthwise_scale,
      const OptionalTensor& project_scale) {
    refuse_trained_block(
        "expand", expand_weight, expand_scale, depthwise_weight, depthwise_scale, project_weight, project_scale);
    const std::string act = activation.value_or("none");
    // Without masks that it needs, backward says so.
    Edges edges;
    const int64_t to_input = edges.of(input);
    edges.of(expand_weight);
    const int64_t to_expand = edges.of(expand_bias);
    edges.of(depthwise_weight);
    const int64_t to_depthwise = edges.of(depthwise_bias);
    edges.of(project_weight);
    const int64_t to_project = edges.of(project_bias);
    TINYTL_RECORDED("inverted_residual_forward");
    auto [out, expand_mask, depthwise_mask, pooled] = inverted_residual_forward(
        input, expand_weight, expand_scale, expand_bias, depthwise_weight, depthwise_scale, depthwise_bias,
        project_weight, project_scale, project_bias, stride[0], padding, act, residual, needs_masks, want_pooled);
    ctx->save_for_backward(
        {or_undefined(expand_weight), depthwise_weight, project_weight, expand_mask, depthwise_mask,
         or_undefined(expand_scale), or_undefined(depthwise_scale), or_undefined(project_scale)});
    ctx->saved_data["edges"] = std::vector<int64_t>{to_input, to_expand, to_depthwise, to_project};
    ctx->saved_data["input_size"] = input.sizes().vec();
    ctx->saved_data["output_size"] = out.sizes().vec();
    ctx->saved_data["stride"] = stride[0];
    ctx->saved_data["padding"] = padding.vec();
    ctx->saved_data["activation"] = act;
    ctx->saved_data["residual"] = residual;
    ctx->set_materialize_grads(false); // the pooled image is often not used
    variable_list constant{expand_mask, depthwise_mask};
    if (!want_pooled) {
      constant.push_back(pooled);
    }
    ctx->mark_non_differentiable(constant);
    return {out, expand_mask, depthwise_mask, pooled};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto saved = ctx->get_saved_variables();
    auto& data = ctx->saved_data;
    const at::Tensor& grad_pooled = grads[3];
    const at::Tensor grad_output =
        grads[0].defined() ? grads[0] : zero_tensor(data["output_size"].toIntVector(), grad_pooled.options());
    const auto need = needed<4>(ctx);
    TINYTL_RECORDED("inverted_residual_backward");
    const auto gradients = inverted_residual_backward(
        grad_output, saved[3], saved[4], or_none(saved[0]), or_none(saved[5]), saved[1], or_none(saved[6]), saved[2],
        or_none(saved[7]), data["input_size"].toIntVector(), data["stride"].toInt(), data["padding"].toIntVector(),
        data["activation"].toStringRef(), data["residual"].toBool(), need[0], need[1], need[2], need[3],
        or_none(grad_pooled));
    constexpr std::array kPlaces{0, 2, 4, 6};
    return once("frozen_inverted_residual", by_argument(kArguments, gradients, kPlaces, need), grads);
  }
};

// What autograd's node of a chain keeps beside tensors.
struct ChainRecord : torch::CustomClassHolder {
  std::vector<BlockShape> shapes;
  std::vector<bool> needs_masks;
  std::optional<DenseShape> stem;
  std::vector<std::array<int64_t, 3>> edges; // to each block's biases, -1: none
};

// frozen_inverted_residual several times in a row, one node of autograd's graph; the first one's expansion may be a
// frozen_conv of an image, which gets no gradient.
struct InvertedResiduals : Function<InvertedResiduals> {
  // biases: those of `blocks` that are there, in order, for autograd.
  static at::Tensor forward(
      AutogradContext* ctx,
      const at::Tensor& input,
      at::TensorList biases,
      const std::vector<ChainedBlock>& blocks) {
    auto record = c10::make_intrusive<ChainRecord>();
    record->stem = blocks[0].stem;
    TORCH_CHECK(
        !record->stem.has_value() || !input.requires_grad(),
        "input: a stem in a chain computes no gradient of its image, which requires one");
    Edges edges;
    edges.of(input);
    for (const ChainedBlock& block : blocks) {
      const auto& [expand, depthwise, project] = block.biases;
      refuse_trained_block(
          block.stem.has_value() ? "stem" : "expand", block.weights[0], block.scales[0], *block.weights[1], block.scales[1], *block.weights[2],
          block.scales[2]);
      record->shapes.push_back(block.shape);
      record->needs_masks.push_back(block.needs_masks);
      record->edges.push_back({edges.of(expand), edges.of(depthwise), edges.of(project)});
    }
    TINYTL_RECORDED("inverted_residual_forward");
    auto [output, masks] = chain_forward(input, blocks);
    variable_list kept{masks};
    for (const ChainedBlock& block : blocks) {
      for (size_t layer = 0; layer < 3; ++layer) {
        kept.push_back(or_undefined(block.weights[layer]));
        kept.push_back(or_undefined(block.scales[layer]));
      }
    }
    ctx->save_for_backward(std::move(kept));
    ctx->saved_data["arguments"] = static_cast<int64_t>(biases.size()) + 2;
    ctx->saved_data["record"] = c10::IValue::make_capsule(record);
    return output;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto record = c10::static_intrusive_pointer_cast<ChainRecord>(ctx->saved_data["record"].toCapsule());
    const auto saved = ctx->get_saved_variables();
    const auto wanted = [&](int64_t edge) { return edge >= 0 && ctx->needs_input_grad(static_cast<size_t>(edge)); };
    std::vector<ChainedBlock> blocks;
    std::vector<std::array<bool, 3>> need;
    auto next = saved.begin();
    const at::Tensor& masks = *next++;
    for (size_t k = 0; k < record->shapes.size(); ++k) {
      ChainedBlock& block = blocks.emplace_back();
      block.shape = record->shapes[k];
      block.stem = k == 0 ? record->stem : std::nullopt;
      block.needs_masks = record->needs_masks[k];
      for (size_t layer = 0; layer < 3; ++layer) {
        block.weights[layer] = or_none(*next++);
        block.scales[layer] = or_none(*next++);
      }
      const auto& [expand, depthwise, project] = record->edges[k];
      need.push_back({wanted(expand), wanted(depthwise), wanted(project)});
    }
    TINYTL_RECORDED("inverted_residual_backward");
    ChainGradients gradients = chain_backward(grads[0], blocks, masks, ctx->needs_input_grad(0), need);
    variable_list results(ctx->saved_data["arguments"].toInt());
    results[0] = std::move(gradients.input);
    for (size_t k = 0; k < need.size(); ++k) {
      for (size_t layer = 0; layer < 3; ++layer) {
        if (need[k][layer]) {
          results[record->edges[k][layer]] = std::move(gradients.biases[k][layer]);
        }
      }
    }
    return once("frozen_inverted_residual", std::move(results), grads);
  }
};

// The block keeps its input and computes itself again (mbconv.h).
struct Mbconv : Function<Mbconv> {
  static constexpr int kArguments = 9;

  static at::Tensor forward(
      AutogradContext* ctx,
      const at::Tensor& input,
      const OptionalTensor& expand_bias,
      const OptionalTensor& depthwise_bias,
      const OptionalTensor& reduce_bias,
      const OptionalTensor& restore_bias,
      const OptionalTensor& project_bias,
      const MbconvLayers& layers,
      const MbconvOptions& options,
      bool compute) {
    constexpr std::array kNames{"expand", "depthwise", "reduce", "restore", "project"};
    for (int layer = 0; layer < kBlockLayers; ++layer) {
      refuse_trained(layers.weights[layer], kNames[layer]);
      refuse_trained(layers.scales[layer], kNames[layer]);
    }
    Edges edges;
    std::vector<int64_t> to{edges.of(input)};
    for (const OptionalTensor& bias : {expand_bias, depthwise_bias, reduce_bias, restore_bias, project_bias}) {
      to.push_back(edges.of(bias));
    }
    variable_list kept{input};
    for (const auto& tensors : {layers.weights, layers.biases, layers.scales}) {
      for (const OptionalTensor& tensor : tensors) {
        kept.push_back(or_undefined(tensor));
      }
    }
    ctx->save_for_backward(std::move(kept));
    ctx->saved_data["edges"] = std::move(to);
    ctx->saved_data["geometry"] = std::vector<int64_t>{
        options.stride,     options.padding[0], options.padding[1],
        options.padding[2], options.padding[3], options.residual};
    ctx->saved_data["activation"] = options.activation;
    ctx->saved_data["squeeze_activation"] = options.squeeze_activation;
    ctx->saved_data["gate"] = options.gate;
    if (!compute) {
      return mbconv_output(input, layers, options);
    }
    TINYTL_RECORDED("mbconv_forward");
    return mbconv_forward(input, layers, options);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    auto& data = ctx->saved_data;
    // The input is kept with its history, but its part of a second derivative is not computed.
    if (at::GradMode::is_enabled()) {
      refuse_second_derivative("mbconv");
    }
    const auto saved = ctx->get_saved_variables();
    MbconvLayers layers;
    auto next = saved.begin() + 1;
    for (auto* tensors : {&layers.weights, &layers.biases, &layers.scales}) {
      for (OptionalTensor& tensor : *tensors) {
        tensor = or_none(*next++);
      }
    }
    const auto geometry = data["geometry"].toIntVector();
    const MbconvOptions options(
        geometry[0],
        at::IntArrayRef(geometry).slice(1, 4),
        data["activation"].toStringRef(),
        data["squeeze_activation"].toStringRef(),
        data["gate"].toStringRef(),
        geometry[5] != 0);
    const auto need = needed<1 + kBlockLayers>(ctx);
    MbconvNeeds needs{need[0], {}};
    std::copy(need.begin() + 1, need.end(), needs.biases.begin());
    TINYTL_RECORDED("mbconv_backward");
    const MbconvGradients gradients = mbconv_backward(grads[0], saved[0], layers, options, needs);
    variable_list results(kArguments);
    results[0] = gradients.input;
    std::copy(gradients.biases.begin(), gradients.biases.end(), results.begin() + 1);
    return results;
  }
};

// compute: false for the history of the output alone, in front of a backward.
at::Tensor mbconv(
    const at::Tensor& input,
    const c10::List<OptionalTensor>& tensors,
    int64_t stride,
    at::IntArrayRef padding,
    const std::string& activation,
    const std::string& squeeze_activation,
    const std::string& gate,
    bool residual,
    bool compute) {
  const MbconvLayers layers(tensors);
  const auto& b = layers.biases;
  return Mbconv::apply(
      input, b[kExpand], b[kDepthwise], b[kReduce], b[kRestore], b[kProject], layers,
      MbconvOptions(stride, padding, activation, squeeze_activation, gate, residual), compute);
}

// lite_branch or, with `main`, the sum of it, upsampled, and `main`: in `main` itself, which nobody has kept.
struct LiteBranch : Function<LiteBranch> {
  static constexpr int kArguments = 20;
  static constexpr size_t kOutputs = 4;

  static variable_list forward(
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
      int64_t stride,
      int64_t groups,
      const std::string& activation,
      int64_t norm_groups1,
      int64_t norm_groups2,
      double eps1,
      double eps2,
      bool keep_conv) {
    Edges edges;
    const int64_t to_main = edges.of(main);
    const int64_t to_pooled = edges.of(pooled), to_weight1 = edges.of(weight1);
    const int64_t to_scale1 = edges.of(norm_weight1), to_bias1 = edges.of(norm_bias1);
    edges.of(running_mean1);
    edges.of(running_var1);
    const int64_t to_weight2 = edges.of(weight2), to_scale2 = edges.of(norm_weight2), to_bias2 = edges.of(norm_bias2);
    TINYTL_RECORDED("lite_branch_forward");
    auto [out, conv, statistics1, statistics2] = lite_branch_forward(
        pooled, weight1, norm_weight1, norm_bias1, running_mean1, running_var1, weight2, norm_weight2, norm_bias2,
        running_mean2, running_var2, stride, groups, activation, norm_groups1, norm_groups2, eps1, eps2, main);
    if (main.has_value()) {
      out = *main;
      ctx->mark_dirty({out});
    }
    if (!keep_conv) {
      conv = empty_tensor({0}, pooled.options());
    }
    ctx->save_for_backward(
        {pooled, conv, statistics1, statistics2, weight1, or_undefined(norm_weight1), or_undefined(norm_bias1), weight2,
         or_undefined(norm_weight2)});
    ctx->saved_data["edges"] =
        std::vector<int64_t>{to_pooled, to_weight1, to_scale1, to_bias1, to_weight2, to_scale2, to_bias2, to_main};
    ctx->saved_data["options"] = std::vector<int64_t>{
        stride,       groups, norm_groups1, norm_groups2, !running_mean1.has_value(), !running_mean2.has_value(),
        main.has_value()};
    ctx->saved_data["eps"] = std::vector<double>{eps1, eps2};
    ctx->saved_data["activation"] = activation;
    ctx->set_materialize_grads(false);
    ctx->mark_non_differentiable({conv, statistics1, statistics2});
    return {out, conv, statistics1, statistics2};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    if (!grads[0].defined()) {
      return variable_list(kArguments);
    }
    const auto saved = ctx->get_saved_variables();
    auto& data = ctx->saved_data;
    const auto options = data["options"].toIntVector();
    const auto eps = data["eps"].toDoubleVector();
    const auto [need_input, need_weight1, need_scale1, need_bias1, need_weight2, need_scale2, need_bias2, need_main] =
        needed<8>(ctx);
    const std::array need{need_input, need_weight1, need_scale1, need_bias1, need_weight2, need_scale2, need_bias2};
    variable_list results(kArguments);
    if (std::find(need.begin(), need.end(), true) != need.end()) {
      TINYTL_RECORDED("lite_branch_backward");
      const auto gradients = lite_branch_backward(
          grads[0], saved[0], saved[1], saved[2], saved[3], saved[4], or_none(saved[5]), or_none(saved[6]), saved[7],
          or_none(saved[8]), options[0], options[1], data["activation"].toStringRef(), options[2], options[3], eps[0],
          eps[1], options[4] != 0, options[5] != 0, need, options[6] != 0);
      constexpr std::array kPlaces{1, 2, 3, 4, 7, 8, 9};
      results = once("lite_branch", by_argument(kArguments, gradients, kPlaces, need), grads);
    }
    if (need_main) {
      results[0] = grads[0];
    }
    return results;
  }
};

struct UpsampleAdd : Function<UpsampleAdd> {
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& main, const at::Tensor& branch) {
    ctx->saved_data["branch_size"] = branch.sizes().vec();
    TINYTL_RECORDED("upsample_add_forward");
    return upsample_add_forward(main, branch);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    variable_list results(2);
    if (ctx->needs_input_grad(1)) {
      TINYTL_RECORDED("upsample_add_backward");
      results[1] = upsample_add_backward(grads[0], ctx->saved_data["branch_size"].toIntVector());
      results = once("upsample_add", std::move(results), grads);
    }
    if (ctx->needs_input_grad(0)) {
      results[0] = grads[0];
    }
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

  bool done() const {
    return next_tensor_ == tensors_.size();
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

// All of `blocks`, none of which has a branch.
at::Tensor apply_blocks(at::Tensor output, const std::vector<ChainedBlock>& blocks) {
  if (blocks.empty()) {
    return output;
  }
  size_t first = 0;
  for (const size_t end : chain_segments(blocks, output.scalar_type())) {
    const std::vector<ChainedBlock> segment(blocks.begin() + first, blocks.begin() + end);
    variable_list biases;
    for (const ChainedBlock& block : segment) {
      for (const OptionalTensor& bias : block.biases) {
        if (bias.has_value()) {
          biases.push_back(*bias);
        }
      }
    }
    output = InvertedResiduals::apply(output, at::TensorList(biases), segment);
    first = end;
  }
  return output;
}

// Blocks in a row, with or without lite residuals: of each frozen_inverted_residual and, with a branch, its pooled
// input, lite_branch and upsample_add. They are the nodes of autograd's graph that they are from Python, so that what
// one has kept and made is freed before the next one runs; but for blocks without a branch that need no more memory
// together (chain_segments). backends/cpu/block_chain.py writes the lists.
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
  while (!next.done()) {
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
    variable_list main = FrozenInvertedResidual::apply(
        output, weights[0], biases[0], *weights[1], biases[1], *weights[2], biases[2], stride, padding,
        OptionalString(activation), residual, block.needs_masks, true, scales[0], scales[1], scales[2]);
    const auto weight1 = next.tensor();
    const auto norm_weight1 = next.optional(), norm_bias1 = next.optional();
    const auto running_mean1 = next.optional(), running_var1 = next.optional();
    const auto weight2 = next.tensor();
    const auto norm_weight2 = next.optional(), norm_bias2 = next.optional();
    const auto running_mean2 = next.optional(), running_var2 = next.optional();
    const int64_t branch_stride = next.number(), groups = next.number();
    const int64_t norm_groups1 = next.number(), norm_groups2 = next.number();
    const bool keep_conv = next.number();
    const double eps1 = next.real(), eps2 = next.real();
    output.reset(); // autograd keeps what it needs of it
    at::Tensor pooled = std::move(main[3]);
    const variable_list branch = LiteBranch::apply(
        OptionalTensor(main[0]), pooled, weight1, norm_weight1, norm_bias1, running_mean1, running_var1, weight2,
        norm_weight2, norm_bias2, running_mean2, running_var2, branch_stride, groups, next.activation(), norm_groups1,
        norm_groups2, eps1, eps2, keep_conv);
    const auto pooled_length = [&](int64_t side) { return (pooled.size(side) - 1) / branch_stride + 1; };
    const int64_t values = pooled.size(0) * pooled_length(2) * pooled_length(3);
    pooled.reset(); // a frozen branch does not keep it
    for (const at::Tensor& statistics : {branch[2], branch[3]}) {
      const double momentum = next.real();
      track(next.running(next.number()), momentum, statistics, values);
    }
    output = branch[0];
  }
  return apply_blocks(std::move(output), row);
}

// The tensors that F::apply gives as what torch.ops returns.
template <class F, size_t... I>
auto as_tuple(const variable_list& outputs, std::index_sequence<I...>) {
  return std::make_tuple(outputs[I]...);
}
template <class F, class... Arguments>
auto apply(const Arguments&... arguments) {
  return as_tuple<F>(F::apply(arguments...), std::make_index_sequence<F::kOutputs>());
}

// What torch.ops calls: the arguments of F::forward after its context.
template <class F, class Forward = decltype(F::forward)>
struct Call;
template <class F, class... Arguments>
struct Call<F, variable_list(AutogradContext*, Arguments...)> {
  static auto call(typename Passed<Arguments>::type... arguments) {
    return apply<F>(arguments...);
  }
};
template <class F, class... Arguments>
struct Call<F, at::Tensor(AutogradContext*, Arguments...)> {
  static at::Tensor call(typename Passed<Arguments>::type... arguments) {
    return F::apply(arguments...);
  }
};
// LiteBranch by itself: nothing that it is added to.
template <class... Arguments>
struct Call<LiteBranch, variable_list(AutogradContext*, const OptionalTensor&, Arguments...)> {
  static auto call(typename Passed<Arguments>::type... arguments) {
    return apply<LiteBranch>(OptionalTensor(), arguments...);
  }
};

} // namespace

// Schemas of the package's own operators; without a dispatch key, because autograd is inside.
TORCH_LIBRARY_FRAGMENT(tinytl_cpu, m) {
  m.def(
      "frozen_conv(Tensor input, Tensor? shortcut, Tensor weight, Tensor? bias, int[2] stride, int[4] padding, "
      "int[2] dilation, int groups, str? activation, bool needs_saved, Tensor? weight_scale, str forward_kernel, "
      "str backward_kernel) -> (Tensor output, Tensor saved)",
      TORCH_FN(Call<FrozenConv>::call));
  m.def(
      "frozen_inverted_residual(Tensor input, Tensor? expand_weight, Tensor? expand_bias, Tensor depthwise_weight, "
      "Tensor? depthwise_bias, Tensor project_weight, Tensor? project_bias, int[2] stride, int[4] padding, "
      "str? activation, bool residual, bool needs_masks, bool want_pooled, Tensor? expand_scale, "
      "Tensor? depthwise_scale, Tensor? project_scale) -> "
      "(Tensor output, Tensor expand_mask, Tensor depthwise_mask, Tensor pooled)",
      TORCH_FN(Call<FrozenInvertedResidual>::call));
  m.def(
      "lite_branch(Tensor pooled, Tensor weight1, Tensor? norm_weight1, Tensor? norm_bias1, Tensor? running_mean1, "
      "Tensor? running_var1, Tensor weight2, Tensor? norm_weight2, Tensor? norm_bias2, Tensor? running_mean2, "
      "Tensor? running_var2, int stride, int groups, str activation, int norm_groups1, int norm_groups2, float eps1, "
      "float eps2, bool keep_conv) -> (Tensor output, Tensor conv, Tensor statistics1, Tensor statistics2)",
      TORCH_FN(Call<LiteBranch>::call));
  m.def(
      "block_chain(Tensor input, Tensor?[] tensors, int[] numbers, float[] reals, str[] activations, "
      "Tensor(a!)[] running) -> Tensor",
      TORCH_FN(block_chain));
  m.def(
      "mbconv(Tensor input, Tensor?[] tensors, int stride, int[4] padding, str activation, str squeeze_activation, "
      "str gate, bool residual, bool compute=True) -> Tensor",
      TORCH_FN(Kernel<mbconv>::call));
  m.def("upsample_add(Tensor main, Tensor branch) -> Tensor", TORCH_FN(Call<UpsampleAdd>::call));
}

} // namespace tinytl::cpu
