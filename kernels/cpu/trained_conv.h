// Trained grouped k x k convolution (square window, one stride, the same padding on all sides) and its gradients, as
// small GEMMs over taps (strided_gemm.h).
//
//     y[p, o]       = sum over taps t, channels i of   x[s p + t, i] W[o, i, t]
//     dx[q, i]      = sum over taps t, channels o of   dy[(q - t) / s, o] W[o, i, t]
//     dW[o, i, t]   = sum over pixels p of             dy[p, o] x[s p + t, i]
//
// Images are kept *position-major*, (H, W, N, C): neighbouring pixels of all images are rows with one stride between
// them, so that tiles are full whatever the size of the batch and of the image, and a tile at the border leaves out
// the taps that fall outside. Columns are padded with zeros, because a tile may cover several, and those of a strided
// window are kept apart by their remainder (phases), because its taps then read evenly spaced rows again.
#pragma once

#include "common.h"
#include "parallel.h"
#include "strided_gemm.h"

#include <vector>

namespace tinytl::cpu {

struct TrainedConv {
  int64_t batch, in_channels, height, width;
  int64_t out_channels, out_height, out_width;
  int64_t kernel, stride, padding, groups;
  // The padded input: (height, stride phases, phase_width, batch, in_channels).
  int64_t phase_width;
  // The padded output gradient: (out_height, gradient_width = left + out_width + some, batch, out_channels).
  int64_t left, gradient_width;

  TrainedConv(at::IntArrayRef input, const at::Tensor& weight, int64_t stride, int64_t groups);

  int64_t taps() const {
    return kernel * kernel;
  }
  int64_t group_in() const {
    return in_channels / groups;
  }
  int64_t group_out() const {
    return out_channels / groups;
  }
  int64_t pixels() const { // of the output, all images
    return out_height * out_width * batch;
  }
  int64_t padded_input() const {
    return height * stride * phase_width * batch * in_channels;
  }
  int64_t padded_gradient() const {
    return out_height * gradient_width * batch * out_channels;
  }
};

// Columns of a weight, in panels of at most kTileVecs vectors.
struct ColumnPanels {
  int64_t columns, vecs, count;
  int64_t narrow, wider; // vectors of every panel, and how many of the panels have one more

  explicit ColumnPanels(int64_t columns)
      : columns(columns),
        vecs(ceil_div(columns, kLanes)),
        count(ceil_div(vecs, kTileVecs)),
        narrow(vecs / count),
        wider(vecs % count) {}

  int width_vecs(int64_t panel) const {
    return static_cast<int>(narrow + (panel < wider ? 1 : 0));
  }
  int64_t start(int64_t panel) const { // first column
    return (narrow * panel + std::min(panel, wider)) * kLanes;
  }
  int64_t padded() const {
    return vecs * kLanes;
  }
  int64_t valid(int64_t panel) const { // columns that exist
    return std::min<int64_t>(width_vecs(panel) * kLanes, columns - start(panel));
  }
};

// A weight as a (terms x columns) matrix per group and tap, packed as [group][panel][tap][term][column]. Terms are input
// channels; transposed, output channels.
class PackedWeight {
 public:
  int64_t groups, taps, terms;
  ColumnPanels panels;

  PackedWeight(const TrainedConv& conv, const at::Tensor& weight, bool transposed);
  PackedWeight(const PackedWeight&) = delete;

  // Nothing is packed before they have run.
  Tasks packing();

  const float* panel(int64_t group, int64_t panel) const {
    return packed_.data_ptr<float>() + offset(group, panel);
  }
  int64_t bytes() const {
    return packed_.numel() * static_cast<int64_t>(sizeof(float));
  }

 private:
  at::Tensor source_; // float32, channels_last
  int64_t in_channels_, out_channels_; // of a group
  bool transposed_;
  at::Tensor packed_;

  int64_t offset(int64_t group, int64_t panel) const {
    return (group * panels.padded() + panels.start(panel)) * taps * terms;
  }
  float* data(int64_t group, int64_t panel) {
    return packed_.data_ptr<float>() + offset(group, panel);
  }
  void pack_columns(const float* rows, int64_t count, int64_t group, int64_t first);
  void pack_terms(const float* rows, int64_t count, int64_t group, int64_t first);
};

// A trained 1x1 convolution of rows of channels, its weight (O, I, 1, 1): y = x W, or x W^T transposed.
class TrainedPointwise {
 public:
  TrainedPointwise(const at::Tensor& weight, bool transposed);
  Tasks packing() {
    return weight_.packing();
  }
  void rows(const float* x, int64_t count, float* y) const;

 private:
  int64_t in_channels_, out_channels_; // of x and of y
  PackedWeight weight_;
};

// The tasks below read and write what they are given, which must outlive them.

// input: channels_last (N, C, H, W). padded: padded_input() floats.
template <class T>
Tasks pad_input(const TrainedConv& conv, const T* input, float* padded);

// y: (out_height, out_width, batch, out_channels).
template <class T>
Tasks trained_conv_forward(const TrainedConv& conv, const float* padded, const PackedWeight& weight, T* y);

// Zeros in the padding columns of the padded output gradient.
Tasks zero_padding(const TrainedConv& conv, float* grad);

// dx: channels_last (N, C, H, W). grad: the padded output gradient, its padding columns zero; weight: transposed.
template <class T>
Tasks trained_conv_backward_input(const TrainedConv& conv, const float* grad, const PackedWeight& weight, T* dx);

// dW, float32, in the shape and strides of grad_weight.
Tasks trained_conv_backward_weight(
    const TrainedConv& conv, const float* padded, const float* grad, const at::Tensor& grad_weight);

// Calls body(first row, rows) for tiles of nearly equal height, at most max_tile_rows(vecs). Heights are whole
// multiples of `unit` rows where that fits the registers: then a tile does not straddle pixels.
template <class Body>
void for_row_tiles(int64_t rows, int64_t unit, int vecs, const Body& body) {
  const int64_t most = max_tile_rows(vecs);
  if (unit <= most && most % unit == 0) {
    for (int64_t r = 0; r < rows; r += most) {
      body(r, static_cast<int>(std::min(most, rows - r)));
    }
    return;
  }
  const int64_t tiles = ceil_div(rows, most), low = rows / std::max<int64_t>(tiles, 1), higher = rows - low * tiles;
  for (int64_t t = 0, r = 0; t < tiles; ++t) {
    const int64_t height = low + (t < higher ? 1 : 0);
    body(r, static_cast<int>(height));
    r += height;
  }
}

// Which pixel and which image a row is of, for rows that follow each other.
struct RowPosition {
  int64_t batch, pixel = 0, image = 0;

  void advance(int64_t rows) {
    for (image += rows; image >= batch; image -= batch) {
      ++pixel;
    }
  }
  RowPosition after(int64_t rows) const {
    RowPosition position = *this;
    position.advance(rows);
    return position;
  }
};

// target[m * stride + n] = tile[m][n] for n < valid; all vectors but the last are whole.
template <class T>
TINYTL_INLINE void store_tile(const float* tile, int rows, int vecs, int64_t valid, T* target, int64_t stride) {
  const int64_t last = valid - (vecs - 1) * kLanes;
  for (int m = 0; m < rows; ++m, target += stride) {
    for (int v = 1; v < vecs; ++v, tile += kLanes) {
      store_channels(target + (v - 1) * kLanes, Vec::loadu(tile));
    }
    store_channels(target + (vecs - 1) * kLanes, Vec::loadu(tile), last);
    tile += kLanes;
  }
}

} // namespace tinytl::cpu
