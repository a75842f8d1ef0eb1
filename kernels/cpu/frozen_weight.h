// A frozen weight as it is stored, and its values as the kernels read them while packing.
//
//     float32, bfloat16, float16                 w[o, i]
//     int8 and a scale (O,) float32              code[o, i] * scale[o]        one scale an output channel
//     uint8 and a codebook (256,) float32        codebook[code[o, i]]         k-means
//
// Packing reads it value by value: a weight in 8 bits is read in 8 bits, and what exists in floating point is the packed
// operand that the arithmetic needs anyway, while it needs it.
#pragma once

#include "common.h"

#include <cstring>
#include <type_traits>

namespace tinytl::cpu {

constexpr int64_t kCodebookSize = 256;

struct FrozenWeight {
  at::Tensor values; // (O, ...), contiguous
  at::Tensor scale; // undefined: values are floating point
  int64_t out_channels, inner; // inner: values an output channel

  // Checks that the two belong together.
  FrozenWeight(const at::Tensor& weight, const OptionalTensor& scale, const char* name);

  bool quantized() const {
    return scale.defined();
  }
};

// Value i of output channel o, rounded to T, the storage type of the activations, as every backend does it.
template <class T, class Stored>
struct PlainValues {
  const Stored* data;
  int64_t inner;
  T operator()(int64_t o, int64_t i) const {
    return static_cast<T>(data[o * inner + i]);
  }
};

template <class T>
struct ScaledValues {
  const int8_t* data;
  int64_t inner;
  const float* scale;
  T operator()(int64_t o, int64_t i) const {
    return static_cast<T>(static_cast<float>(data[o * inner + i]) * scale[o]);
  }
};

template <class T>
struct CodebookValues {
  const uint8_t* data;
  int64_t inner;
  const float* codebook;
  T operator()(int64_t o, int64_t i) const {
    return static_cast<T>(codebook[data[o * inner + i]]);
  }
};

// The values themselves where they are stored as the arithmetic reads them, else null.
template <class Element, class Values>
const Element* plain_values(const Values& values) {
  if constexpr (std::is_same_v<Values, PlainValues<Element, Element>>) {
    return values.data;
  } else {
    return nullptr;
  }
}

// Calls body with the reader of this weight's values.
template <class T, class Body>
auto with_values(const FrozenWeight& weight, Body&& body) {
  switch (weight.values.scalar_type()) {
    case at::kChar:
      return body(ScaledValues<T>{weight.values.data_ptr<int8_t>(), weight.inner, weight.scale.data_ptr<float>()});
    case at::kByte:
      return body(CodebookValues<T>{weight.values.data_ptr<uint8_t>(), weight.inner, weight.scale.data_ptr<float>()});
    case at::kFloat:
      return body(PlainValues<T, float>{weight.values.data_ptr<float>(), weight.inner});
    default:
      if constexpr (!std::is_same_v<T, float>) {
        return body(PlainValues<T, T>{weight.values.data_ptr<T>(), weight.inner});
      }
      TORCH_CHECK(false, "weight: expected float32, int8 or uint8, got ", weight.values.scalar_type());
  }
}

// `count` values of output channel o from value i on, as the arithmetic reads them.
template <class Values, class Element>
void copy_values(const Values& values, int64_t o, int64_t i, int64_t count, Element* to) {
  for (int64_t c = 0; c < count; ++c) {
    to[c] = static_cast<Element>(values(o, i + c));
  }
}

// Rounded once or not at all, as a vector conversion does it.
template <class T, class Stored, class Element>
  requires(std::is_same_v<T, Stored> || std::is_same_v<T, Element>)
void copy_values(const PlainValues<T, Stored>& values, int64_t o, int64_t i, int64_t count, Element* to) {
  copy_row(values.data + o * values.inner + i, count, to);
}

// Depthwise taps (C, 1, kh, kw) as [group][tap][kGroup], float32, padded with zeros.
template <class T>
void pack_depthwise(const FrozenWeight& weight, float* packed) {
  const int64_t taps = weight.inner;
  const int64_t channels = weight.out_channels;
  std::memset(packed, 0, sizeof(float) * padded_channels(channels) * taps);
  with_values<T>(weight, [&](const auto& values) {
    for (int64_t c = 0; c < channels; ++c) {
      float* to = packed + c / kGroup * kGroup * taps + c % kGroup;
      for (int64_t t = 0; t < taps; ++t) {
        to[t * kGroup] = static_cast<float>(values(c, t));
      }
    }
  });
}

} // namespace tinytl::cpu
