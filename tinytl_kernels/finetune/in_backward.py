"""Gradients consumed as they arrive: the optimizer steps inside backward, one parameter at a time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor


@contextmanager
def step_in_backward(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Inside, ``loss.backward()`` updates each parameter as soon as its gradient is complete, and frees the gradient.

    Never more than a few gradients are alive, instead of all of them from backward to ``optimizer.step()``. The updates
    are the same, bit for bit, because Adam and its like look at one parameter at a time. ``optimizer.step()`` and
    ``zero_grad()`` in the loop find no gradients and do nothing; they can stay. Learning rates must be set before
    backward. There is one optimizer, with one state_dict, so that a run may go on with or without.

    What needs all gradients at once, or more than one backward, cannot work:

    - Clipping by the global norm: after backward there is no gradient to clip.
    - Gradient accumulation: the first backward would step. ``finetune`` refuses it.
    - ``GradScaler`` (float16): it looks for infinities in all gradients before any is used. bfloat16 needs none.
    - DistributedDataParallel: a gradient is averaged over processes after this step has used it.
    - An optimizer whose update looks at several parameters, such as LBFGS.

    Args:
        optimizer: Over the trained parameters, none of which holds a gradient.

    Raises:
        ValueError: A parameter holds a gradient, which would be part of the first step.

    Example:
        >>> model = torch.nn.Linear(4, 2)
        >>> optimizer = torch.optim.Adam(model.parameters())
        >>> with step_in_backward(optimizer):
        ...     model(torch.ones(1, 4)).sum().backward()
        >>> model.weight.grad is None
        True
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    held = sum(parameter.grad is not None for parameter in parameters)
    if held:
        raise ValueError(
            f"step_in_backward: expected parameters without gradients, but {held} of {len(parameters)} of `optimizer` "
            "hold one; call optimizer.zero_grad(set_to_none=True) first"
        )

    def consume(parameter: Tensor) -> None:
        # Of all parameters only this one holds a gradient, so that the step is its own.
        optimizer.step()
        parameter.grad = None

    with ExitStack() as stack:
        for parameter in parameters:
            if parameter.requires_grad:
                stack.callback(parameter.register_post_accumulate_grad_hook(consume).remove)
        yield
