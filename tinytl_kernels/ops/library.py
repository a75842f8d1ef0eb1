"""How an operator of this package is declared: schema, checks, fake, autocast, autograd, in one call.

Every operator lives in the torch namespace ``tinytl`` (``torch.ops.tinytl.frozen_conv``) and is opaque to
``torch.compile``: the compiler sees its fake implementation, the backend is chosen when it runs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from tinytl_kernels.backends import implementation

NAMESPACE = "tinytl"
_AUTOCAST_DEVICES = {"cpu": "AutocastCPU", "cuda": "AutocastCUDA", "xpu": "AutocastXPU", "mps": "AutocastMPS"}

_library = torch.library.Library(NAMESPACE, "FRAGMENT")


def define_operator(
    schema: str,
    *,
    check: Callable[..., None],
    fake: Callable,
    setup_context: Callable | None = None,
    backward: Callable | None = None,
    tags: Sequence[torch.Tag] = (),
) -> None:
    """Declare ``tinytl::<name>`` from its schema.

    Args:
        schema: as in PyTorch's native functions, name first: ``"scale(Tensor input, float by) -> Tensor"``. The
            first argument is the tensor that picks the backend.
        check: called with the operator's arguments before it runs and before it is faked; raises on bad input.
        fake: shapes, dtypes and strides of the outputs, without computing them.
        setup_context, backward: as in ``torch.library.register_autograd``. Without ``backward`` the operator
            is itself a backward: differentiating it again raises a clear error instead of giving a silent zero.
        tags: further operator tags.
    """
    name, signature = schema.split("(", 1)
    qualified = f"{NAMESPACE}::{name}"
    torch.library.define(qualified, "(" + signature, tags=(torch.Tag.pt2_compliant_tag, *tags))

    def compute(*args):
        check(*args)
        return implementation(name, args[0])(*args)

    def checked_fake(*args):
        check(*args)
        return fake(*args)

    torch.library.impl(qualified, "CompositeExplicitAutograd", compute)
    torch.library.register_fake(qualified, checked_fake)
    if backward is None:
        torch.library.register_autograd(qualified, _refuse_double_backward(name))
    else:
        torch.library.register_autograd(qualified, backward, setup_context=setup_context)


def _refuse_double_backward(name: str) -> Callable:
    def backward(ctx, *grads):
        raise no_second_derivative(name)

    return backward


def no_second_derivative(name: str) -> RuntimeError:
    """The error for a second derivative through ``tinytl::<name>``."""
    return RuntimeError(
        f"tinytl::{name} has no second derivative: the operators of tinytl_kernels keep too little for one. "
        "Differentiate twice through the plain PyTorch model that tinytl_kernels.to_torch(model) gives."
    )


def define_autocast(name: str, cast: Callable[[torch.dtype, tuple], tuple]) -> None:
    """Give ``tinytl::<name>`` an autocast rule.

    An operator without a rule runs in the dtype of its inputs, as pooling and activations do in PyTorch.

    Args:
        name: the operator.
        cast: ``cast(autocast dtype, args) -> args``; it is differentiated through, so that a gradient comes back in
            the dtype of the argument it belongs to.
    """
    operator = getattr(torch.ops.tinytl, name).default
    keys = [getattr(torch._C.DispatchKey, key, None) for key in _AUTOCAST_DEVICES.values()]
    keyset = torch._C.DispatchKeySet(keys[0])
    for key in keys[1:]:
        if key is not None:
            keyset = keyset | torch._C.DispatchKeySet(key)

    def rule(device: str) -> Callable:
        def kernel(_keyset, *args):
            with torch._C._ExcludeDispatchKeyGuard(keyset):
                return operator(*cast(torch.get_autocast_dtype(device), args))

        return kernel

    for device, key in _AUTOCAST_DEVICES.items():
        if getattr(torch._C.DispatchKey, key, None) is not None:
            _library.impl(name, rule(device), key, with_keyset=True)


def autocast_to(dtype: torch.dtype, tensor: torch.Tensor) -> torch.Tensor:
    """``tensor`` in the autocast dtype, as PyTorch's own rules do it: float64 and integers are left alone."""
    if tensor.is_floating_point() and tensor.dtype != torch.float64:
        return tensor.to(dtype)
    return tensor


def gradient_needed(*tensors: torch.Tensor | None) -> bool:
    """Whether a backward pass can be asked for, so that what it needs has to be kept."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
