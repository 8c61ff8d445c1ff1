"""`gcpo-t2i rewards check`: what each reward says about images that are known to be good, bad, blank and noise."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from PIL import Image
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from scipy.stats import mannwhitneyu

from gcpo_t2i.config import RewardConfig, RewardsCheckConfig
from gcpo_t2i.data import Prompt, PromptSampler, load_prompts
from gcpo_t2i.errors import UserError
from gcpo_t2i.run import resolve_device
from gcpo_t2i.scoring import RewardSet, scored_name
from gcpo_t2i.shapes import BACKGROUNDS, render, sample_scene

GOOD, BAD, BLANK, NOISE = KINDS = ("good", "bad", "blank", "noise")
SURE = 0.001  # p value below which good images are said to score higher than bad ones
SAME = 1e-5  # difference of two scores that is rounding


@dataclass(frozen=True)
class Known:
    """N prompts, with N images of each kind; image i of the bad ones is that of the good ones with the index `other[i]`."""

    prompts: list[Prompt]
    images: dict[str, list[Image.Image]]
    other: list[int]


@dataclass(frozen=True)
class Finding:
    """What one reward said, kind → N scores, and what that means."""

    name: str
    verdict: str
    failed: bool = False
    scores: dict[str, list[float | None]] = field(default_factory=dict)
    milliseconds: float | None = None  # per image
    range: tuple[float, float] | None = None


def check(config: RewardsCheckConfig) -> int:
    """Prints a table of scores and a verdict for each reward. Returns 1 if one of them fails, else 0."""
    console = Console()
    device = str(resolve_device(config.device))
    count, seed = config.num_images, config.seed
    known = own_images(config.images, count, seed) if config.images else shapes_images(count, seed)
    rewards = [*config.rewards, *config.eval.rewards]
    once = [reward for n, reward in enumerate(rewards) if reward not in rewards[:n]]
    findings = [examine(reward, known, device) for reward in once]
    if scored := [finding for finding in findings if finding.scores]:
        console.print(_table(scored))
    for finding in findings:
        style = "red" if finding.failed else "green" if finding.verdict == "ok" else "yellow"
        console.print(f"[bold]{escape(finding.name)}[/]: [{style}]{escape(finding.verdict)}[/]", soft_wrap=True)
    return int(any(finding.failed for finding in findings))


# --- images -------------------------------------------------------------------


def shapes_images(count: int, seed: int) -> Known:
    """Held-out prompts of ShapesWorld, in turns over their tags. Good: a scene that fulfils the prompt; bad: the scene of
    another prompt, with none of its shapes; blank: a plain background of that world."""
    rng = np.random.default_rng(seed)
    prompts = PromptSampler(load_prompts("shapesworld:heldout"), seed).batch(0, max(count, 2))
    good = [Image.fromarray(render(sample_scene(dict(prompt.columns), rng))) for prompt in prompts]
    shapes = [{clause["class"] for clause in prompt.columns["include"]} for prompt in prompts]
    other = []
    for i, own in enumerate(shapes):
        strangers = [j for j, theirs in enumerate(shapes) if not own & theirs] or [(i + 1) % len(shapes)]
        other.append(int(rng.choice(strangers)))
    return _known(prompts, good, other, BACKGROUNDS, rng)


def own_images(path: str, count: int, seed: int) -> Known:
    """The first `count` prompts of a .jsonl file, whose column `image` names the good ones, beside the file. Bad: the image
    of the next prompt; blank: grey. UserError for images that are missing or cannot be read, and for fewer than two."""
    prompts, images = load_prompts(path)[:count], []
    if len(prompts) < 2:
        raise UserError(f"images '{path}': at least two prompts are needed, so that one's image is bad for the other")
    for prompt in prompts:
        name = prompt.columns.get("image")
        if not isinstance(name, str):
            raise UserError(f"images '{path}': the prompt '{prompt.text}' has no \"image\", a path beside the file")
        try:
            images.append(Image.open(Path(path).parent / name).convert("RGB"))
        except OSError as error:
            raise UserError(f"images '{path}': '{name}' cannot be read as an image: {error}") from error
    other = [(i + 1) % len(images) for i in range(len(images))]
    return _known(prompts, images, other, ((0, 0, 0), (128, 128, 128), (255, 255, 255)), np.random.default_rng(seed))


def _known(
    prompts: list[Prompt], good: list[Image.Image], other: list[int], plain: Sequence[Any], rng: np.random.Generator
) -> Known:
    blank = [Image.new("RGB", image.size, plain[i % len(plain)]) for i, image in enumerate(good)]
    noise = [Image.fromarray(rng.integers(0, 256, (*image.size[::-1], 3), np.uint8)) for image in good]
    return Known(prompts, {GOOD: good, BAD: [good[j] for j in other], BLANK: blank, NOISE: noise}, other)


# --- what a reward says -------------------------------------------------------


def examine(config: RewardConfig, known: Known, device: str) -> Finding:
    """Loads one reward and scores every kind of image with it. What it does wrong is the verdict, not an exception."""
    name, scores, seconds = scored_name(config), {}, 0.0
    try:
        rewards = RewardSet.load([config], device, label=scored_name)
        for kind, images in known.images.items():
            started = time.perf_counter()
            scores[kind] = rewards.score(images, known.prompts)[name]
            seconds += time.perf_counter() - started if scores.keys() != {GOOD} else 0.0  # the first call also warms up
    except UserError as error:
        return Finding(name, f"FAILED: {error}", failed=True, scores=scores)
    milliseconds = 1000 * seconds / (len(known.prompts) * (len(KINDS) - 1))
    return Finding(name, verdict(scores, known.other), False, scores, milliseconds, rewards.rewards[name].range)


def verdict(scores: Mapping[str, Sequence[float | None]], other: Sequence[int]) -> str:
    """One line about the scores of each kind. `ok`: good images score higher than bad ones (one-sided rank test of Mann and
    Whitney, p < 0.001)."""
    given = {kind: [value for value in values if value is not None] for kind, values in scores.items()}
    if not any(given.values()):
        return "applies to none of these prompts (None for every image); see --images"
    every = [value for values in given.values() for value in values]
    if max(every) - min(every) <= SAME:
        return f"constant: {every[0]:g} for every image, so it teaches nothing"
    if not given[GOOD] or not given[BAD]:
        return "does not tell good from bad: it applies only to images of one kind"
    if _higher(given[GOOD], given[BAD]):
        return "ok"
    if _higher(given[BAD], given[GOOD]):
        return "prefers bad images to good ones"
    if all(_same(scores[BAD][i], scores[GOOD][j]) for i, j in enumerate(other)):
        worse = " and ".join(kind for kind in (BLANK, NOISE) if _higher(given[GOOD], given[kind]))
        above = f"above {worse}" if worse else "no higher than blank and noise"
        return f"does not look at the prompt; scores good images {above}"
    return "does not tell good from bad"


def _higher(one: Sequence[float], other: Sequence[float]) -> bool:
    return bool(one and other) and mannwhitneyu(one, other, alternative="greater").pvalue < SURE


def _same(one: float | None, other: float | None) -> bool:
    return one is other or (one is not None and other is not None and abs(one - other) <= SAME)


def _table(findings: Sequence[Finding]) -> Table:
    table = Table(title="Scores of known images (ms: time per image)", title_justify="left")
    for column in ("reward", "images", "min", "mean", "max", "none", "range", "ms"):
        justify = "left" if column in ("reward", "images", "range") else "right"
        table.add_column(column, justify=justify, no_wrap=column == "reward")
    for finding in findings:
        low_high = "any" if finding.range is None else "{:g} to {:g}".format(*finding.range)
        speed = "" if finding.milliseconds is None else f"{finding.milliseconds:.1f}"
        for n, (kind, scores) in enumerate(finding.scores.items()):
            given = [score for score in scores if score is not None]
            numbers = [f"{f(given):.3f}" if given else "" for f in (min, fmean, max)]
            ends = (low_high, speed) if n == 0 else ("", "")
            name = escape(finding.name) if n == 0 else ""
            table.add_row(name, kind, *numbers, f"{1 - len(given) / len(scores):.0%}", *ends)
        table.add_section()
    return table
