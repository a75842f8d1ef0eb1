// GroupNorm and the activation behind it over a channels_last tensor:
//
//     x_hat = (x - mean) rstd      mean, rstd over the channels of a group and all pixels of an image
//     y = f(z),  z = weight x_hat + bias
//
//     g = f'(z) dy,  dbias = sum g,  dweight = sum g x_hat
//     dx = rstd (weight g - E[weight g] - x_hat E[weight g x_hat])
//
// Forward reads x twice (statistics, then normalise + activate) and writes y; backward reads x and dy twice and writes
// dx. An image is meant to be in cache the second time. z is computed again in backward by the same instructions, so
// nothing is kept of the activation. All arithmetic is float32.
//
// Statistics are numerically sound for any mean: a few pixels at a time, while they are in the first-level cache, mean
// and sum of squared deviations from that mean, a channel each; those are merged (Chan, Golub, LeVeque 1979) into the
// task's, and the tasks' and channels' into the group's in double precision, always in the same order.
#include "operators.h"
#include "parallel.h"
#include "smooth.h"

#include <cmath>
#include <limits>

namespace tinytl::cpu {
namespace {

constexpr int64_t kBlockPixels = 32; // pixels whose statistics are taken in one go

// f and g f' on vectors, as in smooth.h. At a kink the gradient is PyTorch's, see bitmask.h.
struct NoActivation {
  TINYTL_INLINE static Vec value(Vec z) {
    return z;
  }
  TINYTL_INLINE static Vec gradient(Vec, Vec g) {
    return g;
  }
};

template <Activation A>
struct BitActivation {
  TINYTL_INLINE static Vec value(Vec z) {
    return activate<A>(z, 0.01f);
  }
  TINYTL_INLINE static Vec gradient(Vec z, Vec g) {
    const uint32_t bits = pass_bits<A>(z);
    if constexpr (A == Activation::leaky_relu) {
      return select(g, bits) + select(g * Vec(0.01f), ~bits & ((1u << kLanes) - 1));
    } else if constexpr (A == Activation::hardsigmoid) {
      return select(g / Vec(6.f), bits);
    } else {
      return select(g, bits);
    }
  }
};

template <class Body>
void with_function(const std::string& name, Body&& body) {
  if (with_smooth(name, body)) {
    return;
  }
  switch (parse_activation(name, true)) {
    case Activation::relu:
      return body(BitActivation<Activation::relu>());
    case Activation::relu6:
      return body(BitActivation<Activation::relu6>());
    case Activation::leaky_relu:
      return body(BitActivation<Activation::leaky_relu>());
    case Activation::hardsigmoid:
      return body(BitActivation<Activation::hardsigmoid>());
    default:
      return body(NoActivation());
  }
}

struct Shape {
  int64_t images, channels, pixels, groups; // pixels of one image
  int64_t padded; // channels in whole vectors

  explicit Shape(const at::Tensor& x, int64_t groups)
      : images(x.size(0)),
        channels(x.size(1)),
        pixels(x.size(2) * x.size(3)),
        groups(groups),
        padded(padded_channels(x.size(1))) {
    TORCH_CHECK(groups >= 1 && channels % groups == 0, "num_groups: expected a divisor of ", channels, ", got ", groups);
  }
  int64_t of_group() const { // values in one group of one image
    return channels / groups * pixels;
  }
};

// Calls body(task, image, first pixel, last) for every band, on all threads.
template <class Body>
void for_pixels(const Bands& bands, const Body& body) {
  for_bands(bands, [&](int64_t task, int64_t image, int64_t band) {
    body(task, image, bands.begin(band), bands.begin(band + 1));
  });
}

// Mean and sum of squared deviations of every channel over pixels [begin, end) of one image, merged into mean and square
// (zeros on entry).
template <class T>
void channel_moments(const T* x, const Shape& shape, int64_t begin, int64_t end, float* mean, float* square) {
  for (int64_t first = begin; first < end; first += kBlockPixels) {
    const int64_t last = std::min(first + kBlockPixels, end);
    const float count = static_cast<float>(last - first);
    const float before = static_cast<float>(first - begin);
    for (int64_t c = 0; c < shape.channels; c += kLanes) {
      const int64_t lanes = shape.channels - c;
      Vec sum(0.f);
      for (int64_t p = first; p < last; ++p) {
        sum = sum + load_channels(x + p * shape.channels + c, lanes);
      }
      const Vec block_mean = sum / Vec(count);
      Vec block_square(0.f);
      for (int64_t p = first; p < last; ++p) {
        const Vec off = load_channels(x + p * shape.channels + c, lanes) - block_mean;
        block_square = at::vec::fmadd(off, off, block_square);
      }
      const Vec old_mean = Vec::loadu(mean + c);
      const Vec delta = block_mean - old_mean;
      const float total = before + count;
      (old_mean + delta * Vec(count / total)).store(mean + c);
      (Vec::loadu(square + c) + block_square + delta * delta * Vec(before * count / total)).store(square + c);
    }
  }
}

// The moments of a group from those of its channels in each band of the image.
void merge_moments(
    const float* moments, const Shape& shape, const Bands& bands, int64_t image, double eps, float* mean, float* rstd) {
  const int64_t width = shape.channels / shape.groups;
  for (int64_t g = 0; g < shape.groups; ++g) {
    const auto over_parts = [&](auto&& body) {
      for (int64_t band = 0; band < bands.per_image; ++band) {
        const float* part = moments + (image * bands.per_image + band) * 2 * shape.padded;
        const double count = static_cast<double>(bands.begin(band + 1) - bands.begin(band));
        for (int64_t c = g * width; c < (g + 1) * width; ++c) {
          body(count, static_cast<double>(part[c]), static_cast<double>(part[shape.padded + c]));
        }
      }
    };
    double sum = 0;
    over_parts([&](double count, double m, double) { sum += count * m; });
    const double center = sum / static_cast<double>(shape.of_group());
    double square = 0;
    over_parts([&](double count, double m, double s) { square += s + count * (m - center) * (m - center); });
    mean[g] = static_cast<float>(center);
    rstd[g] = static_cast<float>(1.0 / std::sqrt(square / static_cast<double>(shape.of_group()) + eps));
  }
}

// A statistic of each group, once for every channel of the group; zeros behind the last.
void spread(const float* of_group, const Shape& shape, float* of_channel) {
  const int64_t width = shape.channels / shape.groups;
  for (int64_t c = 0; c < shape.padded; ++c) {
    of_channel[c] = c < shape.channels ? of_group[c / width] : 0.f;
  }
}

// weight and bias as padded float32, ones and zeros where there is none.
struct Affine {
  at::Tensor weight, bias;

  Affine(const OptionalTensor& w, const OptionalTensor& b, int64_t channels, const at::Tensor& like)
      : weight(padded_bias(w, channels, "weight")), bias(padded_bias(b, channels, "bias")) {
    const auto options = like.options().dtype(at::kFloat);
    if (!weight.defined()) {
      weight = empty_tensor({padded_channels(channels)}, options).fill_(1.0);
    }
    if (!bias.defined()) {
      bias = zero_tensor({padded_channels(channels)}, options);
    }
  }
};

const at::Tensor checked_statistics(const at::Tensor& statistics, const char* name, const Shape& shape) {
  TORCH_CHECK(
      statistics.dim() == 2 && statistics.size(0) == shape.images && statistics.size(1) == shape.groups &&
          statistics.scalar_type() == at::kFloat,
      name,
      ": expected (",
      shape.images,
      ", ",
      shape.groups,
      ") of float32, got ",
      statistics.sizes(),
      " of ",
      statistics.scalar_type());
  return statistics.contiguous();
}

// What one image's backward needs of every channel, in one run of memory.
struct ChannelRows {
  float* data;
  int64_t padded;
  enum Row : int { kShift, kScale, kOfG, kOfProduct, kRowCount };

  float* operator[](Row row) const {
    return data + row * padded;
  }
};

} // namespace

std::tuple<at::Tensor, at::Tensor, at::Tensor> group_norm_forward(
    const at::Tensor& x,
    const OptionalTensor& weight,
    const OptionalTensor& bias,
    int64_t num_groups,
    double eps,
    const std::string& activation) {
  TORCH_CHECK(x.dim() == 4, "input: expected 4 dimensions (N, C, H, W), got ", x.sizes());
  const at::Tensor input = in_channels_last(x);
  const Shape shape(input, num_groups);
  const auto floats = input.options().dtype(at::kFloat);
  at::Tensor out = empty_tensor(input.sizes(), input.options(), at::MemoryFormat::ChannelsLast);
  at::Tensor mean = empty_tensor({shape.images, shape.groups}, floats);
  at::Tensor rstd = empty_tensor({shape.images, shape.groups}, floats);
  if (input.numel() == 0) {
    return {out, mean, rstd};
  }
  const Affine affine(weight, bias, shape.channels, input);
  const Bands bands(shape.images, shape.pixels, 0);
  at::Tensor moments = zero_tensor({bands.tasks(), 2, shape.padded}, floats);
  at::Tensor rows = empty_tensor({shape.images, 2, shape.padded}, floats); // mean, rstd of every channel
  float* moment = moments.data_ptr<float>();
  float* row = rows.data_ptr<float>();
  with_storage_type(input.scalar_type(), "input", [&](auto zero) {
    using T = decltype(zero);
    const T* from = input.data_ptr<T>();
    T* to = out.data_ptr<T>();
    const int64_t image_size = shape.pixels * shape.channels;
    for_pixels(bands, [&](int64_t task, int64_t image, int64_t begin, int64_t end) {
      float* part = moment + task * 2 * shape.padded;
      channel_moments(from + image * image_size, shape, begin, end, part, part + shape.padded);
    });
    for (int64_t image = 0; image < shape.images; ++image) {
      float* means = mean.data_ptr<float>() + image * shape.groups;
      float* rstds = rstd.data_ptr<float>() + image * shape.groups;
      merge_moments(moment, shape, bands, image, eps, means, rstds);
      spread(means, shape, row + image * 2 * shape.padded);
      spread(rstds, shape, row + (image * 2 + 1) * shape.padded);
    }
    const float* weights = affine.weight.template data_ptr<float>();
    const float* biases = affine.bias.template data_ptr<float>();
    with_function(activation, [&](auto f) {
      using F = decltype(f);
      for_pixels(bands, [&](int64_t, int64_t image, int64_t begin, int64_t end) {
        const float* shift = row + image * 2 * shape.padded;
        const float* scale = shift + shape.padded;
        for (int64_t p = begin; p < end; ++p) {
          const int64_t at = image * image_size + p * shape.channels;
          for (int64_t c = 0; c < shape.channels; c += kLanes) {
            const int64_t lanes = shape.channels - c;
            const Vec x_hat = (load_channels(from + at + c, lanes) - Vec::loadu(shift + c)) * Vec::loadu(scale + c);
            const Vec z = at::vec::fmadd(x_hat, Vec::loadu(weights + c), Vec::loadu(biases + c));
            store_channels(to + at + c, F::value(z), lanes);
          }
        }
      });
    });
  });
  return {out, mean, rstd};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> group_norm_backward(
    const at::Tensor& grad_output,
    const at::Tensor& x,
    const at::Tensor& mean,
    const at::Tensor& rstd,
    const OptionalTensor& weight,
    const OptionalTensor& bias,
    int64_t num_groups,
    const std::string& activation,
    bool need_input,
    bool need_weight,
    bool need_bias) {
  TORCH_CHECK(grad_output.dim() == 4, "grad_output: expected 4 dimensions (N, C, H, W), got ", grad_output.sizes());
  check_size(x, "values", grad_output.sizes(), grad_output.scalar_type());
  const at::Tensor input = in_channels_last(x);
  const at::Tensor grad_out = in_channels_last(grad_output);
  const Shape shape(input, num_groups);
  const auto floats = input.options().dtype(at::kFloat);
  at::Tensor grad = need_input ? empty_tensor(input.sizes(), input.options(), at::MemoryFormat::ChannelsLast)
                               : empty_tensor({0}, input.options());
  const at::Tensor means = checked_statistics(mean, "shift", shape);
  const at::Tensor rstds = checked_statistics(rstd, "rstd", shape);
  const Affine affine(weight, bias, shape.channels, input);
  const Bands bands(shape.images, std::max<int64_t>(shape.pixels, 1), 0);
  // A task's sum g and sum g x_hat of every channel, and as much again for work.
  at::Tensor partial = zero_tensor({std::max<int64_t>(bands.tasks(), 1), 4 * shape.padded}, floats);
  at::Tensor rows = zero_tensor({shape.images, ChannelRows::kRowCount, shape.padded}, floats);
  const auto rows_of = [&](int64_t image) {
    return ChannelRows{rows.data_ptr<float>() + image * ChannelRows::kRowCount * shape.padded, shape.padded};
  };
  const float* weights = affine.weight.data_ptr<float>();
  const float* biases = affine.bias.data_ptr<float>();
  float* sums = partial.data_ptr<float>();
  for (int64_t image = 0; image < shape.images; ++image) {
    spread(means.data_ptr<float>() + image * shape.groups, shape, rows_of(image)[ChannelRows::kShift]);
    spread(rstds.data_ptr<float>() + image * shape.groups, shape, rows_of(image)[ChannelRows::kScale]);
  }
  if (input.numel() > 0) {
    with_storage_type(input.scalar_type(), "values", [&](auto zero) {
      using T = decltype(zero);
      const T* from = input.data_ptr<T>();
      const T* grads = grad_out.data_ptr<T>();
      const int64_t image_size = shape.pixels * shape.channels;
      with_function(activation, [&](auto f) {
        using F = decltype(f);
        for_pixels(bands, [&](int64_t task, int64_t image, int64_t begin, int64_t end) {
          const ChannelRows row = rows_of(image);
          float* total = sums + task * 4 * shape.padded;
          float* chain = total + 2 * shape.padded;
          for (int64_t p = begin; p < end; ++p) {
            const int64_t at = image * image_size + p * shape.channels;
            for (int64_t c = 0; c < shape.channels; c += kLanes) {
              const int64_t lanes = shape.channels - c;
              const Vec x_hat = (load_channels(from + at + c, lanes) - Vec::loadu(row[ChannelRows::kShift] + c)) *
                  Vec::loadu(row[ChannelRows::kScale] + c);
              const Vec z = at::vec::fmadd(x_hat, Vec::loadu(weights + c), Vec::loadu(biases + c));
              const Vec g = F::gradient(z, load_channels(grads + at + c, lanes));
              (Vec::loadu(chain + c) + g).store(chain + c);
              at::vec::fmadd(g, x_hat, Vec::loadu(chain + shape.padded + c)).store(chain + shape.padded + c);
            }
            if ((p - begin) % kBlockPixels == kBlockPixels - 1 || p + 1 == end) {
              flush_sums(chain, total, 2 * shape.padded);
            }
          }
        });
        if (!need_input) {
          return;
        }
        const int64_t width = shape.channels / shape.groups;
        const double count = static_cast<double>(shape.of_group());
        for (int64_t image = 0; image < shape.images; ++image) {
          const ChannelRows row = rows_of(image);
          for (int64_t g = 0; g < shape.groups; ++g) {
            double of_g = 0;
            double of_product = 0;
            for (int64_t band = 0; band < bands.per_image; ++band) {
              const float* total = sums + (image * bands.per_image + band) * 4 * shape.padded;
              for (int64_t c = g * width; c < (g + 1) * width; ++c) {
                of_g += static_cast<double>(weights[c]) * total[c];
                of_product += static_cast<double>(weights[c]) * total[shape.padded + c];
              }
            }
            for (int64_t c = g * width; c < (g + 1) * width; ++c) {
              row[ChannelRows::kOfG][c] = static_cast<float>(of_g / count);
              row[ChannelRows::kOfProduct][c] = static_cast<float>(of_product / count);
            }
          }
        }
        T* to = grad.data_ptr<T>();
        for_pixels(bands, [&](int64_t, int64_t image, int64_t begin, int64_t end) {
          const ChannelRows row = rows_of(image);
          for (int64_t p = begin; p < end; ++p) {
            const int64_t at = image * image_size + p * shape.channels;
            for (int64_t c = 0; c < shape.channels; c += kLanes) {
              const int64_t lanes = shape.channels - c;
              const Vec scale = Vec::loadu(row[ChannelRows::kScale] + c);
              const Vec x_hat = (load_channels(from + at + c, lanes) - Vec::loadu(row[ChannelRows::kShift] + c)) * scale;
              const Vec w = Vec::loadu(weights + c);
              const Vec z = at::vec::fmadd(x_hat, w, Vec::loadu(biases + c));
              const Vec g = F::gradient(z, load_channels(grads + at + c, lanes));
              const Vec centred = w * g - Vec::loadu(row[ChannelRows::kOfG] + c) -
                  x_hat * Vec::loadu(row[ChannelRows::kOfProduct] + c);
              store_channels(to + at + c, centred * scale, lanes);
            }
          }
        });
      });
    });
  }
  return {
      grad,
      reduce_partial(partial, shape.padded, shape.channels, need_weight),
      reduce_partial(partial, 0, shape.channels, need_bias)};
}

} // namespace tinytl::cpu
