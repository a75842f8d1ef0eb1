// Forward of the block in mbconv.h.
//
// Rows of h1 in a ring and rows of h2, as the inverted residual goes (inverted_residual_rows.h); with a gate all rows of
// h2 stay in the thread's own buffer until their mean is known.
#include "mbconv_tasks.h"

#include <algorithm>

namespace tinytl::cpu {
namespace {

// rows (pixels, width) *= factors (width).
template <class Element>
void scale_rows(Element* rows, int64_t pixels, int64_t width, const float* factors) {
  for (int64_t m = 0; m < pixels; ++m, rows += width) {
    for (int64_t c = 0; c < width; c += kLanes) {
      store_channels(rows + c, load_channels(rows + c) * Vec::loadu(factors + c));
    }
  }
}

} // namespace

at::Tensor mbconv_forward(const at::Tensor& input, const MbconvLayers& layers, const MbconvOptions& options) {
  const at::Tensor x = in_channels_last(input);
  BlockShape s = mbconv_shape(x.sizes(), layers, options);
  const std::optional<SqueezeExcite> gate = squeeze_excite(s, layers, options, x.scalar_type());
  // relu and relu6 are part of a tile.
  const bool in_tiles = options.activation == "relu" || options.activation == "relu6";
  if (in_tiles) {
    s.activation = parse_activation(options.activation);
  }
  at::Tensor out = mbconv_output(x, layers, options);
  const auto biases = padded_biases(s, layers);
  const Bands bands = output_bands(s);
  const int64_t pixels = s.out_height * s.out_width, padded = padded_channels(s.expanded);

  with_storage_type(x.scalar_type(), "input", [&](auto zero) {
    using T = decltype(zero);
    using Element = typename DotFor<T>::type::Element;
    const BlockWeights stored = block_weights(layers);
    const PackedWeights packed = pack_block_forward(s, stored, x.scalar_type());
    parallel_tasks(packed.packing);
    const BlockForward<T> block = block_forward<T>(
        s, x.data_ptr<T>(), packed.data, biases[kExpand], biases[kDepthwise], biases[kProject], out.data_ptr<T>());
    const Passes<Element> passes = passes_of<Element>(options.activation);
    const Schedule schedule(s.batch, bands);
    const int64_t per_image = schedule.by_image ? 1 : bands.per_image;
    at::Tensor kept, sums;
    if (gate.has_value()) {
      const auto bytes = x.options().dtype(at::kByte);
      kept = empty_tensor({schedule.buffers, pixels * padded * int64_t(sizeof(Element))}, bytes);
      sums = zero_tensor({s.batch, per_image, padded}, x.options().dtype(at::kFloat));
    }
    const auto kept_of = [&](int64_t image) {
      return reinterpret_cast<Element*>(kept.data_ptr<uint8_t>() + schedule.buffer(image) * kept.size(1));
    };

    // h2, and without a gate y.
    const auto compute = [&](int64_t image, int64_t band) {
      const Rows out_rows = rows_of(bands, band), own = owned_input(s, bands, band);
      const Walk walk = block.walk(out_rows.end - out_rows.begin);
      const Panels& panels = block.panels;
      const int64_t step_pixels = walk.step_rows * s.out_width;
      const auto [ring_data, step] = rings_and_rows<Element>(
          PanelRings::elements(panels, walk), gate.has_value() ? 0 : step_pixels * padded);
      const PanelRings rings(ring_data, panels, walk, s.width);
      std::vector<TapRun> runs(s.taps());
      std::vector<Segment<Element>> segments(panels.count);
      Element* all_rows = gate.has_value() ? kept_of(image) : nullptr;
      float* own_sums =
          gate.has_value() ? sums.data_ptr<float>() + (image * per_image + std::max<int64_t>(band, 0)) * padded : nullptr;
      const auto advance = [&, step = step](int64_t from, int64_t to, int64_t row, int64_t row_end) {
        const auto activate = [&](int64_t p, float* ring) {
          for (int64_t g = 0; !in_tiles && g < panels.groups(p); ++g) {
            for (int64_t r = from; r < to; ++r) {
              passes.activate(ring_row(ring, walk, g, r), s.width * kGroup);
            }
          }
        };
        const auto filter = [&](int64_t p, const float* ring) {
          const int64_t start = panels.start(p), width = panels.width(p);
          Element* target = all_rows != nullptr ? all_rows + start * pixels + row * s.out_width * width
                                                : step + start * step_pixels;
          block.depthwise_rows(image, p, row, row_end, ring, target, walk, runs.data());
          for (int64_t r = row; (!in_tiles || own_sums != nullptr) && r < row_end; ++r) {
            // Of what a tile has activated only the sum is left: relu and relu6 change nothing the second time.
            passes.activate_rows(target, s.out_width, width, own_sums != nullptr ? own_sums + start : nullptr);
            target += s.out_width * width;
          }
        };
        advance_rows(block, image, walk, rings, from, to, row < row_end, activate, filter);
      };
      walk_down(
          block, walk, s.height, out_rows.begin, out_rows.end, own.begin, own.end, advance,
          [&, step = step](int64_t row, int64_t row_end) {
            if (all_rows == nullptr) {
              block.project_rows(image, row, row_end, step, step_pixels, segments.data());
            }
          });
    };
    if (!gate.has_value()) {
      for_bands(bands, [&](int64_t, int64_t image, int64_t band) { compute(image, band); });
      return;
    }
    const at::Tensor factors = empty_tensor({s.batch, padded}, x.options().dtype(at::kFloat));
    const auto factors_of = [&](int64_t image) { return factors.data_ptr<float>() + image * padded; };
    const auto squeeze = [&](int64_t image, int64_t) {
      std::vector<float> mean(padded), state(gate->state());
      mean_of(sums.data_ptr<float>() + image * per_image * padded, per_image, padded, padded, double(pixels), mean.data());
      gate->forward(mean.data(), factors_of(image), state.data());
    };
    // Gates h2 and projects it, as many rows at a time as stay in a core's cache between the two.
    const auto project = [&](int64_t image, int64_t band) {
      const Rows rows = rows_of(bands, band);
      const int64_t row_bytes = s.out_width * padded * int64_t(sizeof(Element));
      const int64_t step_rows = std::max<int64_t>(kScratchBudget / 2 / row_bytes, 1);
      std::vector<Segment<Element>> segments(block.panels.count);
      Element* all_rows = kept_of(image);
      for (int64_t row = rows.begin; row < rows.end; row += step_rows) {
        const int64_t row_end = std::min(row + step_rows, rows.end);
        for (int64_t p = 0; p < block.panels.count; ++p) {
          const int64_t start = block.panels.start(p), width = block.panels.width(p);
          scale_rows(
              all_rows + start * pixels + row * s.out_width * width, (row_end - row) * s.out_width, width,
              factors_of(image) + start);
        }
        block.project_rows(image, row, row_end, all_rows, pixels, segments.data(), row * s.out_width);
      }
    };
    run_phases(s.batch, schedule, {{&bands, compute}, {nullptr, squeeze}, {&bands, project}});
  });
  return out;
}

} // namespace tinytl::cpu
