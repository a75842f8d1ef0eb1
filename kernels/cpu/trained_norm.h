// A trained BatchNorm or GroupNorm over position-major rows, (pixels, batch, channels), in four passes:
//
//     statistics   mean, var of each channel (BatchNorm), or of each group of channels of each image (GroupNorm)
//     apply        z = x scale + shift          scale = weight rstd, shift = bias - mean scale
//     sums         S1 = sum g, S2 = sum g x_hat             they are the gradients of bias and weight
//     gradient     dx = rstd (weight g - m1 - x_hat m2)     m1, m2: means of weight g and weight g x_hat; 0 in eval mode
//
// A *set* is what has statistics of its own along the batch: all images for a BatchNorm, one for a GroupNorm. Image n of
// a row belongs to set n % sets. A task takes few rows, that stay in the first-level cache, the same ones whatever
// the number of threads, and partial results are combined in order, in double precision: the same bits every time.
#pragma once

#include "common.h"
#include "parallel.h"

#include <vector>

namespace tinytl::cpu {

constexpr int64_t kTaskRows = 96;

// A small image is cut into about so many tasks, of so many rows at least: with one task a thread has nothing to do.
constexpr int64_t kUsualTasks = 8;
constexpr int64_t kLeastTaskRows = 16;

struct TrainedNorm {
  int64_t channels, batch, pixels;
  int64_t groups; // 0: BatchNorm
  int64_t task_pixels;
  double eps;
  bool of_batch; // statistics depend on the input
  at::Tensor statistics; // (2, channels) or (2, batch * groups)
  float *weight, *bias; // (channels)
  float *mean, *rstd, *scale, *shift; // (sets, channels)
  float *constant, *slope; // m1 rstd and m2 rstd^2 of the formula, (sets, channels)
  std::vector<double> sum_g, sum_gx; // (sets, channels)

  TrainedNorm(
      int64_t channels,
      int64_t batch,
      int64_t pixels,
      int64_t groups,
      double eps,
      const OptionalTensor& weight,
      const OptionalTensor& bias);
  TrainedNorm(const TrainedNorm&) = delete;

  int64_t sets() const {
    return groups > 0 ? batch : 1;
  }
  int64_t rows() const {
    return pixels * batch;
  }
  int64_t task_rows() const {
    return task_pixels * batch;
  }
  int64_t num_tasks() const {
    return ceil_div(rows(), task_rows());
  }
  // Where the statistics of a channel of a set stand in a row of `statistics`.
  int64_t entry(int64_t set, int64_t channel) const {
    return groups > 0 ? set * groups + channel / (channels / groups) : channel;
  }

  // The same tasks for both, so that one may follow the other in a task.
  void align(TrainedNorm& other) {
    task_pixels = other.task_pixels = std::min(task_pixels, other.task_pixels);
  }
  // What tasks find out, `values` numbers for every channel of every set: (tasks, values, sets, channels).
  std::vector<float> partial(int64_t values) const {
    return std::vector<float>(num_tasks() * values * sets() * channels);
  }
  float* of_task(std::vector<float>& partial, int64_t task) const {
    return partial.data() + task * (static_cast<int64_t>(partial.size()) / num_tasks());
  }

  // Statistics of x: `measure_rows` in every task, with partial(3), then `take_moments`. Or given ones.
  template <class T>
  void measure_rows(const T* x, int64_t begin, int64_t end, float* moments) const;
  void take_moments(const std::vector<float>& partial);
  void use(const at::Tensor& given);
  // Sums over a gradient were taken, with partial(2): constant and slope follow.
  void take_sums(const std::vector<float>& partial);
  // The gradients of weight and bias.
  at::Tensor grad_weight(bool wanted) const;
  at::Tensor grad_bias(bool wanted) const;

  // body(task, first row, end row). The norm must outlive them.
  template <class Body>
  Tasks tasks(const Body& body) const {
    return {num_tasks(), [=, this](int64_t task) {
      body(task, task * task_rows(), std::min((task + 1) * task_rows(), rows()));
    }};
  }
  // Calls body(row, pixel, image) for the rows of a set among [begin, end), whole pixels.
  template <class Body>
  TINYTL_INLINE void for_rows(int64_t set, int64_t begin, int64_t end, const Body& body) const {
    const int64_t first = groups > 0 ? set : 0, last = groups > 0 ? set + 1 : batch;
    for (int64_t pixel = begin / batch; pixel < end / batch; ++pixel) {
      for (int64_t image = first; image < last; ++image) {
        body(pixel * batch + image, pixel, image);
      }
    }
  }
  // Calls body(set, channel, lanes) for every vector of channels of every set.
  template <class Body>
  TINYTL_INLINE void for_vectors(const Body& body) const {
    for (int64_t set = 0; set < sets(); ++set) {
      for (int64_t c = 0; c < channels; c += kLanes) {
        body(set, c, std::min<int64_t>(channels - c, kLanes));
      }
    }
  }
  TINYTL_INLINE Vec coefficient(const float* of, int64_t set, int64_t channel, int64_t lanes) const {
    return load_channels(of + set * channels + channel, lanes);
  }

 private:
  std::vector<float> coefficients_;
};

} // namespace tinytl::cpu
