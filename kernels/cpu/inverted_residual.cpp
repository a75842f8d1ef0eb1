// What both directions of the inverted residual block share: argument checks, weight packing, cutting into tasks.
#include "inverted_residual.h"

#include "masked_gemm.h"
#include "packing.h"

namespace tinytl::cpu {
namespace {

template <class T>
Tasks depthwise_packing(const FrozenWeight& weight, float* packed) {
  return {1, [&weight, packed](int64_t) { pack_depthwise<T>(weight, packed); }};
}

} // namespace

BlockShape block_shape(
    at::IntArrayRef input_size,
    const OptionalTensor& expand_weight,
    const at::Tensor& depthwise_weight,
    const at::Tensor& project_weight,
    int64_t stride,
    at::IntArrayRef padding,
    const std::string& activation,
    bool residual) {
  TORCH_CHECK(input_size.size() == 4, "input: expected 4 dimensions (N, C, H, W), got ", input_size);
  TORCH_CHECK(padding.size() == 4, "padding: expected (top, bottom, left, right), got ", padding);
  for (const int64_t pad : padding) {
    TORCH_CHECK(pad >= 0, "padding: expected no negative number, got ", padding);
  }
  TORCH_CHECK(stride >= 1, "stride: expected at least 1, got ", stride);
  TORCH_CHECK(
      depthwise_weight.dim() == 4 && depthwise_weight.size(1) == 1,
      "depthwise_weight: expected (E, 1, kh, kw), got ",
      depthwise_weight.sizes());

  BlockShape s;
  s.batch = input_size[0];
  s.in_channels = input_size[1];
  s.height = input_size[2];
  s.width = input_size[3];
  s.expanded = depthwise_weight.size(0);
  s.kernel_height = depthwise_weight.size(2);
  s.kernel_width = depthwise_weight.size(3);
  s.stride = stride;
  s.pad_top = padding[0];
  s.pad_left = padding[2];
  s.has_expand = expand_weight.has_value() && expand_weight->defined();
  s.residual = residual;
  s.activation = parse_activation(activation);

  const int64_t span_height = s.height + padding[0] + padding[1] - s.kernel_height;
  const int64_t span_width = s.width + padding[2] + padding[3] - s.kernel_width;
  TORCH_CHECK(
      s.height > 0 && s.width > 0 && s.kernel_height > 0 && s.kernel_width > 0 && span_height >= 0 && span_width >= 0,
      "input: expected padded height and width of at least the depthwise kernel ",
      depthwise_weight.sizes(),
      ", got input ",
      input_size,
      " with padding ",
      padding);
  s.out_height = span_height / stride + 1;
  s.out_width = span_width / stride + 1;

  if (s.has_expand) {
    TORCH_CHECK(
        expand_weight->dim() == 4 && expand_weight->size(0) == s.expanded && expand_weight->size(1) == s.in_channels &&
            expand_weight->size(2) == 1 && expand_weight->size(3) == 1,
        "expand_weight: expected (",
        s.expanded,
        ", ",
        s.in_channels,
        ", 1, 1), got ",
        expand_weight->sizes());
  } else {
    TORCH_CHECK(
        s.expanded == s.in_channels,
        "depthwise_weight: without expand_weight expected as many channels as the input, ",
        s.in_channels,
        ", got ",
        s.expanded);
  }
  TORCH_CHECK(
      project_weight.dim() == 4 && project_weight.size(1) == s.expanded && project_weight.size(2) == 1 &&
          project_weight.size(3) == 1,
      "project_weight: expected (C_out, ",
      s.expanded,
      ", 1, 1), got ",
      project_weight.sizes());
  s.out_channels = project_weight.size(0);
  TORCH_CHECK(
      s.in_channels > 0 && s.expanded > 0 && s.out_channels > 0, "weights: expected at least one channel everywhere");
  TORCH_CHECK(
      !residual || (s.in_channels == s.out_channels && s.height == s.out_height && s.width == s.out_width),
      "residual: expected an output of the input's shape ",
      input_size,
      ", got ",
      s.out_channels,
      " channels, ",
      s.out_height,
      " x ",
      s.out_width);
  return s;
}

BlockWeights::BlockWeights(
    const OptionalTensor& expand_weight,
    const OptionalTensor& expand_scale,
    const at::Tensor& depthwise_weight,
    const OptionalTensor& depthwise_scale,
    const at::Tensor& project_weight,
    const OptionalTensor& project_scale)
    : depthwise(depthwise_weight, depthwise_scale, "depthwise_weight"),
      project(project_weight, project_scale, "project_weight") {
  if (expand_weight.has_value() && expand_weight->defined()) {
    expand.emplace(*expand_weight, expand_scale, "expand_weight");
  }
}

PackedWeights pack_block_forward(
    const BlockShape& s, const BlockWeights& weights, at::ScalarType dtype, bool with_project) {
  PackedWeights packed;
  with_storage_type(dtype, "input", [&](auto zero) {
    using T = decltype(zero);
    using Dot = typename DotFor<T>::type;
    const auto layout = BlockPack<Dot>::forward(s);
    packed.data = empty_tensor({layout.bytes()}, weights.project.values.options().dtype(at::kByte));
    *layout.spoiled(packed.data) = 0;
    const Panels panels(s.expanded), out_panels(s.out_channels, kWideGroups);
    if (weights.expand.has_value()) {
      const int64_t depth = packed_depth<Dot>(s.in_channels);
      packed.packing.push_back(
          pack_forward<Dot, T>(*weights.expand, depth, panels, 0, panels.count, layout.into(packed.data)));
    }
    packed.packing.push_back(depthwise_packing<T>(weights.depthwise, layout.depthwise(packed.data)));
    if (with_project) {
      packed.packing.push_back(pack_forward<Dot, T>(
          weights.project,
          panels.padded(),
          out_panels,
          0,
          out_panels.count,
          layout.out(packed.data),
          layout.spoiled(packed.data)));
    }
  });
  return packed;
}

PackedWeights pack_block_backward(
    const BlockShape& s,
    const BlockWeights& weights,
    at::ScalarType dtype,
    bool need_input,
    const uint8_t* mask_depthwise) {
  PackedWeights packed;
  with_storage_type(dtype, "grad_output", [&](auto zero) {
    using T = decltype(zero);
    using Dot = typename DotFor<T>::type;
    if (weights.expand.has_value()) {
      packed.stored_expand = packed_as_stored<T>(*weights.expand);
    }
    const auto layout = BlockPack<Dot>::backward(s, packed.stored_expand == nullptr);
    packed.data = empty_tensor({layout.bytes()}, weights.project.values.options().dtype(at::kByte));
    *layout.spoiled(packed.data) = 0;
    const Panels panels(s.expanded), in_panels(s.in_channels, kWideGroups);
    if constexpr (std::is_same_v<Dot, FloatDot>) {
      const int64_t bytes = s.batch * s.out_height * s.out_width * mask_bytes(s.expanded);
      packed.dots = mask_depthwise != nullptr && dots_pay(share_of_bits(mask_depthwise, bytes), s.out_channels);
    }
    if (packed.dots) {
      const Panels out_panels(s.out_channels, kWideGroups);
      packed.packing.push_back(pack_forward<Dot, T>(
          weights.project, panels.padded(), out_panels, 0, out_panels.count, layout.into(packed.data)));
    } else {
      const int64_t depth = packed_depth<Dot>(s.out_channels);
      packed.packing.push_back(
          pack_backward<Dot, T>(weights.project, depth, panels, 0, panels.count, layout.into(packed.data)));
    }
    packed.packing.push_back(depthwise_packing<T>(weights.depthwise, layout.depthwise(packed.data)));
    if (packed.stored_expand != nullptr && need_input) {
      packed.packing.push_back(look_for_spoiled(*weights.expand, layout.spoiled(packed.data)));
    } else if (weights.expand.has_value() && need_input) {
      packed.packing.push_back(pack_backward<Dot, T>(
          *weights.expand,
          panels.padded(),
          in_panels,
          0,
          in_panels.count,
          layout.out(packed.data),
          layout.spoiled(packed.data)));
    }
  });
  return packed;
}

} // namespace tinytl::cpu
