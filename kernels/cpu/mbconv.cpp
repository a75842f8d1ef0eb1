// See mbconv.h and mbconv_tasks.h: what does not depend on a storage type.
#include "mbconv_tasks.h"

#include <algorithm>
#include <utility>

namespace tinytl::cpu {

MbconvLayers::MbconvLayers(const c10::List<OptionalTensor>& tensors) {
  TORCH_CHECK(
      tensors.size() == 3 * kBlockLayers, "tensors: expected weight, bias and scale of ", int(kBlockLayers),
      " layers, got ", tensors.size());
  for (int layer = 0; layer < kBlockLayers; ++layer) {
    weights[layer] = tensors.get(3 * layer);
    biases[layer] = tensors.get(3 * layer + 1);
    scales[layer] = tensors.get(3 * layer + 2);
  }
  TORCH_CHECK(weights[kDepthwise].has_value() && weights[kProject].has_value(), "tensors: expected both weights, got None");
  TORCH_CHECK(
      weights[kReduce].has_value() == weights[kRestore].has_value(),
      "reduce_weight, restore_weight: expected both or none of them");
}

MbconvOptions::MbconvOptions(
    int64_t stride,
    at::IntArrayRef padding,
    std::string activation,
    std::string squeeze_activation,
    std::string gate,
    bool residual)
    : stride(stride),
      activation(std::move(activation)),
      squeeze_activation(std::move(squeeze_activation)),
      gate(std::move(gate)),
      residual(residual) {
  TORCH_CHECK(padding.size() == 4, "padding: expected (top, bottom, left, right), got ", padding);
  std::copy(padding.begin(), padding.end(), this->padding.begin());
}

BlockShape mbconv_shape(at::IntArrayRef input_size, const MbconvLayers& layers, const MbconvOptions& options) {
  return block_shape(
      input_size,
      layers.weights[kExpand],
      *layers.weights[kDepthwise],
      *layers.weights[kProject],
      options.stride,
      options.padding,
      "none",
      options.residual);
}

BlockWeights block_weights(const MbconvLayers& layers) {
  return {
      layers.weights[kExpand],
      layers.scales[kExpand],
      *layers.weights[kDepthwise],
      layers.scales[kDepthwise],
      *layers.weights[kProject],
      layers.scales[kProject]};
}

std::optional<SqueezeExcite> squeeze_excite(
    const BlockShape& s, const MbconvLayers& layers, const MbconvOptions& options, at::ScalarType dtype) {
  if (!layers.weights[kReduce].has_value()) {
    return std::nullopt;
  }
  return SqueezeExcite(
      s.expanded,
      *layers.weights[kReduce],
      layers.scales[kReduce],
      layers.biases[kReduce],
      *layers.weights[kRestore],
      layers.scales[kRestore],
      layers.biases[kRestore],
      options.squeeze_activation,
      options.gate,
      dtype);
}

std::array<at::Tensor, kBlockLayers> padded_biases(const BlockShape& s, const MbconvLayers& layers) {
  std::array<at::Tensor, kBlockLayers> padded;
  padded[kExpand] = padded_bias(layers.biases[kExpand], s.expanded, "expand_bias");
  padded[kDepthwise] = padded_bias(layers.biases[kDepthwise], s.expanded, "depthwise_bias");
  padded[kProject] = padded_bias(layers.biases[kProject], s.out_channels, "project_bias");
  return padded;
}

Schedule::Schedule(int64_t images, const Bands& bands) {
  const int64_t threads = at::get_num_threads();
  by_image = images >= 2 * threads || bands.per_image == 1;
  buffers = by_image ? std::min(images, threads) : images;
}

void run_phases(int64_t images, const Schedule& schedule, const std::vector<Phase>& phases) {
  if (schedule.by_image) {
    parallel_tasks(images, [&](int64_t image) {
      for (const Phase& phase : phases) {
        phase.run(image, -1);
      }
    });
    return;
  }
  for (const Phase& phase : phases) {
    const int64_t per_image = phase.bands != nullptr ? phase.bands->per_image : 1;
    parallel_tasks(images * per_image, [&](int64_t t) { phase.run(t / per_image, t % per_image); });
  }
}

Rows rows_of(const Bands& bands, int64_t band) {
  return band < 0 ? Rows{0, bands.rows} : Rows{bands.begin(band), bands.begin(band + 1)};
}

Rows owned_input(const BlockShape& s, const Bands& bands, int64_t band) {
  return band < 0 ? Rows{0, s.height}
                  : Rows{first_owned_input(s, bands, band), first_owned_input(s, bands, band + 1)};
}

void mean_of(const float* sums, int64_t bands, int64_t stride, int64_t channels, double pixels, float* mean) {
  for (int64_t c = 0; c < channels; ++c) {
    double sum = 0;
    for (int64_t b = 0; b < bands; ++b) {
      sum += sums[b * stride + c];
    }
    mean[c] = static_cast<float>(sum / pixels);
  }
}

at::Tensor mbconv_output(const at::Tensor& x, const MbconvLayers& layers, const MbconvOptions& options) {
  const BlockShape s = mbconv_shape(x.sizes(), layers, options);
  return empty_tensor(
      {s.batch, s.out_channels, s.out_height, s.out_width}, x.options(), at::MemoryFormat::ChannelsLast);
}

} // namespace tinytl::cpu
