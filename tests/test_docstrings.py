"""Every example in a docstring runs and gives what it shows."""

from __future__ import annotations

import doctest
import importlib
import pkgutil

import pytest

import tinytl_kernels

FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
# Running it as a module would start the command line; Triton is optional.
LEFT_OUT = ("tinytl_kernels.__main__", "tinytl_kernels.backends.triton")

MODULES = sorted(
    module.name
    for module in pkgutil.walk_packages(tinytl_kernels.__path__, "tinytl_kernels.", onerror=lambda name: None)
    if not module.name.startswith(LEFT_OUT)
)


@pytest.mark.parametrize("name", MODULES)
def test_examples_run(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # an example may write a file
    failed, _ = doctest.testmod(importlib.import_module(name), optionflags=FLAGS)
    assert failed == 0


@pytest.mark.parametrize(
    "function", ["frozen_conv", "activation", "avg_pool2d", "adaptive_avg_pool2d", "max_pool2d", "dropout",
                 "upsample_add", "pad2d"]
)  # fmt: skip
def test_every_operator_documents_itself_with_an_example(function):
    text = getattr(tinytl_kernels.ops, function).__doc__
    for section in ("Args:", "Raises:", "Example:"):
        assert section in text
