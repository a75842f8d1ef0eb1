"""Which backend computes: the choice by tensor, forced choices, and that reference defines every operator."""

from __future__ import annotations

import inspect
import sys
import types

import pytest
import torch

import tinytl_kernels as tk
from tinytl_kernels import backends, ops
from tinytl_kernels.backends import reference


@pytest.fixture
def fake(monkeypatch):
    """A backend that doubles what ReLU gives, refuses float64 and defines no other operator."""
    module = types.ModuleType("tinytl_kernels.backends.fake")
    module.reason = None
    module.unavailable_reason = lambda: module.reason
    module.cannot_take = lambda tensor: "float64 is not for it" if tensor.dtype == torch.float64 else None

    def activation(input, name, negative_slope, needs_mask, needs_codes=False):
        output, mask = reference.OPERATORS["activation"](input, name, negative_slope, needs_mask, needs_codes)
        return output * 2, mask

    module.OPERATORS = {"activation": activation}
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(backends, "BACKENDS", ("fake", "reference"))
    monkeypatch.setattr(backends, "AUTOMATIC", ("fake", "reference"))
    monkeypatch.delenv(backends.ENVIRONMENT_VARIABLE, raising=False)
    return module


def relu(dtype=torch.float32) -> float:
    return ops.activation(torch.ones(1, dtype=dtype), "relu").item()


def test_the_first_backend_that_can_take_the_tensor_computes(fake):
    assert relu() == 2
    assert relu(torch.float64) == 1
    fake.reason = "no compiler"
    assert relu() == 1


def test_what_a_backend_does_not_define_reference_computes(fake):
    assert ops.avg_pool2d(torch.ones(1, 1, 2, 2), 2).item() == 1
    with tk.use_backend("fake"):
        assert ops.avg_pool2d(torch.ones(1, 1, 2, 2), 2).item() == 1


def test_use_backend_forces_and_nests(fake):
    with tk.use_backend("reference"):
        assert relu() == 1
        with tk.use_backend("fake"):
            assert relu() == 2
            with tk.use_backend("reference"):
                assert relu() == 1
            # The inner "reference" is left, not the outer one.
            assert relu() == 2
        assert relu() == 1
    assert relu() == 2


def test_use_backend_is_left_on_an_exception(fake):
    with pytest.raises(ZeroDivisionError), tk.use_backend("reference"):
        raise ZeroDivisionError
    assert relu() == 2


def test_backward_follows_the_choice(fake, monkeypatch):
    calls = []

    def activation_backward(*args):
        calls.append(args)
        return reference.OPERATORS["activation_backward"](*args)

    monkeypatch.setitem(fake.OPERATORS, "activation_backward", activation_backward)
    x = torch.ones(3, requires_grad=True)
    with tk.use_backend("reference"):
        ops.activation(x, "relu").sum().backward()
    assert not calls
    ops.activation(x, "relu").sum().backward()
    assert len(calls) == 1


def test_unknown_name_is_refused_with_the_known_ones():
    with (
        pytest.raises(ValueError, match=r"unknown backend 'cudnn': expected one of .*'reference'"),
        tk.use_backend("cudnn"),
    ):
        pass


def test_an_unavailable_backend_is_refused_on_entry(fake):
    fake.reason = "no compiler"
    with pytest.raises(RuntimeError, match="backend 'fake' is not available here: no compiler"):
        tk.use_backend("fake").__enter__()
    assert relu() == 1


def test_a_forced_backend_that_cannot_take_a_tensor_says_so(fake):
    with (
        tk.use_backend("fake"),
        pytest.raises(RuntimeError, match="backend 'fake' is forced but cannot take this tensor: float64"),
    ):
        relu(torch.float64)


def test_environment_variable_forces_for_the_process(fake, monkeypatch):
    monkeypatch.setenv("TINYTL_BACKEND", "reference")
    assert relu() == 1
    with tk.use_backend("fake"):
        assert relu() == 2  # the block is closer than the environment
    monkeypatch.setenv("TINYTL_BACKEND", "cudnn")
    with pytest.raises(ValueError, match="unknown backend 'cudnn'"):
        relu()
    monkeypatch.setenv("TINYTL_BACKEND", "")
    assert relu() == 2


def test_available_backends_tells_why_not(fake):
    fake.reason = "no compiler"
    assert tk.available_backends() == {"fake": "no compiler", "reference": "available"}


def operator_names() -> list[str]:
    names = {name.split("::")[1].split(".")[0] for name in torch._C._dispatch_get_all_op_names() if "tinytl::" in name}
    return sorted(names)


def test_reference_defines_every_operator_and_no_other():
    assert len(operator_names()) >= 14
    assert sorted(reference.OPERATORS) == operator_names()


@pytest.mark.parametrize("name", operator_names())
def test_reference_takes_the_arguments_of_the_schema(name):
    arguments = getattr(torch.ops.tinytl, name).default._schema.arguments
    inspect.signature(reference.OPERATORS[name]).bind(*arguments)


def test_reference_takes_everything():
    assert reference.unavailable_reason() is None
    assert reference.cannot_take(torch.zeros(1, dtype=torch.float64)) is None
