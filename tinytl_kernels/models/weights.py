"""Local weights: files read without running code, and loaded only if all of it fits."""

from __future__ import annotations

import pickle
from pathlib import Path

import torch
from torch import nn

from ..errors import TinyTLError


def read_state_dict(path: str | Path) -> dict[str, torch.Tensor]:
    """Read a state_dict from ``.safetensors`` or from a ``torch.save`` file, without unpickling objects.

    Returns:
        Name to tensor, on the CPU. The wrappers that training scripts put around it (``state_dict``, ``model``) and
        the prefix ``module.`` of DistributedDataParallel are taken off.

    Raises:
        TinyTLError: The file is missing, unreadable, holds code, or holds something else.
    """
    path = Path(path)
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise TinyTLError(f"weights: no such file: {path}") from None
    except pickle.UnpicklingError:
        raise TinyTLError(
            f"weights: {path} holds pickled Python objects, which could run code, or is damaged; "
            "save its state_dict() with torch.save or safetensors and give that"
        ) from None
    except Exception as error:  # a damaged file fails in the zip reader, the header parser or the unpickler
        raise TinyTLError(f"weights: cannot read {path} ({type(error).__name__}: {str(error)[:120]})") from error
    for wrapper in ("state_dict", "model", "model_state_dict"):
        if isinstance(state, dict) and isinstance(state.get(wrapper), dict):
            state = state[wrapper]
            break
    if not isinstance(state, dict) or not state or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise TinyTLError(f"weights: {path} is not a state_dict (a dictionary of names and tensors)")
    return {name.removeprefix("module."): value for name, value in state.items()}


def load_weights(model: nn.Module, path: str | Path, name: str) -> None:
    """Load a local state_dict into ``model``; all of it has to fit.

    Raises:
        TinyTLError: See :func:`read_state_dict`; or names or shapes differ: the counts and the first of each.
    """
    state, own = read_state_dict(path), model.state_dict()
    troubles = {
        "missing": [key for key in own if key not in state],
        "unknown": [key for key in state if key not in own],
        "of another shape": [key for key in own if key in state and state[key].shape != own[key].shape],
    }
    told = [f"{len(keys)} {trouble} ({keys[0]}, ...)" for trouble, keys in troubles.items() if keys]
    if told:
        raise TinyTLError(f"weights: {path} does not fit {name}: {'; '.join(told)}")
    model.load_state_dict(state)
