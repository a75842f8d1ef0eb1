// What forward and backward of the block in mbconv.h share: its layers as the kernels take them, activations as passes
// over rows, and how images are shared out.
#pragma once

#include "mbconv.h"

#include "activation_slopes.h"
#include "inverted_residual_rows.h"
#include "parallel.h"

#include <array>
#include <functional>
#include <optional>
#include <string>
#include <vector>

namespace tinytl::cpu {

// Of the three convolutions around the gate, without their activations. Checks them.
BlockShape mbconv_shape(at::IntArrayRef input_size, const MbconvLayers& layers, const MbconvOptions& options);
BlockWeights block_weights(const MbconvLayers& layers);
// Their biases, padded.
std::array<at::Tensor, kBlockLayers> padded_biases(const BlockShape& s, const MbconvLayers& layers);
// dtype: of the activations.
std::optional<SqueezeExcite> squeeze_excite(
    const BlockShape& s, const MbconvLayers& layers, const MbconvOptions& options, at::ScalarType dtype);

// Passes over rows that have just been computed and are in cache.
template <class Element>
struct Passes {
  // f of `count` neighbours, in place.
  void (*activate)(float* values, int64_t count);
  // f of `pixels` pixels of one group, in place; the slopes, `stride` apart.
  void (*activate_group)(float* values, int64_t pixels, float* slopes, int64_t stride);
  // f of rows (pixels, width), in place; sums += their sums over pixels, where not null.
  void (*activate_rows)(Element* rows, int64_t pixels, int64_t width, float* sums);
  // One group of z2 (pixels, width) and d (pixels, kGroup): d becomes d f'(z2). slopes: f'(z2) laid out as d, or null;
  // values += sum of h2 and products += sum of d h2 where slopes are wanted, else sums += sum of d f'(z2).
  void (*backward_group)(
      const Element* z, int64_t pixels, int64_t width, float* d, float* slopes, float* values, float* products);
};

template <class Element, class F>
struct PassesOf {
  static void activate(float* values, int64_t count) {
    for (int64_t i = 0; i < count; i += kLanes) {
      F::value(Vec::loadu(values + i)).store(values + i);
    }
  }
  static void activate_group(float* values, int64_t pixels, float* slopes, int64_t stride) {
    for (int64_t m = 0; m < pixels; ++m, values += kGroup, slopes += stride) {
      TINYTL_UNROLL
      for (int v = 0; v < kGroupVecs; ++v) {
        const auto [value, slope] = F::both(Vec::loadu(values + v * kLanes));
        value.store(values + v * kLanes);
        slope.store(slopes + v * kLanes);
      }
    }
  }
  static void activate_rows(Element* rows, int64_t pixels, int64_t width, float* sums) {
    for (int64_t c = 0; c < width; c += kLanes) {
      Vec sum(0.f);
      for (int64_t m = 0; m < pixels; ++m) {
        const Vec value = F::value(load_channels(rows + m * width + c));
        store_channels(rows + m * width + c, value);
        sum = sum + value;
      }
      if (sums != nullptr) {
        (Vec::loadu(sums + c) + sum).store(sums + c);
      }
    }
  }
  static void backward_group(
      const Element* z, int64_t pixels, int64_t width, float* d, float* slopes, float* values, float* products) {
    for (int v = 0; v < kGroupVecs; ++v) {
      Vec value_sum(0.f), product_sum(0.f);
      for (int64_t m = 0; m < pixels; ++m) {
        const int64_t at = m * kGroup + v * kLanes;
        const auto [value, slope] = F::both(load_channels(z + m * width + v * kLanes));
        const Vec grad = Vec::loadu(d + at);
        const Vec passed = pass_gradient(grad, slope);
        passed.store(d + at);
        if (slopes != nullptr) {
          slope.store(slopes + at);
          value_sum = value_sum + value;
          product_sum = at::vec::fmadd(grad, value, product_sum);
        } else {
          product_sum = product_sum + passed;
        }
      }
      if (slopes != nullptr) {
        (Vec::loadu(values + v * kLanes) + value_sum).store(values + v * kLanes);
      }
      (Vec::loadu(products + v * kLanes) + product_sum).store(products + v * kLanes);
    }
  }
};

template <class Element>
Passes<Element> passes_of(const std::string& activation) {
  Passes<Element> passes{};
  with_slopes(activation, [&](auto f) {
    using P = PassesOf<Element, decltype(f)>;
    passes = {P::activate, P::activate_group, P::activate_rows, P::backward_group};
  });
  return passes;
}

// How images are shared out. By image: a task is an image from its first phase to its last, with a buffer a thread. By
// band: the phases come one after the other, each over bands of rows of all images, with a buffer an image.
struct Schedule {
  bool by_image;
  int64_t buffers;

  Schedule(int64_t images, const Bands& bands);
  int64_t buffer(int64_t image) const {
    return by_image ? at::get_thread_num() : image;
  }
};

using BandTask = std::function<void(int64_t image, int64_t band)>;

// A phase is a task for every image where bands is null, else one for every band of its image.
struct Phase {
  const Bands* bands;
  BandTask run;
};

void run_phases(int64_t images, const Schedule& schedule, const std::vector<Phase>& phases);

// What a task goes down; of the whole image where `band` is -1.
struct Rows {
  int64_t begin, end;
};
Rows rows_of(const Bands& bands, int64_t band);
// The rows of h1 that are a band's to activate.
Rows owned_input(const BlockShape& s, const Bands& bands, int64_t band);

// The mean of h2 from sums that each band of an image has made, `stride` apart.
void mean_of(const float* sums, int64_t bands, int64_t stride, int64_t channels, double pixels, float* mean);

// Brings h1 of an image from row `from` to row `to`, panel after panel: activate(panel, ring) makes it of z1, then
// filter(panel, ring) reads what is complete.
template <class T, class Activate, class Filter>
void advance_rows(
    const BlockForward<T>& block,
    int64_t image,
    const Walk& walk,
    const PanelRings& rings,
    int64_t from,
    int64_t to,
    bool read,
    const Activate& activate,
    const Filter& filter) {
  using Dot = typename DotFor<T>::type;
  const BlockShape& s = block.s;
  const int64_t* offsets = ring_offsets(from, to, s.width, walk);
  Segment<typename Dot::Element> operand{};
  if (s.has_expand) {
    operand = operand_rows<Dot>(
        block.x.at(image) + from * s.width * s.in_channels, (to - from) * s.width, s.in_channels,
        s.in_channels);
  }
  for (int64_t p = 0; p < block.panels.count; ++p) {
    float* ring = rings.next(p, read);
    block.expand_rows(image, p, from, to, 0, ring, walk.plane(), offsets, operand, nullptr);
    if (s.has_expand) {
      activate(p, ring);
    }
    filter(p, ring);
  }
}

// Row `row` of a group, without the zeros beside it.
inline float* ring_row(float* ring, const Walk& walk, int64_t group, int64_t row) {
  return ring + group * walk.plane() + walk.pixel(row) * kGroup;
}

} // namespace tinytl::cpu
