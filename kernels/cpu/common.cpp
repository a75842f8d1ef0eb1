// See common.h and frozen_weight.h.
#include "common.h"

#include "frozen_weight.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>

#include <algorithm>
#include <cstring>
#include <vector>

namespace tinytl::cpu {

at::Tensor empty_tensor(
    at::IntArrayRef sizes, const at::TensorOptions& options, std::optional<at::MemoryFormat> format) {
  return at::empty(sizes, options, format);
}

at::Tensor zero_tensor(at::IntArrayRef sizes, const at::TensorOptions& options) {
  at::Tensor zeros = empty_tensor(sizes, options); // at::zeros is three operators
  if (zeros.numel() > 0) { // memset refuses the null pointer of an empty one
    std::memset(zeros.mutable_data_ptr(), 0, zeros.nbytes());
  }
  return zeros;
}

at::Tensor empty_like(const at::Tensor& other, const at::TensorOptions& options) {
  return at::empty_like(other, options);
}

at::Tensor as_float(const at::Tensor& tensor) {
  return tensor.scalar_type() == at::kFloat ? tensor : tensor.to(at::kFloat);
}

at::Tensor checked_addend(const OptionalTensor& addend, at::IntArrayRef size, at::ScalarType dtype) {
  if (!addend.has_value() || !addend->defined()) {
    return {};
  }
  check_size(*addend, "addend", size, dtype);
  return in_channels_last(*addend);
}

Activation parse_activation(const std::string& name, bool every) {
  if (name == "none") {
    return Activation::none;
  }
  if (name == "relu") {
    return Activation::relu;
  }
  if (name == "relu6") {
    return Activation::relu6;
  }
  if (every && name == "leaky_relu") {
    return Activation::leaky_relu;
  }
  if (every && name == "hardsigmoid") {
    return Activation::hardsigmoid;
  }
  TORCH_CHECK(
      false,
      "activation: expected \"none\", \"relu\" or \"relu6\"",
      every ? ", \"leaky_relu\" or \"hardsigmoid\"" : "",
      ", got \"",
      name,
      "\"");
}

Bands::Bands(int64_t images, int64_t rows, int64_t halo) : images(images), rows(rows), per_image(1) {
  const int64_t threads = at::get_num_threads();
  const auto cost = [&](int64_t bands) { // rows that the busiest thread computes
    return ceil_div(images * bands, threads) * (ceil_div(rows, bands) + (bands > 1 ? halo : 0));
  };
  for (int64_t bands = 2; bands <= std::min(threads, rows); ++bands) {
    if (cost(bands) < cost(per_image)) {
      per_image = bands;
    }
  }
}

FrozenWeight::FrozenWeight(const at::Tensor& weight, const OptionalTensor& scale, const char* name)
    : values(weight.contiguous()),
      out_channels(weight.size(0)),
      inner(out_channels > 0 ? weight.numel() / out_channels : 0) {
  const bool coded = weight.scalar_type() == at::kChar || weight.scalar_type() == at::kByte;
  const bool scaled = scale.has_value() && scale->defined();
  TORCH_CHECK(
      coded == scaled,
      name,
      coded ? ": in 8 bits, expected with a scale or a codebook, got none" : ": floating point, expected without a scale");
  if (coded) {
    const int64_t length = weight.scalar_type() == at::kChar ? out_channels : kCodebookSize;
    TORCH_CHECK(
        scale->dim() == 1 && scale->size(0) == length && scale->scalar_type() == at::kFloat,
        name,
        ": expected a scale of ",
        length,
        " float32 numbers, got ",
        scale->sizes(),
        " of ",
        scale->scalar_type());
    this->scale = scale->contiguous();
  }
}

at::Tensor padded_bias(const OptionalTensor& bias, int64_t channels, const char* name) {
  if (!bias.has_value() || !bias->defined()) {
    return {};
  }
  TORCH_CHECK(
      bias->dim() == 1 && bias->size(0) == channels, name, ": expected (", channels, "), got ", bias->sizes());
  if (bias->scalar_type() == at::kFloat && bias->is_contiguous() && padded_channels(channels) == channels) {
    return *bias;
  }
  at::Tensor padded = zero_tensor({padded_channels(channels)}, bias->options().dtype(at::kFloat));
  padded.narrow(0, 0, channels).copy_(*bias);
  return padded;
}

// Column sums of partial (tasks, length) from `start`, in order, in double precision.
at::Tensor reduce_partial(const at::Tensor& partial, int64_t start, int64_t channels, bool wanted) {
  if (!wanted) {
    return empty_tensor({0}, partial.options());
  }
  at::Tensor total = empty_tensor({channels}, partial.options());
  const int64_t length = partial.size(1);
  const float* source = partial.data_ptr<float>() + start;
  std::vector<double> sums(channels);
  for (int64_t t = 0; t < partial.size(0); ++t, source += length) {
    for (int64_t c = 0; c < channels; ++c) {
      sums[c] += source[c];
    }
  }
  std::copy(sums.begin(), sums.end(), total.data_ptr<float>());
  return total;
}

at::Tensor empty_mask(const at::Tensor& like, bool wanted, int64_t batch, int64_t height, int64_t width, int64_t channels) {
  const auto options = like.options().dtype(at::kByte);
  return wanted ? empty_tensor({batch, height, width, mask_bytes(channels)}, options) : empty_tensor({0}, options);
}

const uint8_t* checked_mask(
    const at::Tensor& mask, const char* name, bool used, int64_t batch, int64_t height, int64_t width, int64_t channels) {
  if (!used) {
    return nullptr;
  }
  check_size(mask, name, {batch, height, width, mask_bytes(channels)}, at::kByte);
  TORCH_CHECK(mask.is_contiguous(), name, ": expected a contiguous mask, as the forward returns it");
  return mask.data_ptr<uint8_t>();
}

void check_size(const at::Tensor& tensor, const char* name, at::IntArrayRef size, at::ScalarType dtype) {
  TORCH_CHECK(
      tensor.sizes() == size && tensor.scalar_type() == dtype,
      name,
      ": expected ",
      size,
      " of ",
      dtype,
      ", got ",
      tensor.sizes(),
      " of ",
      tensor.scalar_type());
}

} // namespace tinytl::cpu
