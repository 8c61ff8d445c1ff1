"""The model, the rewards and the limits that all visitors of the demo share. One of them computes at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any

import torch

from gcpo_t2i.config import DemoConfig
from gcpo_t2i.data import Prompt, described
from gcpo_t2i.demo.runs import run_folder
from gcpo_t2i.errors import UserError
from gcpo_t2i.maps import remarks
from gcpo_t2i.maps.pictures import Picture, fit
from gcpo_t2i.maps.results import Group
from gcpo_t2i.maps.scored import explain_images, phrase_maps, sample_images, without
from gcpo_t2i.models.policy import Policy
from gcpo_t2i.models.progress import listening
from gcpo_t2i.rollout import Sampling
from gcpo_t2i.run import autocast, load_model, resolve_device
from gcpo_t2i.scoring import RewardSet

MAX_PHRASES = 6
BOUNDS: dict[str, tuple[float, float]] = {"guidance": (1.0, 8.0), "temperature": (0.1, 2.0), "seed": (0, 2**31 - 1)}

Tell = Callable[[float, str], object]  # share that is done in [0, 1], and what goes on


def nobody(done: float, what: str) -> None:
    """A Tell that keeps it to itself."""


@dataclass(frozen=True)
class Order:
    """What a visitor wants to be drawn, as the page hands it over: nothing of it has been checked."""

    text: str
    negative: str | None
    group: int
    guidance: float
    temperature: float
    seed: int

    def prompt(self) -> Prompt:
        return described(*cleaned(self.text, self.negative))

    def check(self, max_images: int) -> None:
        """UserError for a number that is none, or out of its bounds."""
        bounds: dict[str, tuple[float, float]] = {"group": (1, max_images), **BOUNDS}
        for name, (low, high) in bounds.items():
            value = getattr(self, name)
            if not isinstance(value, (int, float)) or not math.isfinite(value) or not low <= value <= high:
                raise UserError(f"{name} must be a number from {low:g} to {high:g}, not {value}")


@dataclass(frozen=True)
class Answer:
    """A group of images with everything that is known of it, and what the visitor should know before believing it."""

    group: Group
    notes: tuple[str, ...]
    seed: int | None = None  # None: a given picture


class Studio:
    """All methods may be called from several threads at once."""

    def __init__(self, config: DemoConfig) -> None:
        self.config = config
        self.device = resolve_device(config.device)
        self.runs_dir = Path(config.runs_dir)
        self.rewards = RewardSet.load(config.rewards, str(self.device))
        self.policy = load_model(config.model, self.device)
        self._lock = Lock()
        self._trained: tuple[Any, Policy] | None = None

    def draw(self, order: Order, tell: Tell = nobody) -> Answer:
        """The images of `gcpo-t2i sample` with these settings, scored. UserError for what the visitor can mend."""
        order.check(self.config.max_images)
        prompt = order.prompt()
        with self._turn(tell):
            return self._draw(self.policy, self.config.model, prompt, order, tell)

    def compare(self, order: Order, run: str | None, tell: Tell = nobody) -> tuple[Answer, Answer]:
        """What the model and what the policy of a run make of the same prompt and seed."""
        order.check(self.config.max_images)
        prompt, folder = order.prompt(), self.policy_folder(run)
        with self._turn(tell):
            before = self._draw(self.policy, self.config.model, prompt, order, lambda done, what: tell(done / 2, what))
            after = self._draw(
                self._load(folder), str(run), prompt, order, lambda done, what: tell(0.5 + done / 2, what)
            )
        return before, after

    def explain(
        self, picture: Picture | None, text: str, negative: str | None, phrases: str, tell: Tell = nobody
    ) -> Answer:
        """A picture as if the model had drawn it for this prompt, and a map for each of the comma-separated phrases."""
        if picture is None:
            raise UserError("there is no picture yet; upload one, or let the prompt be drawn")
        prompt = described(*cleaned(text, negative))
        chosen = list(dict.fromkeys(filter(None, map(str.strip, phrases.split(",")))))
        if len(chosen) > MAX_PHRASES:
            raise UserError(f"{len(chosen)} phrases; {MAX_PHRASES} are the most")
        for phrase in chosen:
            without(prompt.text, phrase)
        with self._turn(tell), autocast(self.config.dtype, self.device):
            fitted = fit(picture, self.policy)
            scored = explain_images(self.policy, prompt, self.rewards, [fitted.image])
            tell(0.5, "phrases")
            group = Group(self.config.model, scored, phrase_maps(self.policy, scored, chosen))
            notes = [*fitted.notes, *remarks.of_prompt(self.policy, prompt), *remarks.of_evidence(scored)]
        notes += [
            f"no map of '{phrase}': the prompt without it predicts every code alike"
            for phrase, own in group.phrases.items()
            if own.unmoved.all()
        ]
        return Answer(group, tuple(notes))

    def policy_folder(self, run: str | None) -> Path:
        folder = run_folder(self.runs_dir, run) / "policy"
        if not folder.is_dir():
            raise UserError(f"run '{run}' has no trained policy yet; it is written when the run ends")
        return folder

    def _draw(self, policy: Policy, name: str, prompt: Prompt, order: Order, tell: Tell) -> Answer:
        sampling = Sampling(int(order.group), float(order.guidance), float(order.temperature))
        generator = torch.Generator(self.device).manual_seed(int(order.seed))
        with autocast(self.config.dtype, self.device), counted(policy, f"drawing {sampling.group} images", tell):
            scored = sample_images(policy, prompt, self.rewards, sampling, generator)
        notes = [*remarks.of_prompt(policy, prompt), *remarks.of_group(scored)]
        return Answer(Group(name, scored, {}), tuple(notes), int(order.seed))

    def _load(self, folder: Path) -> Policy:
        """The policy in a folder; the last one is kept, until its files change."""
        key = (folder, [path.stat().st_mtime_ns for path in sorted(folder.rglob("*.json"))])
        if self._trained is None or self._trained[0] != key:
            self._trained = None  # lets go of the old one before there are two
            self._trained = key, load_model(str(folder), self.device)
        return self._trained[1]

    @contextmanager
    def _turn(self, tell: Tell) -> Iterator[None]:
        tell(0.0, "waiting for the images of another visitor" if self._lock.locked() else "starting")
        with self._lock:
            yield


@contextmanager
def counted(policy: Policy, what: str, tell: Tell) -> Iterator[None]:
    """Tells which part of the codes is drawn."""
    whole = policy.grid[0] * policy.grid[1]
    with listening(lambda codes: tell(codes / whole, what)):
        yield


def cleaned(text: str | None, negative: str | None) -> tuple[str, str | None]:
    """Prompt and negative prompt of two text boxes, of which an empty one means none."""
    return (text or "").strip(), (negative or "").strip() or None
