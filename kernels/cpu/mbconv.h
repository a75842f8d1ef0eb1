// The block of MobileNetV3 and EfficientNet as one operator: the inverted residual with any activation and, between
// depthwise and projection, an optional squeeze-and-excite. Everything is frozen but the biases.
//
//     h1 = f(x We + be)                   1x1 expand        (N, H, W, E);   absent when no weight is given
//     h2 = f(depthwise(h1, Wd) + bd)      k x k, stride s   (N, H', W', E)
//     c  = squeeze_excite(mean(h2))       squeeze_excite.h  (N, E);         absent: 1
//     y  = (c h2) Wp + bp [+ x]           1x1 project       (N, H', W', C_out)
//
// A smooth activation and a gate need full values of h1 and h2 for an exact gradient, so the block keeps its narrow
// input and computes itself again in backward, one image after the other in each thread: expanded activations never
// exist for the whole batch. Where there are fewer images than threads, the threads share the rows of every image and
// wait for each other where a mean or a neighbour's rows are needed.
#pragma once

#include "inverted_residual.h"
#include "squeeze_excite.h"

#include <ATen/core/List.h>

#include <array>
#include <string>

namespace tinytl::cpu {

// Five layers: expand, depthwise, reduce, restore, project; the first, and the two in the middle together, may be absent.
enum BlockLayer : int { kExpand, kDepthwise, kReduce, kRestore, kProject, kBlockLayers };

struct MbconvLayers {
  std::array<OptionalTensor, kBlockLayers> weights, biases, scales;

  MbconvLayers() = default;
  // Weight, bias and scale of each layer in turn.
  explicit MbconvLayers(const c10::List<OptionalTensor>& tensors);
};

struct MbconvOptions {
  int64_t stride;
  std::array<int64_t, 4> padding; // top, bottom, left, right
  std::string activation, squeeze_activation, gate; // as with_slopes (activation_slopes.h) takes them
  bool residual;

  MbconvOptions(
      int64_t stride,
      at::IntArrayRef padding,
      std::string activation,
      std::string squeeze_activation,
      std::string gate,
      bool residual);
};

at::Tensor mbconv_forward(const at::Tensor& x, const MbconvLayers& layers, const MbconvOptions& options);
// What forward returns, not computed.
at::Tensor mbconv_output(const at::Tensor& x, const MbconvLayers& layers, const MbconvOptions& options);

// Which gradients are wanted: of x, and of the bias of each layer.
struct MbconvNeeds {
  bool input;
  std::array<bool, kBlockLayers> biases;
};

// Undefined where it is not wanted.
struct MbconvGradients {
  at::Tensor input;
  std::array<at::Tensor, kBlockLayers> biases;
};

MbconvGradients mbconv_backward(
    const at::Tensor& grad_output,
    const at::Tensor& x,
    const MbconvLayers& layers,
    const MbconvOptions& options,
    const MbconvNeeds& needs);

} // namespace tinytl::cpu
