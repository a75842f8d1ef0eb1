// What every operator here needs around its kernel: storage types, activation names, padded biases, GEMM operands, and
// sums over tasks that come out the same every run.
#pragma once

#include "bitmask.h"
#include "gemm.h"
#include "parallel.h"
#include "scratch.h"

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <optional>
#include <string>

namespace tinytl::cpu {

using OptionalTensor = std::optional<at::Tensor>;

// at::empty, at::zeros and at::empty_like, whose own headers take a compiler four seconds in every file. What is counted
// of a step's memory is what passes the dispatcher: temporaries are tensors from here, too.
at::Tensor empty_tensor(
    at::IntArrayRef sizes, const at::TensorOptions& options, std::optional<at::MemoryFormat> format = std::nullopt);
at::Tensor zero_tensor(at::IntArrayRef sizes, const at::TensorOptions& options);
at::Tensor empty_like(const at::Tensor& other, const at::TensorOptions& options = {});

// Null for a tensor without elements, or none at all.
template <class T>
T* data_or_null(const at::Tensor& tensor) {
  return tensor.defined() && tensor.numel() > 0 ? tensor.data_ptr<T>() : nullptr;
}

// The tensor itself where it is float32.
at::Tensor as_float(const at::Tensor& tensor);

// x in channels_last or in (N, C, H, W), itself where it is: x.contiguous(), in less time. layout.cpp
at::Tensor in_layout(const at::Tensor& x, bool channels_last);
inline at::Tensor in_channels_last(const at::Tensor& x) {
  return x.is_contiguous(at::MemoryFormat::ChannelsLast) ? x : in_layout(x, true);
}

// What is added to a result of `size`, in channels_last; undefined where there is nothing to add.
at::Tensor checked_addend(const OptionalTensor& addend, at::IntArrayRef size, at::ScalarType dtype);

// "none", "relu", "relu6"; with `every` also "leaky_relu" and "hardsigmoid".
Activation parse_activation(const std::string& name, bool every = false);

// Calls body with a value of the storage type behind dtype.
template <class Body>
void with_storage_type(at::ScalarType dtype, const char* name, Body&& body) {
  switch (dtype) {
    case at::kFloat:
      return body(float());
    case at::kBFloat16:
      return body(c10::BFloat16());
    case at::kHalf:
      return body(c10::Half());
    default:
      TORCH_CHECK(false, name, ": expected float32, bfloat16 or float16, got ", dtype);
  }
}

// Which arithmetic a storage type gets: pairs of bfloat16 where the instruction exists, else float32.
template <class T>
struct DotFor {
  using type = FloatDot;
};
#if defined(TINYTL_BFLOAT16_DOT)
template <>
struct DotFor<c10::BFloat16> {
  using type = BFloat16Dot;
};
#endif

// Tasks: images, or bands of rows of images when there are fewer images than would keep every thread busy.
struct Bands {
  int64_t images, rows, per_image;

  // rows: rows of the walked side of an image; halo: rows of work that each band repeats.
  Bands(int64_t images, int64_t rows, int64_t halo);
  int64_t tasks() const {
    return images * per_image;
  }
  int64_t begin(int64_t band) const {
    return rows * band / per_image;
  }
};

// Calls body(task, image, band) for all of them, on all threads.
template <class Body>
void for_bands(const Bands& bands, const Body& body) {
  parallel_tasks(bands.tasks(), [&](int64_t task) { body(task, task / bands.per_image, task % bands.per_image); });
}

// A bias in float32, padded with zeros to whole groups: itself where it is that; undefined for no bias.
at::Tensor padded_bias(const OptionalTensor& bias, int64_t channels, const char* name);

// Pixels of a tensor as a GEMM operand: in place when the storage type is the operand type, else converted into scratch
// and padded to whole steps of the dot product. stride: elements from pixel to pixel.
template <class Dot, class T>
Segment<typename Dot::Element> operand_rows(const T* rows, int64_t pixels, int64_t channels, int64_t stride) {
  using Element = typename Dot::Element;
  const int64_t depth = packed_depth<Dot>(channels);
  if constexpr (std::is_same_v<T, Element>) {
    if (depth == channels) {
      return {rows, stride, depth};
    }
  }
  const int64_t padded = padded_channels(channels);
  Element* target = scratch<Element>(kOperand, pixels * padded);
  for (int64_t m = 0; m < pixels; ++m) {
    for (int64_t c = 0; c < channels; c += kLanes) {
      store_channels(
          target + m * padded + c, load_channels(rows + m * stride + c, std::min<int64_t>(channels - c, kLanes)));
    }
  }
  return {target, padded, depth};
}

// Column sums of partial (tasks, length) for `channels` columns from `start`, in order, in double precision. Empty when
// not wanted.
at::Tensor reduce_partial(const at::Tensor& partial, int64_t start, int64_t channels, bool wanted);

// target[c] += source[c], then source[c] = 0; count is a multiple of kLanes. Bias gradients are summed over a tile, then
// over a step or chunk, then over a task, because short chains of additions keep their rounding errors short.
inline void flush_sums(float* source, float* target, int64_t count) {
  for (int64_t c = 0; c < count; c += kLanes) {
    (Vec::loadu(target + c) + Vec::loadu(source + c)).store(target + c);
    Vec(0.f).store(source + c);
  }
}

// The mask that a forward leaves: uint8 (N, H, W, ceil(C / 8)) when wanted, else empty.
at::Tensor empty_mask(const at::Tensor& like, bool wanted, int64_t batch, int64_t height, int64_t width, int64_t channels);

// The bytes of a mask given back to a backward, checked; null when it is not used.
const uint8_t* checked_mask(
    const at::Tensor& mask, const char* name, bool used, int64_t batch, int64_t height, int64_t width, int64_t channels);

// Raises unless tensor has this size (N, C, H, W) and dtype.
void check_size(const at::Tensor& tensor, const char* name, at::IntArrayRef size, at::ScalarType dtype);

} // namespace tinytl::cpu
