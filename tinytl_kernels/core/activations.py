"""The activations this package knows, and what each must keep for its backward."""

from __future__ import annotations

# One bit an element: the derivative takes one of two values, and the bit says which.
BIT_MASK = ("relu", "relu6", "leaky_relu", "hardsigmoid")
# The value before the activation: the derivative depends on it smoothly (or, hardswish, linearly in between).
FULL_VALUE = ("hardswish", "silu", "gelu", "gelu_tanh")

# What a convolution or a norm can take over.
ACTIVATIONS = BIT_MASK + FULL_VALUE

# The value behind the activation, as in PyTorch: mostly a gate, and the product that it goes to keeps that very tensor.
FULL_RESULT = ("sigmoid",)

# What the stand-alone operator computes.
STAND_ALONE = ACTIVATIONS + FULL_RESULT

# torch.nn.LeakyReLU's default; a fused LeakyReLU has this one, the stand-alone operator any.
LEAKY_SLOPE = 0.01


def check_activation(name: str | None, argument: str = "activation", known: tuple[str, ...] = ACTIVATIONS) -> None:
    """Raise ``ValueError`` unless ``name`` is None or one of the ``known`` activations."""
    if name is not None and name not in known:
        names = ", ".join(map(repr, known))
        raise ValueError(f"{argument}: expected None or one of {names}, got {name!r}")


def mask_size(size) -> tuple[int, ...]:
    """Shape of the bit mask of a tensor of ``size``: eight channels a byte, channels last.

    (N, C, H, W) -> (N, H, W, ceil(C / 8)); any other shape counts its last dimension as channels. Bit k of byte j
    belongs to channel 8j + k and is 1 where the gradient passes.
    """
    if len(size) == 4:
        n, c, h, w = size
        return (n, h, w, (c + 7) // 8)
    if len(size) == 0:
        return (1,)
    return (*size[:-1], (size[-1] + 7) // 8)
