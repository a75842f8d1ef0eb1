"""Memory-efficient transfer learning that is real: fine-tune in less memory than inference takes.

Swap ``nn.Conv2d`` for :class:`FrozenConvBias`, or call :func:`convert` on a model, and train with your own loop.
"""

from tinytl_kernels import nn, ops
from tinytl_kernels.adapters import load_adapter, save_adapter
from tinytl_kernels.backends import available_backends, use_backend
from tinytl_kernels.convert import METHODS, ConversionReport, conversion_report, convert, to_torch
from tinytl_kernels.env import env_report
from tinytl_kernels.memory import MemoryEstimate, MemoryReport, estimate_memory, measure_memory, plot_memory
from tinytl_kernels.nn import FrozenConvBias, FrozenInvertedResidual, LiteResidual, LiteResidualBlock
from tinytl_kernels.version import __version__

__all__ = [
    "METHODS",
    "ConversionReport",
    "FrozenConvBias",
    "FrozenInvertedResidual",
    "LiteResidual",
    "LiteResidualBlock",
    "MemoryEstimate",
    "MemoryReport",
    "__version__",
    "available_backends",
    "conversion_report",
    "convert",
    "env_report",
    "estimate_memory",
    "load_adapter",
    "measure_memory",
    "nn",
    "ops",
    "plot_memory",
    "save_adapter",
    "to_torch",
    "use_backend",
]
