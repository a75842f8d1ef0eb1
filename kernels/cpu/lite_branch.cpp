// The lite residual's branch after its pooling (TinyTL, section 3.2), trained:
//
//     c = pooled *kxk W1      a = f(norm1(c))      e = a *1x1 W2      out = norm2(e)
//
// Kept for backward: pooled, the statistics of the norms, and c where it is wanted (else computed again); a and e, a
// tenth of the arithmetic, always are. Everything between the user's tensors is position-major, (H, W, N, C): see
// trained_conv.h.
#include "lite_branch.h"

#include "epilogues.h"
#include "trained_conv.h"
#include "trained_norm.h"

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

template <class T>
at::Tensor first_conv(const TrainedConv& conv, const float* padded, const at::Tensor& weight, at::ScalarType dtype) {
  at::Tensor result = empty_tensor({conv.out_height, conv.out_width, conv.batch, conv.out_channels}, dtype);
  trained_conv_forward(conv, padded, weight, result.data_ptr<T>());
  return result;
}

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
void normalised(const TrainedNorm& norm, const float* e, T* out) {
  norm.for_tasks([&](int64_t, int64_t begin, int64_t end) {
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

// The sums of a gradient, g(row, pixel, image, channel, lanes, z) with the norm's output z, over rows [begin, end).
template <class T, class Gradient>
void sum_gradient_rows(
    const TrainedNorm& norm, const T* x, const Gradient& g, int64_t begin, int64_t end, float* sums) {
  const int64_t count = norm.sets() * norm.channels;
  norm.for_vectors([&](int64_t set, int64_t channel, int64_t lanes) TINYTL_LAMBDA_INLINE {
    const Vec mean = norm.coefficient(norm.mean, set, channel, lanes);
    const Vec scale = norm.coefficient(norm.scale, set, channel, lanes);
    const Vec shift = norm.coefficient(norm.shift, set, channel, lanes);
    Vec sum(0.f), sum_x(0.f);
    norm.for_rows(set, begin, end, [&](int64_t row, int64_t pixel, int64_t image) TINYTL_LAMBDA_INLINE {
      const Vec value = load_channels(x + row * norm.channels + channel, lanes);
      const Vec gradient = g(row, pixel, image, channel, lanes, at::vec::fmadd(value, scale, shift));
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
void input_gradient(const TrainedNorm& norm, const T* x, const Gradient& g, const Store& store) {
  std::vector<float> constants, slopes;
  norm.gradient_terms(constants, slopes);
  norm.for_tasks([&](int64_t, int64_t begin, int64_t end) {
    norm.for_vectors([&](int64_t set, int64_t channel, int64_t lanes) TINYTL_LAMBDA_INLINE {
      const Vec mean = norm.coefficient(norm.mean, set, channel, lanes);
      const Vec scale = norm.coefficient(norm.scale, set, channel, lanes);
      const Vec shift = norm.coefficient(norm.shift, set, channel, lanes);
      const Vec constant = norm.coefficient(constants, set, channel, lanes);
      const Vec slope = norm.coefficient(slopes, set, channel, lanes);
      norm.for_rows(set, begin, end, [&](int64_t row, int64_t pixel, int64_t image) TINYTL_LAMBDA_INLINE {
        const Vec value = load_channels(x + row * norm.channels + channel, lanes);
        const Vec gradient = g(row, pixel, image, channel, lanes, at::vec::fmadd(value, scale, shift));
        store(row, pixel, image, channel, lanes, gradient * scale - constant - (value - mean) * slope);
      });
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
    double eps2) {
  const TrainedConv conv1(pooled.sizes(), weight1, stride, groups);
  const TrainedConv conv2 = pointwise_after(conv1, weight2);
  TORCH_CHECK(conv2.in_channels == conv1.out_channels, "weight2: expected ", conv1.out_channels, " input channels");
  const Activation f = parse_activation(activation);
  const at::Tensor input = pooled.contiguous(kChannelsLast);
  at::Tensor out =
      empty_tensor({conv2.batch, conv2.out_channels, conv2.out_height, conv2.out_width}, pooled.options(), kChannelsLast);
  at::Tensor c;
  TrainedNorm norm1 = norm_of(conv1, norm_weight1, norm_bias1, norm_groups1, eps1);
  TrainedNorm norm2 = norm_of(conv2, norm_weight2, norm_bias2, norm_groups2, eps2);
  norm1.align(norm2);
  with_storage_type(pooled.scalar_type(), "pooled", [&](auto zero) {
    using T = decltype(zero);
    const int64_t e_elements = conv2.pixels() * conv2.out_channels;
    Workspace workspace(std::max(conv1.padded_input(), e_elements), 1);
    float* padded = workspace.take(std::max(conv1.padded_input(), e_elements));
    float* e = padded; // from when c is there
    pad_input(conv1, input.data_ptr<T>(), padded);
    c = first_conv<T>(conv1, padded, weight1, pooled.scalar_type());
    const T* values = c.data_ptr<T>();
    if (running_mean1.has_value()) {
      use_running(norm1, running_mean1, running_var1);
    } else {
      std::vector<float> moments = norm1.partial(3);
      norm1.for_tasks([&](int64_t task, int64_t begin, int64_t end) {
        norm1.measure_rows(values, begin, end, norm1.of_task(moments, task));
      });
      norm1.take_moments(moments);
    }
    const TrainedPointwise second(weight2, false);
    std::vector<float> moments = norm2.partial(3);
    norm1.for_tasks([&](int64_t task, int64_t begin, int64_t end) {
      for_row_blocks(begin, end, conv1.batch, [&](int64_t first, int64_t last) {
        float* a = scratch<float>(kRows, (last - first) * conv2.in_channels);
        activate_rows(norm1, f, values, first, last, a);
        second.rows(a, last - first, e + first * conv2.out_channels);
      });
      if (!running_mean2.has_value()) {
        norm2.measure_rows(e, begin, end, norm2.of_task(moments, task));
      }
    });
    if (running_mean2.has_value()) {
      use_running(norm2, running_mean2, running_var2);
    } else {
      norm2.take_moments(moments);
    }
    normalised(norm2, e, out.data_ptr<T>());
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
    std::array<bool, 7> needed) {
  const TrainedConv conv1(pooled.sizes(), weight1, stride, groups);
  const TrainedConv conv2 = pointwise_after(conv1, weight2);
  const auto dtype = pooled.scalar_type();
  check_size(grad_output, "grad_output", {conv2.batch, conv2.out_channels, conv2.out_height, conv2.out_width}, dtype);
  const auto [need_input, need_weight1, need_scale1, need_bias1, need_weight2, need_scale2, need_bias2] = needed;
  const bool need_conv1 = need_input || need_weight1;
  const bool need_norm1 = need_conv1 || need_scale1 || need_bias1;
  at::Tensor grad_input = empty_tensor({0}, pooled.options());
  at::Tensor grad_weight1 = empty_tensor({0}, weight1.options()), grad_weight2 = empty_tensor({0}, weight2.options());
  const at::Tensor input = pooled.contiguous(kChannelsLast), grad = grad_output.contiguous(kChannelsLast);
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
    const int64_t grad_elements = need_conv1 ? conv1.padded_gradient() : 0;
    const int64_t a_elements = conv2.pixels() * conv2.in_channels, e_elements = conv2.pixels() * conv2.out_channels;
    // Two buffers, each for one thing after another.
    Workspace workspace(std::max(padded_elements, a_elements) + std::max(e_elements, grad_elements), 2);
    float* a = workspace.take(std::max(padded_elements, a_elements)); // then its gradient
    float* e = workspace.take(std::max(e_elements, grad_elements)); // then its gradient
    float* padded = a; // before a, and after its gradient
    float* grad_c = e; // after e's gradient; padded
    at::Tensor c = conv;
    if (need_conv) {
      pad_input(conv1, input.data_ptr<T>(), padded);
      c = first_conv<T>(conv1, padded, weight1, dtype);
    }
    check_size(c, "conv", {conv1.out_height, conv1.out_width, conv1.batch, conv1.out_channels}, dtype);
    const T* values = c.data_ptr<T>();

    const T* grad_data = grad.data_ptr<T>();
    const auto from_output = [&](int64_t, int64_t pixel, int64_t image, int64_t channel, int64_t lanes, Vec)
                                 TINYTL_LAMBDA_INLINE {
      return load_channels(grad_data + (image * norm2.pixels + pixel) * norm2.channels + channel, lanes);
    };
    std::vector<float> sums2 = norm2.partial(2);
    const TrainedPointwise second(weight2, false);
    norm1.for_tasks([&](int64_t task, int64_t begin, int64_t end) {
      for_row_blocks(begin, end, conv1.batch, [&](int64_t first, int64_t last) {
        activate_rows(norm1, f, values, first, last, a + first * conv2.in_channels);
        second.rows(a + first * conv2.in_channels, last - first, e + first * conv2.out_channels);
      });
      sum_gradient_rows(norm2, e, from_output, begin, end, norm2.of_task(sums2, task));
    });
    norm2.take_sums(sums2);
    if (!need_norm1 && !need_weight2) {
      return;
    }
    const auto to_rows = [&](int64_t row, int64_t, int64_t, int64_t channel, int64_t lanes, Vec value)
                             TINYTL_LAMBDA_INLINE {
      store_channels(e + row * norm2.channels + channel, value, lanes);
    };
    input_gradient(norm2, e, from_output, to_rows);
    if (need_weight2) {
      grad_weight2 = empty_like(weight2);
      trained_conv_backward_weight(conv2, a, e, grad_weight2);
    }
    if (!need_norm1) {
      return;
    }
    const TrainedPointwise back(weight2, true);
    with_activation(f, [&](auto act) {
      const auto from_activation = [&](int64_t row, int64_t, int64_t, int64_t channel, int64_t lanes, Vec z)
                                       TINYTL_LAMBDA_INLINE {
        return passed<act.value>(load_channels(a + row * norm1.channels + channel, lanes), z);
      };
      std::vector<float> sums1 = norm1.partial(2);
      norm1.for_tasks([&](int64_t task, int64_t begin, int64_t end) {
        back.rows(e + begin * conv2.out_channels, end - begin, a + begin * conv2.in_channels);
        sum_gradient_rows(norm1, values, from_activation, begin, end, norm1.of_task(sums1, task));
      });
      norm1.take_sums(sums1);
      if (need_conv1) {
        zero_padding(conv1, grad_c);
        std::vector<int64_t> padded_pixels(norm1.pixels); // where they lie in grad_c
        for (int64_t p = 0; p < norm1.pixels; ++p) {
          padded_pixels[p] =
              (p / conv1.out_width * conv1.gradient_width + conv1.left + p % conv1.out_width) * conv1.batch;
        }
        const auto to_padded = [&](int64_t, int64_t pixel, int64_t image, int64_t channel, int64_t lanes, Vec value)
                                   TINYTL_LAMBDA_INLINE {
          store_channels(grad_c + (padded_pixels[pixel] + image) * norm1.channels + channel, value, lanes);
        };
        input_gradient(norm1, values, from_activation, to_padded);
      }
    });
    if (need_input) {
      grad_input = empty_tensor(pooled.sizes(), pooled.options(), kChannelsLast);
      trained_conv_backward_input(conv1, grad_c, weight1, grad_input.data_ptr<T>());
    }
    if (need_weight1) {
      grad_weight1 = empty_like(weight1);
      pad_input(conv1, input.data_ptr<T>(), padded);
      trained_conv_backward_weight(conv1, padded, grad_c, grad_weight1);
    }
  });
  return {
      grad_input,
      grad_weight1,
      norm1.grad_weight(need_scale1),
      norm1.grad_bias(need_bias1),
      grad_weight2,
      norm2.grad_weight(need_scale2),
      norm2.grad_bias(need_bias2)};
}

} // namespace tinytl::cpu
