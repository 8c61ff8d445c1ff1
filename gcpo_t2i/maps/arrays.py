"""The numbers behind the maps: `arrays.npz`, and `arrays.json` with what they are of."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from gcpo_t2i.algo.credit import CreditSettings
from gcpo_t2i.files import whole_file, write_text
from gcpo_t2i.maps.scored import ScoredImages, phrase_settings

ARRAYS, DESCRIPTION = "arrays.npz", "arrays.json"


def write_arrays(
    folder: Path,
    scored: ScoredImages,
    settings: CreditSettings,
    phrases: Mapping[str, ScoredImages] | None = None,
    **origin: Any,
) -> None:
    """Writes both files, whole, into a folder that is there. `origin`: what else to write down, such as model and seed."""
    phrases = phrases or {}
    with whole_file(folder / ARRAYS) as partial, partial.open("wb") as file:
        # numpy before 2 would take allow_pickle=False for one more array; none of ours has objects
        np.savez_compressed(file, **named_arrays(scored, settings, phrases))  # pyright: ignore[reportArgumentType]
    write_text(folder / DESCRIPTION, json.dumps(origin | description(scored, settings, phrases), indent=2) + "\n")


def named_arrays(
    scored: ScoredImages, settings: CreditSettings, phrases: Mapping[str, ScoredImages]
) -> dict[str, np.ndarray]:
    """N images of T codes, row by row, and K phrases: `tokens` (N, T); `cond_logp`, `null_logp`, `exact_kl`, `js`,
    `entropy` (N, T) in nats; `credit`, `advantage_map` (N, T); `rewards`, `advantage` (N,); `phrase_null_logp`,
    `phrase_credit` (K, N, T)."""
    tensors = {
        "tokens": scored.tokens,
        **scored.tensors,
        "credit": scored.credit(settings),
        "advantage_map": scored.advantage_map(settings),
        "rewards": scored.rewards,
        "advantage": scored.advantage,
    }
    arrays = {name: tensor.numpy() for name, tensor in tensors.items()}
    if phrases:
        arrays["phrase_null_logp"] = np.stack([own.tensors["null_logp"].numpy() for own in phrases.values()])
        arrays["phrase_credit"] = np.stack([own.credit(phrase_settings(settings)).numpy() for own in phrases.values()])
    return arrays


def description(scored: ScoredImages, settings: CreditSettings, phrases: Mapping[str, ScoredImages]) -> dict[str, Any]:
    """What the arrays are of, in words and numbers of JSON. `sampling` is null for given pictures."""
    return {
        "prompt": scored.prompt.text,
        "negative": scored.prompt.negative,
        "columns": dict(scored.prompt.columns),
        "grid": list(scored.grid),
        "sampling": None if scored.given else asdict(scored.sampling),
        "temperature": scored.sampling.temperature,
        "credit": asdict(settings),
        "phrase_credit": asdict(phrase_settings(settings)),
        "scores": scored.scores,
        "reasons": [getattr(verdict, "reason", None) for verdict in scored.verdicts],
        "rewards": scored.rewards.tolist(),
        "advantage": scored.advantage.tolist(),
        "no_advantage": scored.no_advantage,
        "unmoved": scored.unmoved.tolist(),
        "phrases": [{"phrase": phrase, "negative": own.prompt.negative} for phrase, own in phrases.items()],
    }
