// What nodes of autograd's graph are made of (autograd.cpp, block_chain.cpp).
#pragma once

#include "common.h"

#include <ATen/record_function.h>
#include <torch/csrc/autograd/custom_function.h>

#include <array>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

namespace tinytl::cpu {

using torch::autograd::AutogradContext;
using torch::autograd::Function;
using torch::autograd::variable_list;
using OptionalString = std::optional<std::string>;

inline at::Tensor or_undefined(const OptionalTensor& tensor) {
  return tensor.value_or(at::Tensor());
}

inline OptionalTensor or_none(const at::Tensor& tensor) {
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

// What a node keeps beside tensors.
template <class State>
struct Kept : torch::CustomClassHolder {
  State state;
  explicit Kept(State state) : state(std::move(state)) {}
};

template <class State>
void keep(AutogradContext* ctx, State state) {
  ctx->saved_data["state"] = c10::IValue::make_capsule(c10::make_intrusive<Kept<State>>(std::move(state)));
}

// As long as the node.
template <class State>
const State& kept(AutogradContext* ctx) {
  return static_cast<const Kept<State>*>(ctx->saved_data.at("state").toCapsule().get())->state;
}

// Which of `edges` are asked for.
template <size_t N>
std::array<bool, N> needed(AutogradContext* ctx, const std::array<int64_t, N>& edges) {
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

// results: by argument of the forward, undefined where there is none. They depend on grad_outputs, but a second
// derivative through them is an error.
variable_list once(const std::string& name, variable_list results, const variable_list& grad_outputs);

[[noreturn]] void refuse_second_derivative(const std::string& operator_name);

// Raises where a frozen weight wants a gradient.
void refuse_trained(const OptionalTensor& weight, const char* name);
// The same for the three weights of a block and what scales them; `first` is what its expansion is called.
void refuse_trained_block(
    const char* first,
    const OptionalTensor& expand_weight,
    const OptionalTensor& expand_scale,
    const at::Tensor& depthwise_weight,
    const OptionalTensor& depthwise_scale,
    const at::Tensor& project_weight,
    const OptionalTensor& project_scale);

// frozen_conv of a 1x1 convolution with stride 1. needs_saved: whether a gradient can be asked for.
at::Tensor frozen_pointwise(
    const at::Tensor& input,
    const at::Tensor& weight,
    const OptionalTensor& bias,
    const OptionalTensor& weight_scale,
    const std::string& activation,
    bool needs_saved);

// The branch of a lite residual: its tensors, the statistics of norms that do not measure the batch among them.
struct BranchTensors {
  const at::Tensor& pooled;
  const at::Tensor& weight1;
  const OptionalTensor &norm_weight1, &norm_bias1, &running_mean1, &running_var1;
  const at::Tensor& weight2;
  const OptionalTensor &norm_weight2, &norm_bias2, &running_mean2, &running_var2;
};

struct BranchOptions {
  int64_t stride, groups;
  std::string activation;
  int64_t norm_groups1, norm_groups2;
  double eps1, eps2;
  bool keep_conv;
};

struct BranchOutputs {
  at::Tensor output, conv, statistics1, statistics2;
};

// Forward of a node whose tensor arguments are main and `tensors`: the branch or, with `main`, the sum of it, upsampled,
// and `main`, in `main` itself, which nobody has kept.
BranchOutputs branch_forward(
    AutogradContext* ctx, const OptionalTensor& main, const BranchTensors& tensors, const BranchOptions& options);
// Its backward: the gradients of those arguments.
variable_list branch_backward(AutogradContext* ctx, const variable_list& grads);

} // namespace tinytl::cpu
