// See trained_conv.h.
#include "trained_conv.h"

#include <c10/util/SmallVector.h>

#include <array>

namespace tinytl::cpu {
namespace {

// Pixels that one chain of a weight gradient adds up, about.
constexpr int64_t kWeightTerms = 128;

// Sums of a weight gradient that a thread holds while the images stream by, in floats: the images pass several times
// rather than a large weight exist twice.
constexpr int64_t kHeldSums = 64 * 1024;

// A row of the kernel window whose pixels lie inside the image: where it begins in the image and in the packed weight.
struct WindowRow {
  const float* a;
  const float* b;
};

// What a column of the window adds to both.
struct WindowColumn {
  int64_t a, b;
};

// So many pixels before it is read, an image's pixel is fetched: the next image's lies too far away for the processor to
// see that it will be wanted.
constexpr int64_t kPrefetch = 8;

// Up to this many taps, and tiles of a panel, no memory is allocated for their list.
constexpr size_t kUsualTaps = 25;
constexpr size_t kUsualTiles = 32;

// A packed weight up to this many bytes stays in a core's cache beside the images.
constexpr int64_t kSmallWeight = 128 * 1024;

// What a task computes: a row of pixels, for one panel of the weight.
struct Unit {
  int64_t group, panel, row;
};

// A task for every part of the weight and each of `rows` rows of pixels. A thread keeps its rows from kernel to kernel;
// of a large weight it keeps its part instead.
template <class Body>
Tasks unit_tasks(const PackedWeight& weight, int64_t rows, const Body& body) {
  const bool rows_outermost = weight.bytes() <= kSmallWeight;
  const int64_t panels = weight.panels.count, parts = weight.groups * panels;
  return {parts * rows, [=](int64_t task) {
    const int64_t part = rows_outermost ? task % parts : task / rows;
    body(Unit{part / panels, part % panels, rows_outermost ? task / parts : task % rows});
  }};
}

// Output positions [first, last) along one side at which tap k falls inside the image.
std::pair<int64_t, int64_t> inside(int64_t k, int64_t length, int64_t positions, const TrainedConv& conv) {
  const int64_t first = std::max<int64_t>(ceil_div(conv.padding - k, conv.stride), 0);
  const int64_t last = std::min(floor_div(length - 1 + conv.padding - k, conv.stride) + 1, positions);
  return {first, std::max(first, last)};
}

// Multiplies a line of pixels, `batch` rows each, with a panel of the weight.
struct Line {
  int64_t rows, batch;
  int vecs;
  int64_t valid; // columns of the panel
  Strides strides;
  int64_t terms; // of a tap
  c10::SmallVector<WindowRow, kUsualTaps> window;
  c10::SmallVector<WindowColumn, kUsualTaps> columns;

  // inside(first pixel, last pixel): the columns of the window that fall inside the image at one of them or more. Before
  // a tile is computed, reach(position of its first row, height) may fetch where store(tile, first row, height) takes it.
  template <class Inside, class Reach, class Store>
  void multiply(const Inside& inside, const Reach& reach, const Store& store) const {
    alignas(64) float tile[kTileElements];
    c10::SmallVector<Run, kUsualTaps> runs(window.size() * columns.size());
    int64_t count = 0;
    std::pair<int64_t, int64_t> taps(0, 0); // columns that `runs` are for
    RowPosition position{batch};
    for_row_tiles(rows, batch, vecs, [&](int64_t row, int height) {
      const std::pair reached = inside(position.pixel, position.after(height - 1).pixel);
      if (reached != taps) {
        taps = reached;
        count = 0;
        for (const WindowRow& from : window) {
          for (int64_t column = taps.first; column < taps.second; ++column) {
            runs[count++] = {from.a + columns[column].a, from.b + columns[column].b, terms};
          }
        }
      }
      reach(position, height);
      strided_gemm(height, vecs, valid, runs.data(), count, row * strides.row, strides, false, tile);
      store(tile, row, height);
      position.advance(height);
    });
  }
};

} // namespace

TrainedConv::TrainedConv(at::IntArrayRef input, const at::Tensor& weight, int64_t stride, int64_t groups)
    : stride(stride), groups(groups) {
  TORCH_CHECK(input.size() == 4, "pooled: expected 4 dimensions (N, C, H, W), got ", input);
  TORCH_CHECK(
      weight.dim() == 4 && weight.size(2) == weight.size(3) && weight.size(2) % 2 == 1,
      "weight: expected (C_out, C_in / groups, k, k) with odd k, got ",
      weight.sizes());
  batch = input[0];
  in_channels = input[1];
  height = input[2];
  width = input[3];
  out_channels = weight.size(0);
  kernel = weight.size(2);
  padding = kernel / 2;
  TORCH_CHECK(
      stride >= 1 && groups >= 1 && out_channels > 0 && out_channels % groups == 0 && in_channels > 0 &&
          in_channels == weight.size(1) * groups && height > 0 && width > 0,
      "weight: ",
      weight.sizes(),
      " in ",
      groups,
      " groups with stride ",
      stride,
      " does not fit pooled ",
      input);
  out_height = (height - 1) / stride + 1;
  out_width = (width - 1) / stride + 1;
  phase_width = ceil_div(width + 2 * padding, stride);
  left = std::max<int64_t>((kernel - 1) / stride - padding / stride, 0);
  const int64_t right = std::max<int64_t>((width - 1 + padding) / stride - (out_width - 1), 0);
  gradient_width = left + out_width + right;
}

PackedWeight::PackedWeight(const TrainedConv& conv, const at::Tensor& weight, bool transposed)
    : groups(conv.groups),
      taps(conv.taps()),
      terms(transposed ? conv.group_out() : conv.group_in()),
      panels(transposed ? conv.group_in() : conv.group_out()),
      source_(as_float(weight).contiguous(at::MemoryFormat::ChannelsLast)),
      in_channels_(conv.group_in()),
      out_channels_(conv.group_out()),
      transposed_(transposed),
      packed_(empty_tensor({groups * taps * terms * panels.padded()}, at::kFloat)) {}

Tasks PackedWeight::packing() {
  // (O, k, k, I / groups): a vector's number of out channels at a time are read from their first number to their last. A
  // weight comes from memory, and that many streams the processor sees coming.
  const int64_t strips = ceil_div(out_channels_, kLanes), row = taps * in_channels_;
  const int64_t grain = ceil_div(kPackedElements, kLanes * row);
  return pieces_of(groups * strips, grain, [=, this](int64_t begin, int64_t end) {
    for (int64_t strip = begin; strip < end; ++strip) {
      const int64_t group = strip / strips, first = strip % strips * kLanes;
      const float* rows = source_.data_ptr<float>() + (group * out_channels_ + first) * row;
      const int64_t count = std::min<int64_t>(kLanes, out_channels_ - first);
      transposed_ ? pack_terms(rows, count, group, first) : pack_columns(rows, count, group, first);
    }
  });
}

// Out channels that are columns: `count` rows become a part of a panel's rows.
void PackedWeight::pack_columns(const float* rows, int64_t count, int64_t group, int64_t first) {
  int64_t p = 0;
  while (first >= panels.start(p) + panels.width_vecs(p) * kLanes) {
    ++p;
  }
  const int64_t width = panels.width_vecs(p) * kLanes, row = taps * in_channels_;
  float* to = data(group, p) + first - panels.start(p);
  if (count == kLanes) {
    transpose(rows, row, to, width, kLanes, row);
    return;
  }
  constexpr int64_t kPiece = 64; // with rows of zeros below the last
  float piece[kLanes * kPiece] = {};
  for (int64_t begin = 0; begin < row; begin += kPiece) {
    const int64_t columns = std::min(kPiece, row - begin);
    for (int64_t m = 0; m < count; ++m) {
      copy_row(rows + m * row + begin, columns, piece + m * kPiece);
    }
    transpose(piece, kPiece, to + begin * width, width, kLanes, columns);
  }
}

// Out channels that are terms: `count` rows become rows of every panel.
void PackedWeight::pack_terms(const float* rows, int64_t count, int64_t group, int64_t first) {
  for (int64_t tap = 0; tap < taps; ++tap) {
    for (int64_t p = 0; p < panels.count; ++p) {
      const int64_t width = panels.width_vecs(p) * kLanes, valid = panels.valid(p), start = panels.start(p);
      float* to = data(group, p) + (tap * terms + first) * width;
      for (int64_t k = 0; k < count; ++k, to += width) {
        copy_row(rows + (k * taps + tap) * in_channels_ + start, valid, to);
        std::fill(to + valid, to + width, 0.f);
      }
    }
  }
}

TrainedPointwise::TrainedPointwise(const at::Tensor& weight, bool transposed)
    : in_channels_(weight.size(transposed ? 0 : 1)),
      out_channels_(weight.size(transposed ? 1 : 0)),
      weight_(TrainedConv({1, weight.size(1), 1, 1}, weight, 1, 1), weight, transposed) {}

void TrainedPointwise::rows(const float* x, int64_t count, float* y) const {
  alignas(64) float tile[kTileElements];
  const ColumnPanels& panels = weight_.panels;
  for (int64_t p = 0; p < panels.count; ++p) {
    const int vecs = panels.width_vecs(p);
    const int64_t start = panels.start(p), valid = panels.valid(p);
    const Run run{x, weight_.panel(0, p), in_channels_};
    const Strides strides{in_channels_, 1, vecs * kLanes};
    for_row_tiles(count, 1, vecs, [&](int64_t row, int rows) {
      strided_gemm(rows, vecs, valid, &run, 1, row * in_channels_, strides, false, tile);
      store_tile(tile, rows, vecs, valid, y + row * out_channels_ + start, out_channels_);
    });
  }
}

template <class T>
Tasks pad_input(const TrainedConv& conv, const T* input, float* padded) {
  const int64_t channels = conv.in_channels, phase = conv.phase_width, pixel = conv.batch * channels;
  const int64_t grain = ceil_div(16384, std::max<int64_t>(conv.width * conv.batch * channels, 1));
  return pieces_of(conv.height, grain, [=, &conv](int64_t begin, int64_t end) {
    for (int64_t y = begin; y < end; ++y) {
      for (int64_t q = 0; q < conv.stride; ++q) {
        for (int64_t u = 0; u < phase; ++u) {
          const int64_t x = u * conv.stride + q - conv.padding;
          float* target = padded + ((y * conv.stride + q) * phase + u) * pixel;
          if (x < 0 || x >= conv.width) {
            std::fill(target, target + pixel, 0.f);
            continue;
          }
          const T* source = input + (y * conv.width + x) * channels;
          for (int64_t n = 0; n < conv.batch; ++n, target += channels, source += conv.height * conv.width * channels) {
            __builtin_prefetch(source + kPrefetch * conv.stride * channels);
            copy_row(source, channels, target);
          }
        }
      }
    }
  });
}

template <class T>
Tasks trained_conv_forward(const TrainedConv& conv, const float* padded, const PackedWeight& weight, T* y) {
  const int64_t rows = conv.out_width * conv.batch, phase_line = conv.phase_width * conv.batch;
  return unit_tasks(weight, conv.out_height, [=, &conv, &weight](const Unit& unit) {
    const ColumnPanels& panels = weight.panels;
    const int64_t group = unit.group, panel = unit.panel, oy = unit.row;
    const int vecs = panels.width_vecs(panel);
    const int64_t valid = panels.valid(panel), tap_elements = weight.terms * vecs * kLanes;
    Line line{rows, conv.batch, vecs, valid, {conv.in_channels, 1, vecs * kLanes}, weight.terms, {}, {}};
    for (int64_t k = 0; k < conv.kernel; ++k) {
      const int64_t column = k % conv.stride * phase_line + k / conv.stride * conv.batch;
      line.columns.push_back({column * conv.in_channels, k * tap_elements});
      const int64_t iy = oy * conv.stride - conv.padding + k;
      if (iy >= 0 && iy < conv.height) {
        line.window.push_back(
            {padded + iy * conv.stride * phase_line * conv.in_channels + group * conv.group_in(),
             weight.panel(group, panel) + k * conv.kernel * tap_elements});
      }
    }
    T* target = y + oy * rows * conv.out_channels + group * conv.group_out() + panels.start(panel);
    line.multiply(
        [&](int64_t first, int64_t last) {
          return std::pair(
              std::max<int64_t>(conv.padding - last * conv.stride, 0),
              std::min(conv.padding + conv.width - first * conv.stride, conv.kernel));
        },
        [](const RowPosition&, int) {},
        [&](const float* tile, int64_t row, int height) {
          store_tile(tile, height, vecs, valid, target + row * conv.out_channels, conv.out_channels);
        });
  });
}

template <class T>
Tasks trained_conv_backward_input(const TrainedConv& conv, const float* grad, const PackedWeight& weight, T* dx) {
  const int64_t grad_line = conv.gradient_width * conv.batch, left = conv.left;
  const int64_t image_elements = conv.height * conv.width * conv.in_channels;
  return unit_tasks(weight, conv.height, [=, &conv, &weight](const Unit& unit) {
    const ColumnPanels& panels = weight.panels;
    const int64_t group = unit.group, panel = unit.panel, iy = unit.row;
    const int vecs = panels.width_vecs(panel);
    const int64_t valid = panels.valid(panel), tap_elements = weight.terms * vecs * kLanes;
    T* target = dx + iy * conv.width * conv.in_channels + group * conv.group_in() + panels.start(panel);
    // Columns ix = v * stride + q - padding of one remainder q are reached by the taps kx = q + j * stride, from the
    // output columns v - j.
    for (int64_t q = 0; q < conv.stride; ++q) {
      const int64_t v0 = ceil_div(conv.padding - q, conv.stride);
      const int64_t v1 = floor_div(conv.width - 1 + conv.padding - q, conv.stride) + 1;
      Line line{
          (v1 - v0) * conv.batch, conv.batch, vecs, valid, {conv.out_channels, 1, vecs * kLanes}, weight.terms, {}, {}};
      for (int64_t k = q, j = 0; k < conv.kernel; k += conv.stride, ++j) {
        line.columns.push_back({-j * conv.batch * conv.out_channels, k * tap_elements});
      }
      for (int64_t k = 0; k < conv.kernel; ++k) {
        const int64_t reached = iy + conv.padding - k;
        if (reached >= 0 && reached % conv.stride == 0 && reached / conv.stride < conv.out_height) {
          const int64_t pixel = reached / conv.stride * grad_line + (left + v0) * conv.batch;
          line.window.push_back(
              {grad + pixel * conv.out_channels + group * conv.group_out(),
               weight.panel(group, panel) + k * conv.kernel * tap_elements});
        }
      }
      // Row by row: an image's pixels lie far from the next image's, too far for the processor to fetch them before they
      // are written.
      std::array<T*, kTileSums> pixels;
      line.multiply(
          [&](int64_t first, int64_t last) {
            return std::pair(
                std::max<int64_t>(v0 + first - conv.out_width + 1, 0),
                std::min(v0 + last + 1, static_cast<int64_t>(line.columns.size())));
          },
          [&](RowPosition position, int height) {
            for (int m = 0; m < height; ++m, position.advance(1)) {
              const int64_t column = (v0 + position.pixel) * conv.stride + q - conv.padding;
              pixels[m] = target + position.image * image_elements + column * conv.in_channels;
              __builtin_prefetch(pixels[m], 1);
            }
          },
          [&](const float* tile, int64_t, int height) {
            for (int m = 0; m < height; ++m) {
              store_tile(tile + m * vecs * kLanes, 1, vecs, valid, pixels[m], 0);
            }
          });
    }
  });
}

Tasks zero_padding(const TrainedConv& conv, float* grad) {
  return {conv.out_height, [=, &conv](int64_t y) {
    const int64_t pixel = conv.batch * conv.out_channels;
    float* line = grad + y * conv.gradient_width * pixel;
    std::fill(line, line + conv.left * pixel, 0.f);
    std::fill(line + (conv.left + conv.out_width) * pixel, line + conv.gradient_width * pixel, 0.f);
  }};
}

Tasks trained_conv_backward_weight(
    const TrainedConv& conv, const float* padded, const float* grad, const at::Tensor& grad_weight) {
  // Tiles of out channels (rows) by in channels (vectors), one tap each, some of them held while chunks of image rows
  // stream by; neighbouring tiles read the same input. No two tasks share a tile: nothing is summed over threads.
  const ColumnPanels panels(conv.group_in());
  const int64_t phase_line = conv.phase_width * conv.batch;
  const int64_t grad_line = conv.gradient_width * conv.batch;
  // A chunk of the output: lines, or a part of one. It is a chain of about kWeightTerms additions.
  const int64_t chunk = ceil_div(kWeightTerms, conv.out_width * conv.batch); // lines
  const int64_t parts = chunk > 1 ? 1 : ceil_div(conv.out_width * conv.batch, kWeightTerms);
  const int64_t part_width = ceil_div(conv.out_width, parts);
  const Strides strides{1, conv.out_channels, conv.in_channels};
  float* target = grad_weight.data_ptr<float>();
  const int64_t out_stride = grad_weight.stride(0), in_stride = grad_weight.stride(1);
  std::vector<std::pair<int64_t, int64_t>> inside_columns, inside_rows; // of each tap
  std::vector<int64_t> tap_offsets; // in grad_weight
  for (int64_t k = 0; k < conv.kernel; ++k) {
    inside_columns.push_back(inside(k, conv.width, conv.out_width, conv));
    inside_rows.push_back(inside(k, conv.height, conv.out_height, conv));
    for (int64_t kx = 0; kx < conv.kernel; ++kx) {
      tap_offsets.push_back(k * grad_weight.stride(2) + kx * grad_weight.stride(3));
    }
  }
  // A unit is a tile; unit = (group, tap, tile) of one panel, the tile of rows fastest.
  const auto tiles_of = [&conv](int vecs) { return ceil_div(conv.group_out(), max_tile_rows(vecs)); };
  const int64_t most_units = conv.groups * tiles_of(panels.width_vecs(0)) * conv.taps();
  const int64_t pieces = ceil_div(piece_count(most_units * panels.count), panels.count); // of each panel
  return {panels.count * pieces, [=, &conv](int64_t task) {
    const int64_t p = task / pieces;
    const int vecs = panels.width_vecs(p);
    const int64_t start = panels.start(p), valid = panels.valid(p);
    const int64_t tiles = tiles_of(vecs), units = conv.groups * tiles * conv.taps();
    const int64_t tile_elements = max_tile_rows(vecs) * vecs * kLanes;
    c10::SmallVector<int64_t, kUsualTiles> row_of(tiles + 1);
    for (int64_t t = 0; t <= tiles; ++t) {
      row_of[t] = conv.group_out() * t / tiles;
    }
    // Calls body(tile of the panel, its sum, group, tap) for units [begin, end), without a division for each.
    const auto for_units = [&](int64_t begin, int64_t end, float* sum, const auto& body) {
      int64_t t = begin % tiles, tap = begin / tiles % conv.taps(), group = begin / tiles / conv.taps();
      for (int64_t unit = begin; unit < end; ++unit, sum += tile_elements) {
        body(t, sum, group, tap);
        if (++t == tiles) {
          t = 0;
          if (++tap == conv.taps()) {
            tap = 0, ++group;
          }
        }
      }
    };
    const auto sum_units = [&](int64_t begin, int64_t end, float* sums, std::vector<Run>& runs) {
      for (int64_t c = 0; c < ceil_div(conv.out_height, chunk) * parts; ++c) {
        const int64_t y = c / parts * chunk, part = c % parts * part_width;
        int64_t count = 0, runs_for = -1; // the tap and group of `runs`
        for_units(begin, end, sums, [&](int64_t t, float* sum, int64_t group, int64_t tap) {
          if (group * conv.taps() + tap != runs_for) {
            runs_for = group * conv.taps() + tap;
            count = 0;
            const int64_t ky = tap / conv.kernel, kx = tap % conv.kernel;
            const int64_t x0 = std::max(inside_columns[kx].first, part);
            const int64_t x1 = std::min(inside_columns[kx].second, part + part_width);
            const auto [y0, y1] = inside_rows[ky];
            for (int64_t oy = std::max(y, y0); oy < std::min(y + chunk, y1) && x0 < x1; ++oy) {
              const int64_t iy = oy * conv.stride - conv.padding + ky;
              const int64_t from = oy * grad_line + (conv.left + x0) * conv.batch;
              const int64_t pixel =
                  (iy * conv.stride + kx % conv.stride) * phase_line + (x0 + kx / conv.stride) * conv.batch;
              runs[count++] = {
                  grad + from * conv.out_channels + group * conv.group_out(),
                  padded + pixel * conv.in_channels + group * conv.group_in() + start,
                  (x1 - x0) * conv.batch};
            }
          }
          if (count > 0 || c == 0) {
            const int rows = static_cast<int>(row_of[t + 1] - row_of[t]);
            strided_gemm(rows, vecs, valid, runs.data(), count, row_of[t], strides, c > 0, sum);
          }
        });
      }
    };
    const auto store_units = [&](int64_t begin, int64_t end, float* sums) {
      for_units(begin, end, sums, [&](int64_t t, const float* tile, int64_t group, int64_t tap) {
        float* to = target + (group * conv.group_out() + row_of[t]) * out_stride + start * in_stride +
            tap_offsets[tap];
        const int rows = static_cast<int>(row_of[t + 1] - row_of[t]);
        if (in_stride == 1) {
          store_tile(tile, rows, vecs, valid, to, out_stride);
          return;
        }
        for (int64_t m = 0; m < rows; ++m, to += out_stride, tile += vecs * kLanes) {
          for (int64_t i = 0; i < valid; ++i) {
            to[i * in_stride] = tile[i];
          }
        }
      });
    };
    const int64_t begin = units * (task % pieces) / pieces, end = units * (task % pieces + 1) / pieces;
    const int64_t held = std::min(std::max<int64_t>(kHeldSums / tile_elements, 1), std::max<int64_t>(end - begin, 1));
    float* sum = scratch<float>(kRows, held * tile_elements);
    std::vector<Run> runs(chunk);
    for (int64_t first = begin; first < end; first += held) {
      const int64_t last = std::min(first + held, end);
      sum_units(first, last, sum, runs);
      store_units(first, last, sum);
    }
  }};
}

#define TINYTL_TRAINED_CONV(T)                                                                                      \
  template Tasks pad_input<T>(const TrainedConv&, const T*, float*);                                                \
  template Tasks trained_conv_forward<T>(const TrainedConv&, const float*, const PackedWeight&, T*);                \
  template Tasks trained_conv_backward_input<T>(const TrainedConv&, const float*, const PackedWeight&, T*);
TINYTL_TRAINED_CONV(float)
TINYTL_TRAINED_CONV(c10::BFloat16)
TINYTL_TRAINED_CONV(c10::Half)
#undef TINYTL_TRAINED_CONV

} // namespace tinytl::cpu
