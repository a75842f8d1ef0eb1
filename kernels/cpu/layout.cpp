// Images between PyTorch's two layouts, (N, C, H, W) and channels_last (N, H, W, C): transposed matrices, in blocks that
// stay in the first-level cache. ATen's copy walks along one of the two layouts and waits for the other, element by
// element: of float32 it takes four times as long, and of half precisions no longer.
#include "common.h"
#include "parallel.h"

namespace tinytl::cpu {
namespace {

constexpr int64_t kBlockSide = 64;
constexpr int64_t kBlockElements = 8192;

// (images, rows, columns) -> (images, columns, rows)
void transpose_images(const float* source, float* target, int64_t images, int64_t rows, int64_t columns) {
  const int64_t height = std::min(rows, kBlockSide); // of a block
  const int64_t width = std::min(columns, std::max(kBlockElements / height, kBlockSide));
  const int64_t down = ceil_div(rows, height), across = ceil_div(columns, width);
  parallel_tasks(images * down * across, [&](int64_t task) {
    const int64_t image = task / (down * across) * rows * columns;
    const int64_t m = task / across % down * height, n = task % across * width;
    transpose(
        source + image + m * columns + n,
        columns,
        target + image + n * rows + m,
        rows,
        std::min(height, rows - m),
        std::min(width, columns - n));
  });
}

} // namespace

at::Tensor in_layout(const at::Tensor& x, bool channels_last) {
  const auto format = channels_last ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous;
  const auto other = channels_last ? at::MemoryFormat::Contiguous : at::MemoryFormat::ChannelsLast;
  const bool transposed = x.dim() == 4 && x.numel() > 0 && !x.is_contiguous(format) && x.is_contiguous(other);
  if (!transposed || x.scalar_type() != at::kFloat) {
    return x.contiguous(format);
  }
  at::Tensor result = empty_tensor(x.sizes(), at::kFloat, format);
  const int64_t channels = x.size(1), pixels = x.size(2) * x.size(3);
  const int64_t rows = channels_last ? channels : pixels, columns = channels_last ? pixels : channels;
  transpose_images(x.data_ptr<float>(), result.data_ptr<float>(), x.size(0), rows, columns);
  return result;
}

} // namespace tinytl::cpu
