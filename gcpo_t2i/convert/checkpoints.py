"""PyTorch's pickled checkpoints, read as named tensors and nothing else, and held against what they should hold."""

from __future__ import annotations

import argparse
import pickle
import re
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from gcpo_t2i.errors import UserError

LAYOUTS = ("model", "module", "state_dict")  # DDP, DeepSpeed, Lightning; FSDP's files are the state dict itself
NAMED = 8  # tensors that an error names of a kind


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """The state dict in a .pt file, mapped into memory. UserError when it is missing, no such file, or holds no state dict.

    `weights_only`: nothing in the file is run. Training checkpoints also hold their options as an argparse.Namespace, a
    plain record, which is let through.
    """
    if not path.is_file():
        raise UserError(
            f"no checkpoint at {path}; LlamaGen's text-to-image ones: hf download peizesun/llamagen_t2i --local-dir FOLDER"
        )
    if not zipfile.is_zipfile(path):  # what torch.save writes since PyTorch 1.6
        raise UserError(f"{path} is no PyTorch checkpoint, or only part of one; download it again")
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL (\S+)", str(error))
        what = f"a {named[1]}" if named else "an object"
        raise UserError(
            f"{path} holds {what}: unpickling it could run any code, so it is refused; save its tensors alone"
        ) from error
    except (RuntimeError, ValueError, KeyError, EOFError) as error:
        raise UserError(f"{path} cannot be read as a PyTorch checkpoint ({_line(error)}); download it again") from error
    return _state_dict(path, content)


def _state_dict(path: Path, content: object) -> dict[str, Tensor]:
    found = content
    if isinstance(content, dict):
        found = next((content[key] for key in LAYOUTS if isinstance(content.get(key), dict)), content)
    if isinstance(found, dict) and found and all(isinstance(value, Tensor) for value in found.values()):
        return dict(found)
    inside = f"the keys {_some(map(str, content))}" if isinstance(content, dict) else f"a {type(content).__name__}"
    raise UserError(f"{path} holds no state dict, neither bare nor under {', '.join(LAYOUTS)}; found {inside}")


def shape_of(path: Path, tensors: Mapping[str, Tensor], name: str, ndim: int) -> tuple[int, ...]:
    """The shape of a tensor that sizes are read off. UserError when it is missing or has another number of dimensions."""
    if name not in tensors:
        raise UserError(f"{path} has no tensor {name}; is it another model's file? It holds {_some(tensors)}")
    shape = tuple(tensors[name].shape)
    if len(shape) != ndim:
        raise UserError(f"{path}: {name} has shape {shape}, expected {ndim} dimensions")
    return shape


def require_tensors(path: Path, tensors: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]]) -> None:
    """UserError that lists what is missing, left over, and of another shape, if anything is."""
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    wrong = [
        f"{name} {shapes[name]} instead of {shape}"
        for name, shape in expected.items()
        if name in shapes and shapes[name] != shape
    ]
    problems = {
        "missing": [name for name in expected if name not in shapes],
        "left over": [name for name in shapes if name not in expected],
        "of another shape": wrong,
    }
    found = [f"{len(names)} {problem}: {_some(names)}" for problem, names in problems.items() if names]
    if found:
        raise UserError(f"{path} does not hold the tensors of its model; {'; '.join(found)}")


def _some(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:NAMED]) + (f" and {len(names) - NAMED} more" if len(names) > NAMED else "")


def _line(error: Exception) -> str:
    return str(error).partition("\n")[0]
