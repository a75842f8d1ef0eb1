"""A frozen weight in 8 bits as a part of a module: how it gets there, back, and through ``state_dict``."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tinytl_kernels.core.quantization import CODE_OF_DTYPE, check_code, dequantize, quantize


class QuantizableWeight(nn.Module):
    """A module with a frozen parameter ``weight`` that may be held in 8 bits, beside the buffer ``weight_scale``.

    ``weight_scale`` is None, and no key of the ``state_dict``, while the weight is floating point. A ``state_dict`` of
    either kind loads into a module of either kind: floats are coded on the way into a coded module, and a coded weight
    is dequantised on the way into a floating point one. Only codes of different kinds (int8, k-means) do not mix.
    """

    weight: nn.Parameter
    weight_scale: Tensor | None
    # What the weight dequantises to; `.half()` and the like change it, as they would the weight.
    _float_dtype: torch.dtype

    @property
    def weight_code(self) -> str | None:
        """How the weight is held: ``"int8"``, ``"kmeans"``, or None for floating point."""
        return CODE_OF_DTYPE.get(self.weight.dtype)

    def float_weight(self) -> Tensor:
        """The weight that is applied, in floating point: itself, or a dequantised copy."""
        weight = self.weight.detach()
        return weight if self.weight_scale is None else dequantize(weight, self.weight_scale, self._float_dtype)

    def quantize_(self, code: str = "int8") -> QuantizableWeight:
        """Hold the weight in 8 bits from now on, a quarter of float32's bytes.

        Args:
            code: ``"int8"``: one scale an output channel. ``"kmeans"``: 256 centroids for the layer, as the authors of
                TinyTL trained.

        Returns:
            The module itself. A weight that is in this code already stays as it is.

        Raises:
            ValueError: ``code`` is unknown, or the weight holds NaN or inf, or is in the other code already.
        """
        check_code(code)
        if self.weight_code not in (None, code):
            raise ValueError(f"code: the weight is in {self.weight_code!r} already; call dequantize_() before {code!r}")
        if self.weight_code is None:
            self._float_dtype = self.weight.dtype
            self._hold(*quantize(self.weight, code))
        return self

    def dequantize_(self) -> QuantizableWeight:
        """Hold the weight in floating point again: the values that its 8 bits stand for. Returns the module itself."""
        self._hold(self.float_weight(), None)
        return self

    def _hold(self, weight: Tensor, scale: Tensor | None) -> None:
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.weight_scale = scale

    def requires_grad_(self, requires_grad: bool = True) -> QuantizableWeight:
        if requires_grad and self.weight_code is not None:
            raise RuntimeError(
                f"{type(self).__name__} holds its weight in 8 bits, which cannot be trained. Train its bias with "
                "bias.requires_grad_(True), or the plain PyTorch model that tinytl_kernels.to_torch(model) gives."
            )
        return super().requires_grad_(requires_grad)

    def _apply(self, fn, recurse: bool = True):
        if self.weight_scale is None:
            return super()._apply(fn, recurse)
        codes, scale = self.weight.data, self.weight_scale
        # What `fn` does to a floating point weight: nothing but its dtype is of interest.
        dtype = fn(torch.empty(0, dtype=self._float_dtype, device=scale.device)).dtype
        super()._apply(fn, recurse)
        self._float_dtype = dtype
        if self.weight.dtype != codes.dtype:  # Module.type() casts integers too
            self.weight = nn.Parameter(codes.to(self.weight.device), requires_grad=False)
        if self.weight_scale.dtype != torch.float32:
            # A scale stays float32, like the sums it goes into: rounded to half precision it would change the weight.
            self.weight_scale = scale.to(self.weight_scale.device)
        return self

    def _load_from_state_dict(self, state_dict, prefix, metadata, strict, missing, unexpected, errors) -> None:
        weight, scale = state_dict.get(f"{prefix}weight"), state_dict.get(f"{prefix}weight_scale")
        if isinstance(weight, Tensor):
            try:
                weight, scale = self._as_held(weight, scale)
            except (ValueError, RuntimeError) as error:
                errors.append(f"{prefix}weight: {error}")
                return
            state_dict[f"{prefix}weight"] = weight
            if scale is None:
                state_dict.pop(f"{prefix}weight_scale", None)
            else:
                state_dict[f"{prefix}weight_scale"] = scale
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, unexpected, errors)

    def _as_held(self, weight: Tensor, scale: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """A weight from a ``state_dict`` in the code of this module."""
        given, held = CODE_OF_DTYPE.get(weight.dtype), self.weight_code
        if (given is None) != (scale is None):
            wanted = "no weight_scale" if given is None else "a weight_scale"
            raise ValueError(f"expected {wanted} beside one of dtype {weight.dtype}; the state_dict is not whole")
        if given == held:
            return weight, scale
        if held is None:
            return dequantize(weight, scale, self.weight.dtype), None
        if given is None:
            return quantize(weight, held)
        raise ValueError(
            f"the module holds {held!r} and the state_dict {given!r}; call dequantize_() on the module and "
            f"quantize_({given!r}), or load before quantising"
        )
