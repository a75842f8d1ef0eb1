// See conv_activation.h.
#include "conv_activation.h"

#include "activation_pixels.h"
#include "parallel.h"
#include "smooth.h"

namespace tinytl::cpu {
namespace {

// sigmoid is no convolution's: what it makes is mostly a gate, and kept by the product that it goes to.
bool names_smooth(const std::string& name) {
  return name != "sigmoid" && with_smooth(name, [](auto) {});
}

// Calls body(place, lanes) for every vector of `elements` neighbours.
template <class Body>
TINYTL_INLINE void for_vectors(int64_t elements, const Body& body) {
  for (int64_t i = 0; i < elements; i += kLanes) {
    body(i, std::min<int64_t>(elements - i, kLanes));
  }
}

} // namespace

ConvActivation::ConvActivation(const std::string& name)
    : smooth(names_smooth(name) ? name : ""), kind(is_smooth() ? Activation::none : parse_activation(name, true)) {}

ConvOutput::ConvOutput(
    const std::string& activation, at::IntArrayRef size, const at::TensorOptions& options, bool needs_saved)
    : activation_(activation),
      out_(empty_tensor(size, options, at::MemoryFormat::ChannelsLast)),
      bits_(nullptr),
      keeps_values_(needs_saved && activation_.is_smooth()) {
  if (keeps_values_) {
    saved_ = empty_tensor(size, options, at::MemoryFormat::ChannelsLast);
    return;
  }
  saved_ = empty_mask(out_, needs_saved && activation_.keeps_bits(), size[0], size[2], size[3], size[1]);
  if (saved_.numel() > 0) {
    bits_ = saved_.data_ptr<uint8_t>();
  }
}

template <class T>
void ConvOutput::pass(int64_t first_pixel, int64_t pixels) const {
  const int64_t channels = out_.size(1);
  T* to = out_.data_ptr<T>();
  if (!activation_.is_smooth()) {
    with_any_activation(activation_.kind, [&](auto a) {
      forward_pixels<a.value, T>(
          to, to, bits_, nullptr, nullptr, kLeakySlope, channels, first_pixel, first_pixel + pixels);
    });
    return;
  }
  to += first_pixel * channels;
  const T* from = values<T>() + first_pixel * channels;
  with_smooth(activation_.smooth, [&](auto f) {
    for_vectors(pixels * channels, [&](int64_t at, int64_t lanes) TINYTL_LAMBDA_INLINE {
      store_channels(to + at, f.value(load_channels(from + at, lanes)), lanes);
    });
  });
}

ConvGradient::ConvGradient(
    const std::string& activation, const at::Tensor& grad_output, const at::Tensor& saved, at::IntArrayRef size)
    : activation_(activation), channels_(size[1]), bits_(nullptr) {
  check_size(grad_output, "grad_output", size, grad_output.scalar_type());
  grad_ = in_channels_last(grad_output);
  if (activation_.is_smooth()) {
    check_size(saved, "saved", size, grad_output.scalar_type());
    values_ = in_channels_last(saved);
  } else {
    bits_ = checked_mask(saved, "saved", activation_.keeps_bits(), size[0], size[2], size[3], size[1]);
  }
}

template <class T>
const T* ConvGradient::pass(const T* grad, int64_t first, int64_t count) const {
  const int64_t elements = count * channels_;
  T* to = scratch<T>(kGradient, elements);
  if (!activation_.is_smooth()) {
    const uint8_t* bits = bits_ + first * mask_bytes(channels_);
    backward_pixels<T>(grad, bits, to, nullptr, gradient_slopes(activation_.kind, kLeakySlope), channels_, 0, count);
    return to;
  }
  const T* values = values_.data_ptr<T>() + first * channels_;
  with_smooth(activation_.smooth, [&](auto f) {
    for_vectors(elements, [&](int64_t at, int64_t lanes) TINYTL_LAMBDA_INLINE {
      store_channels(to + at, f.gradient(load_channels(values + at, lanes), load_channels(grad + at, lanes)), lanes);
    });
  });
  return to;
}

at::Tensor ConvGradient::sum(bool wanted) const {
  const int64_t pixels = wanted ? grad_.size(0) * grad_.size(2) * grad_.size(3) : 0;
  const int64_t runs = ceil_div(pixels, kSumPixels), tasks = pixel_tasks(pixels, channels_);
  const int64_t length = 2 * padded_channels(channels_);
  const at::Tensor partial = zero_tensor({tasks, length}, options().dtype(at::kFloat));
  float* sums = partial.data_ptr<float>();
  with_storage_type(dtype(), "grad_output", [&](auto zero) {
    using T = decltype(zero);
    parallel_tasks(tasks, [&](int64_t t) {
      for (int64_t run = runs * t / tasks; run < runs * (t + 1) / tasks; ++run) {
        const int64_t first = run * kSumPixels, count = std::min(pixels - first, kSumPixels);
        const uint8_t* bits = loop_bits() != nullptr ? loop_bits() + first * mask_bytes(channels_) : nullptr;
        backward_pixels<T>(
            this->pixels<T>(first, count), bits, nullptr, sums + t * length, {1.f, 0.f}, channels_, 0, count);
      }
    });
  });
  return reduce_partial(partial, 0, channels_, wanted);
}

#define TINYTL_CONV_ACTIVATION(T)                                       \
  template void ConvOutput::pass<T>(int64_t, int64_t) const;            \
  template const T* ConvGradient::pass<T>(const T*, int64_t, int64_t) const;
TINYTL_CONV_ACTIVATION(float)
TINYTL_CONV_ACTIVATION(c10::BFloat16)
TINYTL_CONV_ACTIVATION(c10::Half)
#undef TINYTL_CONV_ACTIVATION

} // namespace tinytl::cpu
