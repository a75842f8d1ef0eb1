// out = main + bilinear upsampling of branch (align_corners=False), and its adjoint:
//
//     forward    out[r, q] = main[r, q] + sum over 2 x 2 neighbours of weight * branch
//     backward   dbranch = (row weights)^T (column weights)^T dout            dmain is dout itself
//
// Forward reads main and branch once and writes out, which may be main. Backward is a gather: a task owns rows of
// dbranch. Both work on one weighted sum of rows, float32 in scratch, and then weigh its columns.
#include "operators.h"
#include "parallel.h"

namespace tinytl::cpu {
namespace {

// Interpolation along one side: out position o reads low[o] with 1 - weight[o] and high[o] with weight[o].
struct Axis {
  std::vector<int64_t> low, high;
  std::vector<float> weight;

  Axis(int64_t in, int64_t out) : low(out), high(out), weight(out) {
    const float scale = static_cast<float>(in) / static_cast<float>(out);
    for (int64_t o = 0; o < out; ++o) {
      const float source = std::max((static_cast<float>(o) + 0.5f) * scale - 0.5f, 0.f);
      low[o] = std::min(static_cast<int64_t>(source), in - 1);
      high[o] = std::min(low[o] + 1, in - 1);
      weight[o] = std::min(std::max(source - static_cast<float>(low[o]), 0.f), 1.f);
    }
  }
  // low and high grow with o: the out positions that read `i` are neighbours, [begin, end).
  int64_t begin(int64_t i) const {
    return std::lower_bound(high.begin(), high.end(), i) - high.begin();
  }
  int64_t end(int64_t i) const {
    return std::upper_bound(low.begin(), low.end(), i) - low.begin();
  }
  // How much of `i` out position o takes.
  float share(int64_t o, int64_t i) const {
    return (low[o] == i ? 1.f - weight[o] : 0.f) + (high[o] == i ? weight[o] : 0.f);
  }
};

// The same seen from the other side: in position i is read by count[i] out positions from first[i] on.
struct Readers {
  std::vector<int64_t> first, count;
  std::vector<float> all_shares;
  int64_t most = 0;

  Readers(const Axis& axis, int64_t in) : first(in), count(in) {
    for (int64_t i = 0; i < in; ++i) {
      first[i] = axis.begin(i);
      count[i] = axis.end(i) - first[i];
      most = std::max(most, count[i]);
    }
    all_shares.resize(in * most);
    for (int64_t i = 0; i < in; ++i) {
      for (int64_t j = 0; j < count[i]; ++j) {
        all_shares[i * most + j] = axis.share(first[i] + j, i);
      }
    }
  }
  at::ArrayRef<float> shares(int64_t i) const {
    return {all_shares.data() + i * most, static_cast<size_t>(count[i])};
  }
};

void check_image(const at::Tensor& tensor, const char* name) {
  TORCH_CHECK(tensor.dim() == 4, name, ": expected 4 dimensions (N, C, H, W), got ", tensor.sizes());
}

// out may be main.
void add_rows(const at::Tensor& main, const at::Tensor& branch, at::Tensor& out) {
  const int64_t channels = main.size(1), height = main.size(2), width = main.size(3);
  const int64_t branch_height = branch.size(2), branch_width = branch.size(3);
  TORCH_CHECK(
      branch.size(0) == main.size(0) && branch.size(1) == channels && branch.scalar_type() == main.scalar_type() &&
          branch_height > 0 && branch_width > 0,
      "branch: expected batch, channels and dtype of main ",
      main.sizes(),
      " (",
      main.scalar_type(),
      "), got ",
      branch.sizes(),
      " (",
      branch.scalar_type(),
      ")");
  const Axis rows(branch_height, height), columns(branch_width, width);
  const int64_t padded = padded_channels(channels);
  with_storage_type(main.scalar_type(), "main", [&](auto zero) {
    using T = decltype(zero);
    const T* base = main.data_ptr<T>();
    const T* source = branch.data_ptr<T>();
    T* target = out.data_ptr<T>();
    const int64_t grain = std::max<int64_t>(16384 / std::max<int64_t>(width * channels, 1), 1);
    parallel_pieces(0, main.size(0) * height, grain, [&](int64_t begin, int64_t end) {
      float* between = scratch<float>(kRows, branch_width * padded); // rows of the branch
      for (int64_t line = begin; line < end; ++line) {
        const int64_t image = line / height, row = line % height;
        const T* low = source + (image * branch_height + rows.low[row]) * branch_width * channels;
        const T* high = source + (image * branch_height + rows.high[row]) * branch_width * channels;
        const Vec down(rows.weight[row]), up(1.f - rows.weight[row]);
        for (int64_t column = 0; column < branch_width; ++column) {
          for (int64_t c = 0; c < channels; c += kLanes) {
            const int64_t at = column * channels + c, count = channels - c;
            (load_channels(low + at, count) * up + load_channels(high + at, count) * down)
                .store(between + column * padded + c);
          }
        }
        for (int64_t column = 0; column < width; ++column) {
          const int64_t at = (line * width + column) * channels;
          const float* left = between + columns.low[column] * padded;
          const float* right = between + columns.high[column] * padded;
          const Vec to_right(columns.weight[column]), to_left(1.f - columns.weight[column]);
          for (int64_t c = 0; c < channels; c += kLanes) {
            const Vec added = Vec::loadu(left + c) * to_left + Vec::loadu(right + c) * to_right;
            store_channels(target + at + c, load_channels(base + at + c, channels - c) + added, channels - c);
          }
        }
      }
    });
  });
}

} // namespace

at::Tensor upsample_add_forward(const at::Tensor& main, const at::Tensor& branch) {
  check_image(main, "main");
  check_image(branch, "branch");
  const auto nhwc = at::MemoryFormat::ChannelsLast;
  at::Tensor out = empty_tensor(main.sizes(), main.options(), nhwc);
  add_rows(main.contiguous(nhwc), branch.contiguous(nhwc), out);
  return out;
}

void upsample_add_(at::Tensor& main, const at::Tensor& branch) {
  check_image(main, "main");
  check_image(branch, "branch");
  TORCH_CHECK(
      main.is_contiguous(at::MemoryFormat::ChannelsLast),
      "main: expected a channels_last tensor to work on in place, got strides ",
      main.strides());
  add_rows(main, branch.contiguous(at::MemoryFormat::ChannelsLast), main);
}

at::Tensor upsample_add_backward(const at::Tensor& grad_output, at::IntArrayRef branch_size) {
  check_image(grad_output, "grad_output");
  const int64_t channels = grad_output.size(1), height = grad_output.size(2), width = grad_output.size(3);
  TORCH_CHECK(
      branch_size.size() == 4 && branch_size[0] == grad_output.size(0) && branch_size[1] == channels &&
          branch_size[2] > 0 && branch_size[3] > 0,
      "branch_size: expected batch and channels of grad_output ",
      grad_output.sizes(),
      ", got ",
      branch_size);
  const auto nhwc = at::MemoryFormat::ChannelsLast;
  const at::Tensor grad = grad_output.contiguous(nhwc);
  at::Tensor grad_branch = empty_tensor(branch_size, grad.options(), nhwc);
  const int64_t branch_height = branch_size[2], branch_width = branch_size[3];
  const Readers rows(Axis(branch_height, height), branch_height), columns(Axis(branch_width, width), branch_width);
  const int64_t padded = padded_channels(channels);
  with_storage_type(grad.scalar_type(), "grad_output", [&](auto zero) {
    using T = decltype(zero);
    const T* source = grad.data_ptr<T>();
    T* target = grad_branch.data_ptr<T>();
    const int64_t grain = std::max<int64_t>(16384 / std::max<int64_t>(width * channels, 1), 1);
    parallel_pieces(0, branch_size[0] * branch_height, grain, [&](int64_t begin, int64_t end) {
      float* combined = scratch<float>(kRows, width * padded);
      for (int64_t line = begin; line < end; ++line) {
        const int64_t image = line / branch_height, row = line % branch_height;
        const T* from = source + (image * height + rows.first[row]) * width * channels;
        const auto row_shares = rows.shares(row);
        for (int64_t column = 0; column < width; ++column) {
          for (int64_t c = 0; c < channels; c += kLanes) {
            Vec sum(0.f);
            const T* value = from + column * channels + c;
            for (const float share : row_shares) {
              sum = at::vec::fmadd(load_channels(value, channels - c), Vec(share), sum);
              value += width * channels;
            }
            sum.store(combined + column * padded + c);
          }
        }
        for (int64_t column = 0; column < branch_width; ++column) {
          const float* first = combined + columns.first[column] * padded;
          const auto column_shares = columns.shares(column);
          T* to = target + (line * branch_width + column) * channels;
          for (int64_t c = 0; c < channels; c += kLanes) {
            Vec sum(0.f);
            const float* value = first + c;
            for (const float share : column_shares) {
              sum = at::vec::fmadd(Vec::loadu(value), Vec(share), sum);
              value += padded;
            }
            store_channels(to + c, sum, channels - c);
          }
        }
      }
    });
  });
  return grad_branch;
}

} // namespace tinytl::cpu
