"""Is the reward being hacked? What is watched in every step, and when a run is warned of.

`Watch` looks at the images of a step through eyes that training does not follow: rewards that are not trained on, and how
sharp, saturated and bright the images are. `Monitor` reads the rows of `metrics.jsonl`, and nothing else, so a run that is
resumed is warned of the same things at the same steps.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from PIL import Image

from gcpo_t2i.config import RewardConfig, TrainConfig, reward_name
from gcpo_t2i.errors import UserError
from gcpo_t2i.rollout import Batch
from gcpo_t2i.scoring import RewardSet, scored_name

Metrics = dict[str, Any]

WINDOW = 10  # steps whose mean is compared with that of other ten; no verdict before there are twice as many
NOISE = 4.0  # standard errors that a difference of two such means must exceed
CONSTANT_STEPS = 5  # in a row in which a reward gave every image one and the same score
FEW_REFERENCES = 8  # that the rewards must have refused, all that there were

# By what share a quantity must fall, at least, to be warned of. Honest runs of the embedded model lower entropy by up to 24 %
# and diversity by up to 14 % (19 runs), as RL has to: it makes likely what was rewarded; and sharpness and saturation by
# about a third, where surplus objects disappear. See docs/monitor.md.
LEAST_FALL = {
    "entropy": 0.5,
    "diversity": 0.3,
    "monitor/sharpness": 0.5,
    "monitor/saturation": 0.5,
    "monitor/brightness": 0.15,
}
LEAST_FALL_HELD_OUT = 0.1  # monitor/<reward>/mean


# --- measuring ----------------------------------------------------------------


def sharpness(image: Image.Image) -> float:
    """Mean length of the gradient of the luma, per pixel: 0 for a blank image, √2 at most (luma in [0, 1])."""
    luma = np.asarray(image.convert("L"), np.float32) / 255
    down, right = np.diff(luma, axis=0)[:, :-1], np.diff(luma, axis=1)[:-1]
    return float(np.hypot(down, right).mean())


def saturation(image: Image.Image) -> float:
    """Mean S of HSV, (max − min)/max of a pixel's channels: 0 for grey and black, 1 for pure colours."""
    pixels = np.asarray(image.convert("RGB"), np.float32)
    high, low = pixels.max(axis=2), pixels.min(axis=2)
    return float(((high - low) / np.maximum(high, 1)).mean())


def brightness(image: Image.Image) -> float:
    """Mean luma (ITU-R BT.601), from 0 for black to 1 for white."""
    return float(np.asarray(image.convert("L"), np.float32).mean()) / 255


STATISTICS = {"sharpness": sharpness, "saturation": saturation, "brightness": brightness}


def watched_rewards(config: TrainConfig, eval_rewards: RewardSet, device: str) -> RewardSet:
    """Those of `monitor.rewards`, by default those of the evaluation that are not trained on. UserError as from `load`."""
    if config.monitor.rewards is not None:
        return RewardSet.load(config.monitor.rewards, device, label=scored_name)
    trained = {_served(reward) for reward in config.rewards}
    named = zip(eval_rewards.rewards.items(), config.eval.rewards, strict=True)
    held_out = {label: reward for (label, reward), given in named if _served(given) not in trained}
    return RewardSet(held_out, {label: eval_rewards.weights[label] for label in held_out})


def _served(reward: RewardConfig) -> str:
    """Its name, on whatever machine it is computed: of `remote` that of the reward on the server."""
    return reward_name(reward).removeprefix("remote/")


def spread(images: int, wanted: int) -> list[int]:
    """Which of a step's images are looked at: as many as wanted, or all, evenly from its prompts."""
    count = min(wanted, images)
    return [i * images // count for i in range(count)]


class Watch:
    """Measures a few images of a step, spread evenly over its prompts: all would cost too much, and each step has new ones.

    A reward that fails is left out from then on, and `failures` says why: what only watches a run must not end it. (The
    usual cause: it needs a column that the evaluation's prompts have and the training prompts lack.)
    """

    def __init__(self, rewards: RewardSet, images: int) -> None:
        self.rewards, self.images = dict(rewards.rewards), images
        self.failures: list[str] = []

    def __call__(self, batch: Batch) -> Metrics:
        """`monitor/sharpness`, `…/saturation`, `…/brightness`, `…/<reward>/mean` over the images it applies to, and the
        seconds that all this took, `monitor_time`."""
        started = time.perf_counter()
        chosen = spread(len(batch.images), self.images)
        count = len(chosen)
        images, prompts = [batch.images[i] for i in chosen], [batch.prompts[i // batch.group] for i in chosen]
        metrics: Metrics = {
            f"monitor/{name}": sum(map(measure, images)) / count for name, measure in STATISTICS.items()
        }
        for label, reward in list(self.rewards.items()):
            try:
                scores = RewardSet({label: reward}, {label: 1.0}).score(images, prompts)[label]
            except UserError as error:
                del self.rewards[label]
                self.failures.append(f"{error}; '{label}' is no longer watched")
                continue
            if given := [score for score in scores if score is not None]:
                metrics[f"monitor/{label}/mean"] = sum(given) / len(given)
        return {**metrics, "monitor_time": time.perf_counter() - started}


# --- judging ------------------------------------------------------------------


@dataclass(frozen=True)
class Alarm:
    """A warning. `kind`: what it is about, in a word or two; `step`: when it was first given; `text`: as it is now."""

    kind: str
    step: int
    text: str


def fell_since(reward: np.ndarray, values: np.ndarray, least: float) -> int | None:
    """Where the ten steps start since which the reward rose and `values` fell, both (N,); None if it is not so.

    The last `WINDOW` steps are compared with every earlier block of as many (starts 0, 10, 20, …), so a decline counts from
    its own beginning, late in a run as well. Both differences of means must exceed `NOISE` of their standard errors,
    √(s₁²/n + s₂²/n): steps draw other prompts, so single steps say little, and a test against their own noise needs no
    scale, which for a custom reward nobody knows. As noise shrinks with the batch, and honest training moves everything a
    little, the fall must also be `least` of |the former mean|. Among several such blocks: that of the deepest fall.
    """
    blocks = len(values) // WINDOW - 1
    if blocks < 1:
        return None
    rise, rise_error, _ = _changes(reward, blocks)
    change, error, before = _changes(values, blocks)
    found = (rise > NOISE * rise_error) & (-change > NOISE * error) & (-change >= least * np.abs(before))
    return int(np.argmin(np.where(found, change, math.inf))) * WINDOW if found.any() else None


def _changes(series: np.ndarray, blocks: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of each block (blocks,): mean of the last window minus its own, the standard error of that, and its mean."""
    past, now = series[: blocks * WINDOW].reshape(blocks, WINDOW), series[-WINDOW:]
    before = past.mean(axis=1)
    error = np.sqrt((past.var(axis=1, ddof=1) + now.var(ddof=1)) / WINDOW)
    return now.mean() - before, error, before


class Monitor:
    """Warnings from the rows of training steps. `alarms`: all there have been, by kind; `active`: the kinds that hold now."""

    def __init__(self, rows: Iterable[Mapping[str, Any]] = ()) -> None:
        self.rows: list[Mapping[str, Any]] = []
        self.alarms: dict[str, Alarm] = {}
        self.active: list[str] = []
        for row in rows:
            self.judge(row)

    def judge(self, row: Mapping[str, Any]) -> list[Alarm]:
        """Takes the row of the next step, and returns the alarms of kinds that were not there before."""
        self.rows.append(row)
        texts = self._hacked() | self._constant() | self._refused()
        new = [Alarm(kind, row["step"], text) for kind, text in texts.items() if kind not in self.alarms]
        self.alarms |= {kind: replace(self.alarms[kind], text=texts[kind]) for kind in texts if kind in self.alarms}
        self.alarms |= {alarm.kind: alarm for alarm in new}
        self.active = list(texts)
        return new

    def _series(self, key: str) -> np.ndarray:
        """(N,), NaN where a row lacks it: no comparison with that holds."""
        return np.array([row.get(key, math.nan) for row in self.rows], float)

    def _hacked(self) -> dict[str, str]:
        held_out = (key for key in self.rows[-1] if key.startswith("monitor/") and key.endswith("/mean"))
        reward, texts = self._series("reward"), {}
        for key, least in {**dict.fromkeys(held_out, LEAST_FALL_HELD_OUT), **LEAST_FALL}.items():
            values = self._series(key)
            if (start := fell_since(reward, values, least)) is None:
                continue
            kind = key.removeprefix("monitor/").removesuffix("/mean")
            then, now = slice(start, start + WINDOW), slice(-WINDOW, None)
            steps = [self.rows[i]["step"] for i in (start, start + WINDOW - 1, -WINDOW, -1)]
            texts[kind] = (
                f"the reward rose from {reward[then].mean():.3g} to {reward[now].mean():.3g} while "
                f"{kind if key in LEAST_FALL else f'held-out {kind}'} fell from {values[then].mean():.3g} to "
                f"{values[now].mean():.3g} (means of steps {steps[0]}-{steps[1]} and {steps[2]}-{steps[3]})"
            )
        return texts

    def _constant(self) -> dict[str, str]:
        rows, texts = self.rows[-CONSTANT_STEPS:], {}
        for key in (key for key in rows[-1] if key.startswith("rewards/") and key.endswith("/min")):
            name = key.removeprefix("rewards/").removesuffix("/min")
            given = {row.get(f"rewards/{name}/{end}", math.nan) for row in rows for end in ("min", "max")}
            if len(rows) == CONSTANT_STEPS and len(given) == 1:
                texts[f"constant {name}"] = (
                    f"reward '{name}' gave every image of the last {CONSTANT_STEPS} steps the same score, {given.pop():g}: "
                    "it teaches nothing; try it with gcpo-t2i rewards check"
                )
        return texts

    def _refused(self) -> dict[str, str]:
        refused, taken = (sum(row.get(f"gold/{what}", 0) for row in self.rows) for what in ("rejected", "injected"))
        if taken or refused < FEW_REFERENCES:
            return {}
        text = (
            f"the rewards refused all {refused} references, as the model's tokenizer shows them, so no group was helped; see "
            "whether they fulfil their prompts, and whether --success_reward asks too much"
        )
        return {"references": text}
