// One pass over a channels_last tensor, activation and bit mask in hand:
//
//     bias_activation_      x <- act(x + bias + addend), mask    in place: the epilogue of a convolution done elsewhere
//     activation_forward    y = act(x), mask
//     activation_backward   g = bit ? pass dy : block dy,  dbias = sum g        (pass, block): relu, relu6 (1, 0),
//                                                                    leaky_relu (1, slope), hardsigmoid (1/6, 0)
//
// and over a dense tensor in any order, with the derivative of a smooth activation in 8 bits (core/derivative_code.py):
//
//     coded_activation_forward    y = f(x),  code = round(zero + steps f'(x)), 255 where f'(x) is NaN
//     coded_activation_backward   g = dy (code - zero) / steps
//
// Bound by memory: reads and writes each value once, and a bit or a byte. Biases and their gradients are float32.
#include "activation_pixels.h"
#include "operators.h"
#include "parallel.h"
#include "smooth.h"

#include <limits>

namespace tinytl::cpu {
namespace {

at::Tensor run_forward(
    const at::Tensor& x,
    at::Tensor& y,
    const OptionalTensor& bias,
    const OptionalTensor& addend,
    Activation kind,
    double slope,
    bool needs_mask) {
  const int64_t channels = x.size(1);
  const int64_t pixels = x.size(0) * x.size(2) * x.size(3);
  at::Tensor mask =
      empty_mask(x, needs_mask && kind != Activation::none, x.size(0), x.size(2), x.size(3), channels);
  const at::Tensor padded = padded_bias(bias, channels, "bias");
  const float* values = padded.defined() ? padded.data_ptr<float>() : nullptr;
  uint8_t* bits = data_or_null<uint8_t>(mask);
  const at::Tensor added = checked_addend(addend, x.sizes(), x.scalar_type());
  with_storage_type(x.scalar_type(), "input", [&](auto zero) {
    using T = decltype(zero);
    const int64_t tasks = pixel_tasks(pixels, channels);
    const T* from = x.data_ptr<T>();
    const T* more = added.defined() ? added.data_ptr<T>() : nullptr;
    T* to = y.data_ptr<T>();
    with_any_activation(kind, [&](auto a) {
      parallel_tasks(tasks, [&](int64_t t) {
        const int64_t begin = pixels * t / tasks, end = pixels * (t + 1) / tasks;
        forward_pixels<a.value>(from, to, bits, values, more, static_cast<float>(slope), channels, begin, end);
      });
    });
  });
  return mask;
}

constexpr int64_t kGrain = 16384; // elements worth a thread
constexpr uint8_t kNanCode = 255;

// How a derivative d is coded: round(zero + steps d).
struct DerivativeCode {
  Vec zero, steps;

  DerivativeCode(int64_t zero, int64_t steps) : zero(static_cast<float>(zero)), steps(static_cast<float>(steps)) {}

  TINYTL_INLINE void store(uint8_t* target, Vec derivative, int64_t count) const {
    const Vec code = (derivative * steps + zero).round();
    alignas(64) float lanes[kLanes];
    Vec::blendv(code, Vec(kNanCode), code != code).store(lanes);
    alignas(64) uint8_t bytes[kLanes];
    for (int lane = 0; lane < kLanes; ++lane) {
      bytes[lane] = static_cast<uint8_t>(lanes[lane]);
    }
    std::memcpy(target, bytes, count);
  }
  TINYTL_INLINE Vec load(const uint8_t* source, int64_t count) const {
    alignas(64) uint8_t bytes[kLanes] = {};
    std::memcpy(bytes, source, count);
    alignas(64) float lanes[kLanes];
    for (int lane = 0; lane < kLanes; ++lane) {
      lanes[lane] = bytes[lane];
    }
    const Vec code = Vec::loadu(lanes);
    // A quotient: a product with 1 / steps would turn the derivative 1 into its neighbour.
    return Vec::blendv((code - zero) / steps, Vec(std::numeric_limits<float>::quiet_NaN()), code == Vec(kNanCode));
  }
};

// Calls body(place, count) for every run of at most kLanes elements, on all threads.
template <class Body>
void for_each_vector(int64_t elements, const Body& body) {
  parallel_pieces(0, ceil_div(elements, kLanes), kGrain / kLanes, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      body(i * kLanes, std::min<int64_t>(elements - i * kLanes, kLanes));
    }
  });
}

void check_dense(const at::Tensor& x, const char* name) {
  TORCH_CHECK(x.is_non_overlapping_and_dense(), name, ": expected a dense tensor, got strides ", x.strides());
}

void check_image(const at::Tensor& x, const char* name) {
  TORCH_CHECK(x.dim() == 4, name, ": expected 4 dimensions (N, C, H, W), got ", x.sizes());
}

} // namespace

std::tuple<at::Tensor, at::Tensor> activation_forward(
    const at::Tensor& x, const std::string& activation, double negative_slope, bool needs_mask) {
  check_image(x, "input");
  const at::Tensor input = in_channels_last(x);
  at::Tensor y = empty_tensor(x.sizes(), x.options(), at::MemoryFormat::ChannelsLast);
  at::Tensor mask = run_forward(input, y, {}, {}, parse_activation(activation, true), negative_slope, needs_mask);
  return {y, mask};
}

at::Tensor bias_activation_(
    at::Tensor& x,
    const OptionalTensor& bias,
    const OptionalTensor& addend,
    const std::string& activation,
    double negative_slope,
    bool needs_mask) {
  check_image(x, "input");
  TORCH_CHECK(
      x.is_contiguous(at::MemoryFormat::ChannelsLast),
      "input: expected a channels_last tensor to work on in place, got strides ",
      x.strides());
  return run_forward(x, x, bias, addend, parse_activation(activation, true), negative_slope, needs_mask);
}

std::tuple<at::Tensor, at::Tensor> activation_backward(
    const at::Tensor& grad_output,
    const at::Tensor& mask,
    const std::string& activation,
    double negative_slope,
    bool need_input,
    bool need_bias) {
  check_image(grad_output, "grad_output");
  const Activation kind = parse_activation(activation, true);
  const int64_t channels = grad_output.size(1);
  const int64_t pixels = grad_output.size(0) * grad_output.size(2) * grad_output.size(3);
  const uint8_t* bits = checked_mask(
      mask, "mask", kind != Activation::none, grad_output.size(0), grad_output.size(2), grad_output.size(3), channels);
  const at::Tensor grad_out = in_channels_last(grad_output);
  at::Tensor grad = need_input
      ? empty_tensor(grad_out.sizes(), grad_out.options(), at::MemoryFormat::ChannelsLast)
      : empty_tensor({0}, grad_out.options());
  const int64_t tasks = pixel_tasks(pixels, channels);
  const int64_t length = 2 * padded_channels(channels);
  at::Tensor partial = zero_tensor({tasks, length}, grad_out.options().dtype(at::kFloat));
  float* sums = partial.data_ptr<float>();
  with_storage_type(grad_out.scalar_type(), "grad_output", [&](auto zero) {
    using T = decltype(zero);
    const T* from = grad_out.data_ptr<T>();
    T* to = need_input ? grad.data_ptr<T>() : nullptr;
    parallel_tasks(tasks, [&](int64_t t) {
      backward_pixels(
          from,
          bits,
          to,
          need_bias ? sums + t * length : nullptr,
          gradient_slopes(kind, negative_slope),
          channels,
          pixels * t / tasks,
          pixels * (t + 1) / tasks);
    });
  });
  return {grad, reduce_partial(partial, 0, channels, need_bias)};
}

std::tuple<at::Tensor, at::Tensor> coded_activation_forward(
    const at::Tensor& x, const std::string& activation, int64_t zero, int64_t steps) {
  check_dense(x, "input");
  at::Tensor y = empty_like(x);
  at::Tensor codes = empty_like(x, x.options().dtype(at::kByte));
  uint8_t* bytes = codes.data_ptr<uint8_t>();
  const DerivativeCode code(zero, steps);
  with_storage_type(x.scalar_type(), "input", [&](auto storage) {
    using T = decltype(storage);
    const T* from = x.data_ptr<T>();
    T* to = y.data_ptr<T>();
    const bool known = with_smooth(activation, [&](auto f) {
      for_each_vector(x.numel(), [&](int64_t at, int64_t count) {
        const Vec value = load_channels(from + at, count);
        store_channels(to + at, f.value(value), count);
        code.store(bytes + at, f.gradient(value, Vec(1.f)), count);
      });
    });
    TORCH_CHECK(known, "activation: expected a smooth one, got \"", activation, "\"");
  });
  return {y, codes};
}

at::Tensor coded_activation_backward(
    const at::Tensor& grad_output, const at::Tensor& codes, int64_t zero, int64_t steps) {
  check_dense(grad_output, "grad_output");
  TORCH_CHECK(
      codes.scalar_type() == at::kByte && codes.sizes() == grad_output.sizes() &&
          codes.strides() == grad_output.strides(),
      "codes: expected uint8 in the sizes and strides of grad_output");
  at::Tensor grad = empty_like(grad_output);
  const uint8_t* bytes = codes.data_ptr<uint8_t>();
  const DerivativeCode code(zero, steps);
  with_storage_type(grad_output.scalar_type(), "grad_output", [&](auto storage) {
    using T = decltype(storage);
    const T* from = grad_output.data_ptr<T>();
    T* to = grad.data_ptr<T>();
    for_each_vector(grad_output.numel(), [&](int64_t at, int64_t count) {
      store_channels(to + at, load_channels(from + at, count) * code.load(bytes + at, count), count);
    });
  });
  return grad;
}

} // namespace tinytl::cpu
