"""Adam whose moments take one byte each, and whose step needs next to no memory.

Kept libraries have such optimizers, and on a GPU they are the better choice. On a CPU, where the step runs beside the
activations of a 16 MB job, neither serves (measured, one parameter of 4 MB, resident memory of the process):
bitsandbytes 0.50 takes 38 MB for its step, because it decodes whole tensors and quantises through index tensors, keeps
tensors of fewer than 4096 elements (every bias) in float32, and adds 190 MB by being imported; torchao 0.18 takes
36 MB, keeps the same tensors in float32, and compiles its step with inductor for every new shape (18 s for five).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

# Elements decoded at a time. Seven float32 buffers of this size are the step's memory, half a megabyte.
CHUNK = 1 << 14
_GOLDEN_RATIO = (math.sqrt(5) - 1) / 2


class Adam8bit(torch.optim.Optimizer):
    r"""Adam (arXiv 1412.6980) with both moments in 8 bits: a quarter of its state.

    The update is :class:`torch.optim.Adam`'s, computed in float32; between steps a moment is a code and one float32
    scale for each index of the parameter's first dimension (for a vector, one in all), as for int8 frozen weights:

    .. math::
        m = s_m \, \mathrm{sign}(k) \, (k / 127)^2, \quad k \in [-127, 127]
        \qquad\qquad
        v = s_v \, (k / 255)^4, \quad k \in [1, 255]

    The powers spend the codes on small values: 1.6e-5 of the largest gradient still has a second moment of its own,
    and it is never zero, so that no update is divided by ``eps`` alone.

    A step changes ``v`` by a thousandth, far less than half the distance of two codes: rounded to nearest it would stay
    where it is for ever. The share of that distance from which a value is rounded up therefore moves with the step
    through ``frac(step * 0.618...)``, which visits [0, 1) evenly, and the codes follow the moments on average over a
    few steps. No random numbers are drawn, hence a resumed run has the same bits.

    Parameters of any strides are worked on in slices of at most 16384 elements (or of one index of the first
    dimension, if that is more): about half a MB of temporaries, however large the parameter.

    Args:
        params: Parameters or parameter groups, as every optimizer takes them.
        lr: Learning rate.
        betas: Decay of the first and of the second moment.
        eps: Added to the denominator.
        weight_decay: L2 penalty, added to the gradient (as in ``torch.optim.Adam``, not in AdamW).

    State of a parameter of shape (O, ...), in bytes: the number of elements twice, 8 O, and 4 for the step.

    Raises:
        ValueError: A hyper-parameter is out of range, or a parameter is not real floating point.

    Example:
        >>> model = torch.nn.Linear(64, 8)
        >>> optimizer = Adam8bit(model.parameters(), lr=1e-2)
        >>> model(torch.ones(1, 64)).sum().backward()
        >>> optimizer.step()
        >>> optimizer.state[model.weight]["exp_avg_sq"].dtype
        torch.uint8
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        for name, value in (("lr", lr), ("eps", eps), ("weight_decay", weight_decay)):
            if not value >= 0:
                raise ValueError(f"Adam8bit: {name}: expected 0 or more, got {value}")
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"Adam8bit: betas: expected two numbers in [0, 1), got {betas}")
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters; see :meth:`torch.optim.Optimizer.add_param_group`."""
        super().add_param_group(param_group)
        for parameter in self.param_groups[-1]["params"]:
            if not parameter.is_floating_point():
                raise ValueError(f"Adam8bit: expected parameters of a real floating-point dtype, got {parameter.dtype}")

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        """Update every parameter that has a gradient.

        Args:
            closure: Computes the loss again; its value is returned.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)
        return loss

    def _update(self, parameter: Tensor, group: dict[str, Any]) -> None:
        if parameter.grad.is_sparse:
            raise RuntimeError("Adam8bit: sparse gradients are not supported; use torch.optim.SparseAdam for them")
        state = self.state[parameter]
        if not state:
            rows = _rows(parameter)
            scale_shape = (len(rows), *[1] * (rows.dim() - 1))
            state["step"] = torch.zeros(())
            # Shape and strides are the parameter's.
            state["exp_avg"] = torch.zeros_like(parameter, dtype=torch.int8)
            state["exp_avg_sq"] = torch.zeros_like(parameter, dtype=torch.uint8)
            for name in ("exp_avg_scale", "exp_avg_sq_scale"):
                state[name] = torch.zeros(scale_shape, device=parameter.device)
        state["step"] += 1
        step = int(state["step"])
        tensors = [parameter, parameter.grad, state["exp_avg"], state["exp_avg_sq"]]
        rows = [*map(_rows, tensors), state["exp_avg_scale"], state["exp_avg_sq_scale"]]
        if parameter.numel() == 0:
            return
        count = max(1, CHUNK * len(rows[0]) // parameter.numel())
        for chunk in zip(*(tensor.split(count) for tensor in rows), strict=True):
            _adam(*chunk, step=step, **{name: value for name, value in group.items() if name != "params"})

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what :meth:`state_dict` returned; codes stay codes.

        The base class casts every state to the parameter's dtype.
        """
        super().load_state_dict(state_dict)
        indices = [index for group in state_dict["param_groups"] for index in group["params"]]
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        for index, parameter in zip(indices, parameters, strict=True):
            for name, value in state_dict["state"].get(index, {}).items():
                device = value.device if name == "step" else parameter.device
                self.state[parameter][name] = value.to(device, copy=True)


def _rows(tensor: Tensor) -> Tensor:
    """``tensor`` with a first dimension whose indices each have a scale: a vector or a number is one row."""
    return tensor.detach() if tensor.dim() > 1 else tensor.detach().reshape(1, -1)


def _adam(
    parameter: Tensor,
    gradient: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    exp_avg_scale: Tensor,
    exp_avg_sq_scale: Tensor,
    *,
    step: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    **_: Any,  # what schedulers keep in a group
) -> None:
    """One step of Adam on rows of one parameter, in place."""
    gradient = gradient.float()
    if weight_decay:
        gradient = gradient.add(parameter.float(), alpha=weight_decay)
    share = step * _GOLDEN_RATIO % 1.0

    first = exp_avg.float().div_(127)
    first.mul_(first.abs()).mul_(exp_avg_scale).lerp_(gradient, 1 - betas[0])
    second = exp_avg_sq.float().div_(255).square_().square_().mul_(exp_avg_sq_scale)
    second.mul_(betas[1]).addcmul_(gradient, gradient, value=1 - betas[1])

    denominator = second.sqrt().div_(math.sqrt(1 - betas[1] ** step)).add_(eps)
    parameter.add_(denominator.reciprocal_().mul_(first), alpha=-float(lr) / (1 - betas[0] ** step))
    del denominator

    dimensions = tuple(range(1, first.dim()))
    magnitude = first.abs()
    torch.amax(magnitude, dimensions, keepdim=True, out=exp_avg_scale)
    exp_avg.copy_(_codes(_normalised(magnitude, exp_avg_scale), 127, 1, share).mul_(first.sign_()))
    del first, magnitude
    torch.amax(second, dimensions, keepdim=True, out=exp_avg_sq_scale)
    exp_avg_sq.copy_(_codes(_normalised(second, exp_avg_sq_scale), 255, 2, share).clamp_(min=1))


def _normalised(values: Tensor, scale: Tensor) -> Tensor:
    """``values / scale`` in place; zeros where the scale is zero."""
    return values.div_(scale.clamp_min(torch.finfo(torch.float32).tiny))


def _codes(values: Tensor, levels: int, squarings: int, share: float) -> Tensor:
    """Codes k, as float32, of values in [0, 1] that stand for ``(k / levels) ** (2 ** squarings)``.

    A value lies between two codes; it gets the upper if it is more than ``share`` of their distance above the lower.
    """
    lower = values.sqrt()
    for _ in range(squarings - 1):
        lower.sqrt_()
    lower.mul_(levels).floor_()
    low, high = lower / levels, (lower + 1).div_(levels)
    for _ in range(squarings):
        low.square_()
        high.square_()
    threshold = low.lerp_(high, share)
    return lower.add_(values > threshold).clamp_(max=levels)
