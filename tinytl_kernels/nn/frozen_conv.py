"""``FrozenConvBias``: the drop-in for ``nn.Conv2d`` that makes TinyTL's memory saving real."""

from __future__ import annotations

from torch import Tensor, nn

from tinytl_kernels import ops
from tinytl_kernels.core.activations import FULL_VALUE, check_activation
from tinytl_kernels.core.derivative_code import check_code_bits
from tinytl_kernels.core.geometry import same_padding, tensorflow_same_padding
from tinytl_kernels.nn.activation import activation_name
from tinytl_kernels.nn.fold import AppliedConvolution, applied_convolution, fold_batch_norm
from tinytl_kernels.nn.quantized import QuantizableWeight
from tinytl_kernels.ops.frozen_conv import conv_output_size

TENSORFLOW_SAME = "tf_same"


class FrozenConvBias(QuantizableWeight, nn.Conv2d):
    """A 2-D convolution with a frozen weight, a trained bias and an optional activation, in one operator.

    ``nn.Conv2d`` keeps its input for backward even where its weight is frozen. This one keeps its weight (by
    reference) and, for an activation of the ReLU family, one bit an output element: never the input, never the output.
    Same arguments, parameters and state_dict as ``nn.Conv2d``; TinyTL, section 3.1. ``quantize_()`` holds the weight in
    8 bits: the ``state_dict`` then has ``weight`` as int8 or uint8 and ``weight_scale``, and one of floats still loads.

    Args:
        in_channels, out_channels, kernel_size, stride, dilation, groups, bias, padding_mode, device, dtype:
            as ``nn.Conv2d``.
        padding: as ``nn.Conv2d`` (int, pair, ``"valid"``, ``"same"``), or four numbers (top, bottom, left, right), or
            ``"tf_same"``: TensorFlow's SAME, which depends on the size of each input.
        activation: None, ``"relu"``, ``"relu6"``, ``"leaky_relu"`` (slope 0.01), ``"hardsigmoid"``: one bit an
            element; ``"hardswish"``, ``"silu"``, ``"gelu"``, ``"gelu_tanh"``: the value before the activation.
        code_bits: None, or 8 to keep the derivative of a smooth activation in one byte an element instead of that
            value; gradients are then off by what :func:`tinytl_kernels.ops.activation` says. May be changed any time.

    Called with two tensors, it adds the second to the convolution, before the activation: the shortcut of a residual
    block, in one operator with its last convolution (:func:`tinytl_kernels.ops.frozen_conv_add`).

    Shape:
        (N, C, H, W) or (C, H, W) in; (N, O, H', W') or (O, H', W') out, ``channels_last`` if input or weight is. The
        shortcut: any that can be added to the output.

    Raises:
        RuntimeError: in forward, if the weight was set to require a gradient (``to_torch`` is the way back).
        ValueError: unknown activation or padding, or what ``nn.Conv2d`` refuses.

    Example:
        >>> import torch, tinytl_kernels as tk
        >>> layer = tk.FrozenConvBias(16, 32, 3, padding=1, activation="relu6")
        >>> layer(torch.randn(2, 16, 8, 8)).shape
        torch.Size([2, 32, 8, 8])
        >>> [name for name, p in layer.named_parameters() if p.requires_grad]
        ['bias']
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, ...] | str = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device=None,
        dtype=None,
        *,
        activation: str | None = None,
        code_bits: int | None = None,
    ) -> None:
        check_activation(activation)
        check_code_bits(code_bits)
        # nn.Conv2d knows neither of these two; every other padding is checked by it.
        beyond_torch = padding == TENSORFLOW_SAME or (isinstance(padding, (tuple, list)) and len(padding) == 4)
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            0 if beyond_torch else padding,
            dilation,
            groups,
            bias,
            padding_mode,
            device,
            dtype,
        )
        if beyond_torch:
            if not isinstance(padding, str) and min(padding) < 0:
                raise ValueError(f"padding: expected four numbers of at least 0, got {tuple(padding)}")
            self.padding = padding if isinstance(padding, str) else tuple(padding)
        self.activation = activation
        self.code_bits = code_bits
        self.weight.requires_grad_(False)
        self.register_buffer("weight_scale", None)

    @classmethod
    def from_conv(
        cls, conv: nn.Conv2d, norm: nn.Module | None = None, activation: str | nn.Module | None = None
    ) -> FrozenConvBias:
        """The frozen twin of ``activation(norm(conv(x)))``, with weights of its own.

        Folds a BatchNorm with its running statistics (from here on they are frozen; its bias is the trained bias) and
        the weight standardisation or SAME padding of a ``Conv2d`` subclass, whatever its name.

        Args:
            conv: the convolution; it may be a subclass.
            norm: a BatchNorm with running statistics, or None.
            activation: a name, a ``torch.nn`` activation module, or None.

        Returns:
            A module on the device and in the dtype of ``conv``, in its train/eval mode.

        Raises:
            TypeError: ``conv`` is not an ``nn.Conv2d``.
            ValueError: ``norm``, ``activation`` or a forward of its own cannot be represented; the message says why.

        Example:
            >>> from torch import nn
            >>> FrozenConvBias.from_conv(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU6())
            FrozenConvBias(3, 8, kernel_size=(3, 3), stride=(1, 1), activation=relu6)
        """
        if not isinstance(conv, nn.Conv2d):
            raise TypeError(f"conv: expected an nn.Conv2d, got {type(conv).__name__}")
        if isinstance(activation, nn.Module):
            module, activation = activation, activation_name(activation)
            if activation is None:
                raise ValueError(f"activation: {module} cannot be fused; pass None and keep it as a module")
        if isinstance(conv, FrozenConvBias):
            if conv.activation is not None and (norm is not None or activation is not None):
                raise ValueError(
                    f"conv: its activation {conv.activation!r} comes first; nothing can be folded behind it"
                )
            activation = activation or conv.activation
            bias = conv.bias if conv.bias is None else conv.bias.detach()
            applied = AppliedConvolution(conv.float_weight(), bias, conv.padding)
        else:
            applied = applied_convolution(conv)
        weight, bias = applied.weight, applied.bias
        if norm is not None:
            weight, bias = fold_batch_norm(weight, bias, norm)
        # On the meta device: no initialisation is drawn only to be thrown away.
        frozen = cls(
            conv.in_channels,
            conv.out_channels,
            conv.kernel_size,
            conv.stride,
            applied.padding,
            conv.dilation,
            conv.groups,
            bias is not None,
            conv.padding_mode,
            "meta",
            weight.dtype,
            activation=activation,
            code_bits=conv.code_bits if isinstance(conv, FrozenConvBias) else None,
        )
        # clone() rather than copy_(): the layout (channels_last) of the weight comes along.
        frozen.weight = nn.Parameter(weight.clone(), requires_grad=False)
        if bias is not None:
            frozen.bias = nn.Parameter(bias.clone())
        return frozen.train(conv.training)

    def forward(self, input: Tensor, shortcut: Tensor | None = None) -> Tensor:
        weight, bias, scale = self.operands()
        if input.dim() not in (3, 4):
            raise ValueError(f"input: expected (N, C, H, W) or (C, H, W), got shape {tuple(input.shape)}")
        if input.dim() == 3:
            return self.forward(input.unsqueeze(0), shortcut).squeeze(0)
        padding = self.four_paddings(input)
        if self.padding_mode != "zeros":
            if any(padding):
                input = ops.pad2d(input, padding, self.padding_mode)
            padding = (0, 0, 0, 0)
        geometry = (self.stride, padding, self.dilation, self.groups)
        if shortcut is not None and self._fits(shortcut, input, padding):
            return ops.frozen_conv_add(input, shortcut, weight, bias, *geometry, self.activation, weight_scale=scale)
        activation, alone = self.activation, None
        if shortcut is not None or (self.code_bits is not None and activation in FULL_VALUE):
            activation, alone = None, activation
        output = ops.frozen_conv(input, weight, bias, *geometry, activation, weight_scale=scale)
        if shortcut is not None:
            output = output + shortcut
        return output if alone is None else ops.activation(output, alone, code_bits=self.code_bits)

    def _fits(self, shortcut: Tensor, input: Tensor, padding: tuple[int, ...]) -> bool:
        """Whether one operator adds ``shortcut``: not where it is broadcast or promoted, nor before an activation that
        needs the sum for its derivative."""
        sides = conv_output_size(input.shape, self.weight.shape, self.stride, padding, self.dilation)
        return (
            isinstance(shortcut, Tensor)
            and shortcut.shape == (input.size(0), self.out_channels, *sides)
            and shortcut.dtype == input.dtype
            and self.activation not in FULL_VALUE
        )

    def operands(self) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The frozen weight, the bias and the scale of a weight in 8 bits.

        Raises:
            RuntimeError: somebody set the weight to require a gradient, which would never come.
        """
        parameters, buffers = self._parameters, self._buffers
        if "weight" not in parameters or "bias" not in parameters or "weight_scale" not in buffers:
            weight, bias, scale = self.weight, self.bias, self.weight_scale  # parametrised, or pruned
        else:
            # A small block computes for about as long as nn.Module.__getattr__ takes to find what its layers hold.
            weight, bias, scale = parameters["weight"], parameters["bias"], buffers["weight_scale"]
        if weight.requires_grad:
            raise RuntimeError(
                "FrozenConvBias computes no weight gradient, but its weight has requires_grad=True. Call "
                "weight.requires_grad_(False), or train the plain PyTorch model that tinytl_kernels.to_torch(model) "
                "gives."
            )
        return weight, bias, scale

    def four_paddings(self, input: Tensor | ops.Described) -> tuple[int, ...]:
        """The padding of ``input`` as (top, bottom, left, right)."""
        if isinstance(self.padding, str):
            if self.padding == "valid":
                return (0, 0, 0, 0)
            if self.padding == "same":
                sides = (same_padding(k, d) for k, d in zip(self.kernel_size, self.dilation, strict=True))
            else:
                sides = (
                    tensorflow_same_padding(input.shape[2 + i], self.kernel_size[i], self.stride[i], self.dilation[i])
                    for i in range(2)
                )
            height, width = sides
            return (*height, *width)
        if len(self.padding) == 4:
            return self.padding
        height, width = self.padding
        return (height, height, width, width)

    def extra_repr(self) -> str:
        text = super().extra_repr()
        if self.activation is not None:
            text += f", activation={self.activation}"
        if self.code_bits is not None:
            text += f", code_bits={self.code_bits}"
        return text if self.weight_code is None else f"{text}, weight={self.weight_code}"
