// The lite residual's branch after its pooling (TinyTL, section 3.2), trained:
//
//     c = pooled *kxk W1      a = f(norm1(c))      e = a *1x1 W2      out = norm2(e)
//
// Kept for backward: pooled, the statistics of the norms, and c where it is wanted (else computed again); a and e, a
// tenth of the arithmetic, always are. Everything between the user's tensors is position-major, (H, W, N, C): see
// trained_conv.h. The upsampled result may be added to a tensor on its way out: it never exists by itself then.
//
// A branch is small, and threads that wait for each other are a good part of its time: what does not depend on each
// other is one list of tasks.
#include "lite_branch.h"

#include "epilogues.h"
#include "trained_conv.h"
#include "trained_norm.h"
#include "upsampling.h"

#include <array>
#include <optional>

namespace tinytl::cpu {
namespace {

constexpr auto kChannelsLast = at::MemoryFormat::ChannelsLast;

TrainedNorm norm_of(
    const TrainedConv& conv, const OptionalTensor& weight, const OptionalTensor& bias, int64_t groups, double eps) {
  return TrainedNorm(conv.out_channels, conv.batch, conv.out_height * conv.out_width, groups, eps, weight, bias);
}

// The 1x1 convolution `weight` (O, I, 1, 1) of images as large as the output of `conv`.
TrainedConv pointwise_after(const TrainedConv& conv, const at::Tensor& weight) {
  return TrainedConv({conv.batch, weight.size(1), conv.out_height, conv.out_width}, weight, 1, 1);
}

// Temporaries of one call, in one piece, handed back after it: kept for the next call, those of the first blocks would
// stand beside the peak of the whole step, which is elsewhere.
class Workspace {
 public:
  Workspace(int64_t elements, int64_t buffers)
      : storage_(empty_tensor({elements + buffers * kGap}, at::kFloat)), next_(storage_.data_ptr<float>()) {}

  // `count` floats, with room behind them for a tile's vectors that begin at the last one.
  float* take(int64_t count) {
    float* taken = next_;
    next_ += count + kGap;
    return taken;
  }

 private:
  static constexpr int64_t kGap = kTileVecs * kLanes;
  at::Tensor storage_;
  float* next_;
};

// Rows of the activated image that are made and multiplied at a time, about: they stay in the first-level cache.
constexpr int64_t kBlockRows = 96;

// Calls body(first, last) for [begin, end), whole pixels at a time.
template <class Body>
void for_row_blocks(int64_t begin, int64_t end, int64_t batch, const Body& body) {
  const int64_t rows = std::max<int64_t>(kBlockRows / batch, 1) * batch;
  for (int64_t first = begin; first < end; first += rows) {
    body(first, std::min(first + rows, end));
  }
}

void use_running(TrainedNorm& norm, const OptionalTensor& mean, const OptionalTensor& var) {
  norm.of_batch = false;
  at::Tensor statistics = empty_tensor({2, norm.channels}, at::kFloat);
  statistics[0].copy_(*mean);
  statistics[1].copy_(*var);
  norm.use(statistics);
}

// Rows [begin, end) of f(norm(c)), the first of them at `a`.
template <class T>
void activate_rows(const TrainedNorm& norm, Activation activation, const T* c, int64_t begin, int64_t end, float* a) {
  with_activation(activation, [&](auto f) {
    norm.for_vectors([&](int64_t set, int64_t channel, int64_t lanes) TINYTL_LAMBDA_INLINE {
      const Vec scale = norm.coefficient(norm.scale, set, channel, lanes);
      const Vec shift = norm.coefficient(norm.shift, set, channel, lanes);
      norm.for_rows(set, begin, end, [&](int64_t row, int64_t, int64_t) TINYTL_LAMBDA_INLINE {
        const Vec z = at::vec::fmadd(load_channels(c + row * norm.channels + channel, lanes), scale, shift);
        store_channels(a + (row - begin) * norm.channels + channel, activate<f.value>(z), lanes);
      });
    });
  });
}

// out = norm(e), channels_last
template <class T>
Tasks normalise(const TrainedNorm& norm, const float* e, T* out) {
  return norm.tasks([=, &norm](int64_t, int64_t begin, int64_t end) {
    norm.for_vectors([&](int64_t set, int64_t channel, int64_t lanes) TINYTL_LAMBDA_INLINE {
      const Vec scale = norm.coefficient(norm.scale, set, channel, lanes);
      const Vec shift = norm.coefficient(norm.shift, set, channel, lanes);
      norm.for_rows(set, begin, end, [&](int64_t row, int64_t pixel, int64_t image) TINYTL_LAMBDA_INLINE {
        const Vec z = at::vec::fmadd(load_channels(e + row * norm.channels + channel, lanes), scale, shift);
        store_channels(out + (image * norm.pixels + pixel) * norm.channels + channel, z, lanes);
      });
    });
  });
}

// As a tensor of T would hold it: a sum is that of the branch's output, whether that exists or not.
template <class T>
TINYTL_INLINE Vec rounded(Vec value) {
  if constexpr (std::is_same_v<T, float>) {
    return value;
  } else {
    T stored[kLanes];
    store_channels(stored, value);
    return load_channels(stored);
  }
}

// out += the upsampled norm(e), channels_last
template <class T>
Tasks add_normalised(const UpsampleAdd& upsample, const TrainedNorm& norm, const float* e, T* out) {
  const auto read = [=, &upsample, &norm](int64_t image, int64_t row, int64_t column, int64_t channel, int64_t lanes)
                        TINYTL_LAMBDA_INLINE {
    const int64_t set = norm.groups > 0 ? image : 0, pixel = row * upsample.branch_width + column;
    const Vec value = load_channels(e + (pixel * norm.batch + image) * norm.channels + channel, lanes);
    const Vec scale = norm.coefficient(norm.scale, set, channel, lanes);
    return rounded<T>(at::vec::fmadd(value, scale, norm.coefficient(norm.shift, set, channel, lanes)));
  };
  return upsample.tasks(out, out, read);
}

// The gradient of the branch's output, position-major: `grad`, channels_last, or what reaches it from an upsampled sum's.
template <class T>
Tasks output_gradient(
    const UpsampleAdjoint& adjoint, const TrainedNorm& norm, const T* grad, bool added, float* target) {
  if (added) {
    const auto write = [=, &adjoint, &norm](
                           int64_t image, int64_t row, int64_t column, int64_t channel, int64_t lanes, Vec value)
                           TINYTL_LAMBDA_INLINE {
      const int64_t pixel = row * adjoint.branch_width + column;
      store_channels(target + (pixel * norm.batch + image) * norm.channels + channel, rounded<T>(value), lanes);
    };
    return adjoint.tasks(grad, write);
  }
  return norm.tasks([=, &norm](int64_t, int64_t begin, int64_t end) {
    norm.for_vectors([&](int64_t set, int64_t channel, int64_t lanes) TINYTL_LAMBDA_INLINE {
      norm.for_rows(set, begin, end, [&](int64_t row, int64_t pixel, int64_t image) TINYTL_LAMBDA_INLINE {
        const Vec value = load_channels(grad + (image * norm.pixels + pixel) * norm.channels + channel, lanes);
        store_channels(target + row * norm.channels + channel, value, lanes);
      });
    });
  });
}

// The sums of a gradient, g(row, channel, lanes, z) with the norm's output z, over rows [begin, end).
template <class T, class Gradient>
void sum_gradient_rows(
    const TrainedNorm& norm, const T* x, const Gradient& g, int64_t begin, int64_t end, float* sums) {
  const int64_t count = norm.sets() * norm.channels;
  norm.for_vectors([&](int64_t set, int64_t channel, int64_t lanes) TINYTL_LAMBDA_INLINE {
    const Vec mean = norm.coefficient(norm.mean, set, channel, lanes);
    const Vec scale = norm.coefficient(norm.scale, set, channel, lanes);
    const Vec shift = norm.coefficient(norm.shift, set, channel, lanes);
    Vec sum(0.f), sum_x(0.f);
    norm.for_rows(set, begin, end, [&](int64_t row, int64_t, int64_t) TINYTL_LAMBDA_INLINE {
      const Vec value = load_channels(x + row * norm.channels + channel, lanes);
      const Vec gradient = g(row, channel, lanes, at::vec::fmadd(value, scale, shift));
      sum = sum + gradient;
      sum_x = at::vec::fmadd(gradient, value - mean, sum_x);
    });
    const Vec rstd = norm.coefficient(norm.rstd, set, channel, lanes);
    store_channels(sums + set * norm.channels + channel, sum, lanes);
    store_channels(sums + count + set * norm.channels + channel, sum_x * rstd, lanes);
  });
}

// store(row, pixel, image, channel, lanes, dx) of the norm's input gradient, for the same g as summed.
template <class T, class Gradient, class Store>
void input_gradient_rows(
    const TrainedNorm& norm, const T* x, const Gradient& g, const Store& store, int64_t begin, int64_t end) {
  norm.for_vectors([&](int64_t set, int64_t channel, int64_t lanes) TINYTL_LAMBDA_INLINE {
    const Vec mean = norm.coefficient(norm.mean, set, channel, lanes);
    const Vec scale = norm.coefficient(norm.scale, set, channel, lanes);
    const Vec shift = norm.coefficient(norm.shift, set, channel, lanes);
    const Vec constant = norm.coefficient(norm.constant, set, channel, lanes);
    const Vec slope = norm.coefficient(norm.slope, set, channel, lanes);
    norm.for_rows(set, begin, end, [&](int64_t row, int64_t pixel, int64_t image) TINYTL_LAMBDA_INLINE {
      const Vec value = load_channels(x + row * norm.channels + channel, lanes);
      const Vec gradient = g(row, channel, lanes, at::vec::fmadd(value, scale, shift));
      store(row, pixel, image, channel, lanes, gradient * scale - constant - (value - mean) * slope);
    });
  });
}

template <Activation A>
TINYTL_INLINE Vec passed(Vec gradient, Vec z) {
  if constexpr (A == Activation::relu) {
    return Vec::blendv(gradient, Vec(0.f), z <= Vec(0.f));
  } else if constexpr (A == Activation::relu6) {
    return Vec::blendv(Vec(0.f), gradient, (z > Vec(0.f)) & (z < Vec(6.f)));
  } else {
    return gradient;
  }
}

// A gradient of `weight`'s shape and strides, summed in float32.
struct WeightGradient {
  const at::Tensor& weight;
  at::Tensor sums;

  explicit WeightGradient(const at::Tensor& weight, bool wanted)
      : weight(weight), sums(wanted ? empty_like(weight, at::kFloat) : at::Tensor()) {}
  at::Tensor result() const {
    return sums.defined() ? sums.to(weight.scalar_type()) : empty_tensor({0}, weight.options());
  }
};

} // namespace

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> lite_branch_forward(
    const at::Tensor& pooled,
    const at::Tensor& weight1,
    const OptionalTensor& norm_weight1,
    const OptionalTensor& norm_bias1,
    const OptionalTensor& running_mean1,
    const OptionalTensor& running_var1,
    const at::Tensor& weight2,
    const OptionalTensor& norm_weight2,
    const OptionalTensor& norm_bias2,
    const OptionalTensor& running_mean2,
    const OptionalTensor& running_var2,
    int64_t stride,
    int64_t groups,
    const std::string& activation,
    int64_t norm_groups1,
    int64_t norm_groups2,
    double eps1,
    double eps2,
    const OptionalTensor& main) {
  const TrainedConv conv1(pooled.sizes(), weight1, stride, groups);
  const TrainedConv conv2 = pointwise_after(conv1, weight2);
  TORCH_CHECK(conv2.in_channels == conv1.out_channels, "weight2: expected ", conv1.out_channels, " input channels");
  const Activation f = parse_activation(activation);
  const auto dtype = pooled.scalar_type();
  const at::Tensor input = in_channels_last(pooled);
  const std::array<int64_t, 4> size{conv2.batch, conv2.out_channels, conv2.out_height, conv2.out_width};
  if (main.has_value()) {
    check_size(*main, "main", {conv2.batch, conv2.out_channels, main->size(2), main->size(3)}, dtype);
    TORCH_CHECK(main->is_contiguous(kChannelsLast), "main: expected channels_last, got strides ", main->strides());
  }
  at::Tensor out = main.has_value() ? empty_tensor({0}, dtype) : empty_tensor(size, dtype, kChannelsLast);
  at::Tensor c = empty_tensor({conv1.out_height, conv1.out_width, conv1.batch, conv1.out_channels}, dtype);
  TrainedNorm norm1 = norm_of(conv1, norm_weight1, norm_bias1, norm_groups1, eps1);
  TrainedNorm norm2 = norm_of(conv2, norm_weight2, norm_bias2, norm_groups2, eps2);
  norm1.align(norm2);
  with_storage_type(dtype, "pooled", [&](auto zero) {
    using T = decltype(zero);
    const int64_t elements = std::max(conv1.padded_input(), conv2.pixels() * conv2.out_channels);
    Workspace workspace(elements, 1);
    float* padded = workspace.take(elements);
    float* e = padded; // from when c is there
    T* values = c.data_ptr<T>();
    PackedWeight first(conv1, weight1, false);
    TrainedPointwise second(weight2, false);
    parallel_tasks({pad_input(conv1, input.data_ptr<T>(), padded), first.packing(), second.packing()});
    parallel_tasks({trained_conv_forward(conv1, padded, first, values)});
    if (running_mean1.has_value()) {
      use_running(norm1, running_mean1, running_var1);
    } else {
      std::vector<float> moments = norm1.partial(3);
      parallel_tasks({norm1.tasks([&](int64_t task, int64_t begin, int64_t end) {
        norm1.measure_rows(values, begin, end, norm1.of_task(moments, task));
      })});
      norm1.take_moments(moments);
    }
    std::vector<float> moments = norm2.partial(3);
    parallel_tasks({norm1.tasks([&](int64_t task, int64_t begin, int64_t end) {
      for_row_blocks(begin, end, conv1.batch, [&](int64_t first, int64_t last) {
        float* a = scratch<float>(kRows, (last - first) * conv2.in_channels);
        activate_rows(norm1, f, values, first, last, a);
        second.rows(a, last - first, e + first * conv2.out_channels);
      });
      if (!running_mean2.has_value()) {
        norm2.measure_rows(e, begin, end, norm2.of_task(moments, task));
      }
    })});
    if (running_mean2.has_value()) {
      use_running(norm2, running_mean2, running_var2);
    } else {
      norm2.take_moments(moments);
    }
    if (main.has_value()) {
      const UpsampleAdd upsample(main->sizes(), size);
      parallel_tasks({add_normalised(upsample, norm2, e, main->data_ptr<T>())});
    } else {
      parallel_tasks({normalise(norm2, e, out.data_ptr<T>())});
    }
  });
  return {out, c, norm1.statistics, norm2.statistics};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> lite_branch_backward(
    const at::Tensor& grad_output,
    const at::Tensor& pooled,
    const at::Tensor& conv,
    const at::Tensor& statistics1,
    const at::Tensor& statistics2,
    const at::Tensor& weight1,
    const OptionalTensor& norm_weight1,
    const OptionalTensor& norm_bias1,
    const at::Tensor& weight2,
    const OptionalTensor& norm_weight2,
    int64_t stride,
    int64_t groups,
    const std::string& activation,
    int64_t norm_groups1,
    int64_t norm_groups2,
    double eps1,
    double eps2,
    bool batch1,
    bool batch2,
    std::array<bool, 7> needed,
    bool added) {
  const TrainedConv conv1(pooled.sizes(), weight1, stride, groups);
  const TrainedConv conv2 = pointwise_after(conv1, weight2);
  const auto dtype = pooled.scalar_type();
  const std::array<int64_t, 4> size{conv2.batch, conv2.out_channels, conv2.out_height, conv2.out_width};
  TORCH_CHECK(grad_output.dim() == 4, "grad_output: expected 4 dimensions (N, C, H, W), got ", grad_output.sizes());
  const int64_t height = added ? grad_output.size(2) : size[2], width = added ? grad_output.size(3) : size[3];
  check_size(grad_output, "grad_output", {size[0], size[1], height, width}, dtype);
  const auto [need_input, need_weight1, need_scale1, need_bias1, need_weight2, need_scale2, need_bias2] = needed;
  const bool need_conv1 = need_input || need_weight1;
  const bool need_norm1 = need_conv1 || need_scale1 || need_bias1;
  const at::Tensor input = in_channels_last(pooled), grad = in_channels_last(grad_output);
  at::Tensor grad_input =
      need_input ? empty_tensor(pooled.sizes(), dtype, kChannelsLast) : empty_tensor({0}, dtype);
  WeightGradient grad_weight1(weight1, need_weight1), grad_weight2(weight2, need_weight2);
  TrainedNorm norm1 = norm_of(conv1, norm_weight1, norm_bias1, norm_groups1, eps1);
  TrainedNorm norm2 = norm_of(conv2, norm_weight2, std::nullopt, norm_groups2, eps2);
  norm1.align(norm2);
  norm1.use(statistics1), norm2.use(statistics2);
  norm1.of_batch = batch1, norm2.of_batch = batch2;

  with_storage_type(dtype, "pooled", [&](auto zero) {
    using T = decltype(zero);
    const Activation f = parse_activation(activation);
    const bool need_conv = conv.numel() == 0;
    const int64_t padded_elements = need_weight1 || need_conv ? conv1.padded_input() : 0;
    const int64_t a_elements = conv2.pixels() * conv2.in_channels, e_elements = conv2.pixels() * conv2.out_channels;
    const int64_t grad_c_elements = need_conv1 ? conv1.padded_gradient() : 0;
    // Three buffers, two of them for one thing after another.
    const int64_t a_room = std::max(padded_elements, a_elements), grad_a_room = need_norm1 ? a_elements : 0;
    const int64_t e_room = std::max(2 * e_elements, grad_c_elements);
    Workspace workspace(a_room + grad_a_room + e_room, 3);
    float* a = workspace.take(a_room);
    float* padded = a; // before a and after it
    float* grad_a = workspace.take(grad_a_room);
    float* e = workspace.take(e_room); // then its gradient
    float* grad_out = e + e_elements;
    float* grad_c = e; // after e's gradient and grad_out; padded

    const UpsampleAdjoint adjoint(grad.sizes(), size);
    TrainedPointwise second(weight2, false), back(weight2, true);
    const Tasks gradient = output_gradient(adjoint, norm2, grad.data_ptr<T>(), added, grad_out);
    at::Tensor c = conv;
    if (need_conv) {
      c = empty_tensor({conv1.out_height, conv1.out_width, conv1.batch, conv1.out_channels}, dtype);
      PackedWeight first(conv1, weight1, false);
      parallel_tasks({pad_input(conv1, input.data_ptr<T>(), padded), first.packing()});
      parallel_tasks({trained_conv_forward(conv1, padded, first, c.data_ptr<T>())});
    }
    check_size(c, "conv", {conv1.out_height, conv1.out_width, conv1.batch, conv1.out_channels}, dtype);
    const T* values = c.data_ptr<T>();
    parallel_tasks({gradient, second.packing(), need_norm1 ? back.packing() : Tasks()});

    const auto from_output = [=, &norm2](int64_t row, int64_t channel, int64_t lanes, Vec) TINYTL_LAMBDA_INLINE {
      return load_channels(grad_out + row * norm2.channels + channel, lanes);
    };
    std::vector<float> sums2 = norm2.partial(2);
    parallel_tasks({norm1.tasks([&](int64_t task, int64_t begin, int64_t end) {
      for_row_blocks(begin, end, conv1.batch, [&](int64_t first, int64_t last) {
        activate_rows(norm1, f, values, first, last, a + first * conv2.in_channels);
        second.rows(a + first * conv2.in_channels, last - first, e + first * conv2.out_channels);
      });
      sum_gradient_rows(norm2, e, from_output, begin, end, norm2.of_task(sums2, task));
    })});
    norm2.take_sums(sums2);
    if (!need_norm1 && !need_weight2) {
      return;
    }

    with_activation(f, [&](auto act) {
      const auto from_activation = [=, &norm1](int64_t row, int64_t channel, int64_t lanes, Vec z)
                                       TINYTL_LAMBDA_INLINE {
        return passed<act.value>(load_channels(grad_a + row * norm1.channels + channel, lanes), z);
      };
      std::vector<float> sums1 = norm1.partial(2);
      parallel_tasks({norm1.tasks([&](int64_t task, int64_t begin, int64_t end) {
        const auto to_rows = [=, &norm2](int64_t row, int64_t, int64_t, int64_t channel, int64_t lanes, Vec value)
                                 TINYTL_LAMBDA_INLINE {
          store_channels(e + row * norm2.channels + channel, value, lanes);
        };
        input_gradient_rows(norm2, e, from_output, to_rows, begin, end);
        if (need_norm1) {
          back.rows(e + begin * conv2.out_channels, end - begin, grad_a + begin * conv2.in_channels);
          sum_gradient_rows(norm1, values, from_activation, begin, end, norm1.of_task(sums1, task));
        }
      })});
      norm1.take_sums(sums1);
      std::optional<PackedWeight> first;
      if (need_input) {
        first.emplace(conv1, weight1, true);
      }
      parallel_tasks({
          need_weight2 ? trained_conv_backward_weight(conv2, a, e, grad_weight2.sums) : Tasks(),
          need_input ? first->packing() : Tasks(),
      });
      if (!need_conv1) {
        return;
      }
      std::vector<int64_t> padded_pixels(norm1.pixels); // where they lie in grad_c
      for (int64_t p = 0; p < norm1.pixels; ++p) {
        padded_pixels[p] = (p / conv1.out_width * conv1.gradient_width + conv1.left + p % conv1.out_width) * conv1.batch;
      }
      const auto to_padded = [&](int64_t, int64_t pixel, int64_t image, int64_t channel, int64_t lanes, Vec value)
                                 TINYTL_LAMBDA_INLINE {
        store_channels(grad_c + (padded_pixels[pixel] + image) * norm1.channels + channel, value, lanes);
      };
      parallel_tasks({
          need_weight1 ? pad_input(conv1, input.data_ptr<T>(), padded) : Tasks(),
          zero_padding(conv1, grad_c),
          norm1.tasks([&](int64_t, int64_t begin, int64_t end) {
            input_gradient_rows(norm1, values, from_activation, to_padded, begin, end);
          }),
      });
      parallel_tasks({
          need_input ? trained_conv_backward_input(conv1, grad_c, *first, grad_input.data_ptr<T>()) : Tasks(),
          need_weight1 ? trained_conv_backward_weight(conv1, padded, grad_c, grad_weight1.sums) : Tasks(),
      });
    });
  });
  return {
      grad_input,
      grad_weight1.result(),
      norm1.grad_weight(need_scale1),
      norm1.grad_bias(need_bias1),
      grad_weight2.result(),
      norm2.grad_weight(need_scale2),
      norm2.grad_bias(need_bias2)};
}

} // namespace tinytl::cpu
