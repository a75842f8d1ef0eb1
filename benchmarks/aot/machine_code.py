"""A launch compiled for a GPU that is not there, and what its machine code says."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from tinytl_kernels.backends.triton.launch import Launch

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# What a program may use of a multiprocessor's shared memory (a compute unit's LDS).
SHARED_LIMITS = {"sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "gfx942": 64 << 10}

_POINTERS = {
    torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.uint8: "*u8", torch.int8: "*i8",
    torch.int64: "*i64",
}  # fmt: skip


@dataclass(frozen=True)
class Compiled:
    """What the machine code of one kernel says."""

    registers: int
    spilled_bytes: int
    shared_bytes: int
    matrix_instructions: int
    widest_load_bits: int


def source(launch: Launch, target: GPUTarget) -> ASTSource:
    """What Triton would compile for a launch, with the specialisation that it would choose."""
    given = dict(launch.constants)
    if target.backend == "hip" and "PRECISION" in given:
        given["PRECISION"] = "ieee"  # as ``launch.dot_precision`` says there: AMD's matrix units know no TF32
    signature, constants, attributes = {}, {}, {}
    for place, parameter in enumerate(launch.kernel.params):
        name = parameter.name
        if name in given:
            signature[name], constants[name] = "constexpr", given[name]
            continue
        value = launch.arguments[name]
        if value is None or (type(value) is int and value == 1 and not parameter.do_not_specialize):
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, Tensor):
            signature[name] = _POINTERS[value.dtype]
            attributes[(place,)] = [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0 and not parameter.do_not_specialize:
                attributes[(place,)] = [["tt.divisibility", 16]]
    return ASTSource(fn=launch.kernel, signature=signature, constexprs=constants, attrs=attributes)


def compile_for(launch: Launch, architecture: str) -> Compiled:
    """Compile a launch's kernel and read its machine code."""
    target = TARGETS[architecture]
    options = dict(num_warps=launch.warps_of(target.warp_size), num_stages=launch.num_stages)
    kernel = triton.compile(source(launch, target), target=target, options=options)
    if "amdgcn" in kernel.asm:
        return _read_amdgcn(kernel.asm["amdgcn"], kernel.metadata.shared)
    return _read_cubin(kernel.asm["cubin"], kernel.metadata.shared)


def _read_cubin(cubin: bytes, shared_bytes: int) -> Compiled:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        usage = _cuobjdump("-res-usage", path)
        sass = _cuobjdump("-sass", path)
    spills = re.findall(r"\b(?:STL|LDL)(?:\.(64|128))?\b", sass)
    loads = re.findall(r"\b(?:LDG|LDGSTS)\.[\w.]*", sass)
    widths = [int(width) for load in loads for width in re.findall(r"\.(64|128|256)\b", load)]
    return Compiled(
        registers=int(re.search(r"REG:(\d+)", usage).group(1)),
        spilled_bytes=sum(int(width or 32) // 8 for width in spills),
        shared_bytes=shared_bytes,
        matrix_instructions=len(re.findall(r"\b(?:HMMA|HGMMA|UTC\w*MMA)\b", sass)),
        widest_load_bits=max([32 if loads else 0, *widths]),
    )


def _cuobjdump(option: str, path: Path) -> str:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return subprocess.run([tool, option, path], check=True, capture_output=True, text=True, timeout=120).stdout


def _read_amdgcn(assembly: str, shared_bytes: int) -> Compiled:
    def number(key: str) -> int:
        found = re.search(rf"\.{key}:\s*(\d+)", assembly)
        return int(found.group(1)) if found else 0

    words = [int(n or 1) for n in re.findall(r"(?:global|buffer)_load_dword(?:x(\d))?", assembly)]
    return Compiled(
        # From gfx90a on the accumulation registers are counted in: one file of 512 a thread has both.
        registers=number("vgpr_count"),
        # Scalar registers spill into lanes of vector registers; what reaches memory is the private segment.
        spilled_bytes=number("private_segment_fixed_size"),
        shared_bytes=shared_bytes,
        matrix_instructions=len(re.findall(r"\bv_mfma", assembly)),
        widest_load_bits=32 * max([0, *words]),
    )
