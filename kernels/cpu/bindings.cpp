// Registers the kernels as torch.ops.tinytl_cpu.*: plain operators, no autograd, CPU tensors only. The package's own
// operators (namespace tinytl) carry the contract and call these.
#include "dispatcher.h"
#include "inverted_residual.h"
#include "lite_branch.h"
#include "operators.h"

#include <torch/library.h>

namespace tinytl::cpu {

TORCH_LIBRARY_FRAGMENT(tinytl_cpu, m) {
  m.def(
      "inverted_residual_forward(Tensor x, Tensor? expand_weight, Tensor? expand_scale, Tensor? expand_bias, "
      "Tensor depthwise_weight, Tensor? depthwise_scale, Tensor? depthwise_bias, Tensor project_weight, "
      "Tensor? project_scale, Tensor? project_bias, int stride, int[4] padding, str activation, bool residual, "
      "bool needs_mask, bool want_pooled) -> (Tensor out, Tensor mask_expand, Tensor mask_depthwise, Tensor pooled)");
  m.def(
      "inverted_residual_backward(Tensor grad_output, Tensor mask_expand, Tensor mask_depthwise, "
      "Tensor? expand_weight, Tensor? expand_scale, Tensor depthwise_weight, Tensor? depthwise_scale, "
      "Tensor project_weight, Tensor? project_scale, int[4] input_size, int stride, int[4] padding, str activation, "
      "bool residual, bool need_input, bool need_expand_bias, bool need_depthwise_bias, bool need_project_bias, "
      "Tensor? grad_pooled=None) -> "
      "(Tensor grad_input, Tensor grad_expand_bias, Tensor grad_depthwise_bias, Tensor grad_project_bias)");
  m.def(
      "activation_forward(Tensor x, str activation, float negative_slope, bool needs_mask) -> "
      "(Tensor out, Tensor mask)");
  m.def(
      "bias_activation_(Tensor(a!) x, Tensor? bias, Tensor? addend, str activation, float negative_slope, "
      "bool needs_mask) -> Tensor");
  m.def(
      "activation_backward(Tensor grad_output, Tensor mask, str activation, float negative_slope, bool need_input, "
      "bool need_bias) -> (Tensor grad_input, Tensor grad_bias)");
  m.def("coded_activation_forward(Tensor x, str activation, int zero, int steps) -> (Tensor out, Tensor codes)");
  m.def("coded_activation_backward(Tensor grad_output, Tensor codes, int zero, int steps) -> Tensor");
  m.def(
      "pointwise_forward(Tensor x, Tensor weight, Tensor? weight_scale, Tensor? bias, Tensor? addend, int[2] stride, "
      "str activation, bool needs_saved) -> (Tensor out, Tensor saved)");
  m.def(
      "pointwise_backward(Tensor grad_output, Tensor saved, Tensor weight, Tensor? weight_scale, int[4] input_size, "
      "int[2] stride, str activation, bool need_input, bool need_bias) -> (Tensor grad_input, Tensor grad_bias)");
  m.def(
      "depthwise_forward(Tensor x, Tensor weight, Tensor? weight_scale, Tensor? bias, int[2] stride, int[4] padding, "
      "int[2] dilation, str activation, bool needs_saved) -> (Tensor out, Tensor saved)");
  m.def(
      "depthwise_backward(Tensor grad_output, Tensor saved, Tensor weight, Tensor? weight_scale, int[4] input_size, "
      "int[2] stride, int[4] padding, int[2] dilation, str activation, bool need_input, bool need_bias) -> "
      "(Tensor grad_input, Tensor grad_bias)");
  m.def(
      "dense_forward(Tensor x, Tensor weight, Tensor? weight_scale, Tensor? bias, int[2] stride, int[4] padding, "
      "int[2] dilation, int groups, str activation, bool needs_saved) -> (Tensor out, Tensor saved)");
  m.def(
      "dense_backward(Tensor grad_output, Tensor saved, Tensor weight, Tensor? weight_scale, int[4] input_size, "
      "int[2] stride, int[4] padding, int[2] dilation, int groups, str activation, bool need_input, bool need_bias) -> "
      "(Tensor grad_input, Tensor grad_bias)");
  m.def(
      "max_pool2d_forward(Tensor x, int[2] kernel_size, int[2] stride, int[2] padding, int[2] dilation, "
      "bool ceil_mode, bool needs_positions) -> (Tensor out, Tensor positions)");
  m.def(
      "max_pool2d_backward(Tensor grad_output, Tensor positions, int[4] input_size, int[2] kernel_size, "
      "int[2] stride, int[2] padding, int[2] dilation, bool ceil_mode) -> Tensor");
  m.def(
      "avg_pool2d_forward(Tensor x, int[2] kernel_size, int[2] stride, int[2] padding, bool ceil_mode, "
      "bool count_include_pad, int divisor_override) -> Tensor");
  m.def(
      "avg_pool2d_backward(Tensor grad_output, int[4] input_size, int[2] kernel_size, int[2] stride, "
      "int[2] padding, bool ceil_mode, bool count_include_pad, int divisor_override) -> Tensor");
  m.def(
      "group_norm_forward(Tensor x, Tensor? weight, Tensor? bias, int num_groups, float eps, str activation) -> "
      "(Tensor out, Tensor mean, Tensor rstd)");
  m.def(
      "group_norm_backward(Tensor grad_output, Tensor x, Tensor mean, Tensor rstd, Tensor? weight, Tensor? bias, "
      "int num_groups, str activation, bool need_input, bool need_weight, bool need_bias) -> "
      "(Tensor grad_input, Tensor grad_weight, Tensor grad_bias)");
  m.def(
      "lite_branch_forward(Tensor pooled, Tensor weight1, Tensor? norm_weight1, Tensor? norm_bias1, "
      "Tensor? running_mean1, Tensor? running_var1, Tensor weight2, Tensor? norm_weight2, Tensor? norm_bias2, "
      "Tensor? running_mean2, Tensor? running_var2, int stride, int groups, str activation, int norm_groups1, "
      "int norm_groups2, float eps1, float eps2, Tensor(a!)? main=None) -> "
      "(Tensor out, Tensor conv, Tensor statistics1, Tensor statistics2)");
  m.def(
      "lite_branch_backward(Tensor grad_output, Tensor pooled, Tensor conv, Tensor statistics1, Tensor statistics2, "
      "Tensor weight1, Tensor? norm_weight1, Tensor? norm_bias1, Tensor weight2, Tensor? norm_weight2, int stride, "
      "int groups, str activation, int norm_groups1, int norm_groups2, float eps1, float eps2, bool of_batch1, "
      "bool of_batch2, bool[7] needed, bool added=False) -> "
      "(Tensor grad_pooled, Tensor grad_weight1, Tensor grad_norm_weight1, Tensor grad_norm_bias1, "
      "Tensor grad_weight2, Tensor grad_norm_weight2, Tensor grad_norm_bias2)");
  m.def("upsample_add_forward(Tensor main, Tensor branch) -> Tensor");
  m.def("upsample_add_backward(Tensor grad_output, int[4] branch_size) -> Tensor");
  m.def("in_layout(Tensor x, bool channels_last) -> Tensor");
  // Bytes of scratch.h that the kernels have asked for since reset_scratch_bytes(), all threads together.
  m.def("scratch_bytes() -> int", [] { return scratch_count.bytes.load(); });
  m.def("reset_scratch_bytes() -> ()", [] {
    ++scratch_count.beginning;
    scratch_count.bytes = 0;
  });
}

#define TINYTL_IMPL(name) m.impl(#name, TORCH_FN((Kernel<&name>::call)))

TORCH_LIBRARY_IMPL(tinytl_cpu, CPU, m) {
  TINYTL_IMPL(inverted_residual_forward);
  TINYTL_IMPL(inverted_residual_backward);
  TINYTL_IMPL(activation_forward);
  TINYTL_IMPL(bias_activation_);
  TINYTL_IMPL(activation_backward);
  TINYTL_IMPL(coded_activation_forward);
  TINYTL_IMPL(coded_activation_backward);
  TINYTL_IMPL(pointwise_forward);
  TINYTL_IMPL(pointwise_backward);
  TINYTL_IMPL(depthwise_forward);
  TINYTL_IMPL(depthwise_backward);
  TINYTL_IMPL(dense_forward);
  TINYTL_IMPL(dense_backward);
  TINYTL_IMPL(max_pool2d_forward);
  TINYTL_IMPL(max_pool2d_backward);
  TINYTL_IMPL(avg_pool2d_forward);
  TINYTL_IMPL(avg_pool2d_backward);
  TINYTL_IMPL(group_norm_forward);
  TINYTL_IMPL(group_norm_backward);
  TINYTL_IMPL(lite_branch_forward);
  TINYTL_IMPL(lite_branch_backward);
  TINYTL_IMPL(upsample_add_forward);
  TINYTL_IMPL(upsample_add_backward);
  TINYTL_IMPL(in_layout);
}

} // namespace tinytl::cpu
