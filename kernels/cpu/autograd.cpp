// The operators of a training step's many small calls with their derivatives in C++: the rules of the same name in
// tinytl_kernels/ops, without the interpreter in forward's bookkeeping and in backward at all. A small block's forward
// and backward take 400 us through Python's autograd on a 2.8 GHz core, and 240 here.
//
// For channels_last inputs that the kernels take; everything else keeps to Python's. What is kept for backward is the
// same, and so is the answer to a second derivative: an error where one is asked for, never a silent zero.
#include "autograd.h"

#include "activation_pixels.h"
#include "conv_activation.h"
#include "dispatcher.h"
#include "inverted_residual.h"
#include "lite_branch.h"
#include "mbconv.h"
#include "operators.h"

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

[[noreturn]] void refuse_second_derivative(const std::string& operator_name) {
  TORCH_CHECK(
      false,
      "tinytl::",
      operator_name,
      " has no second derivative: the operators of tinytl_kernels keep too little for one. Differentiate twice through "
      "the plain PyTorch model that tinytl_kernels.to_torch(model) gives.");
}

namespace {

// Hands gradients on with a history that refuses to be differentiated.
struct Once : Function<Once> {
  static variable_list forward(AutogradContext* ctx, const std::string& name, at::TensorList gradients, at::TensorList) {
    keep(ctx, name);
    return gradients.vec();
  }
  static variable_list backward(AutogradContext* ctx, const variable_list&) {
    refuse_second_derivative(kept<std::string>(ctx) + "_backward");
  }
};

} // namespace

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

// What a branch's node keeps beside tensors.
struct BranchState {
  std::array<int64_t, 8> edges; // to main, pooled, weight1, its norm's weight and bias, weight2, its norm's
  BranchOptions options;
  bool batch1, batch2, added;
};

BranchOutputs branch_forward(
    AutogradContext* ctx, const OptionalTensor& main, const BranchTensors& tensors, const BranchOptions& options) {
  const auto& [pooled, weight1, norm_weight1, norm_bias1, mean1, var1, weight2, norm_weight2, norm_bias2, mean2, var2] =
      tensors;
  Edges edges;
  BranchState state{{}, options, !mean1.has_value(), !mean2.has_value(), main.has_value()};
  auto& [to_main, to_pooled, to_weight1, to_scale1, to_bias1, to_weight2, to_scale2, to_bias2] = state.edges;
  to_main = edges.of(main);
  to_pooled = edges.of(pooled), to_weight1 = edges.of(weight1);
  to_scale1 = edges.of(norm_weight1), to_bias1 = edges.of(norm_bias1);
  edges.of(mean1), edges.of(var1);
  to_weight2 = edges.of(weight2), to_scale2 = edges.of(norm_weight2), to_bias2 = edges.of(norm_bias2);
  TINYTL_RECORDED("lite_branch_forward");
  auto [output, conv, statistics1, statistics2] = lite_branch_forward(
      pooled, weight1, norm_weight1, norm_bias1, mean1, var1, weight2, norm_weight2, norm_bias2, mean2, var2,
      options.stride, options.groups, options.activation, options.norm_groups1, options.norm_groups2, options.eps1,
      options.eps2, main);
  if (main.has_value()) {
    output = *main;
    ctx->mark_dirty({output});
  }
  if (!options.keep_conv) {
    conv = empty_tensor({0}, pooled.options());
  }
  ctx->save_for_backward(
      {pooled, conv, statistics1, statistics2, weight1, or_undefined(norm_weight1), or_undefined(norm_bias1), weight2,
       or_undefined(norm_weight2)});
  keep(ctx, std::move(state));
  ctx->set_materialize_grads(false);
  return {output, conv, statistics1, statistics2};
}

variable_list branch_backward(AutogradContext* ctx, const variable_list& grads) {
  constexpr int kTensors = 12;
  if (!grads[0].defined()) {
    return variable_list(kTensors);
  }
  const auto saved = ctx->get_saved_variables();
  const BranchState& state = kept<BranchState>(ctx);
  const BranchOptions& o = state.options;
  const auto [need_main, need_input, need_weight1, need_scale1, need_bias1, need_weight2, need_scale2, need_bias2] =
      needed(ctx, state.edges);
  const std::array need{need_input, need_weight1, need_scale1, need_bias1, need_weight2, need_scale2, need_bias2};
  variable_list results(kTensors);
  if (std::find(need.begin(), need.end(), true) != need.end()) {
    TINYTL_RECORDED("lite_branch_backward");
    const auto gradients = lite_branch_backward(
        grads[0], saved[0], saved[1], saved[2], saved[3], saved[4], or_none(saved[5]), or_none(saved[6]), saved[7],
        or_none(saved[8]), o.stride, o.groups, o.activation, o.norm_groups1, o.norm_groups2, o.eps1, o.eps2,
        state.batch1, state.batch2, need, state.added);
    constexpr std::array kPlaces{1, 2, 3, 4, 7, 8, 9};
    results = once("lite_branch", by_argument(kTensors, gradients, kPlaces, need), grads);
  }
  if (need_main) {
    results[0] = grads[0];
  }
  return results;
}

namespace {

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
  struct State {
    std::array<int64_t, 3> edges; // to input, shortcut, bias
    std::vector<int64_t> input_size, stride, padding, dilation;
    int64_t groups;
    std::string activation, kernel;
  };

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
    keep(
        ctx,
        State{
            {to_input, to_shortcut, to_bias},
            input.sizes().vec(),
            stride.vec(),
            padding.vec(),
            dilation.vec(),
            groups,
            act,
            backward_kernel});
    ctx->set_materialize_grads(false); // no zeros for what is saved
    ctx->mark_non_differentiable({saved});
    return {out, saved};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    if (!grads[0].defined()) {
      return variable_list(kArguments);
    }
    const State& state = kept<State>(ctx);
    std::string activation = state.activation;
    // The value before a smooth activation is kept as a number without history: its part of a second derivative could
    // only be lost in silence.
    if (at::GradMode::is_enabled() && ConvActivation(activation).is_smooth()) {
      refuse_second_derivative("frozen_conv");
    }
    const auto saved = ctx->get_saved_variables();
    const auto [need_input, need_shortcut, need_bias] = needed(ctx, state.edges);
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
          state.kernel, grad, saved[1], saved[0], or_none(saved[2]), state.input_size, state.stride, state.padding,
          state.dilation, state.groups, activation, need_input, need_bias);
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

} // namespace

at::Tensor frozen_pointwise(
    const at::Tensor& input,
    const at::Tensor& weight,
    const OptionalTensor& bias,
    const OptionalTensor& weight_scale,
    const std::string& activation,
    bool needs_saved) {
  constexpr std::array<int64_t, 4> kOnes{1, 1, 1, 1}, kZeros{};
  const at::IntArrayRef one(kOnes.data(), 2);
  if (!needs_saved) {
    const at::AutoDispatchBelowADInplaceOrView no_history;
    return std::get<0>(conv_forward(
        "pointwise", input, std::nullopt, weight, weight_scale, bias, one, kZeros, one, 1, activation, false));
  }
  return FrozenConv::apply(
      input, OptionalTensor(), weight, bias, one, at::IntArrayRef(kZeros), one, 1, OptionalString(activation), true,
      weight_scale, std::string("pointwise"), std::string("pointwise"))[0];
}

namespace {

struct FrozenInvertedResidual : Function<FrozenInvertedResidual> {
  static constexpr int kArguments = 16;
  static constexpr size_t kOutputs = 4;
  struct State {
    std::array<int64_t, 4> edges; // to input and the biases
    std::vector<int64_t> input_size, output_size;
    int64_t stride;
    std::vector<int64_t> padding;
    std::string activation;
    bool residual;
  };

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
    keep(
        ctx,
        State{
            {to_input, to_expand, to_depthwise, to_project},
            input.sizes().vec(),
            out.sizes().vec(),
            stride[0],
            padding.vec(),
            act,
            residual});
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
    const State& state = kept<State>(ctx);
    const at::Tensor& grad_pooled = grads[3];
    const at::Tensor grad_output =
        grads[0].defined() ? grads[0] : zero_tensor(state.output_size, grad_pooled.options());
    const auto need = needed(ctx, state.edges);
    TINYTL_RECORDED("inverted_residual_backward");
    const auto gradients = inverted_residual_backward(
        grad_output, saved[3], saved[4], or_none(saved[0]), or_none(saved[5]), saved[1], or_none(saved[6]), saved[2],
        or_none(saved[7]), state.input_size, state.stride, state.padding, state.activation, state.residual, need[0],
        need[1], need[2], need[3], or_none(grad_pooled));
    constexpr std::array kPlaces{0, 2, 4, 6};
    return once("frozen_inverted_residual", by_argument(kArguments, gradients, kPlaces, need), grads);
  }
};

// The block keeps its input and computes itself again (mbconv.h).
struct Mbconv : Function<Mbconv> {
  static constexpr int kArguments = 9;
  struct State {
    std::array<int64_t, 1 + kBlockLayers> edges; // to input and the biases
    MbconvOptions options;
  };

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
    const State state{
        {edges.of(input), edges.of(expand_bias), edges.of(depthwise_bias), edges.of(reduce_bias),
         edges.of(restore_bias), edges.of(project_bias)},
        options};
    variable_list kept{input};
    for (const auto& tensors : {layers.weights, layers.biases, layers.scales}) {
      for (const OptionalTensor& tensor : tensors) {
        kept.push_back(or_undefined(tensor));
      }
    }
    ctx->save_for_backward(std::move(kept));
    keep(ctx, state);
    if (!compute) {
      return mbconv_output(input, layers, options);
    }
    TINYTL_RECORDED("mbconv_forward");
    return mbconv_forward(input, layers, options);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
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
    const State& state = kept<State>(ctx);
    const auto need = needed(ctx, state.edges);
    MbconvNeeds needs{need[0], {}};
    std::copy(need.begin() + 1, need.end(), needs.biases.begin());
    TINYTL_RECORDED("mbconv_backward");
    const MbconvGradients gradients = mbconv_backward(grads[0], saved[0], layers, state.options, needs);
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

struct LiteBranch : Function<LiteBranch> {
  static constexpr int kArguments = 19;
  static constexpr size_t kOutputs = 4;

  static variable_list forward(
      AutogradContext* ctx,
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
    auto [out, conv, statistics1, statistics2] = branch_forward(
        ctx,
        std::nullopt,
        {pooled, weight1, norm_weight1, norm_bias1, running_mean1, running_var1, weight2, norm_weight2, norm_bias2,
         running_mean2, running_var2},
        {stride, groups, activation, norm_groups1, norm_groups2, eps1, eps2, keep_conv});
    ctx->mark_non_differentiable({conv, statistics1, statistics2});
    return {out, conv, statistics1, statistics2};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    variable_list results = branch_backward(ctx, grads);
    results.erase(results.begin()); // nothing that it is added to
    results.resize(kArguments);
    return results;
  }
};

struct UpsampleAdd : Function<UpsampleAdd> {
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& main, const at::Tensor& branch) {
    keep(ctx, branch.sizes().vec());
    TINYTL_RECORDED("upsample_add_forward");
    return upsample_add_forward(main, branch);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    variable_list results(2);
    if (ctx->needs_input_grad(1)) {
      TINYTL_RECORDED("upsample_add_backward");
      results[1] = upsample_add_backward(grads[0], kept<std::vector<int64_t>>(ctx));
      results = once("upsample_add", std::move(results), grads);
    }
    if (ctx->needs_input_grad(0)) {
      results[0] = grads[0];
    }
    return results;
  }
};

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
      "mbconv(Tensor input, Tensor?[] tensors, int stride, int[4] padding, str activation, str squeeze_activation, "
      "str gate, bool residual, bool compute=True) -> Tensor",
      TORCH_FN(Kernel<mbconv>::call));
  m.def("upsample_add(Tensor main, Tensor branch) -> Tensor", TORCH_FN(Call<UpsampleAdd>::call));
}

} // namespace tinytl::cpu
