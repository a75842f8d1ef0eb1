// See squeeze_excite.h.
#include "squeeze_excite.h"

#include "activation_slopes.h"
#include "frozen_weight.h"

#include <cstring>

namespace tinytl::cpu {
namespace {

// A frozen weight's values in float32, rounded to dtype: itself where it is that.
at::Tensor float_matrix(const FrozenWeight& weight, at::ScalarType dtype) {
  if (dtype == at::kFloat && weight.values.scalar_type() == at::kFloat) {
    return weight.values;
  }
  at::Tensor matrix = empty_tensor({weight.out_channels, weight.inner}, weight.values.options().dtype(at::kFloat));
  float* to = matrix.data_ptr<float>();
  with_storage_type(dtype, "input", [&](auto zero) {
    with_values<decltype(zero)>(weight, [&](const auto& values) {
      for (int64_t o = 0; o < weight.out_channels; ++o) {
        copy_values(values, o, 0, weight.inner, to + o * weight.inner);
      }
    });
  });
  return matrix;
}

// out[o] = bias[o] + sum over i of matrix[o, i] in[i]
void multiply(const at::Tensor& matrix, int64_t rows, int64_t columns, const float* in, const at::Tensor& bias, float* out) {
  const float* row = matrix.data_ptr<float>();
  const float* start = bias.defined() ? bias.data_ptr<float>() : nullptr;
  for (int64_t o = 0; o < rows; ++o, row += columns) {
    Vec sum(0.f);
    for (int64_t i = 0; i < columns; i += kLanes) {
      const int64_t count = std::min<int64_t>(columns - i, kLanes);
      sum = at::vec::fmadd(load_channels(row + i, count), load_channels(in + i, count), sum);
    }
    const float total = at::vec::vec_reduce_all<float>([](Vec& a, Vec& b) { return a + b; }, sum);
    out[o] = total + (start != nullptr ? start[o] : 0.f);
  }
}

// out[i] = sum over o of matrix[o, i] in[o]
void multiply_transposed(const at::Tensor& matrix, int64_t rows, int64_t columns, const float* in, float* out) {
  const float* row = matrix.data_ptr<float>();
  std::memset(out, 0, sizeof(float) * columns);
  for (int64_t o = 0; o < rows; ++o, row += columns) {
    const Vec factor(in[o]);
    for (int64_t i = 0; i < columns; i += kLanes) {
      const int64_t count = std::min<int64_t>(columns - i, kLanes);
      store_channels(
          out + i, at::vec::fmadd(load_channels(row + i, count), factor, load_channels(out + i, count)), count);
    }
  }
}

// values = f(values); slopes = f'(values)
void activate_all(const std::string& name, float* values, float* slopes, int64_t padded) {
  with_slopes(name, [&](auto f) {
    for (int64_t c = 0; c < padded; c += kLanes) {
      const auto [value, slope] = f.both(Vec::loadu(values + c));
      value.store(values + c);
      slope.store(slopes + c);
    }
  });
}

void times_slopes(float* gradients, const float* slopes, float* sums, int64_t padded) {
  for (int64_t c = 0; c < padded; c += kLanes) {
    const Vec passed = pass_gradient(Vec::loadu(gradients + c), Vec::loadu(slopes + c));
    passed.store(gradients + c);
    (Vec::loadu(sums + c) + passed).store(sums + c);
  }
}

void clear_tail(float* values, int64_t channels) {
  std::memset(values + channels, 0, sizeof(float) * (padded_channels(channels) - channels));
}

} // namespace

SqueezeExcite::SqueezeExcite(
    int64_t channels,
    const at::Tensor& reduce_weight,
    const OptionalTensor& reduce_scale,
    const OptionalTensor& reduce_bias,
    const at::Tensor& restore_weight,
    const OptionalTensor& restore_scale,
    const OptionalTensor& restore_bias,
    const std::string& activation,
    const std::string& gate,
    at::ScalarType dtype)
    : channels_(channels), squeezed_(reduce_weight.size(0)), activation_(activation), gate_(gate) {
  const auto check = [](const at::Tensor& weight, const char* name, int64_t out, int64_t in) {
    TORCH_CHECK(
        weight.sizes() == at::IntArrayRef({out, in, 1, 1}), name, ": expected (", out, ", ", in, ", 1, 1), got ",
        weight.sizes());
  };
  TORCH_CHECK(squeezed_ > 0, "reduce_weight: expected at least one channel, got ", reduce_weight.sizes());
  check(reduce_weight, "reduce_weight", squeezed_, channels);
  check(restore_weight, "restore_weight", channels, squeezed_);
  for (const std::string& name : {activation, gate}) {
    with_slopes(name, [](auto) {}); // an unknown one raises here
  }
  reduce_ = float_matrix(FrozenWeight(reduce_weight, reduce_scale, "reduce_weight"), dtype);
  restore_ = float_matrix(FrozenWeight(restore_weight, restore_scale, "restore_weight"), dtype);
  reduce_bias_ = padded_bias(reduce_bias, squeezed_, "reduce_bias");
  restore_bias_ = padded_bias(restore_bias, channels, "restore_bias");
}

void SqueezeExcite::forward(const float* mean, float* gate, float* state) const {
  const int64_t padded = padded_channels(squeezed_);
  float *squeezed = state, *slopes = state + padded, *gate_slopes = state + 2 * padded;
  multiply(reduce_, squeezed_, channels_, mean, reduce_bias_, squeezed);
  clear_tail(squeezed, squeezed_);
  activate_all(activation_, squeezed, slopes, padded);
  multiply(restore_, channels_, squeezed_, squeezed, restore_bias_, gate);
  clear_tail(gate, channels_);
  activate_all(gate_, gate, gate_slopes, padded_channels(channels_));
}

void SqueezeExcite::backward(float* grad_gate, float* state, float* grad_reduce_bias, float* grad_restore_bias) const {
  const int64_t padded = padded_channels(squeezed_);
  float *squeezed = state, *slopes = state + padded, *gate_slopes = state + 2 * padded;
  times_slopes(grad_gate, gate_slopes, grad_restore_bias, padded_channels(channels_));
  multiply_transposed(restore_, channels_, squeezed_, grad_gate, squeezed);
  clear_tail(squeezed, squeezed_);
  times_slopes(squeezed, slopes, grad_reduce_bias, padded);
  multiply_transposed(reduce_, squeezed_, channels_, squeezed, grad_gate);
  clear_tail(grad_gate, channels_);
}

} // namespace tinytl::cpu
