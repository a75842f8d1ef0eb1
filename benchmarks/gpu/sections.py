"""What a worker can do, by name."""

from __future__ import annotations

import platform
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

import tinytl_kernels as tk
from benchmarks import blocks, layers
from benchmarks.cases import Case
from benchmarks.gpu import bandwidth, steps
from benchmarks.gpu.operators import DTYPES, cases, difference
from benchmarks.gpu.schedule import Row
from benchmarks.gpu.worker import Context
from benchmarks.machine import machine
from tinytl_kernels.core.activations import ACTIVATIONS
from tinytl_kernels.errors import TinyTLError
from tinytl_kernels.models import build_model

# Network -> its names, best first: a library's own model, or this package's of the same shape.
NETWORKS = {
    "mobilenet_v2": ("torchvision:mobilenet_v2", "timm:mobilenetv2_100", "tinytl:mobilenet_v2"),
    "efficientnet_lite0": ("timm:efficientnet_lite0", "tinytl:efficientnet_lite0"),
    "resnet50": ("torchvision:resnet50", "timm:resnet50"),
}
BATCHES = (128, 8)
# Rows of the benchmark suite's layers and blocks that differ in their bottleneck; a GPU gets them at batch 128.
LAYERS = (
    "stem_3x3_s2_3_32_224", "expand_1x1_24_144_56", "project_1x1_144_24_56", "expand_1x1_96_576_14",
    "depthwise_3x3_s2_96_112", "depthwise_3x3_s1_144_56", "depthwise_5x5_s1_240_28", "dense_3x3_64_64_56",
    "relu6_96_112", "max_pool_3x3_s2_64_112",
)  # fmt: skip
BLOCKS = (
    "inverted_residual_32x1_16_s1_112", "inverted_residual_16x6_24_s2_112", "inverted_residual_24x6_24_s1_56",
    "inverted_residual_64x6_64_s1_14", "bottleneck_256_56",
)  # fmt: skip


def environment(name: str, context: Context) -> Iterator[Row]:
    """Device, driver, versions, commit; the rate of a copy."""
    about = {key: value for key, value in machine(rates=False).items() if key not in ("cpu", "capability")}
    yield about | {"triton": _version("triton"), "processor": platform.machine()}
    if context.device.type == "cuda":
        properties = torch.cuda.get_device_properties(context.device)
        yield {
            "device": properties.name,
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
            "l2_bytes": getattr(properties, "L2_cache_size", None),
            "capability": f"{properties.major}.{properties.minor}",
            "cuda": torch.version.cuda or torch.version.hip,
            "cudnn": torch.backends.cudnn.version(),
            "driver": driver(),
        }
    yield {"copy_bytes_per_s": bandwidth.copy_bytes_per_second(context)}


def _version(package: str) -> str | None:
    try:
        return __import__(package).__version__
    except ImportError:
        return None


def driver() -> str | None:
    """The driver's version, if its tool is there."""
    try:
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.split()[0]
    except (OSError, subprocess.TimeoutExpired, IndexError):
        return None


def operators(name: str, context: Context) -> Iterator[Row]:
    """Every operator in the precision ``name`` against the reference and float64: one row each."""
    tf32 = name == "tf32"
    torch.backends.cudnn.allow_tf32 = tf32
    torch.backends.cuda.matmul.allow_tf32 = tf32
    for case in cases(context.tiny):
        if context.left < 0:
            return
        row: Row = {"operator": case.name, "dtype": name}
        try:
            found = difference(case, name, context.device, context.backend)
        except Exception as error:
            yield row | {"right": False, "wrong": f"{type(error).__name__}: {error}".splitlines()[0][:300]}
            continue
        yield row | {"right": found.right, "tensor": found.tensor, "error": found.error, "allowed": found.allowed}


def touch(name: str, context: Context) -> Iterator[Row]:
    """Every operator, tiny, forward and backward, with nobody looking at the answer: for compute-sanitizer."""
    with tk.use_backend(context.backend):
        for case in cases(tiny=True):
            if context.left < 0:
                return
            if "NCHW" in case.name or case.name in ACTIVATIONS:  # the same kernels, and each takes seconds to compile
                continue
            sample = case.build(DTYPES[name], context.device)
            sample.answers([torch.ones_like(output) for output in sample.outputs()])
            if context.device.type == "cuda":
                torch.cuda.synchronize()
            yield {"operator": case.name, "dtype": name}


def system(name: str, context: Context) -> Iterator[Row]:
    """What only a whole program shows: CUDA graphs, torch.compile, offsets of 64 bits."""
    for check in (cuda_graph, compiled, wide_offsets):
        try:
            yield {"check": check.__name__, "right": True, "note": check(context)}
        except Exception as error:
            yield {"check": check.__name__, "right": False, "wrong": f"{type(error).__name__}: {error}"[:600]}


def small_network(context: Context) -> tuple[nn.Module, torch.Tensor]:
    """A stem and two blocks, converted; and pictures for them. No library of models is needed."""
    torch.manual_seed(20260101)

    def conv(channels: int, out_channels: int, kernel: int, stride: int = 1, groups: int = 1) -> list[nn.Module]:
        layer = nn.Conv2d(channels, out_channels, kernel, stride, kernel // 2, groups=groups, bias=False)
        return [layer, nn.BatchNorm2d(out_channels)]

    model = nn.Sequential(
        *conv(3, 16, 3, 2), nn.ReLU6(), *conv(16, 96, 1), nn.ReLU6(), *conv(96, 96, 3, 1, 96), nn.ReLU6(),
        *conv(96, 24, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 10),
    ).eval()  # fmt: skip
    pictures = torch.randn(4, 3, 32, 32)
    model = tk.convert(model, "bias", example_input=pictures, inplace=True)
    layout = {"memory_format": torch.channels_last}
    return model.to(context.device, **layout), pictures.to(context.device).contiguous(**layout)


def _gradients(model: nn.Module) -> list[torch.Tensor]:
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def _same(name: str, got: list[torch.Tensor], expected: list[torch.Tensor], eps: float) -> None:
    for index, (a, b) in enumerate(zip(got, expected, strict=True)):
        error = ((a - b).norm() / b.norm()).item()
        if not error <= eps:
            raise ValueError(f"{name}: gradient {index} differs by {error:.1e} of itself, allowed {eps:.1e}")


def cuda_graph(context: Context) -> str:
    """A replayed step has the gradients of an eager one, also on other pictures than it was recorded with."""
    if context.device.type != "cuda":
        return "there is no graph to capture on this device"
    model, pictures = small_network(context)

    def step() -> None:
        for p in model.parameters():
            p.grad = None
        F.cross_entropy(model(pictures), torch.arange(4, device=context.device)).backward()

    with tk.use_backend(context.backend):
        step()
        expected = _gradients(model)
        replay = steps.captured(step)
        pictures.copy_(torch.randn_like(pictures))
        replay()
        other = _gradients(model)
        step()
        _same("new pictures", other, _gradients(model), 1e-5)  # libraries may choose another algorithm
        if all(torch.equal(a, b) for a, b in zip(other, expected, strict=True)):
            raise ValueError("a replay on new pictures gave the gradients of the old ones")
    return "same gradients"


def compiled(context: Context) -> str:
    """torch.compile takes the converted network whole, and gives the same gradients."""
    model, pictures = small_network(context)
    found = []
    with tk.use_backend(context.backend):
        # The eager backend of the compiler on the CPU: nothing is generated, which takes half a minute there.
        whole = torch.compile(model, fullgraph=True, backend="inductor" if context.device.type == "cuda" else "eager")
        for run in (model, whole):
            model.zero_grad(set_to_none=True)
            F.cross_entropy(run(pictures), torch.arange(4, device=context.device)).backward()
            found.append(_gradients(model))
    _same("compiled", found[1], found[0], 1e-2)  # the classifier and the loss may round in TF32
    return "fullgraph"


def wide_offsets(context: Context) -> str:
    """Images beyond 2^31 elements: the first and the last come out as they do alone."""
    if context.device.type != "cuda" and not context.tiny:
        return "needs a GPU"
    channels, side = 64, 4 if context.tiny else 512
    images = 3 if context.tiny else 2**31 // (channels * side * side) + 2
    needed = 5 * images * channels * side * side * 2
    if context.device.type == "cuda" and torch.cuda.mem_get_info()[0] < needed:
        return f"skipped: needs {needed >> 30} GiB of free memory"
    x = torch.zeros((images, channels, side, side), dtype=torch.bfloat16, device=context.device)
    x = x.contiguous(memory_format=torch.channels_last)
    ends = torch.randint(-3, 4, (2, channels, side, side), device=context.device).to(x.dtype)
    x[0], x[-1] = ends[0], ends[1]
    bias = torch.zeros(channels, device=context.device)
    generator = torch.Generator(context.device).manual_seed(1)
    with tk.use_backend(context.backend):
        for groups, kernel in ((1, 1), (channels, 3)):
            size = (channels, channels // groups, kernel, kernel)
            weight = torch.randint(-1, 2, size, generator=generator, device=context.device).to(x.dtype)
            results = []
            for images_in in (x, ends.contiguous(memory_format=torch.channels_last)):
                leaf = images_in.detach().requires_grad_()
                y = tk.ops.frozen_conv(leaf, weight, bias, 1, kernel // 2, 1, groups, "relu6")
                (grad,) = torch.autograd.grad(y, leaf, images_in)
                results.append([t[i].clone() for t in (y.detach(), grad) for i in (0, -1)])
                del y, grad, leaf
            if not all(torch.equal(a, b) for a, b in zip(*results, strict=True)):
                raise ValueError(
                    f"{kernel}x{kernel}: the ends of {x.numel()} elements differ from the same images alone"
                )
    return f"{x.numel()} elements"


def network(name: str, context: Context) -> Iterator[Row]:
    """``NETWORK:PRECISION``: training steps at each batch size."""
    short, _, precision = name.partition(":")
    model, side = _first_that_builds(short), 64 if context.tiny else 224
    if model is None:
        yield {"case": short, "absent": f"none of {', '.join(NETWORKS[short])} can be built here"}
        return
    sized = partial(Case, make=partial(build_model, model, pretrained=False))
    # Calibrated on few pictures: the weights are the same for every batch size.
    stock = sized(short, "network", input_size=(8, 3, side, side)).stock()
    for batch in (2,) if context.tiny else BATCHES:
        case = sized(f"{short}_b{batch}", "network", input_size=(batch, 3, side, side))
        for row in steps.matches(case, stock, precision, context):
            yield row | {"model": model}


def _first_that_builds(name: str) -> str | None:
    for model in NETWORKS[name]:
        try:
            build_model(model, pretrained=False)
            return model
        except TinyTLError:
            continue
    return None


def inner(name: str, context: Context) -> Iterator[Row]:
    """``layers`` or ``blocks``, or one of them after a colon: the cases of the benchmark suite at batch 128."""
    level, _, only = name.partition(":")
    by_name = {case.name: case for case in (*layers.LAYERS, *blocks.BLOCKS)}
    names = LAYERS if level == "layers" else BLOCKS
    for wanted in [only] if only else names[:2] if context.tiny else names:
        if context.left < 0:
            return
        case = by_name[wanted].quick() if context.tiny else by_name[wanted]
        try:
            stock = case.stock()
        except TinyTLError as error:  # the library that the block comes from is not here
            yield {"case": wanted, "absent": str(error)}
            continue
        if not context.tiny:
            case = replace(case, input_size=(128, *case.input_size[1:]))
        yield from steps.matches(case, stock, "bfloat16", context)


def kernels(name: str, context: Context) -> Iterator[Row]:
    """The share of a copy's rate, kernel by kernel."""
    yield from bandwidth.rows(context, name or "bfloat16")


SECTIONS: dict[str, Callable[[str, Context], Iterator[Row]]] = {
    "environment": environment,
    "operators": operators,
    "touch": touch,
    "system": system,
    "kernels": kernels,
    "network": network,
    "inner": inner,
}
