// The single operators. All tensors are (N, C, H, W) unless it says otherwise; anything not channels_last is copied to
// it first, and results are channels_last. A weight is in the storage type of the input, in float32, or in 8 bits with
// its weight_scale (frozen_weight.h). Storage: float32, bfloat16, float16; arithmetic, biases and bias gradients:
// float32. A result that was not asked for is an empty tensor. Formulas, traffic and saved state: at the head of each
// file.
#pragma once

#include "common.h"
#include "depthwise.h"

#include <tuple>
#include <vector>

namespace tinytl::cpu {

// activation.cpp: activation in {none, relu, relu6, leaky_relu, hardsigmoid}.
std::tuple<at::Tensor, at::Tensor> activation_forward( // (out, mask)
    const at::Tensor& x, const std::string& activation, double negative_slope, bool needs_mask);
at::Tensor bias_activation_( // mask
    at::Tensor& x,
    const OptionalTensor& bias,
    const OptionalTensor& addend,
    const std::string& activation,
    double negative_slope,
    bool needs_mask);
std::tuple<at::Tensor, at::Tensor> activation_backward( // (grad_input, grad_bias)
    const at::Tensor& grad_output,
    const at::Tensor& mask,
    const std::string& activation,
    double negative_slope,
    bool need_input,
    bool need_bias);

// activation.cpp: dense tensors of any shape and order of dimensions; codes: uint8, like them. activation in {hardswish,
// silu, gelu, gelu_tanh, sigmoid}.
std::tuple<at::Tensor, at::Tensor> coded_activation_forward( // (out, codes)
    const at::Tensor& x, const std::string& activation, int64_t zero, int64_t steps);
at::Tensor coded_activation_backward( // grad_input
    const at::Tensor& grad_output, const at::Tensor& codes, int64_t zero, int64_t steps);

// group_norm.cpp: any activation.
std::tuple<at::Tensor, at::Tensor, at::Tensor> group_norm_forward( // (out, mean, rstd)
    const at::Tensor& x,
    const OptionalTensor& weight,
    const OptionalTensor& bias,
    int64_t num_groups,
    double eps,
    const std::string& activation);
std::tuple<at::Tensor, at::Tensor, at::Tensor> group_norm_backward( // (grad_input, grad_weight, grad_bias)
    const at::Tensor& grad_output,
    const at::Tensor& x,
    const at::Tensor& mean,
    const at::Tensor& rstd,
    const OptionalTensor& weight,
    const OptionalTensor& bias,
    int64_t num_groups,
    const std::string& activation,
    bool need_input,
    bool need_weight,
    bool need_bias);

// The convolutions: any activation of conv_activation.h, which says what is saved. pointwise.cpp; addend: as out, added
// before the activation.
std::tuple<at::Tensor, at::Tensor> pointwise_forward( // (out, saved)
    const at::Tensor& x,
    const at::Tensor& weight,
    const OptionalTensor& weight_scale,
    const OptionalTensor& bias,
    const OptionalTensor& addend,
    at::IntArrayRef stride,
    const std::string& activation,
    bool needs_saved);
std::tuple<at::Tensor, at::Tensor> pointwise_backward( // (grad_input, grad_bias)
    const at::Tensor& grad_output,
    const at::Tensor& saved,
    const at::Tensor& weight,
    const OptionalTensor& weight_scale,
    at::IntArrayRef input_size,
    at::IntArrayRef stride,
    const std::string& activation,
    bool need_input,
    bool need_bias);

// depthwise_conv.cpp: padding (top, bottom, left, right).
std::tuple<at::Tensor, at::Tensor> depthwise_forward( // (out, saved)
    const at::Tensor& x,
    const at::Tensor& weight,
    const OptionalTensor& weight_scale,
    const OptionalTensor& bias,
    at::IntArrayRef stride,
    at::IntArrayRef padding,
    at::IntArrayRef dilation,
    const std::string& activation,
    bool needs_saved);
std::tuple<at::Tensor, at::Tensor> depthwise_backward( // (grad_input, grad_bias)
    const at::Tensor& grad_output,
    const at::Tensor& saved,
    const at::Tensor& weight,
    const OptionalTensor& weight_scale,
    at::IntArrayRef input_size,
    at::IntArrayRef stride,
    at::IntArrayRef padding,
    at::IntArrayRef dilation,
    const std::string& activation,
    bool need_input,
    bool need_bias);

// dense_conv.cpp: padding (top, bottom, left, right); forward in groups: a multiple of 8 output channels each.
std::tuple<at::Tensor, at::Tensor> dense_forward( // (out, saved)
    const at::Tensor& x,
    const at::Tensor& weight,
    const OptionalTensor& weight_scale,
    const OptionalTensor& bias,
    at::IntArrayRef stride,
    at::IntArrayRef padding,
    at::IntArrayRef dilation,
    int64_t groups,
    const std::string& activation,
    bool needs_saved);
std::tuple<at::Tensor, at::Tensor> dense_backward( // (grad_input, grad_bias)
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
    bool need_bias);

// max_pool.cpp, avg_pool.cpp. divisor_override 0: none.
std::tuple<at::Tensor, at::Tensor> max_pool2d_forward( // (out, positions)
    const at::Tensor& x,
    at::IntArrayRef kernel_size,
    at::IntArrayRef stride,
    at::IntArrayRef padding,
    at::IntArrayRef dilation,
    bool ceil_mode,
    bool needs_positions);
at::Tensor max_pool2d_backward( // grad_input
    const at::Tensor& grad_output,
    const at::Tensor& positions,
    at::IntArrayRef input_size,
    at::IntArrayRef kernel_size,
    at::IntArrayRef stride,
    at::IntArrayRef padding,
    at::IntArrayRef dilation,
    bool ceil_mode);
at::Tensor avg_pool2d_forward( // out
    const at::Tensor& x,
    at::IntArrayRef kernel_size,
    at::IntArrayRef stride,
    at::IntArrayRef padding,
    bool ceil_mode,
    bool count_include_pad,
    int64_t divisor_override);
at::Tensor avg_pool2d_backward( // grad_input
    const at::Tensor& grad_output,
    at::IntArrayRef input_size,
    at::IntArrayRef kernel_size,
    at::IntArrayRef stride,
    at::IntArrayRef padding,
    bool ceil_mode,
    bool count_include_pad,
    int64_t divisor_override);

// upsample_add.cpp
at::Tensor upsample_add_forward(const at::Tensor& main, const at::Tensor& branch); // out
at::Tensor upsample_add_backward(const at::Tensor& grad_output, at::IntArrayRef branch_size); // grad_branch

} // namespace tinytl::cpu
