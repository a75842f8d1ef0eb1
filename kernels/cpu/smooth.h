// The smooth activations on vectors: f(z), and g f'(z). Arithmetic is float32, formulas are PyTorch's.
#pragma once

#include "vector.h"

#include <string>

namespace tinytl::cpu {

struct Hardswish {
  TINYTL_INLINE static Vec value(Vec z) {
    return z * at::vec::clamp(z + Vec(3.f), Vec(0.f), Vec(6.f)) / Vec(6.f);
  }
  TINYTL_INLINE static Vec gradient(Vec z, Vec g) {
    const Vec ramp = g * (z / Vec(3.f) + Vec(0.5f));
    return Vec::blendv(Vec::blendv(ramp, Vec(0.f), z <= Vec(-3.f)), g, z >= Vec(3.f));
  }
};

struct Silu {
  TINYTL_INLINE static Vec value(Vec z) {
    return z / (Vec(1.f) + z.neg().exp());
  }
  TINYTL_INLINE static Vec gradient(Vec z, Vec g) {
    const Vec sigmoid = Vec(1.f) / (Vec(1.f) + z.neg().exp());
    return g * sigmoid * (Vec(1.f) + z * (Vec(1.f) - sigmoid));
  }
};

struct Gelu {
  TINYTL_INLINE static Vec cdf(Vec z) {
    return Vec(0.5f) * (Vec(1.f) + (z * Vec(0.70710678118654752f)).erf());
  }
  TINYTL_INLINE static Vec value(Vec z) {
    return z * cdf(z);
  }
  TINYTL_INLINE static Vec gradient(Vec z, Vec g) {
    const Vec density = (z * z * Vec(-0.5f)).exp() * Vec(0.39894228040143268f);
    return g * (cdf(z) + z * density);
  }
};

struct GeluTanh {
  static constexpr float kBeta = 0.79788456080286536f; // sqrt(2 / pi)
  static constexpr float kCubic = 0.044715f;
  TINYTL_INLINE static Vec inner(Vec z) {
    return (Vec(kBeta) * (z + Vec(kCubic) * z * z * z)).tanh();
  }
  TINYTL_INLINE static Vec value(Vec z) {
    return Vec(0.5f) * z * (Vec(1.f) + inner(z));
  }
  TINYTL_INLINE static Vec gradient(Vec z, Vec g) {
    const Vec t = inner(z);
    const Vec slope = Vec(kBeta) * (Vec(1.f) + Vec(3.f * kCubic) * z * z);
    return g * (Vec(0.5f) * (Vec(1.f) + t) + Vec(0.5f) * z * (Vec(1.f) - t * t) * slope);
  }
};

struct Sigmoid {
  TINYTL_INLINE static Vec value(Vec z) {
    return Vec(1.f) / (Vec(1.f) + z.neg().exp());
  }
  TINYTL_INLINE static Vec gradient(Vec z, Vec g) {
    const Vec sigmoid = value(z);
    return g * sigmoid * (Vec(1.f) - sigmoid);
  }
};

// Calls body with the smooth activation of that name; false if there is none.
template <class Body>
bool with_smooth(const std::string& name, Body&& body) {
  const auto found = [&](auto activation) {
    body(activation);
    return true;
  };
  if (name == "hardswish") {
    return found(Hardswish());
  }
  if (name == "silu") {
    return found(Silu());
  }
  if (name == "gelu") {
    return found(Gelu());
  }
  if (name == "gelu_tanh") {
    return found(GeluTanh());
  }
  return name == "sigmoid" && found(Sigmoid());
}

} // namespace tinytl::cpu
