// Every activation with its derivative, f(z) and f'(z) together, on vectors, for kernels that compute z again and keep
// neither bits nor values. Formulas are PyTorch's; what NaN does is as in bitmask.h.
#pragma once

#include "activation_pixels.h"
#include "bitmask.h"
#include "smooth.h"

#include <string>

namespace tinytl::cpu {

struct ValueAndSlope {
  Vec value, slope;
};

// g f'(z). A blocked gradient is a select, never a product: an infinite one becomes exactly 0.
TINYTL_INLINE Vec pass_gradient(Vec g, Vec slope) {
  return Vec::blendv(g * slope, Vec(0.f), slope == Vec(0.f));
}

// Those of bitmask.h.
template <Activation A>
struct Piecewise {
  TINYTL_INLINE static Vec value(Vec z) {
    return activate<A>(z, kLeakySlope);
  }
  TINYTL_INLINE static ValueAndSlope both(Vec z) {
    constexpr uint32_t LANES = (1u << kLanes) - 1;
    if constexpr (A == Activation::none) {
      return {z, Vec(1.f)};
    } else {
      const uint32_t bits = pass_bits<A>(z);
      const Slopes slopes = gradient_slopes(A, kLeakySlope);
      Vec slope = select(Vec(slopes.pass), bits);
      if (slopes.block != 0.f) {
        slope = slope + select(Vec(slopes.block), ~bits & LANES);
      }
      return {value(z), slope};
    }
  }
};

// Those of smooth.h.
template <class Smooth>
struct SmoothWithSlope {
  // The very value that comes with the slope: backward computes again what forward has computed.
  TINYTL_INLINE static Vec value(Vec z) {
    return both(z).value;
  }
  TINYTL_INLINE static ValueAndSlope both(Vec z) {
    if constexpr (std::is_same_v<Smooth, Silu>) { // one exponential for the two
      const Vec sigmoid = Sigmoid::value(z);
      return {z * sigmoid, sigmoid * (Vec(1.f) + z * (Vec(1.f) - sigmoid))};
    } else if constexpr (std::is_same_v<Smooth, Sigmoid>) {
      const Vec sigmoid = Sigmoid::value(z);
      return {sigmoid, sigmoid * (Vec(1.f) - sigmoid)};
    } else {
      return {Smooth::value(z), Smooth::gradient(z, Vec(1.f))};
    }
  }
};

// Calls body with the activation of that name: those of ConvActivation, and "sigmoid".
template <class Body>
void with_slopes(const std::string& name, Body&& body) {
  if (!with_smooth(name, [&](auto smooth) { body(SmoothWithSlope<decltype(smooth)>()); })) {
    with_any_activation(parse_activation(name, true), [&](auto a) { body(Piecewise<a.value>()); });
  }
}

} // namespace tinytl::cpu
