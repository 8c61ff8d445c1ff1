"""All maps of a group in one figure: a column per image, a line per kind of map, with colour bars."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from textwrap import wrap
from typing import Any

from PIL import Image

from gcpo_t2i.maps.draw import Scale, font_path, ramp

CELL = 2.1  # inches, of an image with what is between two of them
BAR = 0.95
WORDS = 0.22  # a line of them
LETTERS = 11  # of the heading, per inch
RESOLUTION = 120  # dots per inch


@dataclass(frozen=True)
class Line:
    """One kind of map, or the pictures, of all images: `titles` over each, `scale` for the colour bar, `file` for names."""

    file: str
    label: str
    images: Sequence[Image.Image]
    titles: Sequence[str] | None = None
    scale: Scale | None = None


def figure(heading: str, lines: Sequence[Line]) -> Any:
    """A matplotlib Figure of lines of equally many images, with a colour bar each; of one image, all kinds are in a line.

    It belongs to no global state of matplotlib, so that threads may draw.
    """
    from matplotlib.figure import Figure  # here, because it takes a moment to import

    count, wide = len(lines[0].images), len(lines[0].images) == 1
    columns, rows = (len(lines), 1) if wide else (count, len(lines))
    width = CELL * columns + BAR
    heading = "\n".join(part for line in heading.split("\n") for part in wrap(line, int(LETTERS * width)))
    drawn = Figure(figsize=(width, CELL * rows + WORDS * (4 + heading.count("\n"))), layout="constrained")
    plain: Any = {"parse_math": False, "fontfamily": "DejaVu Sans"}  # a prompt may hold $
    drawn.suptitle(drawable(heading), x=0.01, ha="left", fontsize="medium", **plain)
    panels: Any = drawn.subplots(rows, columns, squeeze=False)
    for i, line in enumerate(lines):
        own = panels[:, i] if wide else panels[i]
        for axes, image, title in zip(own, line.images, line.titles or [""] * count, strict=True):
            axes.imshow(image, interpolation="nearest")
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_visible(False)
            over = f"{line.label}\n{title}".strip() if wide else title
            axes.set_title(drawable(over), fontsize="small", loc="left", **plain)
        if not wide:
            own[0].set_ylabel(drawable(line.label), fontsize="small", **plain)
            _bar(drawn, own, line.scale)
    if wide:
        _bar(drawn, panels[0], next((line.scale for line in lines if line.scale), None))
    return drawn


def drawable(text: str) -> str:
    """The text with □ for what the font lacks, such as Chinese, of which matplotlib would warn for every character."""
    return "".join(letter if letter == "\n" or ord(letter) in _glyphs() else "□" for letter in text)


@cache
def _glyphs() -> frozenset[int]:
    from matplotlib.ft2font import FT2Font

    return frozenset(FT2Font(str(font_path())).get_charmap())


def _bar(drawn: Any, panels: Any, scale: Scale | None) -> None:
    """Its colours are those that the map has on the image, not those of the opaque colour map."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import ListedColormap, Normalize

    if scale is None:
        return
    colors = ScalarMappable(Normalize(scale.low, scale.high), ListedColormap(ramp(scale) / 255))
    extend = "both" if scale.signed else "max"  # what is beyond the scale has its last colour
    bar = drawn.colorbar(colors, ax=list(panels), extend=extend, aspect=14, shrink=0.9)
    bar.set_label(scale.label, fontsize="small")
    bar.ax.tick_params(labelsize="x-small")
    bar.outline.set_visible(False)


def save(drawn: Any, path: Any) -> None:
    drawn.savefig(path, dpi=RESOLUTION, format="png")
