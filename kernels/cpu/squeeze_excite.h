// Squeeze-and-excite of one image: a number for every channel, between them two small layers, frozen, with biases.
//
//     r = act(Wr mean + br)      squeeze     (S)
//     gate = gate(We r + be)     excite      (E)
//
// The mean over an image's pixels is given, the gradient of it is what backward gives.
#pragma once

#include "common.h"

#include <optional>
#include <string>

namespace tinytl::cpu {

class SqueezeExcite {
 public:
  // reduce_weight: (S, E, 1, 1), restore_weight: (E, S, 1, 1). dtype: what weights are rounded to.
  SqueezeExcite(
      int64_t channels,
      const at::Tensor& reduce_weight,
      const OptionalTensor& reduce_scale,
      const OptionalTensor& reduce_bias,
      const at::Tensor& restore_weight,
      const OptionalTensor& restore_scale,
      const OptionalTensor& restore_bias,
      const std::string& activation,
      const std::string& gate,
      at::ScalarType dtype);

  int64_t squeezed() const {
    return squeezed_;
  }
  // Floats that one image needs between forward and backward.
  int64_t state() const {
    return 2 * padded_channels(squeezed_) + padded_channels(channels_);
  }
  // mean, gate: padded channels, of which those that exist are read and written; state: as much as state() says.
  void forward(const float* mean, float* gate, float* state) const;
  // After forward with the same state: grad_gate is overwritten with the gradient of `mean`. The gradients of the
  // biases, padded, are added to.
  void backward(float* grad_gate, float* state, float* grad_reduce_bias, float* grad_restore_bias) const;

 private:
  int64_t channels_, squeezed_;
  at::Tensor reduce_, restore_; // float32, (S, E) and (E, S)
  at::Tensor reduce_bias_, restore_bias_; // padded; undefined: zeros
  std::string activation_, gate_;
};

} // namespace tinytl::cpu
