"""`gcpo-t2i prompts geneval`: training prompts from the templates that GenEval's evaluation prompts are made from.

The grammar is that of the official generator (github.com/djghosh13/geneval, `prompts/create_prompts.py`), with its articles
("an orange", by the first letter) and its plurals ("benchs", by the last): the model meets such texts in the evaluation.
People have no colour; the two objects of a prompt are of different classes, their two colours different.

The random numbers are our own, so no seed gives the official evaluation prompts. These are to be left out with `exclude`.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from gcpo_t2i.config import PromptsGenevalConfig
from gcpo_t2i.data import load_prompts
from gcpo_t2i.errors import UserError
from gcpo_t2i.files import write_text
from gcpo_t2i.scoring import geneval_words
from gcpo_t2i.shapes.prompts import (
    NUMBERS,
    OPPOSITE,
    RELATIONS,
    Metadata,
    color_attr_spec,
    colors_spec,
    counting_spec,
    position_spec,
    single_spec,
    two_object_spec,
)

UNCOLORED = "person"
MAX_REJECTED = 10_000  # draws in a row that are left out, before a tag is given up


@dataclass(frozen=True)
class Words:
    """What templates are filled with. `colorable`: the classes that may have a colour."""

    classes: tuple[str, ...]
    colors: tuple[str, ...]

    @property
    def colorable(self) -> tuple[str, ...]:
        return tuple(name for name in self.classes if name != UNCOLORED)


def make_prompts(config: PromptsGenevalConfig) -> Path:
    """Writes the file, prints what is in it, and returns its path. UserError for a file that is there, and for tags of which
    nothing is left."""
    path = Path(config.out)
    if path.exists() and not config.overwrite:
        raise UserError(f"out '{path}' is already there; add --overwrite to replace it, or name another")
    excluded = {plain(prompt.text) for prompt in load_prompts(config.exclude)} if config.exclude else set()
    specs = draw(config.n, config.mix, excluded, config.seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, "".join(json.dumps(spec) + "\n" for spec in specs))
    show(specs, config)
    return path


def draw(number: int, mix: Mapping[str, int], excluded: set[str], seed: int) -> list[Metadata]:
    """Metadata (with its `prompt`) of so many prompts, in random order, their tags in the proportions of the mix.

    Draws are independent, as the official generator's, so prompts of a small tag repeat (there are 240 of counting).
    `excluded`: texts, as `plain` has them. UserError for a tag of which they leave next to nothing.
    """
    words = Words(*geneval_words())
    specs: list[Metadata] = []
    for tag, count in shares(number, mix).items():
        source = allowed(tag, words, excluded, random.Random(f"{seed}/{tag}"))
        specs += [next(source) for _ in range(count)]
    random.Random(f"{seed}/order").shuffle(specs)
    return specs


def shares(number: int, mix: Mapping[str, int]) -> dict[str, int]:
    """How many of `number` prompts each tag gets: the whole parts of its share, and what is left to the largest remainders."""
    total = sum(mix.values())
    counts = {tag: number * share // total for tag, share in mix.items()}
    by_remainder = sorted(mix, key=lambda tag: -(number * mix[tag] % total))  # stable: ties in the order of the mix
    for tag in by_remainder[: number - sum(counts.values())]:
        counts[tag] += 1
    return counts


def allowed(tag: str, words: Words, excluded: set[str], rng: random.Random) -> Iterator[Metadata]:
    """An endless stream of prompts of one tag, none of whose twins is excluded."""
    rejected = 0
    while True:
        spec = TEMPLATES[tag](words, rng)
        if excluded.isdisjoint(map(plain, twins(spec))):
            rejected = 0
            yield spec
        elif (rejected := rejected + 1) > MAX_REJECTED:
            raise UserError(
                f"mix: the prompts to exclude leave next to nothing of the tag '{tag}'; leave that tag out of --mix"
            )


# --- templates ----------------------------------------------------------------


def _single(words: Words, rng: random.Random) -> Metadata:
    return single_spec(rng.choice(words.classes))


def _two_object(words: Words, rng: random.Random) -> Metadata:
    return two_object_spec(*rng.sample(words.classes, 2))


def _counting(words: Words, rng: random.Random) -> Metadata:
    return counting_spec(rng.choice(words.classes), rng.choice(list(NUMBERS)))


def _colors(words: Words, rng: random.Random) -> Metadata:
    return colors_spec(rng.choice(words.colorable), rng.choice(words.colors))


def _position(words: Words, rng: random.Random) -> Metadata:
    subject, anchor = rng.sample(words.classes, 2)
    return position_spec(subject, rng.choice(RELATIONS), anchor)


def _color_attr(words: Words, rng: random.Random) -> Metadata:
    (first, second), (one, other) = rng.sample(words.colorable, 2), rng.sample(words.colors, 2)
    return color_attr_spec(first, one, second, other)


TEMPLATES: dict[str, Callable[[Words, random.Random], Metadata]] = {
    "position": _position,
    "counting": _counting,
    "color_attr": _color_attr,
    "colors": _colors,
    "two_object": _two_object,
    "single_object": _single,
}


def twins(spec: Metadata) -> list[str]:
    """The text, and those in which its two objects have changed places: in the sentence, or only in the relation or in who
    has which colour."""
    if len(spec["include"]) == 1:
        return [spec["prompt"]]
    a, b = spec["include"]
    one, other = a["class"], b["class"]
    match spec["tag"]:
        case "position":
            relation = b["position"][0]
            ways = [(one, relation, other), (other, relation, one)]
            ways += [(second, OPPOSITE[relation], first) for first, relation, second in ways]
            found = [position_spec(*way) for way in ways]
        case "color_attr":
            pairs = [(one, a["color"], other, b["color"]), (one, b["color"], other, a["color"])]
            found = [color_attr_spec(*way) for pair in pairs for way in (pair, (*pair[2:], *pair[:2]))]
        case _:
            found = [two_object_spec(one, other), two_object_spec(other, one)]
    return [twin["prompt"] for twin in found]


def plain(text: str) -> str:
    """A text as prompts are compared: without case, double blanks and a full stop."""
    return " ".join(text.lower().split()).rstrip(" .")


# --- what a person sees -------------------------------------------------------


def show(specs: list[Metadata], config: PromptsGenevalConfig) -> None:
    console = Console()
    found: dict[str, Counter[str]] = {tag: Counter() for tag in config.mix}
    for spec in specs:
        found[spec["tag"]][spec["prompt"]] += 1
    table = Table("tag", "prompts", "different", "such as")
    for tag, texts in found.items():
        table.add_row(tag, f"{texts.total():,}", f"{len(texts):,}", escape(next(iter(texts), "")))
    console.print(table)
    mix: Any = json.dumps({tag: share for tag, share in config.mix.items() if share})
    command = f"gcpo-t2i train --train_prompts {config.out} --train_mix '{mix}'"
    console.print(
        f"Training takes the tags in turns unless it is told their shares:\n  {escape(command)}", soft_wrap=True
    )
