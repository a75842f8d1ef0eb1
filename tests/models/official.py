"""A file as the authors of TinyTL publish it, and what it computes, written from their names alone.

Neither the shapes nor the forward come from the package: a tensor that lands in the wrong place changes the answer.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.memory.proxyless import STAGES

# Their network has two blocks that pass their input on; they hold no tensors, so the numbers 3 and 4 are left out.
NUMBERS = [0, 1, 2, *range(5, 22)]
PARTS = ("inverted_bottleneck", "depth_conv", "point_linear")


def block_table() -> list[tuple[int, int, int, int, int]]:
    """(inputs, outputs, kernel, expand ratio, stride) of the 20 blocks."""
    table, width = [], 32
    for out, stride, kernels, expands in STAGES:
        for position, (kernel, expand) in enumerate(zip(kernels, expands, strict=True)):
            table.append((width, out, kernel, expand, stride if position == 0 else 1))
            width = out
    return table


def official_state(*, norm: str = "gn", lite: bool = True, num_classes: int = 1000) -> dict[str, Tensor]:
    """Random tensors with the names and shapes of ``proxylessnas_mobile+lite_residual@imagenet@ws+gn``."""
    state: dict[str, Tensor] = {}

    def put_norm(name: str, channels: int) -> None:
        state[f"{name}.weight"] = 0.5 + torch.rand(channels)
        state[f"{name}.bias"] = 0.2 * torch.randn(channels)
        if norm == "bn":
            state[f"{name}.running_mean"] = 0.2 * torch.randn(channels)
            state[f"{name}.running_var"] = 0.5 + torch.rand(channels)
            state[f"{name}.num_batches_tracked"] = torch.tensor(1000)

    def put(name: str, out: int, inputs: int, kernel: int) -> None:
        scale = (2 / (inputs * kernel * kernel)) ** 0.5
        state[f"{name}.conv.weight"] = scale * torch.randn(out, inputs, kernel, kernel)
        put_norm(f"{name}.bn", out)

    put("first_conv", 32, 3, 3)
    resolution = 128
    for number, (cin, cout, kernel, expand, stride) in zip(NUMBERS, block_table(), strict=True):
        with_lite = lite and number > 0
        name = f"blocks.{number}.conv" + (".main_branch" if with_lite else "")
        if expand != 1:
            put(f"{name}.inverted_bottleneck", cin * expand, cin, 1)
        put(f"{name}.depth_conv", cin * expand, 1, kernel)
        put(f"{name}.point_linear", cout, cin * expand, 1)
        if with_lite:
            name = f"blocks.{number}.conv.lite_residual"
            kernel = 5 if resolution // 2 >= 5 else 3
            state[f"{name}.conv1.weight"] = 0.2 * torch.randn(cin, cin // 2, kernel, kernel)
            put_norm(f"{name}.bn1", cin)
            state[f"{name}.conv2.weight"] = 0.2 * torch.randn(cout, cin, 1, 1)
            put_norm(f"{name}.final_bn", cout)
            resolution //= stride
    put("feature_mix_layer", 1280, 320, 1)
    state["classifier.linear.weight"] = 0.03 * torch.randn(num_classes, 1280)
    state["classifier.linear.bias"] = 0.1 * torch.randn(num_classes)
    return state


def official_forward(state: dict[str, Tensor], x: Tensor, *, standardized: bool = True) -> Tensor:
    """The class scores of ``state``, with functions only."""

    def conv(name: str, x: Tensor, stride: int = 1) -> Tensor:
        weight = state[f"{name}.weight"]
        if standardized:
            rows = weight.flatten(1)
            rows = (rows - rows.mean(1, keepdim=True)) / (rows.std(1, keepdim=True) + 1e-5)
            weight = rows.view_as(weight)
        return F.conv2d(x, weight, None, stride, weight.shape[-1] // 2, groups=x.shape[1] // weight.shape[1])

    def norm(name: str, x: Tensor) -> Tensor:
        weight, bias = state[f"{name}.weight"], state[f"{name}.bias"]
        if f"{name}.running_mean" not in state:
            return F.group_norm(x, x.shape[1] // 8, weight, bias, 1e-3)
        mean, var = state[f"{name}.running_mean"], state[f"{name}.running_var"]
        return F.batch_norm(x, mean, var, weight, bias, False, 0.0, 1e-3)

    def layer(name: str, x: Tensor, stride: int = 1) -> Tensor:
        return norm(f"{name}.bn", conv(f"{name}.conv", x, stride))

    x = F.relu6(layer("first_conv", x, 2))
    for number, (cin, cout, _, _, stride) in zip(NUMBERS, block_table(), strict=True):
        name = f"blocks.{number}.conv"
        main = f"{name}.main_branch" if f"{name}.main_branch.depth_conv.conv.weight" in state else name
        out = x
        if f"{main}.inverted_bottleneck.conv.weight" in state:
            out = F.relu6(layer(f"{main}.inverted_bottleneck", out))
        out = F.relu6(layer(f"{main}.depth_conv", out, stride))
        out = layer(f"{main}.point_linear", out)
        if main != name:
            lite = f"{name}.lite_residual"
            side = F.relu(norm(f"{lite}.bn1", conv(f"{lite}.conv1", F.avg_pool2d(x, 2), stride)))
            side = norm(f"{lite}.final_bn", conv(f"{lite}.conv2", side))
            out = out + F.interpolate(side, out.shape[2:], mode="bilinear", align_corners=False)
        x = out + x if stride == 1 and cin == cout else out
    x = F.relu6(layer("feature_mix_layer", x)).mean((2, 3))
    return F.linear(x, state["classifier.linear.weight"], state["classifier.linear.bias"])


def in_double(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Exactly these numbers, in float64."""
    return {name: value.double() if value.is_floating_point() else value for name, value in state.items()}
