"""Going on with a run: which settings may differ from those it was made with, and how to say so."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from dataclasses import asdict
from typing import Any

from gcpo_t2i.config import TrainConfig
from gcpo_t2i.errors import UserError

# Settings that no weight depends on ...
FREE = (
    *("output_dir", "resume", "overwrite", "save_every", "keep_last", "eval_every", "log", "monitor"),
    "gradient_checkpointing",
)
# ... and those that a run may need to change to get through, at the price of not being the run it would have been.
INEXACT = {
    "steps": "the learning rates of a cosine schedule depend on it",
    "micro_batch_size": "sums are rounded in another order",
    "rollout_batch_size": "sums are rounded in another order",
    "device": "another device rounds differently",
    "dtype": "another precision rounds differently",
}


def settings_as_json(config: Any) -> dict[str, Any]:
    """The settings as they are after a round trip through JSON: lists for tuples."""
    return json.loads(json.dumps(asdict(config)))


def differences(
    saved: Mapping[str, Any], now: Mapping[str, Any], ignored: Collection[str] = (), prefix: str = ""
) -> Iterator[tuple[str, Any, Any]]:
    """(dotted key, saved value, value now) of the settings that both have and that differ, in the order of `now`."""
    for key in now:
        name = f"{prefix}{key}"
        if key not in saved or name in ignored:
            continue
        one, other = saved[key], now[key]
        if isinstance(one, Mapping) and isinstance(other, Mapping):
            yield from differences(one, other, ignored, f"{name}.")
        elif one != other:
            yield name, one, other


def allowed_changes(
    folder: str, saved: Mapping[str, Any], now: Any, free: Collection[str], inexact: Collection[str]
) -> dict[str, str]:
    """Key → what was changed, in words, of the `inexact` settings; those in `free` do not count.

    UserError, which names every key and both values, where others differ from the saved ones.
    """
    changed = sorted(differences(saved, settings_as_json(now), free))
    shown = {name: f"{name} {json.dumps(one)} → {json.dumps(other)}" for name, one, other in changed}
    if refused := [text for name, text in shown.items() if name not in inexact]:
        raise UserError(
            f"{folder} was made with other settings: {'; '.join(refused)}; "
            "go on with the old ones (drop the options, or mend config.yaml), or start another run"
        )
    return shown


def check_settings(folder: str, found: Mapping[str, Any], config: TrainConfig) -> list[str]:
    """Notes on settings that were changed and leave the run going on inexactly; `found` is the checkpoint's state.json.

    UserError where the checkpoint is of a run with other settings.
    """
    shown = allowed_changes(folder, found["settings"], config, FREE, INEXACT)
    if config.steps < found["step"]:
        raise UserError(
            f"{folder}: steps {config.steps} is less than the {found['step']} steps that were made; give more"
        )
    exact = {"steps"} if config.optim.schedule == "constant" else set()
    return [f"{text}: {INEXACT[name]}" for name, text in shown.items() if name not in exact]
