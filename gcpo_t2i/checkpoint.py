"""`checkpoint-<step>` folders in a run: all that going on needs. A checkpoint is either whole or not there."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from pickle import UnpicklingError

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from gcpo_t2i.errors import UserError
from gcpo_t2i.models.policy import Policy

FORMAT = 1
WEIGHTS, OPTIMIZER, STATE = "model.safetensors", "optimizer.pt", "state.json"


@dataclass
class TrainState:
    """What changes while training. `policy` contributes its trainable parameters."""

    policy: Policy
    optimizer: torch.optim.Optimizer
    generators: dict[str, torch.Generator]
    step: int = 0
    prompts_drawn: int = 0
    bad_steps: int = 0
    counters: tuple[str, ...] = field(default=("step", "prompts_drawn", "bad_steps"), repr=False)

    def weights(self) -> dict[str, torch.Tensor]:
        return {name: p.detach() for name, p in self.policy.named_parameters() if p.requires_grad}


def save(run: Path, state: TrainState) -> Path:
    """Writes `checkpoint-<step>` beside its final name and renames it, so that an interrupted write leaves none."""
    final = run / f"checkpoint-{state.step}"
    partial = run / f".partial-{final.name}"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    save_file({name: p.contiguous().cpu() for name, p in state.weights().items()}, partial / WEIGHTS)
    generators = {name: generator.get_state() for name, generator in state.generators.items()}
    torch.save({"optimizer": state.optimizer.state_dict(), "generators": generators}, partial / OPTIMIZER)
    counters = {name: getattr(state, name) for name in state.counters}
    (partial / STATE).write_text(json.dumps({"format": FORMAT, **counters}, indent=2))
    if final.exists():
        shutil.rmtree(final)
    partial.replace(final)
    return final


def newest(run: Path) -> Path:
    """The checkpoint of `run` with the highest step. UserError if there is none."""
    found = [path for path in run.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    if not found:
        raise UserError(f"{run}: no checkpoint to resume from; start the run again with --overwrite")
    return max(found, key=lambda path: int(path.name.removeprefix("checkpoint-")))


def load(folder: Path, state: TrainState) -> None:
    """Puts a checkpoint into `state`, in place. UserError if it is damaged, of another model, or of a newer version."""
    try:
        counters = json.loads((folder / STATE).read_text())
        weights = load_file(folder / WEIGHTS)
        saved = torch.load(folder / OPTIMIZER, weights_only=True)
    except (OSError, ValueError, RuntimeError, EOFError, SafetensorError, UnpicklingError) as error:
        raise UserError(
            f"{folder}: the checkpoint cannot be read ({error}); delete it to use the one before"
        ) from error
    if counters["format"] > FORMAT:
        raise UserError(
            f"{folder}: written by a newer gcpo-t2i (format {counters['format']}, known: {FORMAT}); upgrade"
        )
    own = state.weights()
    wrong = sorted(own.keys() ^ weights.keys()) or [name for name in own if own[name].shape != weights[name].shape]
    if wrong:
        raise UserError(
            f"{folder}: it is of another model: '{wrong[0]}' and {len(wrong) - 1} more tensors do not match"
        )
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(weights[name])
    state.optimizer.load_state_dict(saved["optimizer"])
    for name, generator in state.generators.items():
        generator.set_state(saved["generators"][name])
    for name in state.counters:
        setattr(state, name, counters[name])
