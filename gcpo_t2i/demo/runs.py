"""Training runs below a folder, as they are at this moment: they may be half written, or gone with the next call."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from gcpo_t2i.errors import UserError
from gcpo_t2i.yaml_files import read_yaml

METRICS = "metrics.jsonl"
DEPTH = 3  # folders below the first, such as compare/grpo-seed0

Row = dict[str, Any]


@dataclass(frozen=True)
class RunState:
    """What is on the disk of a run."""

    name: str
    rows: list[Row]  # of metrics.jsonl
    pictures: dict[int, Path]  # step → PNG of its samples, with their maps beside them
    steps: int | None  # that it is to have

    @property
    def last(self) -> int:
        return max((int(row["step"]) for row in self.rows), default=0)


def list_runs(root: Path) -> list[str]:
    """Names of all runs below the root, those that changed last first. No links: they might lead out of it."""
    found = []
    for folder in _run_folders(root, DEPTH):
        try:
            found.append(((folder / METRICS).stat().st_mtime, folder.relative_to(root).as_posix()))
        except OSError:  # gone since
            continue
    return [name for _, name in sorted(found, reverse=True)]


def is_language_model(policy: Path) -> bool:
    """Whether a run's policy answers questions: its config.json names one of transformers' causal models."""
    try:
        names = json.loads((policy / "config.json").read_text(encoding="utf-8")).get("architectures") or [""]
    except (OSError, ValueError):
        return False
    return str(names[0]).endswith("ForCausalLM")


def _run_folders(folder: Path, depth: int) -> Iterator[Path]:
    try:
        inner = [path for path in sorted(folder.iterdir()) if path.is_dir() and not path.is_symlink()]
    except OSError:
        return
    for path in inner:
        if path.name.startswith("."):
            continue
        if (path / METRICS).is_file():
            yield path
        elif depth > 1:
            yield from _run_folders(path, depth - 1)


def run_folder(root: Path, name: str | None) -> Path:
    """The folder of a run that `list_runs` names. UserError for any other name, whatever is there."""
    if not name:
        raise UserError("no run is chosen; choose one from the list")
    if name not in list_runs(root):
        raise UserError(f"run '{name[:200]}' is not there any more; choose another one")
    return root / name


def read_run(root: Path, name: str | None) -> RunState:
    """UserError if the run is gone."""
    folder = run_folder(root, name)
    try:
        text = (folder / METRICS).read_text(encoding="utf-8", errors="replace")
        pictures = find_pictures(folder)
    except OSError as error:
        raise UserError(f"run '{name}' is not there any more; choose another one") from error
    return RunState(str(name), list(_rows(text)), pictures, _steps(folder))


def _rows(text: str) -> Iterator[Row]:
    """The rows that are whole: a run that is going, or was killed, may have half of its last line."""
    for line in text.splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            yield row


def _steps(folder: Path) -> int | None:
    try:
        steps = read_yaml(folder / "config.yaml").get("steps")
    except UserError:
        return None
    return steps if isinstance(steps, int) else None


def find_pictures(folder: Path) -> dict[int, Path]:
    """Step → PNG, by step."""
    found: dict[int, Path] = {}
    for path in (folder / "samples").glob("step-*.png"):
        if (match := re.fullmatch(r"step-(\d+)", path.stem)) and not path.is_symlink():
            found[int(match[1])] = path
    return dict(sorted(found.items()))


def read_samples(state: RunState, step: int) -> Image.Image | None:
    """None if there are none, or not yet the whole picture."""
    path = state.pictures.get(step)
    if path is None:
        return None
    try:
        with Image.open(path, formats=["PNG"]) as image:
            return image.convert("RGB")
    except (OSError, SyntaxError, ValueError):
        return None


def curve_names(rows: list[Row]) -> list[str]:
    """Everything that has a number somewhere, but for the step and the half-widths of intervals."""
    names = dict.fromkeys(key for row in rows for key, value in row.items() if _is_number(value))
    return [name for name in names if name != "step" and not name.endswith("_ci95")]


def curve(rows: list[Row], name: str) -> list[tuple[int, float]]:
    """(step, value) of one metric."""
    return [(row["step"], float(row[name])) for row in rows if _is_number(row.get(name))]


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def status(state: RunState) -> str:
    """One line: how far it is."""
    whole = f" of {state.steps}" if state.steps else ""
    going = " · not finished" if state.steps and state.last < state.steps else ""
    evaluated = curve(state.rows, "eval/geneval/strict")
    scores = " → ".join(
        f"{value:.3f}" for _, value in ([evaluated[0], evaluated[-1]] if len(evaluated) > 1 else evaluated)
    )
    return f"step {state.last}{whole}{going}" + (f" · held-out strict GenEval {scores}" if scores else "")
