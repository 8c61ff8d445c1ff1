"""The recipe of an evaluation: all that its numbers depend on. Two evaluations are comparable if only the policy differs."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from gcpo_t2i import __version__
from gcpo_t2i.config import EvaluationConfig
from gcpo_t2i.config.evaluation import DEFAULT_PROMPTS
from gcpo_t2i.data import Prompt
from gcpo_t2i.errors import UserError
from gcpo_t2i.evals.layout import canonical
from gcpo_t2i.files import write_text
from gcpo_t2i.models import FAMILIES
from gcpo_t2i.models.folder import read_index
from gcpo_t2i.run import model_folder, use_bfloat16

RECIPE = "recipe.json"
FORMAT = 1
KEYS = {"format", "policy", "prompts", "samples_per_prompt", "sampling", "evaluator"}

# Dotted keys, with all below them, that may differ ...
BETWEEN_POLICIES = ("policy", "prompts.source", "environment")  # ... between two evaluations that are compared
BETWEEN_IMAGES = (
    *BETWEEN_POLICIES,
    "sampling",
)  # ... if the images of one are not ours: nobody knows how they were sampled
WHEN_RESUMED = ("policy.model", "prompts.source", "environment")  # ... when an evaluation goes on
WHEN_RESUMED_UNSCORED = (*WHEN_RESUMED, "evaluator")  # ... if it was interrupted before it had scores

Recipe = dict[str, Any]


def policy_hash(folder: Path) -> str:
    """SHA-256 over the lines `PATH SHA-256` of a policy folder's weights and configs (*.safetensors, *.json), by path.

    `scores.json` and model cards are left out: they tell of a policy and are not part of it. UserError if the folder
    holds no policy.
    """
    read_index(folder, FAMILIES)
    files = [
        path for path in folder.rglob("*") if path.suffix in (".safetensors", ".json") and path.name != "scores.json"
    ]
    whole = hashlib.sha256()
    for path in sorted(files, key=lambda path: path.relative_to(folder).as_posix()):
        with path.open("rb") as file:
            own = hashlib.file_digest(file, "sha256").hexdigest()
        whole.update(f"{path.relative_to(folder).as_posix()} {own}\n".encode())
    return whole.hexdigest()


def prompts_hash(lines: Sequence[str]) -> str:
    """SHA-256 of prompts with all their columns, in their order, each as `layout.canonical` writes it."""
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def make_recipe(
    config: EvaluationConfig,
    prompts: Sequence[Prompt],
    samples_per_prompt: int,
    rewards: Mapping[str, Any],
    device: torch.device,
) -> Recipe:
    """The recipe of an evaluation with these settings; `rewards`: label → what `RewardSet.versions` says of it."""
    if config.images is None:
        policy = {"model": config.model, "sha256": policy_hash(model_folder(config.model))}
        names = ("seed", "guidance", "temperature", "top_k", "top_p")
        precision = "bfloat16" if use_bfloat16(config.dtype, device) else "float32"
        sampling = {name: getattr(config, name) for name in names} | {"dtype": precision}
    else:
        policy, sampling = {"images": config.images, "external": True}, None
    return {
        "format": FORMAT,
        "policy": policy,
        "prompts": {
            "source": config.prompts or config.images or DEFAULT_PROMPTS,
            "number": len(prompts),
            "sha256": prompts_hash([canonical(prompt) for prompt in prompts]),
        },
        "samples_per_prompt": samples_per_prompt,
        "sampling": sampling,
        "evaluator": {"name": "gcpo-t2i", "version": __version__, "rewards": dict(rewards)},
        "environment": {"device": str(device), "batch_size": config.batch_size, "torch": torch.__version__},
    }


def is_external(recipe: Recipe) -> bool:
    return bool(recipe["policy"].get("external"))


def check_comparable(ours: Recipe, theirs: Recipe, where: Path) -> None:
    """UserError that names every setting in which two evaluations differ, with both values, but for their policies."""
    external = is_external(ours) or is_external(theirs)
    if found := differences(ours, theirs, BETWEEN_IMAGES if external else BETWEEN_POLICIES):
        raise UserError(f"{where} has another recipe, so the scores cannot be compared: {'; '.join(found)}")


def check_resumable(ours: Recipe, folder: Path, scored: bool) -> None:
    """UserError if the evaluation in `folder` was begun with another recipe."""
    if found := differences(ours, read_recipe(folder), WHEN_RESUMED if scored else WHEN_RESUMED_UNSCORED):
        raise UserError(
            f"{folder} was begun with another recipe: {'; '.join(found)}; give the same settings, or --overwrite, "
            "or another --output_dir"
        )


def differences(ours: Recipe, theirs: Recipe, ignored: Sequence[str]) -> list[str]:
    """`key: a here, b there` for every dotted key that differs and is not, nor lies below, one of the ignored."""
    here, there = _flat(ours), _flat(theirs)
    return [
        f"{key}: {_shown(here, key)} here, {_shown(there, key)} there"
        for key in dict.fromkeys((*here, *there))
        if not any(f"{key}.".startswith(f"{prefix}.") for prefix in ignored)
        and (key in here, here.get(key)) != (key in there, there.get(key))
    ]


def _flat(value: Any, key: str = "") -> dict[str, Any]:
    if not isinstance(value, dict) or not value:
        return {key: value}
    return {
        name: leaf for part, own in value.items() for name, leaf in _flat(own, f"{key}.{part}" if key else part).items()
    }


def _shown(flat: Mapping[str, Any], key: str) -> str:
    """The value for a message, hashes cut to their first 12 digits."""
    text = json.dumps(flat[key]).strip('"') if key in flat else "not set"
    return re.sub("([0-9a-f]{12})[0-9a-f]{52}", r"\1…", text)


def write_recipe(recipe: Recipe, folder: Path) -> None:
    write_text(folder / RECIPE, json.dumps(recipe, indent=2) + "\n")


def read_recipe(folder: Path) -> Recipe:
    """UserError if the folder holds no evaluation, or one of a newer version, or its recipe is damaged."""
    path = folder / RECIPE
    if not folder.is_dir():
        raise UserError(f"no evaluation at {folder}: there is no such folder")
    if not path.is_file():
        raise UserError(f"no evaluation at {folder}: it holds no {RECIPE}; name a folder that gcpo-t2i eval wrote")
    try:
        recipe = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: damaged ({error}); evaluate again") from error
    if not isinstance(recipe, dict) or not recipe.keys() >= KEYS:
        raise UserError(f"{path}: not a recipe of gcpo-t2i eval, which has the keys {', '.join(sorted(KEYS))}")
    if recipe["format"] != FORMAT:
        raise UserError(f"{path}: written by another gcpo-t2i (format {recipe['format']}, known: {FORMAT}); upgrade")
    return recipe
