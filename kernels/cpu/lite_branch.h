// The lite residual's branch after its pooling, all of it trained, as one operator (formulas: lite_branch.cpp).
#pragma once

#include "common.h"

#include <array>
#include <tuple>

namespace tinytl::cpu {

// norm_groups: 0 for a BatchNorm, else the groups of a GroupNorm. running_mean, running_var: a BatchNorm in eval mode.
// conv: (H', W', N, C_inner); statistics: (2, C) or (2, N * norm_groups), mean and biased variance. main: what the
// upsampled result is added to in its place, channels_last; out is empty then.
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> lite_branch_forward( // (out, conv, statistics1, statistics2)
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
    const OptionalTensor& main = std::nullopt);

// conv: as the forward returned it, or empty: computed again. batch1, batch2: the statistics are of this batch.
// added: grad_output is of the upsampled sum. needed and the result: pooled, weight1, norm_weight1, norm_bias1, weight2, norm_weight2, norm_bias2.
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> lite_branch_backward(
    const at::Tensor& grad_output,
    const at::Tensor& pooled,
    const at::Tensor& conv,
    const at::Tensor& statistics1,
    const at::Tensor& statistics2,
    const at::Tensor& weight1,
    const OptionalTensor& norm_weight1,
    const OptionalTensor& norm_bias1,
    const at::Tensor& weight2,
    const OptionalTensor& norm_weight2,
    int64_t stride,
    int64_t groups,
    const std::string& activation,
    int64_t norm_groups1,
    int64_t norm_groups2,
    double eps1,
    double eps2,
    bool batch1,
    bool batch2,
    std::array<bool, 7> needed,
    bool added = false);

} // namespace tinytl::cpu
