"""How an operator of this package is declared: schema, checks, fake, autocast, autograd, in one call.

Every operator lives in the torch namespace ``tinytl`` (``torch.ops.tinytl.frozen_conv``) and is opaque to
``torch.compile``: the compiler sees its fake implementation, the backend is chosen when it runs.

In plain eager mode nobody looks at an operator through the dispatcher, whose layers cost an operator written in Python
as much as a small block computes (forward and backward of a tiny block: 181 us through it, 107 past it):
:class:`Operator` then calls the same functions directly, through a ``torch.autograd.Function``, or, of a backend that
differentiates by itself, the functions that do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from tinytl_kernels.backends import backend_of, fused_implementation, implementation

NAMESPACE = "tinytl"
_AUTOCAST_DEVICES = {"cpu": "AutocastCPU", "cuda": "AutocastCUDA", "xpu": "AutocastXPU", "mps": "AutocastMPS"}


def _autocast_keys() -> torch._C.DispatchKeySet:
    keys = [getattr(torch._C.DispatchKey, key, None) for key in _AUTOCAST_DEVICES.values()]
    keyset = torch._C.DispatchKeySet(keys[0])
    for key in keys[1:]:
        if key is not None:
            keyset = keyset | torch._C.DispatchKeySet(key)
    return keyset


_AUTOCAST_KEYS = _autocast_keys()

_library = torch.library.Library(NAMESPACE, "FRAGMENT")


class Operator:
    """A declared operator. Called with **all** arguments of its schema, in order.

    Compiling, exporting, tracing, tensor subclasses, dispatch modes (memory tools, ``FakeTensor``), functorch and meta
    tensors see ``torch.ops.tinytl.<name>``; plain eager calls see none of the dispatcher. Both run the same check,
    the same autocast rule, the same ``setup_context`` and ``backward``, and the same implementation.
    """

    def __init__(
        self,
        name: str,
        check: Callable[..., None],
        setup_context: Callable | None,
        backward: Callable,
        cast: Callable[[torch.dtype, tuple], tuple] | None,
    ) -> None:
        self.name = name
        self._check = check
        self._cast = cast
        self._dispatched = getattr(torch.ops.tinytl, name).default
        self._function = _autograd_function(name, setup_context, backward)

    def __call__(self, *args):
        if torch.compiler.is_compiling() or not _plain_eager(args):
            return self._dispatched(*args)
        device = args[0].device.type
        if not torch.is_autocast_enabled(device):
            return self._run(args)
        if self._cast is not None:
            args = self._cast(torch.get_autocast_dtype(device), args)
        with torch._C._ExcludeDispatchKeyGuard(_AUTOCAST_KEYS):
            return self._run(args)

    def _run(self, args: tuple):
        self._check(*args)
        backend = backend_of(self.name, args[0])
        compute = backend.OPERATORS[self.name]
        if not gradient_needed(*args):
            return compute(*args)
        differentiable = getattr(backend, "DIFFERENTIABLE", {}).get(self.name)
        if differentiable is not None and (outputs := differentiable(*args)) is not None:
            return outputs
        return self._function.apply(*args, compute)


def fused_call(name: str, args: Sequence, *, keeps_less: bool = False) -> Callable | None:
    """What computes the chain ``name`` in one call for these arguments, or None; the first of them is the tensor that
    picks the backend, as :func:`autocast_input` gives it.

    Args:
        keeps_less: the chain keeps other tensors than its operators one by one: what measures memory has to see it.
            Every other chain is taken apart for it, so that each tensor is booked to the layer that keeps it.
    """
    if torch.compiler.is_compiling() or not _plain_eager(args, under_listeners=keeps_less):
        return None
    fused = fused_implementation(name, args[0])
    if fused is None or not torch.is_autocast_enabled(args[0].device.type):
        return fused

    def without_autocast(*args):
        with torch._C._ExcludeDispatchKeyGuard(_AUTOCAST_KEYS):
            return fused(*args)

    return without_autocast


def _plain_eager(args: Sequence, under_listeners: bool = False) -> bool:
    """Whether nothing stands between a call and its tensors that has to see the operator; with ``under_listeners``,
    dispatch modes may that have the attribute ``listens_only``."""
    modes = _get_current_dispatch_mode_stack() if torch._C._len_torch_dispatch_stack() else ()
    return (
        all(under_listeners and getattr(mode, "listens_only", False) for mode in modes)
        and not torch._C._are_functorch_transforms_active()
        and torch._C._get_tracing_state() is None
        and all(kind in _PLAIN or not issubclass(kind, Tensor) for kind in {type(a) for a in args})
        and not args[0].is_meta
    )


_PLAIN = {Tensor, torch.nn.Parameter, type(None)}


def _autograd_function(name: str, setup_context: Callable | None, backward: Callable) -> type:
    """A ``torch.autograd.Function`` whose ``apply(*args, compute)`` runs ``compute(*args)``."""

    # Not the form with a separate setup_context: torch binds its arguments through inspect.signature at every call.
    def forward(ctx, *args_and_compute):
        *args, compute = args_and_compute
        output = compute(*args)
        if setup_context is not None:
            setup_context(ctx, args, output)
        return output

    def backward_and_none(ctx, *grads):
        grads = backward(ctx, *grads)
        return (*(grads if isinstance(grads, tuple) else (grads,)), None)

    # The class's name is what graphs (grad_fn) and profilers show.
    methods = {"forward": staticmethod(forward), "backward": staticmethod(backward_and_none)}
    return type(name, (torch.autograd.Function,), methods)


def define_operator(
    schema: str,
    *,
    check: Callable[..., None],
    fake: Callable,
    setup_context: Callable | None = None,
    backward: Callable | None = None,
    cast: Callable[[torch.dtype, tuple], tuple] | None = None,
    tags: Sequence[torch.Tag] = (),
) -> Operator:
    """Declare ``tinytl::<name>`` from its schema.

    Args:
        schema: as in PyTorch's native functions, name first: ``"scale(Tensor input, float by) -> Tensor"``. The
            first argument is the tensor that picks the backend.
        check: called with the operator's arguments before it runs and before it is faked; raises on bad input.
        fake: shapes, dtypes and strides of the outputs, without computing them.
        setup_context, backward: as in ``torch.library.register_autograd``. Without ``backward`` the operator
            is itself a backward: differentiating it again raises a clear error instead of giving a silent zero.
        cast: the autocast rule, ``cast(autocast dtype, args) -> args``; it is differentiated through, so that a
            gradient comes back in the dtype of the argument it belongs to. Without one the operator runs in the dtype
            of its inputs, as pooling and activations do in PyTorch.
        tags: further operator tags.

    Returns:
        What calls it.
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
        setup_context, backward = None, _refuse_double_backward(name)
    torch.library.register_autograd(qualified, backward, setup_context=setup_context)
    if cast is not None:
        _register_autocast(name, cast)
    return Operator(name, check, setup_context, backward, cast)


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


def _register_autocast(name: str, cast: Callable[[torch.dtype, tuple], tuple]) -> None:
    operator = getattr(torch.ops.tinytl, name).default

    def rule(device: str) -> Callable:
        def kernel(_keyset, *args):
            with torch._C._ExcludeDispatchKeyGuard(_AUTOCAST_KEYS):
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


def autocast_input(tensor: torch.Tensor) -> torch.Tensor:
    """What the autocast rule of the frozen operators makes of their input: ``tensor`` itself outside of autocast."""
    device = tensor.device.type
    if not torch.is_autocast_enabled(device):
        return tensor
    return autocast_to(torch.get_autocast_dtype(device), tensor)


def cast_input(dtype: torch.dtype, args: tuple) -> tuple:
    """The autocast rule of a frozen operator: only its input is cast.

    The weights stay float32 in memory and are rounded inside, so that no cast copy of them is kept for backward; the
    biases and their gradients stay float32.
    """
    return (autocast_to(dtype, args[0]), *args[1:])


def gradient_needed(*args: object) -> bool:
    """Whether a backward pass to one of the tensors can be asked for, so that what it needs has to be kept."""
    return torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in args)
