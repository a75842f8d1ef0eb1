"""``env_report``: what this machine offers, in the words one pastes into a bug report."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shlex
import shutil
import sys

import torch

from tinytl_kernels.backends import ENVIRONMENT_VARIABLE, available_backends
from tinytl_kernels.backends.cpu.build import compiler


def env_report() -> str:
    """Versions, devices, compilers and backends, and for each backend that is missing the reason why.

    Example:
        >>> import tinytl_kernels as tk
        >>> "reference" in tk.env_report()
        True
    """
    rows = [
        ("tinytl_kernels", _version("tinytl_kernels")),
        ("python", f"{platform.python_version()} ({platform.system()} {platform.machine()})"),
        ("torch", torch.__version__),
        *((name, _version(name)) for name in ("triton", "torchvision", "timm", "numpy", "safetensors")),
        ("cpu capability", f"{torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"),
        ("cuda", _cuda()),
        ("c++ compiler", _compiler()),
        (ENVIRONMENT_VARIABLE, os.environ.get(ENVIRONMENT_VARIABLE, "not set")),
        *((f"backend {name}", state) for name, state in available_backends().items()),
    ]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


def _compiler() -> str:
    program, *words = compiler()
    found = shutil.which(program)
    return shlex.join([found, *words]) if found else f"none found ({program})"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed" if package not in sys.modules else "unknown (not installed as a package)"


def _cuda() -> str:
    if not torch.cuda.is_available():
        return "not available"
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return f"{torch.version.cuda or torch.version.hip}: {', '.join(names)}"
