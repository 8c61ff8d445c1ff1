"""The folder that a policy is saved in: `model_index.json` plus one sub-folder per part, as a diffusers pipeline has it;
or the format of transformers, where a `config.json` names the model's type."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gcpo_t2i.errors import UserError, did_you_mean

INDEX = "model_index.json"
FORMAT_VERSION = 1
CONFIG = "config.json"
MODEL_TYPES = {"janus": "JanusPolicy"}  # of transformers, and the class of our own that loads it


def read_index(folder: str | Path, known: Iterable[str]) -> dict[str, Any]:
    """The model index of `folder`, or `_class_name` alone for transformers' own format.

    UserError when it is missing, unreadable, newer, or of a class not in `known`.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"no model folder at {folder}; give a folder written by save_pretrained")
    if not (folder / INDEX).is_file() and (folder / CONFIG).is_file():
        return {"_class_name": _class_of_model_type(folder / CONFIG)}
    index = read_json(folder / INDEX)
    name = str(index.get("_class_name"))
    version = index.get("format_version")
    if name not in known:
        raise UserError(f"{folder / INDEX}: unknown policy class {name!r}{did_you_mean(name, known)}")
    if not isinstance(version, int) or version > FORMAT_VERSION:
        raise UserError(
            f"{folder / INDEX}: format version {version!r}, this gcpo-t2i reads up to {FORMAT_VERSION}; update gcpo-t2i"
        )
    return index


def _class_of_model_type(config: Path) -> str:
    name = str(read_json(config).get("model_type"))
    if name == "multi_modality":
        raise UserError(
            f"{config}: model type 'multi_modality' is Janus for DeepSeek's own code; "
            "use the same weights in transformers' format: deepseek-community/Janus-Pro-1B, deepseek-community/Janus-Pro-7B"
        )
    if name not in MODEL_TYPES:
        raise UserError(f"{config}: unknown model type {name!r}{did_you_mean(name, MODEL_TYPES)}")
    return MODEL_TYPES[name]


def write_index(folder: str | Path, class_name: str, parts: dict[str, tuple[str, str]]) -> None:
    """`parts` maps a sub-folder to (library, class), as diffusers does."""
    write_json(Path(folder) / INDEX, {"_class_name": class_name, "format_version": FORMAT_VERSION, **parts})


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file, else a UserError naming the file."""
    if not path.is_file():
        raise UserError(f"{path} is missing; the model folder is incomplete")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON ({error}); save the model again") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} holds a {type(value).__name__}, expected a JSON object; save the model again")
    return value


def write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turns whatever the libraries raise on broken, missing or ill-shaped weights in `path` into one UserError."""
    from safetensors import SafetensorError

    if not path.is_dir():
        raise UserError(f"{path} is missing; the model folder is incomplete")
    try:
        yield
    except UserError:
        raise
    except (OSError, RuntimeError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise UserError(f"cannot load {path}: {' '.join(str(error).split())}") from error


def require_complete(path: Path, info: dict[str, Any]) -> None:
    """The libraries only warn when weights are absent and then invent random ones: an error here.

    `info` is what `from_pretrained(…, output_loading_info=True)` returned.
    """
    for problem in ("missing_keys", "mismatched_keys", "error_msgs"):
        if info.get(problem):
            raise UserError(
                f"{path}: weights do not fit their config.json: {problem} {sorted(map(str, info[problem]))[:5]}"
            )


@contextmanager
def no_progress_bars() -> Iterator[None]:
    """transformers draws one bar per loaded part; a policy has three, and they garble the display of a running job."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
