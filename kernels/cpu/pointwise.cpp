// Frozen 1x1 convolution with bias and activation (conv_activation.h), and its backward:
//
//     y  = act(x W^T + b + addend)      x (N, H, W, C_in), W (C_out, C_in), any stride, no padding
//     g  = act'(..) dy,  db = sum g,  dx = g W
//
// A task takes runs of pixels small enough to stay in cache. Forward reads x and writes y and the mask once. Backward
// reads dy once: a run's g goes into scratch, where it is summed and is the GEMM's operand; no full g exists.
//
// A weight in 8 bits is unpacked a few panels at a time, into at most kUnpackedBytes (or one panel), and the tensors are
// walked once for each: only a weight larger than that, which belongs to small images, is walked more than once.
#include "operators.h"

#include "conv_activation.h"
#include "epilogues.h"
#include "packing.h"
#include "parallel.h"
#include "sparse_gemm.h"

namespace tinytl::cpu {
namespace {

// A run is this many bytes of operand at most.
constexpr int64_t kRunBytes = 128 * 1024;

// Floating point values that a weight in 8 bits is unpacked into at a time.
constexpr int64_t kUnpackedBytes = 1024 * 1024;

// Of the operand's channels, see cut_segments.
constexpr int64_t kSegmentDepth = 48;

struct PointwiseShape {
  int64_t batch, in_channels, height, width;
  int64_t out_channels, out_height, out_width;
  int64_t stride_height, stride_width;

  PointwiseShape(at::IntArrayRef input, const at::Tensor& weight, at::IntArrayRef stride) {
    TORCH_CHECK(input.size() == 4, "input: expected 4 dimensions (N, C, H, W), got ", input);
    TORCH_CHECK(
        stride.size() == 2 && stride[0] >= 1 && stride[1] >= 1, "stride: expected two numbers >= 1, got ", stride);
    TORCH_CHECK(
        weight.dim() == 4 && weight.size(1) == input[1] && weight.size(2) == 1 && weight.size(3) == 1,
        "weight: expected (C_out, ",
        input[1],
        ", 1, 1), got ",
        weight.sizes());
    batch = input[0];
    in_channels = input[1];
    height = input[2];
    width = input[3];
    out_channels = weight.size(0);
    stride_height = stride[0];
    stride_width = stride[1];
    TORCH_CHECK(
        in_channels > 0 && out_channels > 0 && height > 0 && width > 0,
        "input: expected at least one channel, row and column, got ",
        input);
    out_height = (height - 1) / stride_height + 1;
    out_width = (width - 1) / stride_width + 1;
  }

  bool strided() const {
    return stride_height > 1 || stride_width > 1;
  }
  int64_t pixels() const {
    return batch * out_height * out_width;
  }
  // Where the image holds output pixel p.
  int64_t input_pixel(int64_t p) const {
    if (!strided()) {
      return p;
    }
    const int64_t column = p % out_width;
    const int64_t row = p / out_width % out_height;
    const int64_t image = p / out_width / out_height;
    return (image * height + row * stride_height) * width + column * stride_width;
  }
  // Runs of output pixels whose input pixels are evenly spaced: rows when strided, else as long as the cache allows,
  // and no longer than gives every thread one.
  int64_t run_pixels(int64_t depth, int64_t element_bytes) const {
    if (strided()) {
      return out_width;
    }
    const int64_t fits = std::max<int64_t>(kRunBytes / (depth * element_bytes) / kTileRows, 1) * kTileRows;
    return std::max<int64_t>(std::min(fits, ceil_div(pixels(), at::get_num_threads())), 1);
  }
};

// Cuts a GEMM operand along its depth: no chain of additions is longer than kChainDepth, and zeros are counted in as many
// pieces as their bits are words.
template <class Element>
std::vector<Segment<Element>> cut_segments(const Segment<Element>& operand) {
  static_assert(kChainDepth % kSegmentDepth == 0 && kSegmentDepth <= 64);
  std::vector<Segment<Element>> segments;
  for (int64_t k = 0; k < operand.depth; k += kSegmentDepth) {
    segments.push_back({operand.data + k, operand.stride, std::min(kSegmentDepth, operand.depth - k)});
  }
  return segments;
}

// Panels of a packed weight of that depth, as wide as sparse rows want them; of one in 8 bits no wider than is unpacked.
template <class Element>
Panels weight_panels(const FrozenWeight& weight, int64_t channels, int64_t depth) {
  const int64_t group_bytes = depth * kGroup * static_cast<int64_t>(sizeof(Element));
  const int64_t most = weight.quantized() ? kUnpackedBytes / group_bytes : kWideGroups;
  return Panels(channels, std::clamp<int64_t>(most, 1, kWideGroups));
}

// Calls body(first panel, end panel, packed weights from the first panel on) until all panels are done: all at once for a
// floating point weight, about kUnpackedBytes at a time for one in 8 bits.
template <class Dot, class Pack, class Body>
void for_unpacked(const FrozenWeight& weight, const Panels& panels, int64_t depth, const Pack& pack, const Body& body) {
  using Element = typename Dot::Element;
  const int64_t panel_bytes = depth * panels.width(0) * static_cast<int64_t>(sizeof(Element));
  const int64_t step = weight.quantized() ? std::max<int64_t>(kUnpackedBytes / panel_bytes, 1) : panels.count;
  const int64_t elements = std::min(step * panels.width(0), panels.padded()) * depth;
  const at::Tensor packed =
      empty_tensor({elements}, weight.values.options().dtype(c10::CppTypeToScalarType<Element>::value));
  for (int64_t first = 0; first < panels.count; first += step) {
    const int64_t last = std::min(first + step, panels.count);
    pack(first, last, packed.data_ptr<Element>());
    body(first, last, packed.data_ptr<Element>());
  }
}

// Calls body(task, first pixel, end pixel) for every run; a task owns neighbouring runs.
template <class Body>
void for_runs(int64_t pixels, int64_t run, const Body& body) {
  const int64_t runs = ceil_div(pixels, run), tasks = piece_count(runs);
  parallel_tasks(tasks, [&](int64_t t) {
    for (int64_t r = runs * t / tasks; r < runs * (t + 1) / tasks; ++r) {
      body(t, r * run, std::min((r + 1) * run, pixels));
    }
  });
}

} // namespace

std::tuple<at::Tensor, at::Tensor> pointwise_forward(
    const at::Tensor& x,
    const at::Tensor& weight,
    const OptionalTensor& weight_scale,
    const OptionalTensor& bias,
    const OptionalTensor& addend,
    at::IntArrayRef stride,
    const std::string& activation,
    bool needs_saved) {
  const PointwiseShape s(x.sizes(), weight, stride);
  const FrozenWeight frozen(weight, weight_scale, "weight");
  const at::Tensor input = in_channels_last(x);
  const std::array<int64_t, 4> size{s.batch, s.out_channels, s.out_height, s.out_width};
  const ConvOutput output(activation, size, x.options(), needs_saved);
  uint8_t* bits = output.tile_bits();
  const at::Tensor padded = padded_bias(bias, s.out_channels, "bias");
  const float* init = padded.defined() ? padded.data_ptr<float>() : nullptr;
  const at::Tensor added = checked_addend(addend, size, x.scalar_type());
  const int64_t mask_stride = mask_bytes(s.out_channels);

  with_storage_type(x.scalar_type(), "input", [&](auto zero) {
    using T = decltype(zero);
    using Dot = typename DotFor<T>::type;
    using Element = typename Dot::Element;
    const int64_t depth = packed_depth<Dot>(s.in_channels);
    const Panels panels = weight_panels<Element>(frozen, s.out_channels, depth);
    const T* source = input.data_ptr<T>();
    T* target = output.values<T>();
    uint8_t spoiled = 0;
    const auto pack = [&](int64_t first, int64_t last, Element* packed) {
      parallel_tasks({pack_forward<Dot, T>(frozen, depth, panels, first, last, packed, &spoiled)});
    };
    for_unpacked<Dot>(frozen, panels, depth, pack, [&](int64_t first, int64_t last, const Element* b) {
      for_runs(s.pixels(), s.run_pixels(depth, sizeof(Element)), [&](int64_t, int64_t begin, int64_t end) {
        const int64_t step = s.stride_width * s.in_channels; // operand pixels are `step` elements apart
        const auto operand =
            operand_rows<Dot>(source + s.input_pixel(begin) * s.in_channels, end - begin, s.in_channels, step);
        const auto segments = cut_segments(operand);
        gemm_of_rows<Dot>(
            end - begin,
            segments.data(),
            static_cast<int64_t>(segments.size()),
            {b, depth, spoiled == 0, panels, first, last},
            init,
            {},
            [&](int64_t channel) {
              ActivateToTensor<T> epilogue{
                  target + begin * s.out_channels + channel,
                  s.out_channels,
                  s.out_channels - channel,
                  output.tile_activation(),
                  {}};
              if (added.defined()) {
                epilogue.addend = added.data_ptr<T>() + begin * s.out_channels + channel;
              }
              if (bits != nullptr) {
                epilogue.mask = {bits + begin * mask_stride + channel / 8, mask_stride, s.out_channels - channel};
              }
              return epilogue;
            });
        if (last == panels.count) {
          output.finish<T>(begin, end - begin);
        }
      });
    });
  });
  return output.result();
}

std::tuple<at::Tensor, at::Tensor> pointwise_backward(
    const at::Tensor& grad_output,
    const at::Tensor& saved,
    const at::Tensor& weight,
    const OptionalTensor& weight_scale,
    at::IntArrayRef input_size,
    at::IntArrayRef stride,
    const std::string& activation,
    bool need_input,
    bool need_bias) {
  const PointwiseShape s(input_size, weight, stride);
  const FrozenWeight frozen(weight, weight_scale, "weight");
  const ConvGradient gradient(activation, grad_output, saved, {s.batch, s.out_channels, s.out_height, s.out_width});
  if (!need_input) {
    return {empty_tensor({0}, gradient.options()), gradient.sum(need_bias)};
  }
  const uint8_t* bits = gradient.loop_bits();
  at::Tensor grad_input = empty_tensor(input_size, gradient.options(), at::MemoryFormat::ChannelsLast);
  if (s.strided()) {
    grad_input.zero_(); // input pixels that no output pixel reads
  }
  const int64_t mask_stride = mask_bytes(s.out_channels);
  const int64_t padded = padded_channels(s.out_channels);
  at::Tensor partial = zero_tensor({piece_count(s.pixels()), padded}, gradient.options().dtype(at::kFloat));
  float* partials = partial.data_ptr<float>();

  with_storage_type(gradient.dtype(), "grad_output", [&](auto zero) {
    using T = decltype(zero);
    using Dot = typename DotFor<T>::type;
    using Element = typename Dot::Element;
    const int64_t depth = packed_depth<Dot>(s.out_channels), run = s.run_pixels(padded, sizeof(Element));
    const Panels panels = weight_panels<Element>(frozen, s.in_channels, depth);
    T* target = grad_input.data_ptr<T>();
    uint8_t spoiled = 0;
    const auto multiply = [&](int64_t first, int64_t last, const Element* b) {
      const bool summing = need_bias && first == 0;
      for_runs(s.pixels(), run, [&](int64_t task, int64_t begin, int64_t end) {
        const T* source = gradient.pixels<T>(begin, end - begin);
        // g of this run, channels padded to whole groups with zeros, and its sums.
        Element* operand = scratch<Element>(kRows, (end - begin) * padded);
        float* sums = scratch<float>(kSums, padded);
        std::memset(sums, 0, sizeof(float) * padded);
        for (int64_t pixel = begin; pixel < end; ++pixel) {
          for (int64_t c = 0; c < s.out_channels; c += kGroup) {
            Vec group[kGroupVecs];
            for (int v = 0; v < kGroupVecs; ++v) {
              const int64_t at = c + v * kLanes;
              const int64_t count = std::clamp<int64_t>(s.out_channels - at, 0, kLanes);
              group[v] = count > 0 ? load_channels(source + (pixel - begin) * s.out_channels + at, count) : Vec(0.f);
            }
            if (bits != nullptr) {
              select_group(group, bits + pixel * mask_stride + c / 8, s.out_channels - c);
            }
            for (int v = 0; v < kGroupVecs; ++v) {
              const int64_t at = c + v * kLanes;
              store_channels(operand + (pixel - begin) * padded + at, group[v]);
              if (summing) {
                (Vec::loadu(sums + at) + group[v]).store(sums + at);
              }
            }
          }
          if (summing && ((pixel - begin + 1) % kChainDepth == 0 || pixel + 1 == end)) {
            flush_sums(sums, partials + task * padded, padded);
          }
        }
        const auto segments = cut_segments(Segment<Element>{operand, padded, depth});
        MaskRows<const uint8_t> mask;
        if (bits != nullptr) {
          mask = {bits + begin * mask_stride, mask_stride, s.out_channels};
        }
        gemm_of_rows<Dot>(
            end - begin,
            segments.data(),
            static_cast<int64_t>(segments.size()),
            {b, depth, spoiled == 0, panels, first, last},
            nullptr,
            mask,
            [&](int64_t channel) {
              return AddToTensor<T>{
                  target + s.input_pixel(begin) * s.in_channels + channel,
                  s.stride_width * s.in_channels,
                  s.in_channels - channel};
            });
      });
    };
    if constexpr (std::is_same_v<Dot, FloatDot>) {
      if (const float* stored = packed_as_stored<T>(frozen); stored != nullptr) {
        parallel_tasks({look_for_spoiled(frozen, &spoiled)});
        return multiply(0, panels.count, stored);
      }
    }
    const auto pack = [&](int64_t first, int64_t last, Element* packed) {
      parallel_tasks({pack_backward<Dot, T>(frozen, depth, panels, first, last, packed, &spoiled)});
    };
    for_unpacked<Dot>(frozen, panels, depth, pack, multiply);
  });
  return {grad_input, reduce_partial(partial, 0, s.out_channels, need_bias)};
}

} // namespace tinytl::cpu
