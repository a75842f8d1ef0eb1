"""Dropout that keeps one bit an element for backward."""

from __future__ import annotations

from torch import Tensor, nn

from tinytl_kernels.ops import dropout


class Dropout(nn.Dropout):
    """Zero elements with probability ``p`` in training; keeps one bit an element.

    Governed by ``torch.manual_seed``, but the numbers drawn are not those of ``torch.nn.Dropout``. ``inplace`` is
    accepted and has no effect.
    """

    def forward(self, input: Tensor) -> Tensor:
        return dropout(input, self.p, self.training)
