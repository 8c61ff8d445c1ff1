"""The one optimisation loop that every pre-training stage shares: AdamW, warm-up and cosine, resumable, with a bar."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor, nn

from gcpo_t2i.errors import UserError

Metrics = dict[str, float]

LOG_EVERY = 50  # steps between the rows of a stage's .jsonl


@dataclass(frozen=True)
class Schedule:
    """Learning rate of a stage: linear warm-up to `peak`, and a cosine down to `floor` × peak over the last `decay`.

    With `decay` below 1 the rate is constant in between, and a run that has not begun to decay can be made longer.
    """

    steps: int
    peak: float
    warmup: int = 100
    decay: float = 1.0  # share of the steps
    floor: float = 0.02
    weight_decay: float = 0.01
    save_every: int = 200

    @property
    def decay_start(self) -> int:
        return max(self.warmup, round(self.steps * (1 - self.decay)))

    def rate(self, step: int) -> float:
        if step < self.warmup:
            return self.peak * (step + 1) / self.warmup
        done = (step - self.decay_start) / max(1, self.steps - self.decay_start)
        return self.peak * (self.floor + (1 - self.floor) * 0.5 * (1 + math.cos(math.pi * min(max(done, 0.0), 1.0))))


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager:
    return nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype=dtype)


def _parameter_groups(module: nn.Module, weight_decay: float) -> list[dict]:
    parameters = [p for p in module.parameters() if p.requires_grad]
    return [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]


def _load(path: Path, module: nn.Module, optimizer: torch.optim.Optimizer, schedule: Schedule) -> int:
    state = torch.load(path, weights_only=True)
    if state["steps"] != schedule.steps and state["step"] > min(state["decay_start"], schedule.decay_start):
        raise UserError(
            f"{path}: it was started with {state['steps']} steps and its learning rate has begun to fall; "
            f"{schedule.steps} steps need a new start, in another --output_dir"
        )
    module.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    return state["step"]


def _save(path: Path, module: nn.Module, optimizer: torch.optim.Optimizer, schedule: Schedule, step: int) -> None:
    """Written beside and renamed, so an interrupted write leaves the previous state whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    state = {
        "step": step,
        "steps": schedule.steps,
        "decay_start": schedule.decay_start,
        "model": module.state_dict(),
        "optimizer": optimizer.state_dict(),
    }
    torch.save(state, partial)
    partial.replace(path)


def _log(path: Path, row: dict[str, float]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def progress_bar() -> Progress:
    return Progress(
        TextColumn("[bold]{task.description:>10}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )


def fit(
    name: str,
    module: nn.Module,
    loss_at: Callable[[int], tuple[Tensor, Metrics]],
    schedule: Schedule,
    state_file: Path,
    max_grad_norm: float = 1.0,
) -> Metrics:
    """Trains the parameters of `module` that require a gradient with `loss_at(step) -> (loss, metrics)`.

    Continues from `state_file` if it is there. Returns the means of the metrics over the last
    `LOG_EVERY` steps, which also go to a .jsonl beside it. Raises FloatingPointError when the
    loss is not finite.
    """
    module.train()
    optimizer = torch.optim.AdamW(_parameter_groups(module, schedule.weight_decay), lr=schedule.peak, betas=(0.9, 0.95))
    start = _load(state_file, module, optimizer, schedule) if state_file.exists() else 0
    window: dict[str, list[float]] = {}
    means: Metrics = {}
    with progress_bar() as progress:
        bar = progress.add_task(name, total=schedule.steps, completed=start, note="")
        for step in range(start, schedule.steps):
            for group in optimizer.param_groups:
                group["lr"] = schedule.rate(step)
            loss, metrics = loss_at(step)
            if not torch.isfinite(loss):
                raise FloatingPointError(f"stage {name}: the loss is {loss.item()} at step {step}; lower the rate")
            loss.backward()
            nn.utils.clip_grad_norm_(module.parameters(), max_grad_norm)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            for key, value in metrics.items():
                window.setdefault(key, []).append(value)
            progress.update(bar, completed=step + 1)
            if (step + 1) % LOG_EVERY == 0 or step + 1 == schedule.steps:
                means = {key: sum(values) / len(values) for key, values in window.items()}
                window.clear()
                _log(state_file.with_suffix(".jsonl"), {"step": step + 1, **means})
                progress.update(bar, note=" ".join(f"{key} {value:.3f}" for key, value in means.items()))
            if (step + 1) % schedule.save_every == 0 or step + 1 == schedule.steps:
                _save(state_file, module, optimizer, schedule, step + 1)
    return means
