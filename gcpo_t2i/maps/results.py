"""What a heatmap command leaves: the figure of one or two groups, and every picture, map and number by itself.

heatmap.png                          a column per image, a line per kind
image-0.png                          in its own size
image-0-credit.png  -advantage.png  -phrase-0.png …        over the image, enlarged
arrays.npz  arrays.json              see gcpo_t2i.maps.arrays
base/                                of the model to compare with: all but the figure
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from gcpo_t2i.algo.credit import CreditSettings
from gcpo_t2i.maps.arrays import write_arrays
from gcpo_t2i.maps.draw import Scale, advantage_scale, credit_scale, overlay
from gcpo_t2i.maps.figure import Line, figure, save
from gcpo_t2i.maps.remarks import brief, of_evidence
from gcpo_t2i.maps.scored import ScoredImages, phrase_settings

FIGURE, BASE = "heatmap.png", "base"
COLUMNS = 8  # images in the figure; all of them are in files


@dataclass(frozen=True)
class Group:
    """What one model has to show: images of the prompt, and phrase → the same images against the prompt without it."""

    model: str
    scored: ScoredImages
    phrases: dict[str, ScoredImages]


@dataclass(frozen=True)
class Scales:
    """One for all maps of a kind in a figure: what looks alike is alike."""

    credit: Scale
    advantage: Scale
    phrase: Scale

    @classmethod
    def of(cls, groups: Sequence[Group], settings: CreditSettings) -> Scales:
        def extent(parts: Iterable[ScoredImages], settings: CreditSettings) -> Scale:
            moved = [own.credit(settings).flatten() for own in parts if not own.unmoved.all()]
            return credit_scale(torch.cat([torch.zeros(0), *moved]), settings)

        advantage = torch.cat([group.scored.advantage_map(settings).flatten() for group in groups])
        phrases = [own for group in groups for own in group.phrases.values()]
        credit = extent((group.scored for group in groups), settings)
        return cls(credit, advantage_scale(advantage), extent(phrases, phrase_settings(settings)))


def write(folder: Path, groups: Sequence[Group], settings: CreditSettings, seed: int | None) -> None:
    """Everything, into an empty folder. Of two groups the first is the one to compare with."""
    scales, columns = Scales.of(groups, settings), chosen_columns(groups)
    lines = [lines_of(group, settings, scales) for group in groups]
    shown = [
        in_columns(line, columns, name_of(group, groups))
        for group, own in zip(groups, lines, strict=True)
        for line in own
    ]
    words = [heading(groups[0].scored, len(columns)), *of_evidence(groups[0].scored)]
    save(figure("\n".join(words), shown), folder / FIGURE)
    for group, own, place in zip(groups, lines, [folder / BASE, folder][-len(groups) :], strict=True):
        place.mkdir(exist_ok=True)
        for line in own:
            for i, image in enumerate(line.images):
                image.save(place / f"image-{i}{line.file}.png")
        origin = {"model": group.model, "seed": seed, "scales": asdict(scales)}
        write_arrays(place, group.scored, settings, group.phrases, **origin)


def lines_of(group: Group, settings: CreditSettings, scales: Scales) -> list[Line]:
    """Pictures, credit, credit × advantage, and a line per phrase; without the maps that would mean nothing."""
    scored = group.scored
    lines = [Line("", "picture" if scored.given else "image", scored.pictures, titles(scored))]
    if scored.given:
        lines.append(Line("-codes", "what its codes hold", scored.images))
    if not scored.unmoved.all():
        lines.append(_maps("-credit", "credit", scored, scored.credit(settings), scales.credit))
        if not scored.no_advantage:
            label, values = "reinforced (green)\nor suppressed (purple)", scored.advantage_map(settings)
            lines.append(_maps("-advantage", label, scored, values, scales.advantage))
    for k, (phrase, own) in enumerate(group.phrases.items()):
        if not own.unmoved.all():
            label = f"credit of “{brief(phrase, 25)}”"
            lines.append(_maps(f"-phrase-{k}", label, own, own.credit(phrase_settings(settings)), scales.phrase))
    return lines


def _maps(file: str, label: str, scored: ScoredImages, values: Tensor, scale: Scale) -> Line:
    own = zip(scored.pictures, values, strict=True)
    return Line(file, label, [overlay(picture, row.view(scored.grid), scale) for picture, row in own], scale=scale)


def titles(scored: ScoredImages) -> list[str]:
    """What stands over each image."""
    words = [f"image {i}" for i in range(len(scored.rewards))]
    if scored.judged:
        words = [f"{word}\nreward {reward:.2f}" for word, reward in zip(words, scored.rewards, strict=True)]
    if scored.no_advantage is None:
        words = [f"{word}, advantage {own:+.2f}" for word, own in zip(words, scored.advantage, strict=True)]
    return words


def name_of(group: Group, groups: Sequence[Group]) -> str:
    """What tells the lines of two models apart."""
    return "" if len(groups) == 1 else f"{group.model if len(group.model) <= 28 else '…' + group.model[-28:]}\n"


def in_columns(line: Line, columns: Sequence[int], name: str) -> Line:
    titles = None if line.titles is None else [line.titles[i] for i in columns]
    return replace(line, label=name + line.label, images=[line.images[i] for i in columns], titles=titles)


def best_first(scored: ScoredImages) -> list[int]:
    return scored.rewards.argsort(descending=True, stable=True).tolist()


def chosen_columns(groups: Sequence[Group]) -> list[int]:
    """The best images and the worst, best first. Of two groups the first images: one seed's are in one column then."""
    if len(groups) > 1:
        return list(range(min(COLUMNS, len(groups[0].scored.rewards))))
    order = best_first(groups[0].scored)
    return order if len(order) <= COLUMNS else [*order[: COLUMNS // 2], *order[-COLUMNS // 2 :]]


def heading(scored: ScoredImages, shown: int | None = None) -> str:
    """The two prompts, and how many of the images are shown."""
    text, negative = scored.prompt.text, scored.prompt.negative
    against = "the empty prompt" if negative is None else f"“{brief(negative, 90)}”"
    part = f" ({shown} of {len(scored.rewards)} images)" if shown is not None and shown < len(scored.rewards) else ""
    return f"“{brief(text, 90)}” against {against}{part}"
