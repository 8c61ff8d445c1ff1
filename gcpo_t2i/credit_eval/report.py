"""What was found, as tables for the terminal and for Markdown, and as JSON."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, is_dataclass
from typing import Any

from rich.markup import escape
from rich.table import Table

from gcpo_t2i.credit_eval.decisions import BEST, COMPARED, SHARES
from gcpo_t2i.credit_eval.intervals import Interval
from gcpo_t2i.credit_eval.objects import INSIDE
from gcpo_t2i.credit_eval.rules import REFERENCE, RULES
from gcpo_t2i.evals.statistics import Estimate, Estimates

SOURCES = {"scenes": "drawn scenes", "images": "the model's own images"}
HEADERS = {"auroc": "AUROC", "average_precision": "average precision"}
HEADERS |= {f"inside/{name}": f"inside, {name}" for name in INSIDE}


@dataclass(frozen=True)
class Sheet:
    """A table and what is to be known about it."""

    title: str
    header: list[str]
    lines: list[list[str]]
    note: str

    def table(self) -> Table:
        """For the terminal, intervals under their numbers."""
        table = Table(title=self.title, title_justify="left", box=None, padding=(0, 2, 0, 0), pad_edge=False)
        for i, name in enumerate(self.header):
            table.add_column(name, justify="right" if i else "left")
        for line in self.lines:
            table.add_row(*(escape(cell.replace(" [", "\n[")) for cell in line))
        return table

    def markdown(self) -> str:
        rule = ["---", *["--:"] * (len(self.header) - 1)]
        rows = [f"| {' | '.join(line)} |" for line in (self.header, rule, *self.lines)]
        return "\n".join([f"## {self.title}", "", *rows, "", self.note, ""])


def markdown(every: Sequence[Sheet]) -> str:
    return "\n".join(sheet.markdown() for sheet in every)


def as_json(value: Any) -> Any:
    """Nested results with their intervals as objects, and null for what is not a finite number, which JSON does not know."""
    if isinstance(value, Estimates):
        return value.as_json()
    if is_dataclass(value) and not isinstance(value, type):
        return as_json(asdict(value))
    if isinstance(value, Mapping):
        return {key: as_json(own) for key, own in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def sheets(found: Mapping[str, Any]) -> list[Sheet]:
    """The tables of what was measured."""
    every: list[Sheet] = []
    for source, rules in found.get("objects", {}).items():
        every += _objects(SOURCES[source], rules)
    for source, own in found.get("phrases", {}).items():
        every += _phrases(SOURCES[source], own)
    if "advantage" in found:
        every += _advantage(found["advantage"])
    return every


def cell(one: Interval | Estimate, style: str = ".3f") -> str:
    """`0.681 [0.650, 0.712]`, without an interval where none is known."""
    if one.low is None or one.high is None:
        return f"{one.mean:{style}}"
    return f"{one.mean:{style}} [{one.low:{style}}, {one.high:{style}}]"


def _objects(source: str, rules: Mapping[str, Mapping[str, Estimates]]) -> Iterator[Sheet]:
    auroc = {rule: own["auroc"] for rule, own in rules.items()}
    tags = list(auroc["uniform"].tags)
    yield Sheet(
        f"Where the objects are: {source}",
        ["score", *HEADERS.values()],
        [[rule, *(cell(rules[rule][key].overall) if key in rules[rule] else "" for key in HEADERS)] for rule in RULES],
        f"{auroc['uniform'].overall.prompts} images; mean over tags [95 % interval, bootstrap over images]. Inside: share of "
        "the credit, by normalizer, on cells of objects; that of uniform is the share of such cells.",
    )
    if tags:
        yield Sheet(
            f"AUROC by tag: {source}",
            ["score", *tags],
            [[rule, *(f"{auroc[rule].tags[tag].mean:.3f}" for tag in tags)] for rule in RULES],
            "Means over the images of a tag.",
        )


def _phrases(source: str, found: Mapping[str, Any]) -> Iterator[Sheet]:
    images: Mapping[str, int] = found["images"]
    for scale, contrasts in found["ratios"].items():
        yield Sheet(
            f"Phrase maps: {source}, credit by {scale}",
            ["contrast", *(f"{kind} ({number} images)" for kind, number in images.items())],
            [[name, *(cell(own[kind], ".2f") for kind in images)] for name, own in contrasts.items()],
            "Mean credit on the cells of the object that the phrase names ÷ on those of the other object: median over phrases "
            "[95 % interval, bootstrap over images]. 1 = the map does not tell them apart.",
        )


def _advantage(found: Mapping[str, Any]) -> Iterator[Sheet]:
    shares: Mapping[str, Any] = found["shares"]
    compared = f"{COMPARED:g}"
    order = sorted(shares, key=lambda rule: -shares[rule]["share"][compared].mean)
    yield Sheet(
        "Which tokens decided the reward",
        ["first by", *(f"top {share:.0%}" for share in SHARES), f"top {COMPARED:.0%} − {REFERENCE}"],
        [
            [
                rule,
                *(cell(shares[rule]["share"][f"{share:g}"], ".2f") for share in SHARES),
                "" if rule in (BEST, REFERENCE) else cell(shares[rule]["difference"][compared], "+.2f"),
            ]
            for rule in order
        ],
        f"Share of ΣΔV² that the first tokens of each image hold [95 % interval, bootstrap over images]; {found['images']} "
        f"images, {found['continuations']:,} continuations. {BEST}: the order that half of the continuations say, measured on "
        f"the other half, hence a lower bound. ΣΔV² {cell(found['sum_of_squares'], '.3g')}, variance of the reward "
        f"{cell(found['variance'], '.3g')}, ratio {cell(found['squares_to_variance'], '.2f')}, which must be 1; noise that is "
        f"kept out of ΣΔV²: {found['noise'].mean:.2g}.",
    )
    cosines: Mapping[str, Mapping[str, Interval]] = found["cosines"]
    names = list(cosines["uniform"])
    yield Sheet(
        "What an update does, and what it should do",
        ["credit", *names],
        [[rule, *(cell(own[name]) if name in own else "" for name in names)] for rule, own in cosines.items()],
        "Cosine between credit × (reward − its expectation) and true token advantage, over all tokens [95 % interval, "
        "bootstrap over images]; columns: normalizers.",
    )
    densities: Mapping[str, Mapping[str, Interval]] = found["densities"]
    regions = list(next(iter(densities.values())))
    yield Sheet(
        "Where in raster order",
        ["", *regions],
        [[rule, *(cell(own[region], ".2f") for region in regions)] for rule, own in densities.items()],
        "Mean on the cells of a region ÷ mean on all cells: of the default credit, and of the squared true advantage [95 % "
        "interval, bootstrap over images].",
    )
