// Backward of the block in mbconv.h, with z1 and z2 before and h1 and h2 after the activation:
//
//     again     h1, h2, their slopes f'(z1), f'(z2);  d = dy Wp^T;  dc = sum d h2;  dbp = sum dy
//     gate      c, and from dc the gradient m of mean(h2), dbr, dbs
//     g2 = f'(z2) (c d + m / (H' W'))                                                  dbd = sum g2
//     g1 = f'(z1) depthwise^T(g2, Wd)                                                  dbe = sum g1
//     dx = g1 We^T [+ dy]
//
// A buffer holds d, which becomes g2, and the slopes of one image. Sums over pixels are made row by row, then over rows,
// then in double precision and in order over tasks.
#include "mbconv_tasks.h"

#include <algorithm>
#include <utility>

namespace tinytl::cpu {
namespace {

// rows (pixels, width) = rows times slopes; sums += their sums over pixels.
template <class Element>
void times_slopes(Element* rows, int64_t pixels, int64_t width, const float* slopes, float* sums) {
  for (int64_t c = 0; c < width; c += kLanes) {
    Vec sum(0.f);
    for (int64_t m = 0; m < pixels; ++m) {
      const int64_t at = m * width + c;
      const Vec passed = pass_gradient(load_channels(rows + at), Vec::loadu(slopes + at));
      store_channels(rows + at, passed);
      sum = sum + passed;
    }
    (Vec::loadu(sums + c) + sum).store(sums + c);
  }
}

// What is kept of an image while its gradients are computed, in floats: all rows of g2 as one ring, which the transposed
// depthwise convolution reads; with a gate f'(z2), laid out alike; f'(z1), panel after panel.
struct ImageBuffer {
  Walk g2;
  int64_t slopes2, slopes1, size; // offsets
};

// The sums of a task, in floats.
struct TaskSums {
  int64_t padded; // expanded channels

  int64_t depthwise_bias() const { // sum g2
    return 0;
  }
  int64_t expand_bias() const { // sum g1
    return padded;
  }
  int64_t values() const { // sum h2
    return 2 * padded;
  }
  int64_t products() const { // sum d h2
    return 3 * padded;
  }
  int64_t project_bias() const { // sum dy
    return 4 * padded;
  }
  int64_t size(int64_t out_channels) const {
    return 4 * padded + padded_channels(out_channels);
  }
};

template <class T>
struct Backward {
  using Dot = typename DotFor<T>::type;
  using Element = typename Dot::Element;

  const BlockShape& s;
  const BlockBackward<T>& block;
  const std::optional<BlockForward<T>>& again; // absent: nothing is computed again
  const std::optional<SqueezeExcite>& gate;
  Passes<Element> passes;
  const Schedule& schedule;
  const Bands &out_bands, &in_bands; // of rows of h2, of rows of h1
  const ImageBuffer& layout;
  float* buffers;
  TaskSums sum; // where which is
  float* sums; // [image][band][sum.size()]
  int64_t sums_image, sums_band; // floats from image to image, from band to band
  float* gate_sums; // [image][restore, reduce]
  float* factors; // [image][c, m / (H' W')]

  const Panels& panels() const {
    return block.panels;
  }
  bool keeps_slopes1() const {
    return block.needs_g1() && s.has_expand;
  }
  float* buffer_of(int64_t image) const {
    return buffers + schedule.buffer(image) * layout.size;
  }
  float* sums_of(int64_t image, int64_t band) const {
    return sums + image * sums_image + std::max<int64_t>(band, 0) * sums_band;
  }
  float* factors_of(int64_t image) const {
    return factors + image * 2 * sum.padded;
  }

  void clear(int64_t image) const {
    for (int64_t p = 0; block.needs_g1() && p < panels().count; ++p) {
      clear_borders(
          buffer_of(image) + panels().start(p) * layout.g2.area(), panels().groups(p), layout.g2, s.out_width);
    }
  }

  // d f'(z2) at the place of g2, the slopes, and the sums of h2 and d h2 or of g2.
  void compute_again(int64_t image, int64_t band) const {
    const Rows out_rows = rows_of(out_bands, band), own = owned_input(s, out_bands, band);
    if (block.need_project_bias) {
      block.sum_output_rows(image, out_rows.begin, out_rows.end, sums_of(image, band) + sum.project_bias());
    }
    if (!again.has_value()) {
      return;
    }
    const Walk walk = again->walk(out_rows.end - out_rows.begin);
    const int64_t step_pixels = walk.step_rows * s.out_width;
    const auto [ring_data, z2] =
        rings_and_rows<Element>(PanelRings::elements(panels(), walk), step_pixels * sum.padded);
    const PanelRings rings(ring_data, panels(), walk, s.width);
    std::vector<TapRun> runs(s.taps());
    const auto advance = [&, z2 = z2](int64_t from, int64_t to, int64_t row, int64_t row_end) {
      const auto activate = [&](int64_t p, float* ring) {
        activate_rows(image, p, from, to, own.end, walk, ring);
      };
      advance_rows(*again, image, walk, rings, from, to, row < row_end, activate, [&](int64_t p, const float* ring) {
        again->depthwise_rows(
            image, p, row, row_end, ring, z2 + panels().start(p) * step_pixels, walk, runs.data());
      });
    };
    walk_down(
        *again, walk, s.height, out_rows.begin, out_rows.end, own.begin, own.end, advance,
        [&, z2 = z2](int64_t row, int64_t row_end) {
          project_rows(image, row, row_end, z2, step_pixels, sums_of(image, band));
        });
  }

  // Rows [from, to) of one panel of z1, in the ring: h1. The slopes of rows from own_end on are another band's to keep.
  void activate_rows(
      int64_t image, int64_t panel, int64_t from, int64_t to, int64_t own_end, const Walk& walk, float* ring) const {
    const int64_t width = panels().width(panel);
    float* slopes1 = buffer_of(image) + layout.slopes1 + panels().start(panel) * s.height * s.width;
    for (int64_t g = 0; g < panels().groups(panel); ++g) {
      for (int64_t r = from; r < to; ++r) {
        float* values = ring_row(ring, walk, g, r);
        if (keeps_slopes1() && r < own_end) {
          passes.activate_group(values, s.width, slopes1 + r * s.width * width + g * kGroup, width);
        } else {
          passes.activate(values, s.width * kGroup);
        }
      }
    }
  }

  // Rows [begin, end) of d f'(z2) from those of dy and z2. row_pixels: pixels that each panel of z2 has room for.
  void project_rows(
      int64_t image, int64_t begin, int64_t end, const Element* z2, int64_t row_pixels, float* task_sums) const {
    const auto operand = operand_rows<Dot>(
        block.grad_output.at(image) + begin * s.out_width * s.out_channels,
        (end - begin) * s.out_width, s.out_channels, s.out_channels);
    const int64_t* offsets = ring_offsets(begin, end, s.out_width, layout.g2);
    float *g2 = buffer_of(image), *slopes2 = gate.has_value() ? g2 + layout.slopes2 : nullptr;
    for (int64_t p = 0; p < panels().count; ++p) {
      const int64_t start = panels().start(p), width = panels().width(p), at = start * layout.g2.area();
      block.project_rows(image, p, begin, end, 0, g2 + at, layout.g2.plane(), offsets, operand, nullptr);
      for (int64_t g = 0; g < panels().groups(p); ++g) {
        float* channel_sums = task_sums + start + g * kGroup;
        for (int64_t r = begin; r < end; ++r) {
          const int64_t first = at + g * layout.g2.plane() + layout.g2.pixel(r) * kGroup;
          passes.backward_group(
              z2 + start * row_pixels + (r - begin) * s.out_width * width + g * kGroup,
              s.out_width,
              width,
              g2 + first,
              slopes2 != nullptr ? slopes2 + first : nullptr,
              channel_sums + sum.values(),
              channel_sums + (slopes2 != nullptr ? sum.products() : sum.depthwise_bias()));
        }
      }
    }
  }

  // The gate's factors, and what the gradient of the mean adds to every pixel.
  void squeeze(int64_t image) const {
    const int64_t pixels = s.out_height * s.out_width;
    const int64_t bands = schedule.by_image ? 1 : out_bands.per_image;
    std::vector<float> mean(sum.padded), state(gate->state());
    float *factor = factors_of(image), *shift = factor + sum.padded;
    mean_of(sums_of(image, 0) + sum.values(), bands, sums_band, sum.padded, double(pixels), mean.data());
    mean_of(sums_of(image, 0) + sum.products(), bands, sums_band, sum.padded, 1., shift);
    gate->forward(mean.data(), factor, state.data());
    float* restore = gate_sums + image * (sum.padded + padded_channels(gate->squeezed()));
    gate->backward(shift, state.data(), restore + sum.padded, restore);
    for (int64_t c = 0; c < sum.padded; ++c) {
      shift[c] /= static_cast<float>(pixels);
    }
  }

  // g2 = c (d f'(z2)) + m / (H' W') f'(z2)
  void finish_g2(int64_t image, int64_t band) const {
    const Rows rows = rows_of(out_bands, band);
    float* bias_sums = sums_of(image, band) + sum.depthwise_bias();
    for (int64_t c = 0; c < sum.padded; c += kLanes) {
      const Vec factor = Vec::loadu(factors_of(image) + c), shift = Vec::loadu(factors_of(image) + sum.padded + c);
      float* group = buffer_of(image) + c / kGroup * layout.g2.plane() + c % kGroup;
      Vec total(0.f);
      for (int64_t r = rows.begin; r < rows.end; ++r) {
        float* d = group + layout.g2.pixel(r) * kGroup;
        const float* slopes = d + layout.slopes2;
        Vec row_sum(0.f);
        for (int64_t m = 0; m < s.out_width; ++m) {
          const Vec value =
              at::vec::fmadd(Vec::loadu(d + m * kGroup), factor, Vec::loadu(slopes + m * kGroup) * shift);
          value.store(d + m * kGroup);
          row_sum = row_sum + value;
        }
        total = total + row_sum;
      }
      (Vec::loadu(bias_sums + c) + total).store(bias_sums + c);
    }
  }

  // dx and the sums of g1.
  void differentiate(int64_t image, int64_t band) const {
    const Rows rows = rows_of(in_bands, band);
    const float *g2 = buffer_of(image), *slopes1 = g2 + layout.slopes1;
    float* bias_sums = sums_of(image, band) + sum.expand_bias();
    const int64_t step_rows = std::min(block.walk(rows.end - rows.begin).step_rows, rows.end - rows.begin);
    const int64_t step_pixels = step_rows * s.width;
    Element* g1 = scratch<Element>(kRows, step_pixels * sum.padded);
    std::vector<TapRun> runs(s.taps());
    std::vector<Segment<Element>> segments(panels().count);
    for (int64_t row = rows.begin; row < rows.end; row += step_rows) {
      const int64_t row_end = std::min(row + step_rows, rows.end);
      for (int64_t p = 0; p < panels().count; ++p) {
        const int64_t start = panels().start(p), width = panels().width(p);
        Element* panel_rows = g1 + start * step_pixels;
        block.transposed_depthwise_rows(
            image, p, row, row_end, g2 + start * layout.g2.area(), panel_rows, layout.g2, runs.data(), nullptr);
        for (int64_t r = row; s.has_expand && r < row_end; ++r, panel_rows += s.width * width) {
          const float* slopes = slopes1 + start * s.height * s.width + r * s.width * width;
          times_slopes(panel_rows, s.width, width, slopes, bias_sums + start);
        }
      }
      if (block.grad_input.data != nullptr) {
        block.expand_rows(image, row, row_end, g1, step_pixels, segments.data());
      }
    }
  }

  void run(int64_t images) const {
    const auto each = [this](void (Backward::*phase)(int64_t) const) {
      return Phase{nullptr, [this, phase](int64_t image, int64_t) { (this->*phase)(image); }};
    };
    const auto banded = [this](const Bands& bands, void (Backward::*phase)(int64_t, int64_t) const) {
      return Phase{&bands, [this, phase](int64_t image, int64_t band) { (this->*phase)(image, band); }};
    };
    std::vector<Phase> phases{each(&Backward::clear), banded(out_bands, &Backward::compute_again)};
    if (gate.has_value() && again.has_value()) {
      phases.push_back(each(&Backward::squeeze));
      if (block.needs_g2()) {
        phases.push_back(banded(out_bands, &Backward::finish_g2));
      }
    }
    if (block.needs_g1()) {
      phases.push_back(banded(in_bands, &Backward::differentiate));
    }
    run_phases(images, schedule, phases);
  }
};

} // namespace

MbconvGradients mbconv_backward(
    const at::Tensor& grad_output,
    const at::Tensor& input,
    const MbconvLayers& layers,
    const MbconvOptions& options,
    const MbconvNeeds& needs) {
  const at::Tensor x = in_channels_last(input);
  const BlockShape s = mbconv_shape(x.sizes(), layers, options);
  check_size(grad_output, "grad_output", {s.batch, s.out_channels, s.out_height, s.out_width}, x.scalar_type());
  const at::Tensor grad = in_channels_last(grad_output);
  const std::optional<SqueezeExcite> gate = squeeze_excite(s, layers, options, x.scalar_type());
  const auto biases = padded_biases(s, layers);
  const Bands out_bands = output_bands(s), in_bands = input_bands(s);
  const Schedule schedule(s.batch, out_bands.per_image > 1 ? out_bands : in_bands);
  const int64_t per_image = schedule.by_image ? 1 : std::max(out_bands.per_image, in_bands.per_image);

  MbconvGradients gradients;
  if (needs.input) {
    gradients.input = empty_tensor(x.sizes(), x.options(), at::MemoryFormat::ChannelsLast);
  }
  const auto floats = x.options().dtype(at::kFloat);
  const TaskSums sum{padded_channels(s.expanded)};
  const at::Tensor sums = zero_tensor({s.batch * per_image, sum.size(s.out_channels)}, floats);
  const int64_t gate_size = gate.has_value() ? sum.padded + padded_channels(gate->squeezed()) : 0;
  const at::Tensor gate_sums = zero_tensor({s.batch, gate_size}, floats);
  const at::Tensor factors = empty_tensor({gate.has_value() ? s.batch : 0, 2 * sum.padded}, floats);

  with_storage_type(x.scalar_type(), "input", [&](auto zero) {
    using T = decltype(zero);
    const BlockWeights stored = block_weights(layers);
    const PackedWeights packed = pack_block_backward(s, stored, x.scalar_type(), needs.input, nullptr);
    parallel_tasks(packed.packing);
    const BlockBackward<T> block = block_backward<T>(
        s,
        grad.data_ptr<T>(),
        packed,
        needs.input ? gradients.input.data_ptr<T>() : nullptr,
        {needs.biases[kExpand], needs.biases[kDepthwise], needs.biases[kProject]});
    PackedWeights packed_again;
    std::optional<BlockForward<T>> again;
    if (block.needs_g2() || (gate.has_value() && (needs.biases[kReduce] || needs.biases[kRestore]))) {
      packed_again = pack_block_forward(s, stored, x.scalar_type(), false);
      parallel_tasks(packed_again.packing);
      again.emplace(block_forward<T>(
          s, x.data_ptr<T>(), packed_again.data, biases[kExpand], biases[kDepthwise], biases[kProject], nullptr));
    }

    ImageBuffer layout{block.walk(s.height), 0, 0, 0};
    layout.g2.ring_rows = s.out_height;
    layout.g2.shared_ring = false;
    layout.slopes2 = layout.g2.area() * sum.padded;
    layout.slopes1 = layout.slopes2 * (gate.has_value() ? 2 : 1);
    layout.size = layout.slopes1 + (block.needs_g1() && s.has_expand ? s.height * s.width * sum.padded : 0);
    const at::Tensor buffers = empty_tensor({again.has_value() ? schedule.buffers : 0, layout.size}, floats);
    const Backward<T> backward{
        s,
        block,
        again,
        gate,
        passes_of<typename DotFor<T>::type::Element>(options.activation),
        schedule,
        out_bands,
        in_bands,
        layout,
        buffers.data_ptr<float>(),
        sum,
        sums.data_ptr<float>(),
        per_image * sums.size(1),
        sums.size(1),
        gate_sums.data_ptr<float>(),
        factors.data_ptr<float>()};
    backward.run(s.batch);
  });

  const auto reduce = [&](BlockLayer layer, const at::Tensor& from, int64_t start, int64_t channels) {
    if (needs.biases[layer]) {
      gradients.biases[layer] = reduce_partial(from, start, channels, true);
    }
  };
  reduce(kExpand, sums, sum.expand_bias(), s.expanded);
  reduce(kDepthwise, sums, sum.depthwise_bias(), s.expanded);
  reduce(kProject, sums, sum.project_bias(), s.out_channels);
  if (gate.has_value()) {
    reduce(kRestore, gate_sums, 0, s.expanded);
    reduce(kReduce, gate_sums, sum.padded, gate->squeezed());
  }
  return gradients;
}

} // namespace tinytl::cpu
