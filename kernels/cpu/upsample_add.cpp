// out = main + bilinear upsampling of branch (align_corners=False), and its adjoint; dmain is dout itself.
#include "operators.h"
#include "upsampling.h"

namespace tinytl::cpu {
namespace {

void check_image(const at::Tensor& tensor, const char* name) {
  TORCH_CHECK(tensor.dim() == 4, name, ": expected 4 dimensions (N, C, H, W), got ", tensor.sizes());
}

} // namespace

at::Tensor upsample_add_forward(const at::Tensor& main, const at::Tensor& branch) {
  check_image(main, "main");
  check_image(branch, "branch");
  TORCH_CHECK(
      branch.size(0) == main.size(0) && branch.size(1) == main.size(1) && branch.scalar_type() == main.scalar_type() &&
          branch.size(2) > 0 && branch.size(3) > 0,
      "branch: expected batch, channels and dtype of main ",
      main.sizes(),
      " (",
      main.scalar_type(),
      "), got ",
      branch.sizes(),
      " (",
      branch.scalar_type(),
      ")");
  const auto nhwc = at::MemoryFormat::ChannelsLast;
  at::Tensor out = empty_tensor(main.sizes(), main.options(), nhwc);
  const at::Tensor base = in_channels_last(main), added = in_channels_last(branch);
  const UpsampleAdd upsample(main.sizes(), branch.sizes());
  with_storage_type(main.scalar_type(), "main", [&](auto zero) {
    using T = decltype(zero);
    const T* source = added.data_ptr<T>();
    const auto read = [&](int64_t image, int64_t row, int64_t column, int64_t channel, int64_t lanes)
                          TINYTL_LAMBDA_INLINE {
      const int64_t pixel = (image * upsample.branch_height + row) * upsample.branch_width + column;
      return load_channels(source + pixel * upsample.channels + channel, lanes);
    };
    parallel_tasks({upsample.tasks(base.data_ptr<T>(), out.data_ptr<T>(), read)});
  });
  return out;
}

at::Tensor upsample_add_backward(const at::Tensor& grad_output, at::IntArrayRef branch_size) {
  check_image(grad_output, "grad_output");
  TORCH_CHECK(
      branch_size.size() == 4 && branch_size[0] == grad_output.size(0) && branch_size[1] == grad_output.size(1) &&
          branch_size[2] > 0 && branch_size[3] > 0,
      "branch_size: expected batch and channels of grad_output ",
      grad_output.sizes(),
      ", got ",
      branch_size);
  const auto nhwc = at::MemoryFormat::ChannelsLast;
  const at::Tensor grad = in_channels_last(grad_output);
  at::Tensor grad_branch = empty_tensor(branch_size, grad.options(), nhwc);
  const UpsampleAdjoint adjoint(grad.sizes(), branch_size);
  with_storage_type(grad.scalar_type(), "grad_output", [&](auto zero) {
    using T = decltype(zero);
    T* target = grad_branch.data_ptr<T>();
    const auto write = [&](int64_t image, int64_t row, int64_t column, int64_t channel, int64_t lanes, Vec value)
                           TINYTL_LAMBDA_INLINE {
      const int64_t pixel = (image * adjoint.branch_height + row) * adjoint.branch_width + column;
      store_channels(target + pixel * adjoint.channels + channel, value, lanes);
    };
    parallel_tasks({adjoint.tasks(grad.data_ptr<T>(), write)});
  });
  return grad_branch;
}

} // namespace tinytl::cpu
