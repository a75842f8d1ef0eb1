"""env_report: one line a fact, and the reason for what is missing."""

from __future__ import annotations

import torch

import tinytl_kernels as tk


def test_names_versions_and_every_backend():
    rows = dict(line.split(maxsplit=1) for line in tk.env_report().splitlines() if not line.startswith("backend"))
    assert rows["torch"].strip() == torch.__version__
    assert "python" in rows
    for name, state in tk.available_backends().items():
        assert f"backend {name}" in tk.env_report()
        assert state in tk.env_report()


def test_tells_which_backend_is_forced(monkeypatch):
    monkeypatch.delenv("TINYTL_BACKEND", raising=False)
    assert "not set" in tk.env_report()
    monkeypatch.setenv("TINYTL_BACKEND", "reference")
    line = next(line for line in tk.env_report().splitlines() if line.startswith("TINYTL_BACKEND"))
    assert line.split() == ["TINYTL_BACKEND", "reference"]


def test_names_the_compiler_that_builds(monkeypatch):
    def named() -> str:
        return next(line for line in tk.env_report().splitlines() if line.startswith("c++ compiler"))

    monkeypatch.setenv("CXX", "env g++")
    assert named().endswith("/env g++")
    monkeypatch.setenv("CXX", "no-such-compiler -O3")
    assert named().endswith("none found (no-such-compiler)")
