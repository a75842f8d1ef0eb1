// See trained_norm.h.
#include "trained_norm.h"

#include <cmath>

namespace tinytl::cpu {
namespace {

void read_parameter(const OptionalTensor& given, int64_t channels, float missing, float* target) {
  if (!given.has_value() || !given->defined()) {
    std::fill(target, target + channels, missing);
    return;
  }
  TORCH_CHECK(
      given->dim() == 1 && given->size(0) == channels, "norm: expected (", channels, ") parameters, got ", given->sizes());
  const at::Tensor values = as_float(*given).contiguous();
  std::copy(values.data_ptr<float>(), values.data_ptr<float>() + channels, target);
}

// Mean and sum of squared deviations of `count` values, grown by those of more values (Chan, Golub and LeVeque).
struct Moments {
  double count = 0, mean = 0, squares = 0;

  void add(double more, double its_mean, double its_squares) {
    if (more == 0) {
      return;
    }
    const double delta = its_mean - mean, total = count + more;
    mean += delta * more / total;
    squares += its_squares + delta * delta * count * more / total;
    count = total;
  }
};

} // namespace

TrainedNorm::TrainedNorm(
    int64_t channels,
    int64_t batch,
    int64_t pixels,
    int64_t groups,
    double eps,
    const OptionalTensor& weight,
    const OptionalTensor& bias)
    : channels(channels), batch(batch), pixels(pixels), groups(groups), eps(eps), of_batch(true) {
  TORCH_CHECK(
      groups >= 0 && (groups == 0 || channels % groups == 0),
      "norm_groups: expected 0 or a divisor of ",
      channels,
      " channels, got ",
      groups);
  // Whole pixels. A chain of additions is about kTaskRows long, and shorter where there were few tasks otherwise.
  const int64_t least = std::max<int64_t>(kLeastTaskRows / batch, 1);
  const int64_t most = groups > 0 ? kTaskRows : std::max<int64_t>(kTaskRows / batch, 1);
  task_pixels = std::clamp(ceil_div(pixels, kUsualTasks), std::min(least, most), most);
  const int64_t count = sets() * channels;
  coefficients_.resize(2 * channels + 6 * count);
  this->weight = coefficients_.data();
  this->bias = this->weight + channels;
  mean = this->bias + channels;
  rstd = mean + count, scale = rstd + count, shift = scale + count, constant = shift + count, slope = constant + count;
  read_parameter(weight, channels, 1.f, this->weight);
  read_parameter(bias, channels, 0.f, this->bias);
}

template <class T>
void TrainedNorm::measure_rows(const T* x, int64_t begin, int64_t end, float* moments) const {
  // Mean as rounded, sum of the deviations from it (they mend it) and of their squares.
  const int64_t length = sets() * channels;
  for_vectors([&](int64_t set, int64_t c, int64_t lanes) TINYTL_LAMBDA_INLINE {
    Vec sum(0.f), deviation(0.f), square(0.f);
    for_rows(set, begin, end, [&](int64_t row, int64_t, int64_t) TINYTL_LAMBDA_INLINE {
      sum = sum + load_channels(x + row * channels + c, lanes);
    });
    const Vec mean = sum / Vec(static_cast<float>((end - begin) / sets()));
    for_rows(set, begin, end, [&](int64_t row, int64_t, int64_t) TINYTL_LAMBDA_INLINE {
      const Vec off = load_channels(x + row * channels + c, lanes) - mean;
      deviation = deviation + off;
      square = at::vec::fmadd(off, off, square);
    });
    float* target = moments + set * channels + c;
    store_channels(target, mean, lanes);
    store_channels(target + length, deviation, lanes);
    store_channels(target + 2 * length, square, lanes);
  });
}

void TrainedNorm::take_moments(const std::vector<float>& partial) {
  // Channel by channel first: their counts are the same.
  const int64_t length = sets() * channels;
  std::vector<double> means(length), squares(length);
  double count = 0;
  for (int64_t task = 0; task < num_tasks(); ++task) {
    const float* found = partial.data() + task * 3 * length;
    const auto more = static_cast<double>((std::min((task + 1) * task_rows(), rows()) - task * task_rows()) / sets());
    const double total = count + more, share = more / total;
    for (int64_t i = 0; i < length; ++i) {
      const double mend = found[length + i] / more;
      const double delta = found[i] + mend - means[i];
      means[i] += delta * share;
      squares[i] += found[2 * length + i] - mend * found[length + i] + delta * delta * count * share;
    }
    count = total;
  }
  const int64_t entries = groups > 0 ? batch * groups : channels;
  std::vector<Moments> moments(entries);
  for (int64_t i = 0; i < length; ++i) {
    moments[entry(i / channels, i % channels)].add(count, means[i], squares[i]);
  }
  at::Tensor measured = empty_tensor({2, entries}, at::kFloat);
  float* target = measured.data_ptr<float>();
  for (int64_t i = 0; i < entries; ++i) {
    target[i] = static_cast<float>(moments[i].mean);
    target[entries + i] = static_cast<float>(moments[i].squares / std::max(moments[i].count, 1.));
  }
  use(measured);
}

void TrainedNorm::use(const at::Tensor& given) {
  const int64_t entries = groups > 0 ? batch * groups : channels;
  check_size(given, "statistics", {2, entries}, at::kFloat);
  statistics = given.contiguous();
  const float* means = statistics.data_ptr<float>();
  for (int64_t set = 0; set < sets(); ++set) {
    for (int64_t c = 0; c < channels; ++c) {
      const int64_t i = set * channels + c;
      mean[i] = means[entry(set, c)];
      rstd[i] = static_cast<float>(1. / std::sqrt(static_cast<double>(means[entries + entry(set, c)]) + eps));
      scale[i] = weight[c] * rstd[i];
      shift[i] = bias[c] - mean[i] * scale[i];
    }
  }
}

void TrainedNorm::take_sums(const std::vector<float>& partial) {
  const int64_t count = sets() * channels;
  sum_g.assign(count, 0.), sum_gx.assign(count, 0.);
  for (int64_t task = 0; task < num_tasks(); ++task) {
    const float* g = partial.data() + task * 2 * count;
    for (int64_t i = 0; i < count; ++i) {
      sum_g[i] += g[i];
      sum_gx[i] += g[count + i];
    }
  }
  if (!of_batch) {
    return; // constant and slope are zeros
  }
  const int64_t width = groups > 0 ? channels / groups : 1; // channels with common statistics
  const double values = static_cast<double>(groups > 0 ? pixels * width : rows());
  for (int64_t set = 0; set < sets(); ++set) {
    for (int64_t first = 0; first < channels; first += width) {
      double m1 = 0, m2 = 0;
      for (int64_t c = first; c < first + width; ++c) {
        m1 += weight[c] * sum_g[set * channels + c];
        m2 += weight[c] * sum_gx[set * channels + c];
      }
      for (int64_t i = set * channels + first; i < set * channels + first + width; ++i) {
        constant[i] = static_cast<float>(m1 / values * rstd[i]);
        slope[i] = static_cast<float>(m2 / values * rstd[i] * rstd[i]);
      }
    }
  }
}

at::Tensor TrainedNorm::grad_weight(bool wanted) const {
  at::Tensor grad = empty_tensor({wanted ? channels : 0}, at::kFloat);
  for (int64_t c = 0; c < grad.numel(); ++c) {
    double sum = 0;
    for (int64_t set = 0; set < sets(); ++set) {
      sum += sum_gx[set * channels + c];
    }
    grad.data_ptr<float>()[c] = static_cast<float>(sum);
  }
  return grad;
}

at::Tensor TrainedNorm::grad_bias(bool wanted) const {
  at::Tensor grad = empty_tensor({wanted ? channels : 0}, at::kFloat);
  for (int64_t c = 0; c < grad.numel(); ++c) {
    double sum = 0;
    for (int64_t set = 0; set < sets(); ++set) {
      sum += sum_g[set * channels + c];
    }
    grad.data_ptr<float>()[c] = static_cast<float>(sum);
  }
  return grad;
}

template void TrainedNorm::measure_rows<float>(const float*, int64_t, int64_t, float*) const;
template void TrainedNorm::measure_rows<c10::BFloat16>(const c10::BFloat16*, int64_t, int64_t, float*) const;
template void TrainedNorm::measure_rows<c10::Half>(const c10::Half*, int64_t, int64_t, float*) const;

} // namespace tinytl::cpu
