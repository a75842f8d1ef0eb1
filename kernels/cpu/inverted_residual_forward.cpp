// Forward of the inverted residual block (formula in inverted_residual.h).
//
// Reads x once, the weights once a step, writes y and, when asked for, one bit an expanded value twice and the 2x2
// average of x. Scratch a thread: the ring of expanded rows and the rows of h2 of one step. The expansion may be a stem
// (stem.h): x is its image then.
#include "inverted_residual_rows.h"

#include "depthwise.h"
#include "epilogues.h"
#include "parallel.h"
#include "stem.h"

#include <algorithm>

namespace tinytl::cpu {
namespace {

// out[r, c] = average of the four pixels of image at (2 r, 2 c), for pooled rows [begin, end).
template <class T>
void pool_rows(const T* image, T* out, int64_t begin, int64_t end, const BlockShape& s) {
  const int64_t columns = s.width / 2;
  const int64_t channels = s.in_channels;
  const int64_t below = s.width * channels;
  for (int64_t r = begin; r < end; ++r) {
    for (int64_t q = 0; q < columns; ++q) {
      const T* source = image + (2 * r * s.width + 2 * q) * channels;
      T* target = out + (r * columns + q) * channels;
      for (int64_t c = 0; c < channels; c += kLanes) {
        const int64_t count = std::min<int64_t>(channels - c, kLanes);
        const Vec top = load_channels(source + c, count) + load_channels(source + channels + c, count);
        const Vec bottom = load_channels(source + below + c, count) + load_channels(source + below + channels + c, count);
        store_channels(target + c, (top + bottom) * Vec(0.25f), count);
      }
    }
  }
}

} // namespace

template <class T>
Walk BlockForward<T>::walk(int64_t task_rows) const {
  Walk walk;
  walk.ring_left = s.pad_left;
  walk.ring_pitch = std::max(s.pad_left + s.width, (s.out_width - 1) * s.stride + s.kernel_width);
  const int64_t row_bytes = s.out_width * panels.padded() * int64_t(sizeof(Element));
  walk.fit(panels, task_rows, row_bytes, [&](int64_t rows) { return (rows - 1) * s.stride + s.kernel_height; });
  return walk;
}

template <class T>
void BlockForward<T>::expand_rows(
    int64_t image,
    int64_t panel,
    int64_t begin,
    int64_t end,
    int64_t mask_end,
    float* ring,
    int64_t plane,
    const int64_t* offsets,
    const Segment<Element>& operand,
    Segment<Element>* segments) const {
  const int64_t start = panels.start(panel);
  if (!s.has_expand) {
    const T* source = x.at(image) + begin * s.width * s.in_channels + start;
    const int64_t width = panels.width(panel);
    const int64_t whole = std::min(s.in_channels - start, width) / kLanes * kLanes;
    for (int64_t m = 0; m < (end - begin) * s.width; ++m, source += s.in_channels) {
      float* target = ring + offsets[m] * kGroup;
      for (int64_t c = 0; c < whole; c += kLanes) {
        load_channels(source + c).store(target + c / kGroup * plane + c % kGroup);
      }
      for (int64_t c = whole; c < width; c += kLanes) {
        const int64_t count = std::clamp<int64_t>(s.in_channels - start - c, 0, kLanes);
        const Vec value = count > 0 ? load_channels(source + c, count) : Vec(0.f);
        value.store(target + c / kGroup * plane + c % kGroup);
      }
    }
    return;
  }
  const int64_t stride = mask_bytes(s.expanded);
  const float* bias = expand_bias != nullptr ? expand_bias + start : nullptr;
  const Element* weight = expand + start * packed_depth<Dot>(s.in_channels);
  const auto multiply = [&](int64_t from, int64_t to, bool with_mask, const Segment<Element>* rows, int64_t count) {
    ActivateToRing epilogue{ring, plane, offsets + (from - begin) * s.width, s.activation, {}};
    if (with_mask) {
      epilogue.mask = {
          mask_expand + (image * s.height + from) * s.width * stride + start / 8, stride, s.expanded - start};
    }
    gemm_panel<Dot>(panels.groups(panel), (to - from) * s.width, rows, count, weight, bias, epilogue);
  };
  const auto run = [&](int64_t from, int64_t to, bool with_mask) {
    if (stem == nullptr) {
      const Segment<Element> rows{
          operand.data + (from - begin) * s.width * operand.stride, operand.stride, operand.depth};
      multiply(from, to, with_mask, &rows, 1);
      return;
    }
    for (int64_t row = from; row < to; ++row) {
      stem->operands(operand.data, row - begin, segments);
      multiply(row, row + 1, with_mask, segments, stem->segments());
    }
  };
  const int64_t split = mask_expand != nullptr ? std::clamp(mask_end, begin, end) : begin;
  run(begin, split, true);
  run(split, end, false);
}

template <class T>
void BlockForward<T>::depthwise_rows(
    int64_t image, int64_t panel, int64_t begin, int64_t end, const float* ring, Element* rows, const Walk& walk, TapRun* runs)
    const {
  const int64_t start = panels.start(panel);
  const int64_t width = panels.width(panel);
  const int64_t stride = mask_bytes(s.expanded);
  const float* weight = depthwise + start * s.taps();
  for (int64_t row = begin; row < end; ++row) {
    const RowRuns row_runs{
        runs,
        forward_runs(s.window(), columns, walk.view(ring), s.height, row, weight, runs),
        columns.kernel_step,
        walk.plane(),
        s.taps()};
    ActivateToRows<Element> epilogue{rows + (row - begin) * s.out_width * width, width, s.activation, {}};
    if (mask_depthwise != nullptr) {
      epilogue.mask = {
          mask_depthwise + (image * s.out_height + row) * s.out_width * stride + start / 8,
          stride,
          s.expanded - start};
    }
    correlate_row(
        s.out_width,
        panels.groups(panel),
        row_runs,
        s.stride,
        depthwise_bias != nullptr ? depthwise_bias + start : nullptr,
        epilogue);
  }
}

template <class T>
void BlockForward<T>::project_rows(
    int64_t image,
    int64_t begin,
    int64_t end,
    const Element* rows,
    int64_t row_pixels,
    Segment<Element>* segments,
    int64_t first) const {
  for (int64_t p = 0; p < panels.count; ++p) {
    // Not the padding of the last panel: where it holds 0 times infinity, adding 0 times that would spoil the sum.
    const int64_t width = panels.width(p), depth = std::min(width, packed_depth<Dot>(s.expanded - panels.start(p)));
    segments[p] = {rows + panels.start(p) * row_pixels + first * width, width, depth};
  }
  const int64_t origin = begin * s.out_width * s.out_channels;
  gemm_of_rows<Dot>(
      (end - begin) * s.out_width,
      segments,
      panels.count,
      {project, panels.padded(), *spoiled == 0, out_panels, 0, out_panels.count},
      project_bias,
      {},
      [&](int64_t channel) {
        AddToTensor<T> epilogue{
            out.at(image) + origin + channel, s.out_channels, s.out_channels - channel};
        if (s.residual) {
          epilogue.addend = x.at(image) + origin + channel;
        }
        return epilogue;
      });
}

template <class T>
void BlockForward<T>::task(int64_t image, int64_t begin, int64_t end, int64_t own_begin, int64_t own_end) const {
  const Walk walk = this->walk(end - begin);
  const int64_t row_pixels = walk.step_rows * s.out_width;
  const auto [ring_data, rows] = rings_and_rows<Element>(PanelRings::elements(panels, walk), row_pixels * panels.padded());
  std::vector<TapRun> runs(s.taps());
  std::vector<Segment<Element>> segments(std::max(panels.count, stem != nullptr ? stem->segments() : 0));
  const PanelRings rings(ring_data, panels, walk, s.width);
  const T* image_rows = x.at(image);

  const auto advance = [&](int64_t from, int64_t to, int64_t row, int64_t row_end) {
    const int64_t* offsets = ring_offsets(from, to, s.width, walk);
    Segment<Element> operand{};
    if (stem != nullptr) {
      operand.data = to > from ? stem->rows(image, from, to) : nullptr;
    } else if (s.has_expand) {
      operand = operand_rows<Dot>(
          image_rows + from * s.width * s.in_channels, (to - from) * s.width, s.in_channels, s.in_channels);
    }
    for (int64_t p = 0; p < panels.count; ++p) {
      float* ring = rings.next(p, row < row_end);
      expand_rows(image, p, from, to, own_end, ring, walk.plane(), offsets, operand, segments.data());
      depthwise_rows(image, p, row, row_end, ring, rows + panels.start(p) * row_pixels, walk, runs.data());
    }
    if (pooled != nullptr) {
      const int64_t pooled_rows = s.height / 2;
      pool_rows(
          image_rows,
          pooled + image * pooled_rows * (s.width / 2) * s.in_channels,
          from / 2,
          std::min({std::min(to, own_end) / 2, pooled_rows}),
          s);
    }
  };
  walk_down(*this, walk, s.height, begin, end, own_begin, own_end, advance, [&](int64_t row, int64_t row_end) {
    project_rows(image, row, row_end, rows, row_pixels, segments.data());
  });
}

template <class T>
void BlockForward<T>::run() const {
  const Bands bands = output_bands(s);
  for_bands(bands, [&](int64_t, int64_t image, int64_t band) {
    task(
        image,
        bands.begin(band),
        bands.begin(band + 1),
        first_owned_input(s, bands, band),
        first_owned_input(s, bands, band + 1));
  });
}

template struct BlockForward<float>;
template struct BlockForward<c10::BFloat16>;
template struct BlockForward<c10::Half>;

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> inverted_residual_forward(
    const at::Tensor& x,
    const OptionalTensor& expand_weight,
    const OptionalTensor& expand_scale,
    const OptionalTensor& expand_bias,
    const at::Tensor& depthwise_weight,
    const OptionalTensor& depthwise_scale,
    const OptionalTensor& depthwise_bias,
    const at::Tensor& project_weight,
    const OptionalTensor& project_scale,
    const OptionalTensor& project_bias,
    int64_t stride,
    at::IntArrayRef padding,
    const std::string& activation,
    bool residual,
    bool needs_mask,
    bool want_pooled) {
  const BlockShape s = block_shape(
      x.sizes(), expand_weight, depthwise_weight, project_weight, stride, padding, activation, residual);
  const BlockWeights stored(
      expand_weight, expand_scale, depthwise_weight, depthwise_scale, project_weight, project_scale);
  const at::Tensor input = in_channels_last(x);
  const auto options = x.options();
  const auto nhwc = at::MemoryFormat::ChannelsLast;
  at::Tensor out = empty_tensor({s.batch, s.out_channels, s.out_height, s.out_width}, options, nhwc);
  const BlockMasks masks(s, x, needs_mask);
  at::Tensor pooled = want_pooled ? empty_tensor({s.batch, s.in_channels, s.height / 2, s.width / 2}, options, nhwc)
                                  : empty_tensor({0}, options);
  const at::Tensor bias1 = padded_bias(expand_bias, s.expanded, "expand_bias");
  const at::Tensor bias2 = padded_bias(depthwise_bias, s.expanded, "depthwise_bias");
  const at::Tensor bias3 = padded_bias(project_bias, s.out_channels, "project_bias");

  with_storage_type(x.scalar_type(), "input", [&](auto zero) {
    using T = decltype(zero);
    const PackedWeights packed = pack_block_forward(s, stored, x.scalar_type());
    parallel_tasks(packed.packing);
    BlockForward<T> forward =
        block_forward<T>(s, input.data_ptr<T>(), packed.data, bias1, bias2, bias3, out.data_ptr<T>());
    forward.mask_expand = masks.bytes(masks.expand);
    forward.mask_depthwise = masks.bytes(masks.depthwise);
    forward.pooled = data_or_null<T>(pooled);
    forward.run();
  });
  return {out, masks.expand, masks.depthwise, pooled};
}

} // namespace tinytl::cpu
