"""`checkpoint-<step>` folders in a run: all that going on needs. A checkpoint is either whole or not there."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from gcpo_t2i import __version__
from gcpo_t2i.errors import UserError
from gcpo_t2i.files import delete_folder, whole_folder
from gcpo_t2i.models.policy import Policy
from gcpo_t2i.processes import ALONE, Processes
from gcpo_t2i.sharding import load_state

FORMAT = 3
WEIGHTS, OPTIMIZER, RANDOM, STATE = "model.safetensors", "optimizer.pt", "random.pt", "state.json"
UNREADABLE = (OSError, ValueError, KeyError, TypeError, RuntimeError, EOFError, SafetensorError, UnpicklingError)


@dataclass
class TrainState:
    """What changes while training. `policy` contributes its trainable parameters."""

    policy: Policy
    optimizer: torch.optim.Optimizer
    step: int = 0
    prompts_drawn: int = 0
    bad_steps: int = 0
    counters: tuple[str, ...] = field(default=("step", "prompts_drawn", "bad_steps"), repr=False)

    def weights(self) -> dict[str, torch.Tensor]:
        return {name: p.detach() for name, p in self.policy.named_parameters() if p.requires_grad}

    def random(self) -> dict[str, Any]:
        """Where this process's global random numbers are, which a reward may use. All others follow from the seed, and the
        place of what they are drawn for."""
        kind, keys, *rest = np.random.get_state(legacy=True)
        return {
            "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
            "numpy": [kind, torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest],
            "python": random.getstate(),
        }

    def set_random(self, saved: Mapping[str, Any]) -> None:
        torch.set_rng_state(saved["torch"])
        if len(saved["cuda"]) == torch.cuda.device_count():
            torch.cuda.set_rng_state_all(saved["cuda"])
        kind, keys, *rest = saved["numpy"]
        np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
        random.setstate(saved["python"])


def save(
    run: Path,
    state: TrainState,
    settings: Mapping[str, Any],
    randoms: list[Any],
    keep_last: int | None,
    optimizer: Mapping[str, Any] | None = None,
) -> Path:
    """Writes `checkpoint-<step>`, and deletes all but the `keep_last` newest (None: keeps them).

    `settings` are those of the run, as JSON has them; `randoms` holds `state.random()` of every process; `optimizer` is the
    whole state of one that is sharded. UserError if it cannot be written; the checkpoints before it are then still there.
    """
    final = run / f"checkpoint-{state.step}"
    counters = {name: getattr(state, name) for name in state.counters}
    about = {"format": FORMAT, "version": __version__, **counters, "processes": len(randoms), "settings": settings}
    try:
        with whole_folder(final) as folder:
            save_file({name: p.contiguous().cpu() for name, p in state.weights().items()}, folder / WEIGHTS)
            torch.save(optimizer or state.optimizer.state_dict(), folder / OPTIMIZER)
            torch.save(randoms, folder / RANDOM)
            (folder / STATE).write_text(json.dumps(about, indent=2), encoding="utf-8")
    except (OSError, RuntimeError, SafetensorError) as error:  # torch and safetensors wrap a full disk in their own
        before = [path.name for path in all_in(run)]
        kept = f"go on from {before[-1]} with --resume" if before else "there is no earlier one"
        raise UserError(
            f"{final}: the checkpoint cannot be written ({error}); make room or mend the folder; {kept}"
        ) from error
    for path in all_in(run)[: -keep_last if keep_last else 0]:
        delete_folder(path)
    return final


def all_in(run: Path) -> list[Path]:
    """The checkpoints of a run, oldest first."""
    found = [path for path in run.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted(found, key=lambda path: int(path.name.removeprefix("checkpoint-")))


def about(folder: Path) -> dict[str, Any]:
    """What `state.json` of a checkpoint says: counters, settings. UserError if it is damaged or of another version."""
    try:
        found = json.loads((folder / STATE).read_text(encoding="utf-8"))
        written, version = found["format"], found.get("version", "an older version")
    except UNREADABLE as error:
        raise _damaged(folder, error) from error
    if written != FORMAT:
        age = "a newer" if written > FORMAT else "an older"
        raise UserError(
            f"{folder}: written by {age} gcpo-t2i ({version}, format {written}; this one reads format {FORMAT}); "
            "go on with that version, or start again with --overwrite"
        )
    return found


def load(folder: Path, state: TrainState, processes: Processes = ALONE) -> list[str]:
    """Puts a checkpoint into `state`, in place; returns what the user should know about that.

    UserError if it is damaged, of another version or of another model; `state` is then as it was.
    """
    found = about(folder)
    try:
        weights = load_file(folder / WEIGHTS)
        optimizer = torch.load(folder / OPTIMIZER, weights_only=True, map_location="cpu")
        randoms = torch.load(folder / RANDOM, weights_only=True)
        counters = {name: found[name] for name in state.counters}
    except UNREADABLE as error:
        raise _damaged(folder, error) from error
    own = state.weights()
    wrong = sorted(own.keys() ^ weights.keys()) or [name for name in own if own[name].shape != weights[name].shape]
    if wrong:
        raise UserError(
            f"{folder}: it is of another model: '{wrong[0]}' and {len(wrong) - 1} more tensors do not match; "
            "name the run's own model with --model, or start again with --overwrite"
        )
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(weights[name])
    load_state(state.optimizer, optimizer)
    for name, value in counters.items():
        setattr(state, name, value)
    if len(randoms) == processes.count:
        state.set_random(randoms[processes.index])
        return []
    return [
        f"{folder} was written by {len(randoms)} process{'es' * (len(randoms) > 1)}, now there are {processes.count}: the run "
        "goes on with the same prompts and random numbers for images; sums are rounded otherwise, and a reward that draws "
        "random numbers itself draws others"
    ]


def _damaged(folder: Path, error: BaseException) -> UserError:
    why = str(error).partition(". ")[0]  # torch goes on for lines
    return UserError(f"{folder}: the checkpoint cannot be read ({why}); delete it to go on from the one before")
