// Activations with one bit of saved state (bitmask.h) over neighbouring pixels of a channels_last tensor, all channels.
#pragma once

#include "bitmask.h"
#include "common.h"
#include "parallel.h"

#include <algorithm>

namespace tinytl::cpu {

// Of the fused leaky_relu: torch.nn.LeakyReLU's default. The stand-alone operator takes any.
constexpr float kLeakySlope = 0.01f;

constexpr int64_t kSumPixels = 64; // pixels in one chain of additions

// Pixels are cut into as many runs, each with sums of its own.
inline int64_t pixel_tasks(int64_t pixels, int64_t channels) {
  return piece_count(ceil_div(pixels * channels, 16384));
}

template <class Body>
void with_any_activation(Activation activation, Body&& body) {
  switch (activation) {
    case Activation::relu:
      return body(std::integral_constant<Activation, Activation::relu>());
    case Activation::relu6:
      return body(std::integral_constant<Activation, Activation::relu6>());
    case Activation::leaky_relu:
      return body(std::integral_constant<Activation, Activation::leaky_relu>());
    case Activation::hardsigmoid:
      return body(std::integral_constant<Activation, Activation::hardsigmoid>());
    case Activation::none:
      return body(std::integral_constant<Activation, Activation::none>());
  }
}

// y = act(x + bias + addend) over pixels [begin, end); x and y may be the same. bias: padded, or null; addend and mask
// may be null.
template <Activation A, class T>
void forward_pixels(
    const T* x,
    T* y,
    uint8_t* mask,
    const float* bias,
    const T* addend,
    float slope,
    int64_t channels,
    int64_t begin,
    int64_t end) {
  const int64_t stride = mask_bytes(channels);
  for (int64_t pixel = begin; pixel < end; ++pixel) {
    for (int64_t c = 0; c < channels; c += kGroup) {
      Vec group[kGroupVecs];
      for (int v = 0; v < kGroupVecs; ++v) {
        const int64_t at = c + v * kLanes;
        const int64_t count = std::clamp<int64_t>(channels - at, 0, kLanes);
        group[v] = count > 0 ? load_channels(x + pixel * channels + at, count) : Vec(0.f);
        if (bias != nullptr) {
          group[v] = group[v] + Vec::loadu(bias + at);
        }
        if (addend != nullptr && count > 0) {
          group[v] = group[v] + load_channels(addend + pixel * channels + at, count);
        }
      }
      uint8_t* bits = mask != nullptr ? mask + pixel * stride + c / 8 : nullptr;
      activate_group<A>(group, bits, channels - c, slope);
      for (int v = 0; v < kGroupVecs; ++v) {
        const int64_t at = c + v * kLanes;
        if (at < channels) {
          store_channels(y + pixel * channels + at, group[v], channels - at);
        }
      }
    }
  }
}

// What a gradient is multiplied with where it passes, and where it does not.
struct Slopes {
  float pass, block;
};

inline Slopes gradient_slopes(Activation activation, double negative_slope) {
  switch (activation) {
    case Activation::leaky_relu:
      return {1.f, static_cast<float>(negative_slope)};
    case Activation::hardsigmoid:
      return {1.f / 6.f, 0.f};
    default:
      return {1.f, 0.f};
  }
}

// g over pixels [begin, end), to grad when not null, and its sums over pixels to sums when not null (zeros on entry;
// twice the padded channels, the second half for work).
template <class T>
void backward_pixels(
    const T* grad_output,
    const uint8_t* mask,
    T* grad,
    float* sums,
    Slopes slopes,
    int64_t channels,
    int64_t begin,
    int64_t end) {
  const int64_t stride = mask_bytes(channels);
  const int64_t padded = padded_channels(channels);
  float* chain = sums != nullptr ? sums + padded : nullptr;
  for (int64_t pixel = begin; pixel < end; ++pixel) {
    for (int64_t c = 0; c < channels; c += kGroup) {
      Vec value[kGroupVecs];
      Vec passed[kGroupVecs];
      for (int v = 0; v < kGroupVecs; ++v) {
        const int64_t at = c + v * kLanes;
        const int64_t count = std::clamp<int64_t>(channels - at, 0, kLanes);
        value[v] = count > 0 ? load_channels(grad_output + pixel * channels + at, count) : Vec(0.f);
        passed[v] = value[v];
      }
      if (mask != nullptr) {
        const uint32_t bits = load_group_bits(mask + pixel * stride + c / 8, channels - c);
        for (int v = 0; v < kGroupVecs; ++v) {
          const uint32_t lanes = (bits >> (v * kLanes)) & ((1u << kLanes) - 1);
          if (slopes.pass != 1.f) {
            passed[v] = passed[v] * Vec(slopes.pass);
          }
          passed[v] = select(passed[v], lanes);
          if (slopes.block != 0.f) {
            passed[v] = passed[v] + select(value[v] * Vec(slopes.block), ~lanes & ((1u << kLanes) - 1));
          }
        }
      }
      for (int v = 0; v < kGroupVecs; ++v) {
        const int64_t at = c + v * kLanes;
        if (grad != nullptr && at < channels) {
          store_channels(grad + pixel * channels + at, passed[v], channels - at);
        }
        if (chain != nullptr) {
          (Vec::loadu(chain + at) + passed[v]).store(chain + at);
        }
      }
    }
    if (chain != nullptr && (pixel - begin) % kSumPixels == kSumPixels - 1) {
      flush_sums(chain, sums, padded);
    }
  }
  if (chain != nullptr) {
    flush_sums(chain, sums, padded);
  }
}

} // namespace tinytl::cpu
