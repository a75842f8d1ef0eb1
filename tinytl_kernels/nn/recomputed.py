"""Blocks that keep their narrow input and are computed again in backward, a few images at a time.

A GroupNorm, a smooth activation or a squeeze-and-excite inside a block needs full values of expanded activations for
its exact gradient. None of them mixes images. So the block keeps its narrow input only and in backward computes itself
again for a few images, takes their gradients, and goes on to the next few: the expanded activations never exist for the
whole batch, forward or backward, and the gradients are exact.

    kept:  N x input            peak:  + (what autograd keeps of the block) x (images at a time)
    arithmetic:  one more forward of the block

An early block's input is itself wide. A block with ``keep_input=False`` does not keep it where it comes straight from
another recomputed block, but what that one was computed from: one kept tensor feeds a *segment* of several blocks, and
its gradient is the only one that exists for the whole batch. For each few images backward computes the inputs of
the segment's blocks, then the blocks from the last to the first: one more forward of all blocks but the last.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.utils.checkpoint import checkpoint, get_device_states, set_device_states

from tinytl_kernels.core.layout import memory_format
from tinytl_kernels.ops.library import gradient_needed, no_second_derivative

# What autograd may keep of a block while a few of its images are computed again, at least one image. Backward has two
# to three times as much alive, on top of everything kept: with 4 MiB ProxylessNAS-Mobile at batch 8 has its peak there.
# With 1 MiB nearly every block is computed image by image, and weights are packed as often: MobileNetV3 took 1.7 times
# as long, for a tenth less at its peak. Between 2 and 3 MiB this is the least at which two images of a block that keeps
# 1.1 MB, and four of one that keeps 0.7, still go together. A GPU wants enough work a kernel.
CHUNK_BYTES = {"cpu": 11 << 18}  # 2.75 MiB
CHUNK_BYTES_ELSEWHERE = 64 << 20


def recompute(module: nn.Module, *, keep_input: bool = True) -> nn.Module:
    """Make ``module`` keep its input alone for backward and compute itself again there, a few images at a time.

    Changed in place: the instance gets a subclass of its own class, so that ``isinstance``, names, children and
    state_dict stay; :func:`stop_recomputing` undoes it. Gradients of the input and of every trained parameter inside
    are exact. Works under autocast, ``no_grad``, DistributedDataParallel, deepcopy and pickle; numbers drawn inside
    (dropout, drop path) are drawn again the same. Under ``torch.compile`` the block is a
    ``torch.utils.checkpoint`` region, of the whole batch.

    Forward hooks of modules inside see a few images at a time, and run again in backward.

    Args:
        module: maps one tensor (N, ...) to one, and no image to another's output: convolutions, GroupNorm, frozen
            BatchNorm, activations, squeeze-and-excite, row-wise drop path.
        keep_input: False not to keep an input that comes straight from another recomputed module; see above.

    Returns:
        ``module``.

    Raises:
        ValueError: a BatchNorm inside takes its statistics from the batch or updates them (also if that is so only when
            it is called), or ``module`` is recomputed already.

    Example:
        >>> import torch, tinytl_kernels.nn as tnn
        >>> block = torch.nn.Sequential(tnn.FrozenConvBias(8, 48, 1), tnn.GroupNorm(6, 48, activation="silu"))
        >>> tnn.recompute(block)(torch.randn(2, 8, 7, 7)).shape
        torch.Size([2, 48, 7, 7])
    """
    if isinstance(module, Recomputed):
        raise ValueError(f"module: {type(module).__name__} is recomputed already")
    if reason := mixes_images(module):
        raise ValueError(f"module: {reason}")
    module.__class__ = _recomputed_class(type(module))
    module.keep_input = keep_input
    return module


def stop_recomputing(module: nn.Module) -> nn.Module:
    """Undo :func:`recompute` for ``module`` itself: the class it had. Others are left alone."""
    if isinstance(module, Recomputed):
        cls = type(module)._stored_class
        # MBConv is the same in one call.
        module.__class__ = cls._layer_by_layer_class if hasattr(cls, "keeps_input_alone") else cls
        for name in ("keep_input", "_kept_bytes"):
            vars(module).pop(name, None)
    return module


def mixes_images(module: nn.Module) -> str:
    """Why the outputs of ``module`` for one image depend on the others, as far as its modules tell, else ``""``."""
    for name, inner in module.named_modules():
        if _takes_statistics(inner):
            return (
                f"{name or type(inner).__name__} takes statistics from the batch, which cannot be computed a few "
                "images at a time; fold it (tinytl_kernels.convert) or put it in evaluation mode"
            )
        if type(inner).__name__ == "StochasticDepth" and inner.mode == "batch" and inner.p:  # torchvision's
            return f"{name or type(inner).__name__} draws one number for the whole batch; use its mode 'row'"
    return ""


def _takes_statistics(module: nn.Module) -> bool:
    if not isinstance(module, _NormBase):
        return False
    updates = module.training and module.track_running_stats
    return updates or (isinstance(module, _BatchNorm) and (module.training or module.running_mean is None))


class Recomputed(nn.Module):
    """What :func:`recompute` mixes into a module's class.

    Attributes:
        keep_input: as in :func:`recompute`; may be changed any time.
    """

    keep_input: bool
    _stored_class: type[nn.Module]

    def forward(self, input: Tensor, *args, **kwargs):
        plain = super().forward
        if args or kwargs or not isinstance(input, Tensor) or torch._C._are_functorch_transforms_active():
            return plain(input, *args, **kwargs)
        if torch.compiler.is_compiling():
            return checkpoint(plain, input, use_reentrant=False) if torch.is_grad_enabled() else plain(input)
        return _call(self, plain, input)

    def __reduce_ex__(self, protocol: int):
        # The class cannot be imported by name: it is made again from the stored one, which may be generated itself.
        make, arguments, state = _reduced_as(self._stored_class, self)
        return _rebuild, (make, arguments), state


@functools.cache
def _recomputed_class(base: type[nn.Module]) -> type[Recomputed]:
    attributes = {
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
        "_stored_class": base,
    }
    return type(base.__name__, (Recomputed, base), attributes)


def _reduced_as(cls: type[nn.Module], module: nn.Module) -> tuple:
    """``(callable, arguments, state)`` that make ``module`` as an instance of ``cls``, which it was."""
    if cls.__reduce_ex__ is not object.__reduce_ex__:
        return cls.__reduce_ex__(module, 2)
    return _new, (cls,), object.__reduce_ex__(module, 2)[2]


def _new(cls: type[nn.Module]) -> nn.Module:
    return cls.__new__(cls)


def _rebuild(make: Callable, arguments: tuple) -> nn.Module:
    module = make(*arguments)
    module.__class__ = _recomputed_class(type(module))
    return module


@dataclass
class _Call:
    """One call of a recomputed module: all that it takes to compute it again, except its input.

    Attributes:
        module, plain: the module and its own forward.
        trained: its parameters that require a gradient.
        modes: the ``training`` flags of it and the modules inside.
        autocast: (device type, dtype, enabled).
        kept: bytes that autograd keeps of one image.
        images: the chunks in which it ran.
        random: states of the random generators before each chunk; empty where nothing was drawn.

    A call that drew numbers ends its segment: chunks of another size would draw others.
    """

    module: Recomputed
    plain: Callable[[Tensor], Tensor]
    trained: list[nn.Parameter]
    modes: list[bool]
    autocast: tuple[str, torch.dtype, bool]
    kept: int = 0
    images: list[slice] = field(default_factory=list)
    random: list[_RandomState] = field(default_factory=list)

    @contextlib.contextmanager
    def as_then(self, stand_ins: Sequence[Tensor] = ()) -> Iterator[None]:
        """The module in the modes of this call, with tensors standing in for its trained parameters."""
        now = [inner.training for inner in self.module.modules()]
        if now != self.modes:
            _set_modes(self.module, self.modes)
        places = _put_in_place(self.module, self.trained, stand_ins)
        try:
            yield
        finally:
            for owner, name, parameter in places:
                owner._parameters[name] = parameter
            if now != self.modes:
                _set_modes(self.module, now)

    def before_backward(self, input: Tensor) -> Tensor:
        """The output for its history; its values only where the module computes them for that."""
        alone = _keeps_input_alone(self.module, input)
        output = self.module.in_one_call(input, compute=False) if alone else None
        return self.plain(input) if output is None else output

    def autocasting(self) -> torch.autocast:
        # Without the cache: a cast that a forward under no_grad left there would have no history in backward.
        device, dtype, enabled = self.autocast
        return torch.autocast(device, dtype, enabled, cache_enabled=False)


@dataclass
class _Source:
    """Where the output of a recomputed module came from; an attribute of that tensor tells the next module."""

    ATTRIBUTE: ClassVar[str] = "_tinytl_source"

    origin: Tensor
    calls: tuple[_Call, ...]
    version: int


def _call(module: Recomputed, plain: Callable[[Tensor], Tensor], input: Tensor) -> Tensor:
    device = input.device.type
    inside = list(module.modules())
    if any(map(_takes_statistics, inside)):  # train() came after recompute()
        raise ValueError(f"{type(module).__name__}: {mixes_images(module)}")
    call = _Call(
        module,
        plain,
        [p for p in module.parameters() if p.requires_grad],
        [inner.training for inner in inside],
        (device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)),
    )
    alone = _keeps_input_alone(module, input)
    # An input that is no more than what a chunk may keep is not worth another forward of the module before this one.
    keep = module.keep_input or (alone and input.nbytes <= _chunk_bytes(input.device))
    source = None if keep else _source_of(input, call)
    origin, calls = (input, (call,)) if source is None else (source.origin, (*source.calls, call))
    call.kept = _kept_by_one_image(call, input, alone)
    if alone and source is None:
        return _forward_alone(call, input)
    call.images = _chunks(input.size(0), max(one.kept for one in calls), input.device)
    trained = [p for one in calls for p in one.trained]
    if not gradient_needed(origin, *trained):
        with torch.no_grad():
            return _forward(call, input)
    output = _Segment.apply(calls, input.detach(), origin, *trained)
    if not call.random:
        setattr(output, _Source.ATTRIBUTE, _Source(origin, calls, output._version))
    return output


def _keeps_input_alone(module: nn.Module, input: Tensor) -> bool:
    ask = getattr(type(module), "keeps_input_alone", None)  # MBConv's
    return ask is not None and ask(module, input)


def _forward_alone(call: _Call, input: Tensor) -> Tensor:
    """The output of a module that keeps its input by itself, and computes itself again."""
    drawing = call.module.training
    before = _RandomState.now(input) if drawing else None
    output = call.module.in_one_call(input)
    if output is None:
        return call.plain(input)
    if output.requires_grad and (before is None or _RandomState.now(input) == before):
        setattr(output, _Source.ATTRIBUTE, _Source(input, (call,), output._version))
    return output


def _source_of(input: Tensor, call: _Call) -> _Source | None:
    """Where ``input`` comes from, unless it has to be kept all the same."""
    source = getattr(input, _Source.ATTRIBUTE, None)
    if source is None or source.version != input._version:  # written to since
        return None
    if input._backward_hooks or input.retains_grad:  # somebody waits for its gradient, which a segment does not make
        return None
    own = set(map(id, call.trained))
    apart = all(own.isdisjoint(map(id, earlier.trained)) for earlier in source.calls)
    return source if apart and all(earlier.autocast == call.autocast for earlier in source.calls) else None


class _Segment(torch.autograd.Function):
    """The last of ``calls`` as a function of what the first was called with, and of all their trained parameters."""

    @staticmethod
    def forward(ctx, calls: tuple[_Call, ...], input: Tensor, origin: Tensor, *trained: Tensor) -> Tensor:
        # The parameters are saved for autograd's check that nobody wrote to them before backward.
        ctx.save_for_backward(origin, *trained)
        ctx.calls = calls
        return _forward(calls[-1], input)

    @staticmethod
    def backward(ctx, grad_output: Tensor) -> tuple:
        if torch.is_grad_enabled():  # create_graph=True
            raise no_second_derivative("recompute")
        calls: tuple[_Call, ...] = ctx.calls
        chunks = calls[-1].images
        origin, *_ = ctx.saved_tensors
        need_origin = ctx.needs_input_grad[2]
        stand_ins = [[p.detach().requires_grad_() for p in call.trained] for call in calls]
        sums: list[list[Tensor | None]] = [[None] * len(some) for some in stand_ins]
        grad_origin = torch.empty_like(origin) if need_origin and len(chunks) > 1 else None
        with contextlib.ExitStack() as then:
            then.enter_context(calls[-1].autocasting())
            for call, some in zip(calls, stand_ins, strict=True):
                then.enter_context(call.as_then(some))
            for i, images in enumerate(chunks):
                inputs = _inputs_again(origin[images], calls)
                grad = grad_output[images]
                for k in reversed(range(len(calls))):
                    wanted = [inputs[k].requires_grad_(), *stand_ins[k]] if k or need_origin else stand_ins[k]
                    with torch.enable_grad(), _drawing_from(calls[k].random[i] if calls[k].random else None):
                        output = calls[k].before_backward(inputs[k])
                    grads = torch.autograd.grad(output, wanted, grad, allow_unused=True)
                    del output, inputs[k]
                    grad = grads[0] if k or need_origin else None
                    _add(sums[k], grads[len(wanted) - len(stand_ins[k]) :])
                    if k and grad is None:  # it does not depend on what came before
                        break
                if grad_origin is None:
                    grad_origin = grad
                else:
                    grad_origin[images] = 0 if grad is None else grad
        totals = [
            total if total is None else total.to(p.dtype)
            for call, some in zip(calls, sums, strict=True)
            for p, total in zip(call.trained, some, strict=True)
        ]
        return None, None, grad_origin if need_origin else None, *totals


def _inputs_again(origin: Tensor, calls: Sequence[_Call]) -> list[Tensor]:
    """What each call was given for these images."""
    inputs = [origin.detach()]
    with torch.no_grad():
        for call in calls[:-1]:
            inputs.append(call.plain(inputs[-1]))
    return inputs


def _add(sums: list[Tensor | None], grads: Sequence[Tensor | None]) -> None:
    """Add the gradients of a few images; those in half precision add up in float32."""
    for k, grad in enumerate(grads):
        if grad is not None:
            grad = grad.float() if grad.dtype in (torch.float16, torch.bfloat16) else grad
            sums[k] = grad if sums[k] is None else sums[k] + grad


def _forward(call: _Call, input: Tensor) -> Tensor:
    """The output, chunk by chunk; notes in ``call`` what was drawn."""
    states = []
    output = None
    with call.autocasting():
        for images in call.images:
            states.append(_RandomState.now(input))
            part = call.plain(input[images] if len(call.images) > 1 else input)
            if not isinstance(part, Tensor) or part.dim() == 0 or part.size(0) != images.stop - images.start:
                shown = tuple(part.shape) if isinstance(part, Tensor) else type(part).__name__
                raise TypeError(
                    f"{type(call.module).__name__}: a recomputed module maps {images.stop - images.start} images to as "
                    f"many, but it returned {shown}; take it out with tinytl_kernels.nn.stop_recomputing"
                )
            if len(call.images) == 1:
                output = part
            else:
                if output is None:
                    output = _empty_for(part, input.size(0))
                output[images] = part
    if _RandomState.now(input) != states[0]:
        call.random = states
    return output


def _empty_for(part: Tensor, images: int) -> Tensor:
    layout = memory_format(part)
    return torch.empty((images, *part.shape[1:]), dtype=part.dtype, device=part.device, memory_format=layout)


def _chunks(images: int, kept: int, device: torch.device) -> list[slice]:
    """Slices of the batch, of as many images as fit the budget where one image keeps ``kept`` bytes."""
    step = max(1, min(images, _chunk_bytes(device) // max(1, kept)))
    return [slice(start, min(images, start + step)) for start in range(0, max(1, images), step)]


def _chunk_bytes(device: torch.device) -> int:
    return CHUNK_BYTES.get(device.type, CHUNK_BYTES_ELSEWHERE)


def _kept_by_one_image(call: _Call, input: Tensor, alone: bool) -> int:
    """Bytes that autograd keeps of the module while it computes one image, found by computing one, once a size."""
    known = vars(call.module).setdefault("_kept_bytes", {})
    key = (tuple(input.shape[1:]), input.dtype, call.autocast, alone)
    if key not in known and input.size(0) < 2:
        return 0
    if key not in known:
        drawn = _RandomState.now(input)
        with call.autocasting():
            held = [*call.module.parameters(), *call.module.buffers()]
            known[key] = kept_bytes(call.plain, input.detach()[:1], held)
        drawn.restore()
    return known[key]


def kept_bytes(function: Callable[[Tensor], Tensor], input: Tensor, exclude: Sequence[Tensor] = ()) -> int:
    """Bytes that autograd keeps for the backward of ``function(input)``, each storage once.

    Args:
        function: called once.
        input: as it comes; its own bytes count where they are kept.
        exclude: tensors whose storages do not count, parameters mostly.
    """
    known = {t.untyped_storage().data_ptr() for t in exclude}
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        # Held, so that no other gets its address; without its history, or an operator that keeps its output would keep
        # itself alive.
        return tensor.detach()

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        output = function(input.detach().requires_grad_())
    del output
    return sum(kept.values())


@dataclass
class _RandomState:
    """States of the generators that a module on the device of a tensor may draw from."""

    cpu: Tensor
    device: str
    devices: list[int]
    states: list[Tensor]

    @classmethod
    def now(cls, like: Tensor) -> _RandomState:
        return cls(torch.get_rng_state(), like.device.type, *get_device_states(like))

    def restore(self) -> None:
        torch.set_rng_state(self.cpu)
        set_device_states(self.devices, self.states, device_type=self.device)

    def __eq__(self, other: object) -> bool:
        pairs = zip((self.cpu, *self.states), (other.cpu, *other.states), strict=True)
        return all(torch.equal(a, b) for a, b in pairs)


@contextlib.contextmanager
def _drawing_from(state: _RandomState | None) -> Iterator[None]:
    """Draw from ``state`` on inside, and go on as if nothing had been drawn outside."""
    if state is None:
        yield
        return
    with torch.random.fork_rng(state.devices, device_type=state.device if state.devices else "cuda"):
        state.restore()
        yield


def _set_modes(module: nn.Module, modes: Sequence[bool]) -> None:
    for inner, training in zip(module.modules(), modes, strict=True):
        inner.training = training


def _put_in_place(
    module: nn.Module, parameters: Sequence[nn.Parameter], stand_ins: Sequence[Tensor]
) -> list[tuple[nn.Module, str, nn.Parameter]]:
    """Put each stand-in wherever its parameter stands inside ``module``; returns how to undo it.

    Through the parameters themselves their hooks would fire for every chunk, beside the one time that is right.
    """
    twin = {id(p): s for p, s in zip(parameters, stand_ins, strict=False)}
    places = [(owner, name, p) for owner in module.modules() for name, p in owner._parameters.items() if id(p) in twin]
    for owner, name, parameter in places:
        owner._parameters[name] = twin[id(parameter)]
    return places
