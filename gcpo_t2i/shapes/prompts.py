"""ShapesWorld prompts in GenEval's six categories and metadata format, and a scene for each of them.

The split is by *key*: the prompt with the order of its two objects, and with it the direction of its relation, taken out.
"a circle left of a square", "a square left of a circle" and "a square right of a circle" share one key, so a held-out
prompt has no twin among the training prompts.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterator
from functools import cache
from itertools import permutations
from typing import Any

import numpy as np

from gcpo_t2i.shapes.scenes import BACKGROUNDS, CELL, GRID, PALETTE, SHAPES, SIZES, Object, Scene

Metadata = dict[str, Any]

TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
NUMBERS = {2: "two", 3: "three", 4: "four"}
RELATIONS = ("left of", "right of", "above", "below")
HELDOUT_SHARE = 0.25

_PAIRS = (
    *(("circle", "ring"), ("square", "diamond"), ("triangle", "heart"), ("cross", "star")),
    *(("red", "pink"), ("orange", "yellow"), ("green", "brown"), ("blue", "purple")),
)
LOOKALIKES = {one: other for pair in _PAIRS for one, other in (pair, pair[::-1])}
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
_AXIS = {"left of": "horizontal", "right of": "horizontal", "above": "vertical", "below": "vertical"}


def plural(shape: str) -> str:
    return shape + ("es" if shape.endswith("s") else "s")


def article(noun: str) -> str:
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


def single_spec(shape: str) -> Metadata:
    return {"tag": "single_object", "include": [{"class": shape, "count": 1}], "prompt": f"a photo of {article(shape)}"}


def colors_spec(shape: str, color: str) -> Metadata:
    include = [{"class": shape, "count": 1, "color": color}]
    return {"tag": "colors", "include": include, "prompt": f"a photo of {article(f'{color} {shape}')}"}


def counting_spec(shape: str, number: int) -> Metadata:
    return {
        "tag": "counting",
        "include": [{"class": shape, "count": number}],
        "exclude": [{"class": shape, "count": number + 1}],
        "prompt": f"a photo of {NUMBERS[number]} {plural(shape)}",
    }


def two_object_spec(first: str, second: str) -> Metadata:
    include = [{"class": first, "count": 1}, {"class": second, "count": 1}]
    return {"tag": "two_object", "include": include, "prompt": f"a photo of {article(first)} and {article(second)}"}


def position_spec(subject: str, relation: str, anchor: str) -> Metadata:
    include = [{"class": anchor, "count": 1}, {"class": subject, "count": 1, "position": [relation, 0]}]
    prompt = f"a photo of {article(subject)} {relation} {article(anchor)}"
    return {"tag": "position", "include": include, "prompt": prompt}


def color_attr_spec(first: str, first_color: str, second: str, second_color: str) -> Metadata:
    return {
        "tag": "color_attr",
        "include": [
            {"class": first, "count": 1, "color": first_color},
            {"class": second, "count": 1, "color": second_color},
        ],
        "prompt": f"a photo of {article(f'{first_color} {first}')} and {article(f'{second_color} {second}')}",
    }


def misdescribed(metadata: Metadata, wrong: float, rng: np.random.Generator) -> Metadata:
    """What is in the picture of somebody who captions it with this prompt and gets each word wrong with this probability.

    A wrong shape or colour is a look-alike, a wrong number another one, a wrong relation the opposite. Only `include`
    tells of it; `prompt` stays.
    """

    def shown(word: Any, other: Any) -> Any:
        return other if rng.random() < wrong else word

    include = []
    for clause in metadata["include"]:
        clause = {**clause, "class": shown(clause["class"], LOOKALIKES[clause["class"]])}
        if "color" in clause:
            clause["color"] = shown(clause["color"], LOOKALIKES[clause["color"]])
        if clause["count"] in NUMBERS:
            clause["count"] = shown(clause["count"], int(rng.choice([n for n in NUMBERS if n != clause["count"]])))
        if "position" in clause:
            relation, target = clause["position"]
            clause["position"] = [shown(relation, OPPOSITE[relation]), target]
        include.append(clause)
    return {**metadata, "include": include}


def reordered(metadata: Metadata) -> Metadata | None:
    """The prompt that has the same words and means something else; None if there is none."""
    first, *others = metadata["include"]
    match metadata["tag"]:
        case "position":
            return position_spec(first["class"], others[0]["position"][0], others[0]["class"])
        case "color_attr":
            return color_attr_spec(first["class"], others[0]["color"], others[0]["class"], first["color"])
        case _:
            return None


@cache
def all_specs() -> tuple[Metadata, ...]:
    """Every ShapesWorld prompt with its GenEval metadata: 8 + 56 + 24 + 64 + 224 + 3136 of them."""
    pairs, colors = list(permutations(SHAPES, 2)), list(PALETTE)
    return (
        *(single_spec(shape) for shape in SHAPES),
        *(two_object_spec(a, b) for a, b in pairs),
        *(counting_spec(shape, number) for shape in SHAPES for number in NUMBERS),
        *(colors_spec(shape, color) for shape in SHAPES for color in colors),
        *(position_spec(a, relation, b) for a, b in pairs for relation in RELATIONS),
        *(color_attr_spec(a, c, b, d) for a, b in pairs for c, d in permutations(colors, 2)),
    )


_NOUN = rf"(a|an|{'|'.join(NUMBERS.values())})(?: ({'|'.join(PALETTE)}))? ({'|'.join((*map(plural, SHAPES), *SHAPES))})"
_PROMPT = re.compile(rf"(?:a photo of )?{_NOUN}(?: (and|{'|'.join(RELATIONS)}) {_NOUN})?")


def parse_prompt(text: str) -> Metadata | None:
    """GenEval's metadata, without `prompt`, of a text in ShapesWorld's words; None for what it has no words for.

    All prompts of the world, with or without "a photo of", and more of their kind: "two red circles above a blue square".
    Objects of one shape in two clauses are None: GenEval's rules take the same object for both.
    """
    match = _PROMPT.fullmatch(" ".join(text.lower().split()).rstrip(" ."))
    if match is None:
        return None
    *first, link, number, color, noun = match.groups()
    clauses = [_clause(*first)] if link is None else [_clause(*first), _clause(number, color, noun)]
    if None in clauses or len({clause["class"] for clause in clauses}) < len(clauses):
        return None
    if link in RELATIONS:
        clauses = [clauses[1], {**clauses[0], "position": [link, 0]}]
    exclude = [{"class": clause["class"], "count": clause["count"] + 1} for clause in clauses if clause["count"] > 1]
    return {"tag": _tag(clauses), "include": clauses, **({"exclude": exclude} if exclude else {})}


def _tag(clauses: list[Metadata]) -> str:
    colored = any("color" in clause for clause in clauses)
    if any("position" in clause for clause in clauses):
        return "position"
    if any(clause["count"] > 1 for clause in clauses):
        return "counting"
    if len(clauses) == 1:
        return "colors" if colored else "single_object"
    return "color_attr" if colored else "two_object"


def _clause(number: str, color: str | None, noun: str) -> Any:
    """An include clause; None where number and noun do not agree, as in "two circle"."""
    count = next((value for value, word in NUMBERS.items() if word == number), 1)
    shape = next(shape for shape in SHAPES if noun in (shape, plural(shape)))
    if noun != (shape if count == 1 else plural(shape)):
        return None
    return {"class": shape, "count": count, **({} if color is None else {"color": color})}


def split_key(metadata: Metadata) -> str:
    """What two prompts share if they differ only in the order of their objects (see the module's docstring)."""
    nouns = sorted(f"{clause.get('color', '')} {clause['class']} {clause['count']}" for clause in metadata["include"])
    axes = [_AXIS[clause["position"][0]] for clause in metadata["include"] if "position" in clause]
    return " | ".join([metadata["tag"], *axes, *nouns])


def _pick(keys: dict[str, list[str]]) -> set[str]:
    """A quarter of the keys (key → its class names), in the order of their hash, so no random state decides.

    At most half of the keys of any class are taken: every class stays to be learned in every category that has enough.
    """
    free = {noun: max(1, total // 2) for noun, total in Counter(n for nouns in keys.values() for n in nouns).items()}
    chosen: set[str] = set()
    for key in sorted(keys, key=lambda key: hashlib.sha256(key.encode()).hexdigest()):
        if len(chosen) < round(HELDOUT_SHARE * len(keys)) and all(free[noun] > 0 for noun in keys[key]):
            chosen.add(key)
            for noun in keys[key]:
                free[noun] -= 1
    return chosen


@cache
def _heldout_keys() -> frozenset[str]:
    chosen: set[str] = set()
    for tag in TAGS:
        specs = [spec for spec in all_specs() if spec["tag"] == tag]
        chosen |= _pick({split_key(spec): [clause["class"] for clause in spec["include"]] for spec in specs})
    return frozenset(chosen)


def train_specs() -> list[Metadata]:
    """Metadata (with its `prompt`) of the training prompts."""
    return [spec for spec in all_specs() if split_key(spec) not in _heldout_keys()]


def heldout_specs() -> list[Metadata]:
    """Metadata of the held-out prompts, which no shipped checkpoint and no training run has seen."""
    return [spec for spec in all_specs() if split_key(spec) in _heldout_keys()]


def _place(sizes: list[int], rng: np.random.Generator) -> list[tuple[int, int]] | None:
    """Top-left cells of boxes that keep one empty cell between them, uniform over placements; None if it did not fit."""
    taken = np.zeros((GRID, GRID), bool)
    corners = []
    for size in sizes:
        cells = size // CELL
        for _ in range(20):
            x, y = rng.integers(0, GRID - cells + 1, 2)
            if not taken[max(y - 1, 0) : y + cells + 1, max(x - 1, 0) : x + cells + 1].any():
                break
        else:
            return None
        taken[y : y + cells, x : x + cells] = True
        corners.append((int(x), int(y)))
    return corners


def _related(subject: Object, anchor: Object, relation: str) -> bool:
    """Whether the subject lies clearly on the named side: the gap is on that axis, and it is the longer offset."""
    dx = (subject.x + subject.size / 2) - (anchor.x + anchor.size / 2)
    dy = (subject.y + subject.size / 2) - (anchor.y + anchor.size / 2)
    along, across = (dx, dy) if _AXIS[relation] == "horizontal" else (dy, dx)
    signed = -along if relation in ("left of", "above") else along
    return signed > (subject.size + anchor.size) / 2 and signed > abs(across)


def _wanted(metadata: Metadata, rng: np.random.Generator) -> list[tuple[str, str, int]]:
    """(shape, color, size) of each object; what the prompt leaves open is drawn. Counted objects look alike."""
    wanted = []
    for clause in metadata["include"]:
        color = clause.get("color") or str(rng.choice(list(PALETTE)))
        wanted += [(clause["class"], color, int(rng.choice(SIZES)))] * clause["count"]
    return wanted


def _candidates(metadata: Metadata, rng: np.random.Generator) -> Iterator[list[Object]]:
    while True:
        wanted = _wanted(metadata, rng)
        corners = _place([size for *_, size in wanted], rng)
        if corners is not None:
            yield [
                Object(shape, color, size, x * CELL, y * CELL)
                for (shape, color, size), (x, y) in zip(wanted, corners, strict=True)
            ]


def sample_scene(metadata: Metadata, rng: np.random.Generator) -> Scene:
    """A scene that fulfils the metadata exactly and shows nothing else.

    Objects come in the order of `include`. Raises KeyError for classes or colours that ShapesWorld does not have.
    """
    background = BACKGROUNDS[rng.integers(len(BACKGROUNDS))]
    positions = [(i, clause["position"]) for i, clause in enumerate(metadata["include"]) if "position" in clause]
    for objects in _candidates(metadata, rng):
        if all(_related(objects[i], objects[target], relation) for i, (relation, target) in positions):
            return Scene(tuple(objects), background)
    raise AssertionError("unreachable: candidates never end")
