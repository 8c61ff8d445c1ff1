"""What a visitor sees of images that are there: tiles, tables, numbers of cells. Needs no model, so it changes at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image
from torch import Tensor

from gcpo_t2i.algo.credit import CreditSettings
from gcpo_t2i.demo.cellmap import Panel
from gcpo_t2i.errors import UserError
from gcpo_t2i.images import enlarge
from gcpo_t2i.maps.draw import LEAST, OPACITY, Scale, overlay
from gcpo_t2i.maps.results import Group, Scales, best_first
from gcpo_t2i.maps.scored import ScoredImages, phrase_settings

PICTURE, CREDIT, ADVANTAGE = "picture", "credit", "advantage"
MEANING = {
    CREDIT: "bright: the prompt decided this code",
    ADVANTAGE: "green: the update makes this code likelier, purple: less likely",
}


@dataclass(frozen=True)
class View:
    """How maps are drawn. All of it can change without the model. UserError for what does not go together."""

    kind: str = CREDIT
    opacity: float = OPACITY
    contrast: str = CreditSettings.contrast
    normalizer: str = CreditSettings.normalizer

    def __post_init__(self) -> None:
        try:
            self.settings  # noqa: B018
        except ValueError as error:
            raise UserError(str(error)) from error

    @property
    def settings(self) -> CreditSettings:
        return CreditSettings(contrast=self.contrast, normalizer=self.normalizer)


def values_of(scored: ScoredImages, kind: str, settings: CreditSettings) -> Tensor | None:
    """(N, T) of the map of this kind; None where it would mean nothing, and for the bare picture."""
    if kind == PICTURE or scored.unmoved.all():
        return None
    if kind == CREDIT:
        return scored.credit(settings)
    return None if scored.no_advantage else scored.advantage_map(settings)


def scale_of(scales: Scales, kind: str) -> Scale:
    return scales.advantage if kind == ADVANTAGE else scales.credit


def tiles(group: Group, view: View, scales: Scales, order: Sequence[int]) -> list[tuple[Image.Image, str]]:
    """(image, caption) of the images in this order."""
    scored, values = group.scored, values_of(group.scored, view.kind, view.settings)
    drawn = []
    for i in order:
        picture = scored.pictures[i]
        if values is None:
            image = enlarge(picture, LEAST)
        else:
            image = overlay(picture, values[i].view(scored.grid), scale_of(scales, view.kind), view.opacity)
        drawn.append((image, caption(scored, i)))
    return drawn


def caption(scored: ScoredImages, i: int) -> str:
    """Short, because a tile is narrow on a phone: the table has the other numbers."""
    return f"image {i}" if scored.no_advantage else f"image {i}: {scored.advantage[i]:+.2f}"


def panels(group: Group, view: View, scales: Scales, i: int) -> list[Panel]:
    """One image, its maps, and a map per phrase, side by side."""
    scored, settings = group.scored, view.settings
    shown = [Panel("the picture" if scored.given else f"image {i}", enlarge(scored.pictures[i], LEAST))]
    if scored.given:
        shown.append(Panel("what its codes hold", enlarge(scored.images[i], LEAST)))
    for kind, title in ((CREDIT, "credit"), (ADVANTAGE, "credit × advantage")):
        values = values_of(scored, kind, settings)
        if values is not None:
            shown.append(_panel(title, scored, i, values, scale_of(scales, kind), view.opacity, MEANING[kind]))
    for phrase, own in group.phrases.items():
        values = values_of(own, CREDIT, phrase_settings(settings))
        if values is not None:
            shown.append(_panel(f"credit of “{phrase}”", own, i, values, scales.phrase, view.opacity))
    return shown


def _panel(
    title: str, scored: ScoredImages, i: int, values: Tensor, scale: Scale, opacity: float, meaning: str = ""
) -> Panel:
    return Panel(title, overlay(scored.pictures[i], values[i].view(scored.grid), scale, opacity), scale, meaning)


def cells(group: Group, settings: CreditSettings, i: int) -> list[str]:
    """What is known of each of the T codes of an image, a line of numbers each, row by row."""
    scored, columns = group.scored, group.scored.grid[1]
    named = {"log p with the prompt": scored.tensors["cond_logp"], "without": scored.tensors["null_logp"]}
    credit, advantage = (values_of(scored, kind, settings) for kind in (CREDIT, ADVANTAGE))
    signed = {"credit": credit, "credit × advantage": advantage}
    by_phrase = phrase_settings(settings)
    signed |= {f"credit of “{phrase}”": values_of(own, CREDIT, by_phrase) for phrase, own in group.phrases.items()}
    lines = []
    for t in range(scored.tokens.shape[1]):
        parts = [f"row {t // columns + 1}, column {t % columns + 1}", f"code {scored.tokens[i, t]}"]
        parts.append(", ".join(f"{name} {values[i, t]:z.2f}" for name, values in named.items()) + " nats")
        parts += [
            f"{name} {values[i, t]:{'+' if '×' in name else ''}z.2f}"
            for name, values in signed.items()
            if values is not None
        ]
        lines.append(" · ".join(parts))
    return lines


def table(scored: ScoredImages) -> tuple[list[str], list[list[str | int]]]:
    """Headers, and a row per image, the best first. A given picture has no group, and no advantage in it."""
    group = [] if scored.given else ["advantage"]
    rows = []
    for i in best_first(scored):
        scores = ["–" if values[i] is None else f"{values[i]:.3f}" for values in scored.scores.values()]
        advantage = "–" if scored.no_advantage else f"{scored.advantage[i]:+.2f}"
        verdict = scored.verdicts[i]
        reason = "–" if verdict is None else getattr(verdict, "reason", "").replace("\n", "; ") or "correct"
        reward = f"{scored.rewards[i]:.3f}" if scored.judged else "–"
        rows.append([i, *scores, reward, *[advantage for _ in group], reason])
    return ["image", *scored.scores, "reward", *group, "GenEval says"], rows
