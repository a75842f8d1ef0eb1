// Backward of the inverted residual block (formula in inverted_residual.h), frozen weights:
//
//     g2 = mask2 ? dy Wp^T : 0                    dbp = sum dy,  dbd = sum g2
//     g1 = mask1 ? depthwise^T(g2, Wd) : 0        dbe = sum g1
//     dx = g1 We^T [+ dy] [+ dpooled / 4]
//
// Reads dy, the two masks and the weights; writes dx. Only what is asked for is computed. A task walks down the rows
// of dx; the ring holds rows of g2, the row buffer rows of g1. Bias gradients are summed over a tile, then a step, then
// a task, and over tasks in double precision and in order, so that they are exact to rounding and the same every run.
#include "inverted_residual_rows.h"

#include "depthwise.h"
#include "epilogues.h"
#include "masked_gemm.h"
#include "parallel.h"

#include <algorithm>
#include <utility>

namespace tinytl::cpu {

template <class T>
Walk BlockBackward<T>::walk(int64_t task_rows) const {
  Walk walk;
  // Input column w meets output columns (w + pad_left - j) / stride, for 0 <= j < kernel_width.
  walk.ring_left = std::max<int64_t>(floor_div(s.kernel_width - 1 - s.pad_left, s.stride), 0);
  walk.ring_pitch = walk.ring_left + std::max(s.out_width, floor_div(s.width - 1 + s.pad_left, s.stride) + 1);
  const int64_t row_bytes = s.width * panels.padded() * int64_t(sizeof(Element));
  walk.fit(panels, task_rows, row_bytes, [&](int64_t rows) { return (rows + s.kernel_height - 2) / s.stride + 1; });
  return walk;
}

template <class T>
void BlockBackward<T>::project_rows(
    int64_t image,
    int64_t panel,
    int64_t begin,
    int64_t end,
    int64_t sum_end,
    float* ring,
    int64_t plane,
    const int64_t* offsets,
    const Segment<Element>& operand,
    float* sums) const {
  const int64_t start = panels.start(panel);
  const int64_t stride = mask_bytes(s.expanded);
  const auto run = [&](int64_t from, int64_t to, float* to_sums) {
    const int64_t skipped = (from - begin) * s.out_width;
    SelectToRing epilogue{ring, plane, offsets + skipped, {}, to_sums};
    if (mask_depthwise != nullptr) {
      epilogue.mask = {
          mask_depthwise + (image * s.out_height + from) * s.out_width * stride + start / 8,
          stride,
          s.expanded - start};
    }
    const Segment<Element> rows{operand.data + skipped * operand.stride, operand.stride, operand.depth};
    const int64_t pixels = (to - from) * s.out_width;
    if constexpr (std::is_same_v<Dot, FloatDot>) {
      if (dots) {
        const Panels out_panels(s.out_channels, kWideGroups);
        return gemm_to_selected(panels.groups(panel), pixels, rows, out_panels, project, start, panels.padded(), epilogue);
      }
    }
    const Element* weight = project + start * packed_depth<Dot>(s.out_channels);
    gemm_panel<Dot>(panels.groups(panel), pixels, &rows, 1, weight, nullptr, epilogue);
  };
  const int64_t split = need_depthwise_bias ? std::clamp(sum_end, begin, end) : begin;
  run(begin, split, sums + start);
  run(split, end, nullptr);
}

template <class T>
void BlockBackward<T>::transposed_depthwise_rows(
    int64_t image,
    int64_t panel,
    int64_t begin,
    int64_t end,
    const float* ring,
    Element* rows,
    const Walk& walk,
    TapRun* runs,
    float* sums) const {
  const int64_t start = panels.start(panel);
  const int64_t width = panels.width(panel);
  const int64_t stride = mask_bytes(s.expanded);
  const float* weight = depthwise + start * s.taps();
  for (int64_t row = begin; row < end; ++row) {
    for (int64_t phase = 0; phase < static_cast<int64_t>(columns.size()); ++phase) {
      const RowRuns row_runs{
          runs,
          transposed_runs(s.window(), columns[phase], walk.view(ring), s.out_height, row, weight, runs),
          columns[phase].kernel_step,
          walk.plane(),
          s.taps()};
      SelectToRows<Element> epilogue{
          rows + ((row - begin) * s.width + phase) * width, width, s.stride, {}, sums != nullptr ? sums + start : nullptr};
      if (mask_expand != nullptr) {
        epilogue.mask = {
            mask_expand + ((image * s.height + row) * s.width + phase) * stride + start / 8,
            stride,
            s.expanded - start};
      }
      correlate_row(ceil_div(s.width - phase, s.stride), panels.groups(panel), row_runs, 1, nullptr, epilogue);
    }
  }
}

template <class T>
const int64_t* BlockBackward<T>::pooled_offsets(int64_t image, int64_t begin, int64_t end) const {
  int64_t* offsets = scratch<int64_t>(kOffsets, (end - begin) * s.width);
  const int64_t pooled_height = s.height / 2;
  const int64_t pooled_width = s.width / 2;
  int64_t* next = offsets;
  for (int64_t row = begin; row < end; ++row) {
    for (int64_t column = 0; column < s.width; ++column) {
      const bool inside = row / 2 < pooled_height && column / 2 < pooled_width;
      *next++ = inside
          ? ((image * pooled_height + row / 2) * pooled_width + column / 2) * s.in_channels
          : -1;
    }
  }
  return offsets;
}

template <class T>
void BlockBackward<T>::expand_rows(
    int64_t image,
    int64_t begin,
    int64_t end,
    const Element* rows,
    int64_t row_pixels,
    Segment<Element>* segments) const {
  const int64_t pixels = (end - begin) * s.width;
  const int64_t first = begin * s.width * s.in_channels;
  const int64_t* offsets = grad_pooled != nullptr ? pooled_offsets(image, begin, end) : nullptr;
  const auto epilogue_at = [&](int64_t channel) {
    AddToTensor<T> epilogue{
        grad_input.at(image) + first + channel, s.in_channels, s.in_channels - channel};
    if (s.residual) {
      epilogue.addend = grad_output.at(image) + first + channel;
    }
    if (grad_pooled != nullptr) {
      epilogue.pooled = grad_pooled + channel;
      epilogue.pooled_offsets = offsets;
    }
    return epilogue;
  };
  if (!s.has_expand) {
    for (int64_t p = 0; p < panels.count; ++p) {
      const Element* source = rows + panels.start(p) * row_pixels;
      for (int64_t c = 0; c < panels.width(p); c += kLanes) {
        const auto epilogue = epilogue_at(panels.start(p) + c);
        const int64_t count = std::min<int64_t>(epilogue.valid, kLanes);
        for (int64_t m = 0; count > 0 && m < pixels; ++m) {
          epilogue.write(m, 0, load_channels(source + m * panels.width(p) + c), count);
        }
      }
    }
    return;
  }
  for (int64_t p = 0; p < panels.count; ++p) {
    // Not the padding of the last panel: where it holds 0 times infinity, adding 0 times that would spoil the sum.
    const int64_t depth = std::min(panels.width(p), packed_depth<Dot>(s.expanded - panels.start(p)));
    segments[p] = {rows + panels.start(p) * row_pixels, panels.width(p), depth};
  }
  MaskRows<const uint8_t> mask;
  if (mask_expand != nullptr) {
    const int64_t stride = mask_bytes(s.expanded);
    mask = {mask_expand + (image * s.height + begin) * s.width * stride, stride, s.expanded};
  }
  gemm_of_rows<Dot>(
      pixels,
      segments,
      panels.count,
      {expand, panels.padded(), *spoiled == 0, in_panels, 0, in_panels.count},
      nullptr,
      mask,
      epilogue_at);
}

template <class T>
void BlockBackward<T>::sum_output_rows(int64_t image, int64_t begin, int64_t end, float* sums) const {
  const T* source = grad_output.at(image) + begin * s.out_width * s.out_channels;
  for (int64_t row = begin; row < end; ++row) {
    for (int64_t c = 0; c < s.out_channels; c += kLanes) {
      const int64_t count = std::min<int64_t>(s.out_channels - c, kLanes);
      Vec total(0.f);
      for (int64_t column = 0; column < s.out_width; ++column) {
        total = total + load_channels(source + column * s.out_channels + c, count);
      }
      (Vec::loadu(sums + c) + total).store(sums + c);
    }
    source += s.out_width * s.out_channels;
  }
}

template <class T>
void BlockBackward<T>::task(int64_t image, int64_t begin, int64_t end, int64_t own_begin, int64_t own_end, float* partial) const {
  const int64_t expanded = panels.padded();
  if (need_project_bias) {
    sum_output_rows(image, own_begin, own_end, partial + 2 * expanded);
  }
  if (!needs_g2()) {
    return;
  }
  const Walk walk = this->walk(end - begin);
  const int64_t row_pixels = walk.step_rows * s.width;
  const auto [ring_data, rows] = rings_and_rows<Element>(PanelRings::elements(panels, walk), row_pixels * expanded);
  float* sums = scratch<float>(kSums, 2 * expanded);
  std::memset(sums, 0, sizeof(float) * 2 * expanded);
  float* expand_sums = need_expand_bias && s.has_expand ? sums + expanded : nullptr;
  std::vector<TapRun> runs(s.taps());
  std::vector<Segment<Element>> segments(panels.count);
  const PanelRings rings(ring_data, panels, walk, s.out_width);

  // Brings g2 up to output row `to`, and input rows [row, row_end) of g1 with it.
  const auto advance = [&](int64_t from, int64_t to, int64_t row, int64_t row_end) {
    const int64_t* offsets = ring_offsets(from, to, s.out_width, walk);
    const auto operand = operand_rows<Dot>(
        grad_output.at(image) + from * s.out_width * s.out_channels,
        (to - from) * s.out_width,
        s.out_channels,
        s.out_channels);
    for (int64_t p = 0; p < panels.count; ++p) {
      float* ring = rings.next(p, row < row_end);
      project_rows(image, p, from, to, own_end, ring, walk.plane(), offsets, operand, sums);
      if (needs_g1()) {
        transposed_depthwise_rows(
            image, p, row, row_end, ring, rows + panels.start(p) * row_pixels, walk, runs.data(), expand_sums);
      }
    }
  };
  const auto finish = [&, rows = rows](int64_t row, int64_t row_end) {
    if (grad_input.data != nullptr) {
      expand_rows(image, row, row_end, rows, row_pixels, segments.data());
    }
    flush_sums(sums, partial, 2 * expanded);
  };
  // Rows that meet no input row of this task still count in the bias gradient.
  walk_down(*this, walk, s.out_height, begin, end, own_begin, own_end, advance, finish);
  flush_sums(sums, partial, 2 * expanded);
}

template <class T>
void BlockBackward<T>::run(const at::Tensor& partial) const {
  const Bands bands = input_bands(s);
  for_bands(bands, [&](int64_t t, int64_t image, int64_t band) {
    task(
        image,
        bands.begin(band),
        bands.begin(band + 1),
        first_owned_output(s, bands, band),
        first_owned_output(s, bands, band + 1),
        partial.data_ptr<float>() + t * partial.size(1));
  });
}

template struct BlockBackward<float>;
template struct BlockBackward<c10::BFloat16>;
template struct BlockBackward<c10::Half>;

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> inverted_residual_backward(
    const at::Tensor& grad_output,
    const at::Tensor& mask_expand,
    const at::Tensor& mask_depthwise,
    const OptionalTensor& expand_weight,
    const OptionalTensor& expand_scale,
    const at::Tensor& depthwise_weight,
    const OptionalTensor& depthwise_scale,
    const at::Tensor& project_weight,
    const OptionalTensor& project_scale,
    at::IntArrayRef input_size,
    int64_t stride,
    at::IntArrayRef padding,
    const std::string& activation,
    bool residual,
    bool need_input,
    bool need_expand_bias,
    bool need_depthwise_bias,
    bool need_project_bias,
    const OptionalTensor& grad_pooled) {
  const BlockShape s = block_shape(
      input_size, expand_weight, depthwise_weight, project_weight, stride, padding, activation, residual);
  const BlockWeights stored(
      expand_weight, expand_scale, depthwise_weight, depthwise_scale, project_weight, project_scale);
  const BlockMasks masks(mask_expand, mask_depthwise);
  const auto nhwc = at::MemoryFormat::ChannelsLast;
  check_size(
      grad_output, "grad_output", {s.batch, s.out_channels, s.out_height, s.out_width}, grad_output.scalar_type());
  const at::Tensor grad = in_channels_last(grad_output);
  at::Tensor pooled;
  if (need_input && grad_pooled.has_value() && grad_pooled->defined()) {
    check_size(
        *grad_pooled, "grad_pooled", {s.batch, s.in_channels, s.height / 2, s.width / 2}, grad.scalar_type());
    pooled = in_channels_last(*grad_pooled);
  }
  at::Tensor grad_input =
      need_input ? empty_tensor(input_size, grad.options(), nhwc) : empty_tensor({0}, grad.options());
  BiasGradients biases;

  with_storage_type(grad.scalar_type(), "grad_output", [&](auto zero) {
    using T = decltype(zero);
    const uint8_t* mask = masks.checked_depthwise(s);
    const PackedWeights packed = pack_block_backward(s, stored, grad.scalar_type(), need_input, mask);
    parallel_tasks(packed.packing);
    BlockBackward<T> backward = block_backward<T>(
        s,
        grad.data_ptr<T>(),
        packed,
        need_input ? grad_input.data_ptr<T>() : nullptr,
        {need_expand_bias, need_depthwise_bias, need_project_bias});
    backward.mask_expand = masks.checked_expand(s);
    backward.mask_depthwise = mask;
    backward.grad_pooled = data_or_null<T>(pooled);
    const at::Tensor partial = backward.partial();
    backward.run(partial);
    biases = backward.bias_gradients(partial);
  });
  return {grad_input, biases[0], biases[1], biases[2]};
}

} // namespace tinytl::cpu
