"""The bridge to the `rewards` package, and the only module of `gcpo_t2i` that imports it."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from PIL import Image

from gcpo_t2i.config import RewardConfig, reward_name
from gcpo_t2i.data import Prompt, collate_columns
from gcpo_t2i.errors import UserError, everywhere

Scores = dict[str, list[float | None]]


class RewardFailed(UserError):
    """A reward that could not score images, though it was loaded."""


def rewards_package() -> ModuleType:
    """Our top-level package `rewards`. UserError names what shadows it: another distribution of that name exists."""
    package = importlib.import_module("rewards")
    if not hasattr(package, "load_reward"):
        raise UserError(
            f"the package 'rewards' that Python finds is not gcpo-t2i's: {package.__file__ or list(package.__path__)}; "
            "uninstall that package, or run from a folder that does not hold a 'rewards' of its own"
        )
    return package


def segment(images: Sequence[Image.Image]) -> list[list[tuple[Any, Any]]]:
    """Of each ShapesWorld image the objects that GenEval's detector sees, `rewards.boxes.Detection`, each with its pixels
    (48, 48) bool. UserError for images of another size."""
    rewards_package()
    detectors = importlib.import_module("rewards.detectors")
    return [_mended(detectors.segment, image) for image in images]


def geneval_words() -> tuple[tuple[str, ...], tuple[str, ...]]:
    """GenEval's class names and colours, in its order."""
    rewards_package()
    coco = importlib.import_module("rewards.coco")
    return coco.CLASSES, coco.COLORS


@dataclass(frozen=True)
class RewardSet:
    """Loaded rewards by label, the weights of their sum, and the sum from which an image is right, if that is given."""

    rewards: dict[str, Any]  # label → rewards.Reward
    weights: dict[str, float]
    success: float | None = None

    @classmethod
    def load(
        cls,
        configs: Sequence[RewardConfig],
        device: str | None = None,
        label: Callable[[RewardConfig], str] | None = None,
    ) -> RewardSet:
        """Loads every reward; those whose class has a parameter `device` go to `device`. UserError for what cannot be loaded.

        `label` names a reward in tables and metrics, by default with `short_name`; where two names are the same, the
        whole `pkg.module:name` or `path/to/file.py:name` is used.
        """
        package = rewards_package()
        short = [(label or short_name)(config) for config in configs]
        rewards, weights = {}, {}
        for config, name in zip(configs, short, strict=True):
            name = config.name if short.count(name) > 1 else name
            rewards[name] = _mended(package.load_reward, config.name, default_device=device, **config.kwargs)
            weights[name] = config.weight
        return cls(rewards, weights)

    def score(self, images: Sequence[Image.Image], prompts: Sequence[Prompt]) -> Scores:
        """Images and their prompts, both of length N → label → N scores (None: does not apply). UserError names a reward
        that raises, or returns NaN, a value out of its range, or the wrong number of scores."""
        texts, columns = [prompt.text for prompt in prompts], collate_columns(prompts)
        package = rewards_package()
        with _failing(), own_precision():
            return {name: package.score(reward, images, texts, columns) for name, reward in self.rewards.items()}

    def judge(self, images: Sequence[Image.Image], prompts: Sequence[Prompt]) -> tuple[Scores, list[Any]]:
        """`score`, and GenEval's verdict on each image (`rewards.geneval.Verdict`) from the same detection pass; None
        where it does not apply or is not among the rewards."""
        texts, columns = [prompt.text for prompt in prompts], collate_columns(prompts)
        package = rewards_package()
        with _failing(), own_precision():
            judged = {name: package.judge(reward, images, texts, columns) for name, reward in self.rewards.items()}
        verdicts = [next(filter(None, own), None) for own in zip(*(v for _, v in judged.values()), strict=True)]
        return {name: scores for name, (scores, _) in judged.items()}, verdicts

    def check(self, prompts: Sequence[Prompt]) -> None:
        """UserError, with the place of the prompt, for prompts that a reward refuses: what can be known before there are
        images."""
        texts, columns = [prompt.text for prompt in prompts], collate_columns(prompts)
        package = rewards_package()
        for label, reward in self.rewards.items():
            _check_specified(label, getattr(reward.fn, "spec_columns", ()), prompts)
            try:
                package.check_prompts(reward, texts, columns)
            except package.RewardError as error:
                place = "" if error.sample is None else prompts[error.sample].place
                raise UserError(f"{place}: {error}" if place else str(error)) from error

    def versions(self, configs: Sequence[RewardConfig]) -> dict[str, dict[str, Any]]:
        """Label → name, settings and version of a reward made from `configs`, and of its detector if it has one."""
        version_of, described = rewards_package().version_of, {}
        for config, (label, reward) in zip(configs, self.rewards.items(), strict=True):
            described[label] = {
                "name": config.name,
                "settings": dict(config.kwargs),
                "version": _mended(version_of, reward.fn),
            }
            if detector := getattr(reward.fn, "detector", None):
                described[label]["detector"] = {
                    "name": getattr(detector, "__name__", type(detector).__name__),
                    "version": _mended(version_of, detector),
                }
                if isinstance(model := getattr(detector, "name", None), str):
                    described[label]["detector"]["model"] = model
        return described

    def total(self, scores: Scores) -> list[float]:
        """The weighted sum per image; what does not apply contributes 0."""
        return _mended(rewards_package().weighted_sum, scores, self.weights)

    def successes(self, scores: Scores) -> list[bool] | None:
        """Which images are right; None if nobody can tell.

        Those whose weighted sum is at least `success`. Where none is given, those with which every reward is content that
        says what success is: GenEval where its strict verdict is that the image is correct. A reward that does not apply
        to an image has nothing against it.
        """
        if self.success is not None:
            return [total >= self.success for total in self.total(scores)]
        least = {name: reward.success for name, reward in self.rewards.items() if reward.success is not None}
        if not least:
            return None
        rows = zip(*([score is None or score >= least[name] for score in scores[name]] for name in least), strict=True)
        return [all(row) for row in rows]


@contextmanager
def _failing() -> Iterator[None]:
    try:
        yield
    except rewards_package().RewardError as error:
        raise RewardFailed(str(error)) from error


@contextmanager
def own_precision() -> Iterator[None]:
    """Rewards compute as they were written, whatever autocast the policy samples in: a score belongs to its image alone."""
    with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
        yield


def _mended(call: Any, *args: Any, **kwargs: Any) -> Any:
    try:
        return call(*args, **kwargs)
    except rewards_package().RewardError as error:
        raise UserError(str(error)) from error


def _check_specified(label: str, columns: Sequence[str], prompts: Sequence[Prompt]) -> None:
    """UserError for the first prompt that has none of these columns, if others have: was it forgotten?"""
    lacking = [prompt for prompt in prompts if not any(column in prompt.columns for column in columns)]
    if columns and lacking and len(lacking) < len(prompts):
        first, name = lacking[0], columns[0]
        raise UserError(
            f"{first.place or 'prompts'}: the prompt '{first.text[:80]}' has no \"{name}\", by which reward '{label}' judges "
            f'the others ({len(lacking)} of {len(prompts)} have none); add it, or "{name}": null if it shall not be judged'
        )


def check_applicable(rewards: Iterable[str], seen: Mapping[str, Any], prompts: Sequence[Prompt]) -> None:
    """UserError for a reward that says nothing about any sample: training on its silence would teach nothing."""
    for name in rewards:
        if f"rewards/{name}/mean" not in seen:
            has = ", ".join(sorted({column for prompt in prompts for column in prompt.columns})) or "none"
            raise everywhere(
                UserError(
                    f"reward '{name}' applies to none of the prompts of the first step, such as '{prompts[0].text}' "
                    f"(their columns: {has}); use prompts with the columns that it reads, or another reward"
                )
            )


def short_name(config: RewardConfig) -> str:
    """`clip`, `remote/clip`, or the function's own name of `path/to/file.py:name`."""
    return reward_name(config) if config.name == "remote" else config.name.rpartition(":")[2]


def scored_name(config: RewardConfig) -> str:
    """The short name with the reward's `score` setting: `geneval/strict`."""
    score = config.kwargs.get("score")
    return f"{short_name(config)}/{score}" if isinstance(score, str) else short_name(config)
