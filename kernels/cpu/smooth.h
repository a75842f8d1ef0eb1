// The smooth activations on vectors: f(z), and g f'(z). Arithmetic is float32, formulas are PyTorch's.
#pragma once

#include "vector.h"

#include <string>

namespace tinytl::cpu {

// e^x to two units in the last place, as ATen's exp() is: that one calls a library, and around a call everything that a
// loop holds in registers goes through memory. Half its time in such loops, and it was a third of an early block's.
TINYTL_INLINE Vec exponential(Vec x) {
  using Int = at::vec::Vectorized<int32_t>;
  using at::vec::fmadd;
  x = at::vec::clamp(x, Vec(-104.f), Vec(104.f)); // beyond them it is 0, and infinite
  const Vec n = (x * Vec(1.44269504088896341f)).round();
  // x - n log(2), log(2) in two parts so that the first product is exact
  const Vec r = fmadd(n, Vec(2.12194440e-4f), fmadd(n, Vec(-0.693359375f), x));
  Vec p(1.9875691500e-4f); // Cephes' polynomial for (e^r - 1 - r) / r^2
  for (const float c : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f}) {
    p = fmadd(p, r, Vec(c));
  }
  p = fmadd(p, r * r, r + Vec(1.f));
  // 2^n in two factors: each a float, also where their product is not
  const auto power = [](Vec k) {
    return at::vec::cast<float, int32_t>((at::vec::convert_to_int_of_same_size(k) + Int(127)) << Int(23));
  };
  const Vec half = (n * Vec(0.5f)).floor();
  return p * power(half) * power(n - half);
}

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
    return z / (Vec(1.f) + exponential(z.neg()));
  }
  TINYTL_INLINE static Vec gradient(Vec z, Vec g) {
    const Vec sigmoid = Vec(1.f) / (Vec(1.f) + exponential(z.neg()));
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
    const Vec density = exponential(z * z * Vec(-0.5f)) * Vec(0.39894228040143268f);
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
    return Vec(1.f) / (Vec(1.f) + exponential(z.neg()));
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
