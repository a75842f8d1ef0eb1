"""How much memory training takes: by the paper's formula (estimate) and in truth (measure)."""

from tinytl_kernels.memory.estimate import LayerEstimate, MemoryEstimate, estimate_memory
from tinytl_kernels.memory.measure import LayerMemory, MemoryReport, measure_memory
from tinytl_kernels.memory.report import format_bytes, plot_memory

__all__ = [
    "LayerEstimate",
    "LayerMemory",
    "MemoryEstimate",
    "MemoryReport",
    "estimate_memory",
    "format_bytes",
    "measure_memory",
    "plot_memory",
]
