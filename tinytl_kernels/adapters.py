"""Adapters: what was trained over a frozen backbone, as one small safetensors file.

Many fit one backbone, as with LoRA. The file holds the trained parameters and the statistics of live norms; its
metadata names the base model, the method and a fingerprint of everything frozen, so that an adapter never lands on
another backbone unnoticed.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from tinytl_kernels.convert.head import resize_head, set_num_classes
from tinytl_kernels.convert.report import ConversionReport, conversion_report, unwrap
from tinytl_kernels.core.files import replace_file

FORMAT = "tinytl-adapter"
VERSION = "1"
_FLOAT = "floating point"  # also of files from before weights could be in 8 bits


def save_adapter(model: nn.Module, path: str | os.PathLike) -> None:
    """Write what was trained in ``model`` to ``path``, atomically: the file is whole or not there.

    Args:
        model: What :func:`tinytl_kernels.convert` returned, also inside ``DistributedDataParallel`` or
            ``torch.compile``.
        path: Of the safetensors file; an existing one is replaced.

    Raises:
        ValueError: The model was not converted, or something else was trained than the method says.
        OSError: The file cannot be written; nothing is left behind.

    Example:
        >>> import tempfile, torch
        >>> import tinytl_kernels as tk
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.Flatten(), torch.nn.Linear(288, 10))
        >>> model = tk.convert(net, "bias", example_input=torch.zeros(1, 3, 8, 8))
        >>> file = tempfile.mkdtemp() + "/flowers.safetensors"
        >>> tk.save_adapter(model, file)
        >>> tk.load_adapter(model, file)
    """
    report = conversion_report(model)
    model = unwrap(model)
    extra = [n for n, p in model.named_parameters() if p.requires_grad and n not in report.trained]
    if extra:
        raise ValueError(
            f"model: {extra[0]!r} requires a gradient, but method {report.method!r} keeps it frozen and an adapter "
            "would lose it; save the state_dict instead"
        )
    tensors = {name: t.detach().cpu().contiguous() for name, t in _adapter_tensors(model, report).items()}
    metadata = {
        "format": FORMAT,
        "version": VERSION,
        "model": report.model,
        "method": report.method,
        "head": report.head,
        "weights": _weights(report),
        "fingerprint": fingerprint(model),
    }
    content = save(tensors, metadata)
    replace_file(path, lambda file: file.write(content))


def load_adapter(model: nn.Module, path: str | os.PathLike) -> None:
    """Put an adapter into a converted model, in place of the one it has.

    Tensors are copied into the parameters that are there, so optimizers, ``DistributedDataParallel`` and compiled
    graphs stay valid. A head of another number of classes is the exception: it gets new parameters. All or nothing:
    a refused adapter changes nothing.

    Args:
        model: Converted from the same weights with the same method.
        path: A file that :func:`save_adapter` wrote.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is damaged or no adapter, or belongs to another backbone, method or model.
    """
    report = conversion_report(model)
    bare = unwrap(model)
    metadata, tensors = _read(Path(path))
    for key, ours in (("method", report.method), ("model", report.model)):
        if metadata[key] != ours:
            raise ValueError(f"{path}: adapter for {key} {metadata[key]!r}, but the model's is {ours!r}")
    if metadata.get("weights", _FLOAT) != _weights(report):
        raise ValueError(
            f"{path}: adapter for a backbone with {metadata.get('weights', _FLOAT)} weights, but the model's are "
            f"{_weights(report)}; convert with the weight_bits and the weight_code that it was trained with"
        )
    targets = _adapter_tensors(bare, report)
    resized = _check_tensors(str(path), tensors, targets, report.head)
    if resized and bare is not model:
        raise ValueError(
            f"{path}: adapter for {resized} classes, which needs new head parameters; load it into the bare model, "
            f"then wrap it in {type(model).__name__} again"
        )
    if metadata["fingerprint"] != fingerprint(bare):
        raise ValueError(f"{path}: adapter for another backbone: the fingerprints of the frozen weights differ")
    if resized:
        head = bare.get_submodule(report.head)
        requires_grad = [p.requires_grad for p in head.parameters()]
        resize_head(head, resized)
        for parameter, flag in zip(head.parameters(), requires_grad, strict=True):
            parameter.requires_grad_(flag)
        set_num_classes(bare, resized)
        targets = _adapter_tensors(bare, report)
    with torch.no_grad():
        for name, target in targets.items():
            target.copy_(tensors[name])


def fingerprint(model: nn.Module) -> str:
    """SHA-256 over names, shapes, dtypes and bytes of everything in a converted model that no method trains.

    Args:
        model: A converted model.

    Returns:
        64 hexadecimal digits; the same on every device and in every memory layout.
    """
    report = conversion_report(model)
    model = unwrap(model)
    adapter = set(_adapter_tensors(model, report))
    digest = hashlib.sha256()
    for name, tensor in sorted(_all_tensors(model).items()):
        if name in adapter:
            continue
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _weights(report: ConversionReport) -> str:
    """What the frozen weights are held in: an 8-bit code, or floating point."""
    return _FLOAT if report.quantization is None else report.quantization.code


def _all_tensors(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def _adapter_tensors(model: nn.Module, report: ConversionReport) -> dict[str, Tensor]:
    """The trained parameters, and the statistics of norms that are still live."""
    live = {
        f"{path}.{name}" if path else name
        for path, module in model.named_modules()
        if isinstance(module, _BatchNorm)
        for name, _ in module.named_buffers(recurse=False)
    }
    wanted = live | set(report.trained)
    return {name: tensor for name, tensor in _all_tensors(model).items() if name in wanted}


def _check_tensors(path: str, tensors: Mapping[str, Tensor], targets: Mapping[str, Tensor], head: str) -> int:
    """Raise unless every tensor fits; returns the number of classes where only that differs, else 0."""
    for names, what in ((targets.keys() - tensors.keys(), "lacks"), (tensors.keys() - targets.keys(), "has")):
        if names:
            raise ValueError(f"{path}: not an adapter for this model: it {what} {min(names)!r}")
    classes = 0
    for name, target in targets.items():
        tensor = tensors[name]
        in_head = name in (f"{head}.weight", f"{head}.bias") and tensor.dim() == target.dim() > 0
        if in_head and tensor.shape[1:] == target.shape[1:]:
            if tensor.shape != target.shape:
                classes = tensor.size(0)
        elif tensor.shape != target.shape:
            raise ValueError(f"{path}: {name!r} is {tuple(tensor.shape)}, but {tuple(target.shape)} in the model")
        if tensor.dtype != target.dtype:
            raise ValueError(f"{path}: {name!r} is {tensor.dtype}, but {target.dtype} in the model")
    sizes = {tensors[name].size(0) for name in (f"{head}.weight", f"{head}.bias") if name in tensors}
    if len(sizes) > 1:
        raise ValueError(f"{path}: weight and bias of the head {head!r} are for different numbers of classes")
    return classes


def _read(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such adapter file")
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except SafetensorError as error:
        raise ValueError(f"{path}: not a whole safetensors file ({str(error).splitlines()[0]})") from None
    if metadata.get("format") != FORMAT:
        raise ValueError(f"{path}: a safetensors file, but not an adapter that tinytl_kernels.save_adapter wrote")
    if metadata.get("version") != VERSION:
        raise ValueError(
            f"{path}: adapter format {metadata.get('version')}, but this version of tinytl_kernels reads {VERSION}"
        )
    missing = {"model", "method", "head", "fingerprint"} - metadata.keys()
    if missing:
        raise ValueError(f"{path}: damaged adapter: its metadata lacks {min(missing)!r}")
    return metadata, tensors
