// The activation of a convolution, and what it keeps for backward.
//
//     forward     y = f(z), and bits or, of a smooth f, z
//     backward    g = f'(z) dy
//
// none, relu and relu6 are part of the tile that computes z, and of the loop that reads dy. Every other one is a pass
// over a run of pixels that has just been written or is about to be read, and so is in a core's cache: no tile is
// compiled for it, and no gradient exists but for a run. Where a kernel reads dy more than once, rows that bands share or
// for one part of a large weight after the other, g is computed as often.
#pragma once

#include "common.h"

#include <string>
#include <tuple>

namespace tinytl::cpu {

struct ConvActivation {
  std::string smooth; // its name in smooth.h, or empty
  Activation kind; // none where it is smooth

  // "none", "relu", "relu6", "leaky_relu", "hardsigmoid", "hardswish", "silu", "gelu", "gelu_tanh"
  explicit ConvActivation(const std::string& name);

  bool is_smooth() const {
    return !smooth.empty();
  }
  bool keeps_bits() const {
    return kind != Activation::none;
  }
  // What tiles and loops apply themselves.
  Activation in_tile() const {
    return kind == Activation::relu || kind == Activation::relu6 ? kind : Activation::none;
  }
  bool is_pass() const {
    return is_smooth() || kind != in_tile();
  }
};

// What a convolution writes: tiles store z, or y where they apply the activation themselves, at values(), and mask bits
// at tile_bits().
class ConvOutput {
 public:
  // size: (N, C, H, W)
  ConvOutput(const std::string& activation, at::IntArrayRef size, const at::TensorOptions& options, bool needs_saved);

  template <class T>
  T* values() const {
    return (keeps_values_ ? saved_ : out_).data_ptr<T>();
  }
  Activation tile_activation() const {
    return activation_.in_tile();
  }
  uint8_t* tile_bits() const { // null: none are wanted of a tile
    return activation_.is_pass() ? nullptr : bits_;
  }
  // These pixels are complete, all channels.
  template <class T>
  void finish(int64_t first_pixel, int64_t pixels) const {
    if (activation_.is_pass()) {
      pass<T>(first_pixel, pixels);
    }
  }
  std::tuple<at::Tensor, at::Tensor> result() const { // (out, saved)
    return {out_, saved_};
  }

 private:
  ConvActivation activation_;
  at::Tensor out_, saved_;
  uint8_t* bits_;
  bool keeps_values_;

  template <class T>
  void pass(int64_t first_pixel, int64_t pixels) const;
};

// The gradient at the output of a convolution. size: (N, C, H, W); saved: as the forward returned it.
class ConvGradient {
 public:
  ConvGradient(
      const std::string& activation, const at::Tensor& grad_output, const at::Tensor& saved, at::IntArrayRef size);

  // g of these pixels, all channels; where loop_bits() is not null it is dy, and who reads it selects. In this thread's
  // scratch memory, until the next call.
  template <class T>
  const T* pixels(int64_t first, int64_t count) const {
    const T* grad = grad_.data_ptr<T>() + first * channels_;
    return activation_.is_pass() ? pass<T>(grad, first, count) : grad;
  }
  const uint8_t* loop_bits() const {
    return activation_.is_pass() ? nullptr : bits_;
  }
  at::TensorOptions options() const {
    return grad_.options();
  }
  at::ScalarType dtype() const {
    return grad_.scalar_type();
  }
  // The sum of g over all pixels, float32; empty where it is not wanted.
  at::Tensor sum(bool wanted) const;

 private:
  ConvActivation activation_;
  at::Tensor grad_, values_; // channels_last
  int64_t channels_;
  const uint8_t* bits_;

  template <class T>
  const T* pass(const T* grad, int64_t first, int64_t count) const;
};

} // namespace tinytl::cpu
