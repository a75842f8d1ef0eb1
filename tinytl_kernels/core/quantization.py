"""Frozen weights in 8 bits: how a weight is coded, read back, and how much that changes it.

Two codes, both with the weight's shape and one byte a value, told apart by their dtype:

* ``"int8"``: int8, and a float32 ``scale`` of shape (O,), one an output channel; a value is ``code * scale[o]``.
* ``"kmeans"``: uint8, and a float32 codebook of 256 centroids for the layer; a value is ``codebook[code]``. It is what
  the authors of TinyTL train with (Deep Compression's weight sharing, arXiv 1510.00149).

A coded weight stands for one float32 tensor, :func:`dequantize`; gradients of a layer are exact for that tensor.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tinytl_kernels.core.dtypes import check_companion
from tinytl_kernels.core.layout import memory_format

CODES = ("int8", "kmeans")
CODE_OF_DTYPE = {torch.int8: "int8", torch.uint8: "kmeans"}

CENTROIDS = 256
_LARGEST = 127  # symmetric: -128 would have no counterpart
_ITERATIONS = 20  # the authors'


def quantize(weight: Tensor, code: str = "int8") -> tuple[Tensor, Tensor]:
    """Code a weight in 8 bits.

    Args:
        weight: (O, ...), floating point.
        code: ``"int8"`` (nearest multiple of the channel's scale) or ``"kmeans"`` (nearest of 256 centroids).

    Returns:
        (codes, scale): codes in the shape and memory layout of ``weight``, int8 or uint8; float32 scale of shape (O,)
        or codebook of shape (256,), ascending. Deterministic. A channel of zeros stays exactly zero, and up to 256
        distinct values are kept exactly by ``"kmeans"``.

    Raises:
        ValueError: ``code`` is unknown, or ``weight`` is not floating point, or holds NaN, inf or more than float32's
            range.

    Example:
        >>> import torch
        >>> quantize(torch.tensor([[1.0, -2.0], [0.0, 0.0]]))
        (tensor([[  64, -127],
                [   0,    0]], dtype=torch.int8), tensor([0.0157, 1.0000]))
    """
    check_code(code)
    if not weight.is_floating_point():
        raise ValueError(f"weight: expected a floating point dtype, got {weight.dtype}")
    weight = weight.detach()
    if not torch.isfinite(weight.float()).all():
        raise ValueError("weight: NaN or inf cannot be coded in 8 bits; load a checkpoint that holds finite numbers")
    return _nearest_multiple(weight) if code == "int8" else _nearest_centroid(weight)


def check_code(code: str, argument: str = "code") -> None:
    """Raise ``ValueError`` unless ``code`` is one of ``CODES``."""
    if code not in CODES:
        raise ValueError(f"{argument}: expected one of {', '.join(map(repr, CODES))}, got {code!r}")


def _nearest_multiple(weight: Tensor) -> tuple[Tensor, Tensor]:
    values = weight if weight.dtype == torch.float64 else weight.float()
    scale = (values.abs().flatten(1).amax(1) / _LARGEST).float()
    # Nothing but zeros (or numbers whose 127th part float32 cannot hold): every code is 0.
    scale = torch.where(scale > 0, scale, 1.0)
    codes = (values / _by_channel(scale, weight)).round().clamp(-_LARGEST, _LARGEST).to(torch.int8)
    return codes, scale


def _nearest_centroid(weight: Tensor) -> tuple[Tensor, Tensor]:
    # Scalars, so Lloyd's iterations are a search in the sorted values and differences of their running sum.
    values = weight.contiguous().view(-1).to("cpu", torch.float64)
    distinct = values.unique()
    if distinct.numel() <= CENTROIDS:
        last = distinct[-1:] if distinct.numel() else distinct.new_zeros(1)
        centroids = torch.cat([distinct, last.expand(CENTROIDS - distinct.numel())])
    else:
        centroids = _lloyd(values.sort().values)
    codebook = centroids.float()
    borders = _borders(codebook.double())
    codes = torch.bucketize(values, borders).to(torch.uint8).view(weight.shape)
    return _like(codes.to(weight.device), weight), codebook.to(weight.device)


def _like(tensor: Tensor, weight: Tensor) -> Tensor:
    """``tensor`` in the memory layout of ``weight``."""
    return tensor.contiguous(memory_format=memory_format(weight)) if weight.dim() == 4 else tensor


def _borders(centroids: Tensor) -> Tensor:
    return (centroids[:-1] + centroids[1:]) / 2


def _lloyd(ordered: Tensor) -> Tensor:
    """256 centroids of more than 256 distinct values in ascending order."""
    running = torch.cat([ordered.new_zeros(1), ordered.cumsum(0)])
    centroids = _first_centroids(ordered)
    for _ in range(_ITERATIONS):
        ends = torch.searchsorted(ordered, _borders(centroids), right=True)
        ends = torch.cat([ends.new_zeros(1), ends, ends.new_full((1,), ordered.numel())])
        counts, sums = ends.diff(), running[ends].diff()
        centroids = torch.where(counts > 0, sums / counts.clamp(min=1), centroids)
    return centroids


def _first_centroids(ordered: Tensor) -> Tensor:
    # As dense as the cube root of the values' density f, where the least squares lie for many centroids (Panter and
    # Dite, 1951): from there 20 iterations suffice. Neighbouring values are 1 / (n f) apart, so the integral of
    # f^(1/3) over the gap between two goes with gap^(2/3).
    reached = torch.cat([ordered.new_zeros(1), ordered.diff().pow(2 / 3).cumsum(0)])
    wanted = (torch.arange(CENTROIDS, dtype=torch.float64) + 0.5) / CENTROIDS * reached[-1]
    after = torch.searchsorted(reached, wanted, right=True).clamp(1, ordered.numel() - 1)
    share = (wanted - reached[after - 1]) / (reached[after] - reached[after - 1])
    return torch.lerp(ordered[after - 1], ordered[after], share)


def _by_channel(scale: Tensor, weight: Tensor) -> Tensor:
    return scale.view(-1, *[1] * (weight.dim() - 1))


def dequantize(weight: Tensor, scale: Tensor | None, dtype: torch.dtype = torch.float32) -> Tensor:
    """The tensor that a coded weight stands for; a floating point weight is cast.

    The value is computed in float32 and then rounded to ``dtype``, in every backend.

    Args:
        weight: (O, ...): int8, uint8, or floating point.
        scale: float32 (O,) for int8, (256,) for uint8, None for floating point.
        dtype: of the result.

    Returns:
        (O, ...) in ``dtype`` and in the memory layout of ``weight``; ``weight`` itself where nothing is to be done.
    """
    if weight.dtype == torch.int8:
        return (weight.to(torch.float32) * _by_channel(scale, weight)).to(dtype)
    if weight.dtype == torch.uint8:
        return _like(scale.to(dtype)[weight.int()], weight)
    return weight.to(dtype)


def relative_error(weight: Tensor, approximation: Tensor) -> float:
    """``|weight - approximation| / |weight|`` in the Euclidean norm; 0 for a weight of zeros."""
    exact = weight.detach().cpu().double()
    norm = exact.norm().item()
    return (exact - approximation.detach().cpu().double()).norm().item() / norm if norm else 0.0


def check_weight(name: str, weight: Tensor, scale: Tensor | None, input: Tensor) -> None:
    """Raise ``ValueError`` unless a weight and its scale fit each other and ``input``.

    Args:
        name: of ``weight``, for the message; ``scale`` is called ``{name without "_weight"}_scale``.
    """
    if scale is None and weight.dtype not in CODE_OF_DTYPE:
        check_companion(name, weight, input)
        return
    scale_name = "weight_scale" if name == "weight" else name.replace("_weight", "_scale")
    if weight.dtype not in CODE_OF_DTYPE:
        raise ValueError(f"{scale_name}: expected None with a weight of dtype {weight.dtype}, got a tensor")
    length, what = (weight.size(0), "scale") if weight.dtype == torch.int8 else (CENTROIDS, "codebook")
    if scale is None:
        raise ValueError(f"{scale_name}: expected the {what} of a weight of dtype {weight.dtype}, got None")
    if tuple(scale.shape) != (length,) or scale.dtype != torch.float32:
        raise ValueError(
            f"{scale_name}: expected a {what} of shape {(length,)}, float32, got {tuple(scale.shape)}, {scale.dtype}"
        )
    for which, tensor in ((name, weight), (scale_name, scale)):
        if tensor.device != input.device:
            raise ValueError(f"{which}: expected on {input.device} as the input, got {tensor.device}")
