"""Building the kernels never leaves the package unusable: failures, interruptions, races, no compiler, no folder.

Most tests build a stand-in of one line instead of the kernels, with a compiler that keeps a diary.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from tinytl_kernels.backends.cpu import build

ROOT = Path(__file__).parents[3]

needs_compiler = pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")

COMPILER = """\
#!/bin/sh
[ "$1" = --version ] && {{ echo stand-in; exit; }}
echo "$$" >> {diary}
[ -e {broken} ] && {{ echo broken; exit 1; }}
[ -e {slow} ] && sleep 4
exec c++ "$@"
"""


class Workshop:
    """A source folder, a cache and a compiler of their own."""

    def __init__(self, folder: Path) -> None:
        self.cache, self.diary = folder / "cache", folder / "diary"
        self.broken, self.slow = folder / "broken", folder / "slow"
        self.source = folder / "bindings.cpp"
        self.source.write_text('extern "C" int tinytl_stand_in() { return 42; }\n')
        self.compiler = folder / "compiler"
        self.compiler.write_text(COMPILER.format(diary=self.diary, broken=self.broken, slow=self.slow))
        self.compiler.chmod(0o755)

    @property
    def environment(self) -> dict[str, str]:
        return {"CXX": str(self.compiler), build.CACHE_VARIABLE: str(self.cache)}

    def compilations(self) -> int:
        return len(self.diary.read_text().splitlines()) if self.diary.exists() else 0

    def process(self) -> subprocess.Popen:
        """Another Python process that builds the stand-in and prints what ``load_kernels`` returns."""
        program = f"""
            from pathlib import Path
            from tinytl_kernels.backends.cpu import build
            build.kernel_sources = lambda: [Path({str(self.source)!r})]
            print(build.load_kernels())
        """
        return subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(program)], cwd=ROOT, env={**os.environ, **self.environment},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip


@pytest.fixture
def workshop(tmp_path, monkeypatch) -> Workshop:
    shop = Workshop(tmp_path)
    for name, value in shop.environment.items():
        monkeypatch.setenv(name, value)
    for name in (build.REBUILD_VARIABLE, build.CAPABILITY_VARIABLE, build.SANITIZE_VARIABLE):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(build, "kernel_sources", lambda: [shop.source])
    return shop


def load() -> str | None:
    return build.load_kernels.__wrapped__()  # not the cached answer of this process


@needs_compiler
def test_a_build_is_done_once_and_says_so(workshop, capsys):
    assert load() is None
    assert load() is None
    assert workshop.compilations() == 2  # compile, link
    error = capsys.readouterr().err.splitlines()
    assert [line.split(" ...")[0] for line in error[:1]] == [
        "tinytl_kernels: compiling the CPU kernels for this machine, once"
    ]
    assert len(error) == 2


@needs_compiler
def test_other_sources_are_another_build(workshop):
    load()
    workshop.source.write_text(workshop.source.read_text() + "// changed\n")
    assert load() is None
    assert workshop.compilations() == 4


NO_HEADERS = """\
#!/bin/sh
case "$*" in *c++-header*) echo no headers; exit 1;; esac
exec c++ "$@"
"""


@needs_compiler
@pytest.mark.parametrize("can_precompile", [True, False])
def test_what_all_files_include_is_read_once_where_the_compiler_can(workshop, monkeypatch, tmp_path, can_precompile):
    header, second = tmp_path / "common.h", tmp_path / "other.cpp"
    header.write_text("#pragma once\nconstexpr int kAnswer = 42;\n")
    second.write_text('#include "common.h"\nint other() { return kAnswer; }\n')
    workshop.source.write_text('#include "common.h"\n' + workshop.source.read_text().replace("42", "kAnswer"))
    monkeypatch.setattr(build, "kernel_sources", lambda: [workshop.source, second, header])
    if not can_precompile:
        workshop.compiler.write_text(NO_HEADERS)
    assert load() is None
    assert workshop.compilations() == (4 if can_precompile else 0)  # the header, two files, link; no diary
    header.write_text(header.read_text().replace("42", "43"))
    assert load() is None
    assert len(list(workshop.cache.glob("*/*.so"))) == 2


def test_a_failed_build_is_remembered_until_asked_again(workshop, capsys, monkeypatch):
    workshop.broken.touch()
    assert "the build failed, see " in load()
    assert len(capsys.readouterr().err.splitlines()) == 2  # that it compiles, that it could not
    assert "an earlier build failed" in load()
    assert workshop.compilations() == 1
    (failure,) = workshop.cache.glob("*/failed.txt")
    assert "broken" in failure.read_text()
    assert not list(workshop.cache.glob("*/build-*"))


@needs_compiler
def test_rebuild_tries_again(workshop, monkeypatch):
    workshop.broken.touch()
    load()
    workshop.broken.unlink()
    assert "TINYTL_REBUILD=1 tries again" in load()
    monkeypatch.setenv(build.REBUILD_VARIABLE, "1")
    assert load() is None
    monkeypatch.delenv(build.REBUILD_VARIABLE)
    assert load() is None


@needs_compiler
def test_a_killed_build_is_begun_anew(workshop):
    workshop.slow.touch()
    process = workshop.process()
    deadline = time.monotonic() + 60
    while not workshop.compilations() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert list(workshop.cache.glob("*/build-*"))  # it was in the middle
    workshop.slow.unlink()
    started = time.monotonic()
    assert load() is None
    # Not held up by the lock of the dead, nor by its compiler, which is still asleep.
    assert time.monotonic() - started < 3.5
    assert not list(workshop.cache.glob("*/build-*"))


@needs_compiler
def test_two_processes_at_once_build_once(workshop):
    workshop.slow.touch()
    processes = [workshop.process() for _ in range(2)]
    outputs = [process.communicate(timeout=120) for process in processes]
    assert [out.strip() for out, _ in outputs] == ["None", "None"], outputs
    assert workshop.compilations() == 2
    assert sum("waiting for another process" in error for _, error in outputs) == 1


def test_a_folder_that_cannot_be_written_is_a_reason(workshop, monkeypatch):
    workshop.cache.write_text("a file where the folder should be")
    assert f"set {build.CACHE_VARIABLE} to a writable one" in load()
    assert workshop.compilations() == 0


def test_a_library_that_cannot_be_loaded_is_a_reason(workshop):
    folder = build._cache_folder([workshop.source])
    folder.mkdir(parents=True)
    (folder / f"{build.LIBRARY}.so").write_bytes(b"not a library")
    assert "could not be loaded" in load()


def test_missing_sources_are_a_reason(workshop, monkeypatch):
    monkeypatch.setattr(build, "kernel_sources", list)
    assert load() == "the C++ sources are missing from this installation"


@needs_compiler
def test_a_prebuilt_library_needs_no_compiler(workshop, monkeypatch, tmp_path):
    package = tmp_path / "package"
    package.mkdir()
    monkeypatch.setattr(build, "__file__", str(package / "build.py"))
    target = package / build.prebuilt_name([workshop.source], build.cpu_capability())
    build.build_library([workshop.source], target, tmp_path)
    assert [path.name for path in package.iterdir()] == [target.name]
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert load() is None
    workshop.source.write_text("// other sources: the library is not for them\n")
    assert load() == "no C++ compiler found (install g++ or clang, or set CXX)"


def on_machine(monkeypatch, machine: str, capability: str, system: str = "Linux") -> None:
    """Let the build see another machine, and what torch would find there."""
    monkeypatch.delenv(build.CAPABILITY_VARIABLE, raising=False)  # `make capabilities` sets it
    monkeypatch.setattr("platform.machine", lambda: machine)
    monkeypatch.setattr("platform.system", lambda: system)
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: capability)


def test_capability_beyond_the_machine_is_refused(monkeypatch):
    on_machine(monkeypatch, "x86_64", "AVX2")
    assert build.cpu_capability() == "AVX2"
    monkeypatch.setenv(build.CAPABILITY_VARIABLE, "AVX512")
    with pytest.raises(ValueError, match="TINYTL_CPU_CAPABILITY: expected one of AVX2, DEFAULT on this machine"):
        build.cpu_capability()


@pytest.mark.parametrize("machine", ["aarch64", "arm64"])  # as Linux and macOS call it
@pytest.mark.parametrize("capability", ["DEFAULT", "SVE256"])
def test_arm_machines_build_neon(machine, capability, monkeypatch):
    on_machine(monkeypatch, machine, capability)
    assert build.cpu_capability() == "NEON"
    flags = build.compile_flags()
    assert "-DCPU_CAPABILITY=DEFAULT" in flags  # ATen's name for NEON; SVE has other vectors
    assert not any(flag.startswith("-march") for flag in flags)  # what a cross compiler or Apple's would refuse
    monkeypatch.setenv(build.CAPABILITY_VARIABLE, "AVX2")
    with pytest.raises(ValueError, match="TINYTL_CPU_CAPABILITY: expected one of NEON on this machine, got 'AVX2'"):
        build.cpu_capability()


def test_macos_runs_on_the_openmp_that_torch_has_loaded(monkeypatch, tmp_path):
    on_machine(monkeypatch, "arm64", "DEFAULT", system="Darwin")
    flags = build.compile_flags()
    assert flags[flags.index("-fopenmp") - 1] == "-Xpreprocessor"  # Apple's clang refuses the bare flag
    commands: list[list[str]] = []
    monkeypatch.setattr(build, "_run", commands.append)
    monkeypatch.setattr("shutil.move", lambda source, target: Path(target).touch())
    (source := tmp_path / "bindings.cpp").touch()
    build.build_library([source], tmp_path / "library.so", tmp_path)
    compile_command, link_command = commands
    assert "-lomp" not in link_command  # a second OpenMP would have threads of its own
    assert "-Wl,-undefined,dynamic_lookup" in link_command
    assert "-Wl,-undefined,dynamic_lookup" not in compile_command


FALLBACK = """
import torch, tinytl_kernels as tk
from tinytl_kernels import ops
print(ops.activation(torch.tensor([-1.0, 7.0]), "relu6").tolist(), tk.available_backends()["cpu"])
"""


@pytest.mark.parametrize(
    ("environment", "reason", "lines"),
    [
        ({"CXX": "", "PATH": ""}, "no C++ compiler found", 0),
        ({"CXX": "/bin/false"}, "the build failed, see ", 2),
    ],
)
def test_without_kernels_the_reference_computes_and_the_reason_is_told(environment, reason, lines, tmp_path):
    if list(Path(build.__file__).parent.glob("*.so")):
        pytest.skip("this installation carries a prebuilt library")
    environment = {**os.environ, "TINYTL_BACKEND": "", build.CACHE_VARIABLE: str(tmp_path), **environment}
    done = subprocess.run(
        [sys.executable, "-c", FALLBACK], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("[0.0, 6.0] ")
    assert reason in done.stdout
    assert len(done.stderr.splitlines()) == lines, done.stderr


@pytest.mark.parametrize(
    ("capability", "compiler"), [("AVX2", "c++"), ("DEFAULT", "c++"), ("NEON", "aarch64-linux-gnu-g++")]
)
def test_sources_are_valid_for_other_machines(capability, compiler):
    """One file with all the templates, parsed only; `make capabilities` and `make neon` build all and run the tests."""
    import torch

    if compiler == "c++" and capability not in build._capabilities():
        pytest.skip(f"this machine has no {capability}")
    if shutil.which(compiler) is None:
        pytest.skip(f"no {compiler}")
    (forward,) = (s for s in build.kernel_sources() if s.name == "inverted_residual_forward.cpp")
    include = Path(torch.__file__).parent / "include"
    flags = [*build.compile_flags(capability), "-fsyntax-only", "-isystem", str(include)]
    done = subprocess.run([compiler, *flags, str(forward)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_an_installation_carries_the_sources(tmp_path):
    command = [sys.executable, "setup.py", "--quiet", "build_py", "--build-lib", str(tmp_path)]
    environment = {k: v for k, v in os.environ.items() if k != "TINYTL_PREBUILD"}
    subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True)
    installed = {path.name for path in (tmp_path / "tinytl_kernels" / "kernels" / "cpu").iterdir()}
    assert installed == {path.name for path in build.kernel_sources()}
    assert not list(tmp_path.rglob("*.so"))
