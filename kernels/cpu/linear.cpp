// A linear layer of few rows, trained, with its derivative:
//
//     y[n, o] = sum over i of x[n, i] W[o, i]  + b[o]
//
//     dx[n, i] = sum over o of dy[n, o] W[o, i]      dW[o, i] = sum over n of dy[n, o] x[n, i]      db[o] = sum of dy[n, o]
//
// A classifier has a million weights and a row an image: its time is that of moving the weights. Forward reads them once;
// backward reads them once for dx and writes dW past the caches, both in one pass. A GEMM library packs W, or dW, in each
// of the three products, and moves them twice.
#include "autograd.h"
#include "strided_gemm.h"

#include <ATen/autocast_mode.h>
#include <ATen/ops/linear.h>
#include <torch/library.h>

#include <array>

namespace tinytl::cpu {
namespace {

// Beyond so many rows the arithmetic counts, and with packed operands it is faster.
constexpr int64_t kMostRows = 32;

// Forward: rows of x and of W whose products are summed in registers, at most so many vectors in one chain, because
// rounding errors grow with its length.
constexpr int kInputRows = kTileSums / kTileVecs;
constexpr int kWeightRows = kTileVecs;
constexpr int64_t kChainVecs = 96;

// Backward: rows of W that are gone through together, a panel of columns at a time.
constexpr int64_t kBlockRows = 16;
constexpr int64_t kPanel = kTileVecs * kLanes;

// sums[n][o] = sum over i < depth of x[n][i] w[o][i]
template <int N, int O>
void dots(const float* x, const float* w, int64_t depth, float* sums) {
  std::fill(sums, sums + N * O, 0.f);
  for (int64_t begin = 0; begin < depth; begin += kChainVecs * kLanes) {
    const int64_t end = std::min(begin + kChainVecs * kLanes, depth);
    Vec sum[N][O];
    TINYTL_UNROLL
    for (int n = 0; n < N; ++n) {
      TINYTL_UNROLL
      for (int o = 0; o < O; ++o) {
        sum[n][o] = Vec(0.f);
      }
    }
    const auto add = [&](const auto& load) TINYTL_LAMBDA_INLINE {
      Vec weights[O];
      TINYTL_UNROLL
      for (int o = 0; o < O; ++o) {
        weights[o] = load(w + o * depth);
      }
      TINYTL_UNROLL
      for (int n = 0; n < N; ++n) {
        const Vec value = load(x + n * depth);
        TINYTL_UNROLL
        for (int o = 0; o < O; ++o) {
          sum[n][o] = at::vec::fmadd(value, weights[o], sum[n][o]);
        }
      }
    };
    int64_t i = begin;
    for (; i + kLanes <= end; i += kLanes) {
      add([=](const float* row) TINYTL_LAMBDA_INLINE { return load_once(row + i); });
    }
    if (i < end) {
      add([=](const float* row) TINYTL_LAMBDA_INLINE { return load_channels(row + i, end - i); });
    }
    for (int n = 0; n < N; ++n) {
      for (int o = 0; o < O; ++o) {
        sums[n * O + o] += at::vec::vec_reduce_all<float>([](Vec& a, Vec& b) { return a + b; }, sum[n][o]);
      }
    }
  }
}

using Dots = void (*)(const float*, const float*, int64_t, float*);

template <int O, size_t... N>
constexpr std::array<Dots, sizeof...(N)> dots_of(std::index_sequence<N...>) {
  return {dots<static_cast<int>(N) + 1, O>...};
}

at::Tensor linear_forward(const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& bias) {
  static constexpr auto kWide = dots_of<kWeightRows>(std::make_index_sequence<kInputRows>());
  static constexpr auto kSingle = dots_of<1>(std::make_index_sequence<kInputRows>());
  const int64_t rows = x.size(0), depth = x.size(1), outputs = weight.size(0);
  at::Tensor y = empty_tensor({rows, outputs}, x.options());
  const float *input = x.data_ptr<float>(), *weights = weight.data_ptr<float>();
  const float* added = bias.has_value() ? bias->data_ptr<float>() : nullptr;
  float* output = y.data_ptr<float>();
  parallel_pieces(0, outputs, kWeightRows, [&](int64_t begin, int64_t end) {
    float sums[kInputRows * kWeightRows];
    for (int64_t o = begin, width; o < end; o += width) {
      width = end - o >= kWeightRows ? kWeightRows : 1;
      for (int64_t n = 0; n < rows; n += kInputRows) {
        const int64_t height = std::min<int64_t>(kInputRows, rows - n);
        (width == 1 ? kSingle : kWide)[height - 1](input + n * depth, weights + o * depth, depth, sums);
        for (int64_t m = 0; m < height; ++m) {
          for (int64_t c = 0; c < width; ++c) {
            output[(n + m) * outputs + o + c] = sums[m * width + c] + (added == nullptr ? 0.f : added[o + c]);
          }
        }
      }
    }
  });
  return y;
}

// A part of a row of dW, past the caches where its vectors are aligned.
void store_gradient(const float* from, int64_t count, float* to) {
  if (reinterpret_cast<uintptr_t>(to) % sizeof(Vec) == 0) {
    for (; count >= kLanes; from += kLanes, to += kLanes, count -= kLanes) {
      store_past_caches(to, Vec::loadu(from));
    }
  }
  copy_row(from, count, to);
}

// The gradients of input, weight and bias, undefined where not needed. x: for that of the weight. sizes: of the weight,
// which is there for that of the input.
variable_list linear_backward(
    const at::Tensor& grad_output,
    const at::Tensor& x,
    const at::Tensor& weight,
    const std::array<int64_t, 2>& sizes,
    const std::array<bool, 3>& need) {
  const int64_t rows = grad_output.size(0), outputs = sizes[0], depth = sizes[1];
  const int64_t panels = ceil_div(depth, kPanel), width = panels * kPanel;
  const int64_t pieces = piece_count(ceil_div(outputs, kBlockRows));
  const bool need_input = need[0], need_weight = need[1], need_bias = need[2];
  const auto options = grad_output.options();
  at::Tensor grad_input = need_input ? empty_tensor({rows, depth}, options) : at::Tensor();
  at::Tensor grad_weight = need_weight ? empty_tensor(sizes, options) : at::Tensor();
  at::Tensor grad_bias = need_bias ? empty_tensor({outputs}, options) : at::Tensor();
  const float *grad = grad_output.data_ptr<float>(), *weights = data_or_null<float>(weight);
  const float* input = data_or_null<float>(x);
  float* const target = data_or_null<float>(grad_weight);
  // dx by pieces of W: (pieces, panels, rows, columns); rows of the last panel are shorter.
  const at::Tensor partial = empty_tensor({need_input ? pieces : 0, rows, width}, options);
  float* const sums = data_or_null<float>(partial);

  // `count` <= kBlockRows rows of W, or x, from `from` on as the GEMM reads them: itself, or columns padded with zeros.
  const auto padded = [&](const float* from, int64_t count, int64_t columns, float* copy) {
    if (columns % kLanes == 0) {
      return std::pair(from, depth);
    }
    for (int64_t k = 0; k < count; ++k) {
      copy_row(from + k * depth, columns, copy + k * kPanel);
      std::fill(copy + k * kPanel + columns, copy + k * kPanel + round_up(columns, kLanes), 0.f);
    }
    return std::pair<const float*, int64_t>(copy, kPanel);
  };
  const auto block = [&](int64_t o, int64_t count, int64_t begin, bool accumulate, float* piece) {
    const int64_t columns = std::min(kPanel, depth - begin);
    const int vecs = static_cast<int>(ceil_div(columns, kLanes));
    const int64_t most = max_tile_rows(vecs);
    alignas(64) float copy[std::max(kBlockRows, kMostRows) * kPanel];
    if (need_input) {
      const auto [values, step] = padded(weights + o * depth + begin, count, columns, copy);
      for (int64_t n = 0; n < rows; n += most) {
        const Run run{grad + n * outputs + o, values, count};
        const int height = static_cast<int>(std::min(most, rows - n));
        float* sum = piece + begin * rows + n * vecs * kLanes;
        strided_gemm(height, vecs, columns, &run, 1, 0, {outputs, 1, step}, accumulate, sum);
      }
    }
    if (need_weight) {
      alignas(64) float tile[kTileElements];
      const auto [values, step] = padded(input + begin, rows, columns, copy);
      for (int64_t k = 0; k < count; k += most) {
        const Run run{grad + o + k, values, rows};
        const int height = static_cast<int>(std::min(most, count - k));
        strided_gemm(height, vecs, columns, &run, 1, 0, {1, outputs, step}, false, tile);
        for (int64_t m = 0; m < height; ++m) {
          store_gradient(tile + m * vecs * kLanes, columns, target + (o + k + m) * depth + begin);
        }
      }
    }
  };
  if (need_input || need_weight) {
    parallel_tasks(pieces, [&](int64_t task) {
      const int64_t first = outputs * task / pieces, last = outputs * (task + 1) / pieces;
      for (int64_t o = first; o < last; o += kBlockRows) {
        for (int64_t begin = 0; begin < depth; begin += kPanel) {
          block(o, std::min(kBlockRows, last - o), begin, o > first, sums + task * rows * width);
        }
      }
      fence_past_caches();
    });
  }
  if (need_input) {
    float* const to = grad_input.data_ptr<float>();
    parallel_tasks(panels, [&](int64_t panel) {
      const int64_t begin = panel * kPanel, columns = std::min(kPanel, depth - begin);
      for (int64_t n = 0; n < rows; ++n) {
        for (int64_t c = 0; c < columns; c += kLanes) {
          const float* from = sums + begin * rows + n * round_up(columns, kLanes) + c;
          Vec sum = Vec::loadu(from);
          for (int64_t p = 1; p < pieces; ++p) {
            sum = sum + Vec::loadu(from + p * rows * width);
          }
          store_channels(to + n * depth + begin + c, sum, columns - c);
        }
      }
    });
  }
  if (need_bias) {
    for (int64_t o = 0; o < outputs; ++o) {
      float sum = 0.f;
      for (int64_t n = 0; n < rows; ++n) {
        sum += grad[n * outputs + o];
      }
      grad_bias.data_ptr<float>()[o] = sum;
    }
  }
  return {grad_input, grad_weight, grad_bias};
}

// Kept, as by PyTorch's: the input for the weight's gradient, the weight for the input's.
struct Linear : Function<Linear> {
  struct State {
    std::array<int64_t, 3> edges; // to input, weight and bias
    std::array<int64_t, 2> sizes; // of the weight
  };

  static at::Tensor forward(
      AutogradContext* ctx, const at::Tensor& input, const at::Tensor& weight, const OptionalTensor& bias) {
    TINYTL_RECORDED("linear_forward");
    at::Tensor output = linear_forward(input, weight, bias);
    ctx->save_for_backward(
        {weight.requires_grad() ? input : at::Tensor(), input.requires_grad() ? weight : at::Tensor()});
    Edges edges;
    keep(ctx, State{{edges.of(input), edges.of(weight), edges.of(bias)}, {weight.size(0), weight.size(1)}});
    return output;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto saved = ctx->get_saved_variables();
    const State& state = kept<State>(ctx);
    const auto need = needed(ctx, state.edges);
    const at::Tensor& grad = grads[0];
    if (at::GradMode::is_enabled()) { // to be differentiated again
      return {
          need[0] ? grad.mm(saved[1]) : at::Tensor(), need[1] ? grad.t().mm(saved[0]) : at::Tensor(),
          need[2] ? grad.sum(0) : at::Tensor()};
    }
    TINYTL_RECORDED("linear_backward");
    return linear_backward(grad.contiguous(), saved[0], saved[1], state.sizes, need);
  }
};

// Whether a call with these tensors would come to a kernel for CPU tensors and nothing else but autocast would see it: no
// subclass, no mode, no transform, no tracer.
bool plain(const at::Tensor& input, const at::Tensor& weight, const OptionalTensor& bias) {
  using c10::DispatchKey;
  const auto tls = c10::impl::tls_local_dispatch_key_set();
  c10::DispatchKeySet keys = tls.included_ | input.key_set() | weight.key_set();
  if (bias.has_value()) {
    keys = keys | bias->key_set();
  }
  constexpr c10::DispatchKeySet kUsual(
      {DispatchKey::CPU, DispatchKey::BackendSelect, DispatchKey::ADInplaceOrView, DispatchKey::AutogradCPU,
       DispatchKey::AutocastCPU});
  return kUsual.isSupersetOf(keys);
}

// Of any dtype of input.
bool few_rows(const at::Tensor& input, const at::Tensor& weight, const OptionalTensor& bias) {
  const auto in_float = [](const at::Tensor& tensor, int64_t dimensions) {
    return tensor.dim() == dimensions && tensor.scalar_type() == at::kFloat && tensor.is_contiguous();
  };
  return in_float(weight, 2) && input.dim() == 2 && input.is_contiguous() && input.numel() > 0 &&
      weight.numel() > 0 && input.size(0) <= kMostRows && input.size(1) == weight.size(1) &&
      (!bias.has_value() || (in_float(*bias, 1) && bias->size(0) == weight.size(0)));
}

// at::linear of any arguments. Under autocast only the rows are rounded: weights are multiplied as they are, and neither
// they nor their gradient are copied into another dtype.
at::Tensor linear(const at::Tensor& input, const at::Tensor& weight, const OptionalTensor& bias) {
  if (plain(input, weight, bias) && few_rows(input, weight, bias)) {
    const bool autocast = at::autocast::is_autocast_enabled(at::kCPU);
    const auto dtype = autocast ? at::autocast::get_autocast_dtype(at::kCPU) : at::kFloat;
    if (autocast && (input.scalar_type() == at::kFloat || input.scalar_type() == dtype)) {
      return Linear::apply(input.to(dtype).to(at::kFloat), weight, bias).to(dtype);
    }
    if (!autocast && input.scalar_type() == at::kFloat) {
      return Linear::apply(input, weight, bias);
    }
  }
  return at::linear(input, weight, bias);
}

} // namespace

TORCH_LIBRARY_FRAGMENT(tinytl_cpu, m) {
  m.def("linear(Tensor input, Tensor weight, Tensor? bias) -> Tensor", TORCH_FN(linear));
}

} // namespace tinytl::cpu
