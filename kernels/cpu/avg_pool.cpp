// Average pooling over channels_last tensors: y = sum over the window / divisor. Nothing is saved.
//
// The backward gathers: a task owns rows of dx and reads the windows that reach them, so that no two threads add to one
// value and the order of the additions is fixed.
#include "pool_window.h"

namespace tinytl::cpu {
namespace {

// What PyTorch divides the sums by: the override, or the window's height * width, each with or without the padding.
struct Divisors {
  std::vector<float> rows, columns;

  Divisors(const PoolShape& s, bool count_include_pad, int64_t divisor_override)
      : rows(lengths(s, 0, count_include_pad, divisor_override)),
        columns(lengths(s, 1, count_include_pad, divisor_override == 0 ? 0 : 1)) {}

  float operator()(int64_t row, int64_t column) const {
    return rows[row] * columns[column];
  }

 private:
  static std::vector<float> lengths(const PoolShape& s, int side, bool count_include_pad, int64_t constant) {
    const int64_t size = side == 0 ? s.height : s.width;
    std::vector<float> lengths(side == 0 ? s.out_height : s.out_width, static_cast<float>(constant));
    for (int64_t w = 0; constant == 0 && w < static_cast<int64_t>(lengths.size()); ++w) {
      const int64_t start = w * s.stride[side] - s.padding[side];
      const int64_t end = std::min(start + s.kernel[side], size + s.padding[side]);
      lengths[w] = static_cast<float>(
          count_include_pad ? end - start : std::min(end, size) - std::max<int64_t>(start, 0));
    }
    return lengths;
  }
};

} // namespace

at::Tensor avg_pool2d_forward(
    const at::Tensor& x,
    at::IntArrayRef kernel_size,
    at::IntArrayRef stride,
    at::IntArrayRef padding,
    bool ceil_mode,
    bool count_include_pad,
    int64_t divisor_override) {
  const PoolShape s(x.sizes(), kernel_size, stride, padding, {1, 1}, ceil_mode);
  const at::Tensor input = in_channels_last(x);
  at::Tensor out =
      empty_tensor({s.batch, s.channels, s.out_height, s.out_width}, x.options(), at::MemoryFormat::ChannelsLast);
  const Divisors divisors(s, count_include_pad, divisor_override);
  const std::vector<Span> row_spans = window_spans(s, 0), column_spans = window_spans(s, 1);
  with_storage_type(x.scalar_type(), "input", [&](auto zero) {
    using T = decltype(zero);
    const T* source = input.data_ptr<T>();
    T* target = out.data_ptr<T>();
    const int64_t row_values = s.out_width * s.channels * s.kernel[0] * s.kernel[1];
    for_rows(s.batch, s.out_height, row_values, [&](int64_t image, int64_t row) {
      const Span rows = row_spans[row];
      const int64_t channels = s.channels;
      const int64_t row_stride = s.width * channels;
      for (int64_t column = 0; column < s.out_width; ++column) {
        const Span columns = column_spans[column];
        const int64_t tap_rows = rows.end - rows.begin;
        const int64_t tap_columns = columns.end - columns.begin;
        const T* first = source +
            ((image * s.height + rows.start + rows.begin) * s.width + columns.start + columns.begin) * channels;
        T* pixel = target + ((image * s.out_height + row) * s.out_width + column) * channels;
        const Vec divisor(divisors(row, column));
        for_channel_blocks(channels, [&](auto block) TINYTL_LAMBDA_INLINE {
          Vec sum[block.VECS];
          for (int v = 0; v < block.VECS; ++v) {
            sum[v] = Vec(0.f);
          }
          for (int64_t i = 0; i < tap_rows; ++i) {
            for (int64_t j = 0; j < tap_columns; ++j) {
              const T* from = first + i * row_stride + j * channels + block.start;
              TINYTL_UNROLL
              for (int v = 0; v < block.VECS; ++v) {
                sum[v] = sum[v] + block.load(from, v);
              }
            }
          }
          TINYTL_UNROLL
          for (int v = 0; v < block.VECS; ++v) {
            block.store(pixel + block.start, v, sum[v] / divisor);
          }
        });
      }
    });
  });
  return out;
}

at::Tensor avg_pool2d_backward(
    const at::Tensor& grad_output,
    at::IntArrayRef input_size,
    at::IntArrayRef kernel_size,
    at::IntArrayRef stride,
    at::IntArrayRef padding,
    bool ceil_mode,
    bool count_include_pad,
    int64_t divisor_override) {
  const PoolShape s(input_size, kernel_size, stride, padding, {1, 1}, ceil_mode);
  check_size(
      grad_output, "grad_output", {s.batch, s.channels, s.out_height, s.out_width}, grad_output.scalar_type());
  const at::Tensor grad = in_channels_last(grad_output);
  at::Tensor grad_input = empty_tensor(input_size, grad.options(), at::MemoryFormat::ChannelsLast);
  const Divisors divisors(s, count_include_pad, divisor_override);
  const Covers row_covers(s, 0), column_covers(s, 1);
  with_storage_type(grad.scalar_type(), "grad_output", [&](auto zero) {
    using T = decltype(zero);
    const T* source = grad.data_ptr<T>();
    T* target = grad_input.data_ptr<T>();
    for_rows(s.batch, s.height, s.width * s.channels * 4, [&](int64_t image, int64_t row) {
      const auto *rows = row_covers.begin(row), *rows_end = row_covers.end(row);
      for (int64_t column = 0; column < s.width; ++column) {
        const auto *columns = column_covers.begin(column), *columns_end = column_covers.end(column);
        T* pixel = target + ((image * s.height + row) * s.width + column) * s.channels;
        for_channel_blocks(s.channels, [&](auto block) TINYTL_LAMBDA_INLINE {
          Vec sum[block.VECS];
          for (int v = 0; v < block.VECS; ++v) {
            sum[v] = Vec(0.f);
          }
          for (const auto* r = rows; r != rows_end; ++r) {
            for (const auto* q = columns; q != columns_end; ++q) {
              const int64_t window = (image * s.out_height + r->window) * s.out_width + q->window;
              const T* from = source + window * s.channels + block.start;
              const Vec divisor(divisors(r->window, q->window));
              TINYTL_UNROLL
              for (int v = 0; v < block.VECS; ++v) {
                sum[v] = sum[v] + block.load(from, v) / divisor;
              }
            }
          }
          TINYTL_UNROLL
          for (int v = 0; v < block.VECS; ++v) {
            block.store(pixel + block.start, v, sum[v]);
          }
        });
      }
    });
  });
  return grad_input;
}

} // namespace tinytl::cpu
