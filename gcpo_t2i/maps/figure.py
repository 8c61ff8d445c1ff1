"""All maps of a group in one figure: a column per image, a line per kind of map, with colour bars."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from gcpo_t2i.maps.draw import Scale, ramp

CELL = 2.1  # inches, of an image with what is between two of them
BAR = 0.95
WORDS = 0.22  # a line of them
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
    """A matplotlib Figure of lines of equally many images; one image each makes a single line of all kinds.

    It belongs to no global state of matplotlib, so that threads may draw.
    """
    from matplotlib.figure import Figure  # here, because it takes a moment to import

    count, wide = len(lines[0].images), len(lines[0].images) == 1
    columns, rows = (len(lines), 1) if wide else (count, len(lines))
    words = WORDS * (5 + heading.count("\n"))
    size = (CELL * columns + (0 if wide else BAR), CELL * rows + words + (BAR if wide else 0))
    drawn = Figure(figsize=size, layout="constrained")
    drawn.suptitle(heading, x=0.01, ha="left", fontsize="medium")
    panels: Any = drawn.subplots(rows, columns, squeeze=False)
    for i, line in enumerate(lines):
        own = panels[:, i] if wide else panels[i]
        for axes, image, title in zip(own, line.images, line.titles or [""] * count, strict=True):
            axes.imshow(image, interpolation="nearest")
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_visible(False)
            axes.set_title("\n".join([line.label, title]) if wide else title, fontsize="small", loc="left")
        if not wide:
            own[0].set_ylabel(line.label, fontsize="small")
        if line.scale is not None:
            _bar(drawn, own, line.scale, "horizontal" if wide else "vertical")
    return drawn


def _bar(drawn: Any, panels: Any, scale: Scale, orientation: str) -> None:
    """Its colours are those that the map has on the image, not those of the opaque colour map."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import ListedColormap, Normalize

    colors = ScalarMappable(Normalize(scale.low, scale.high), ListedColormap(ramp(scale) / 255))
    extend = "both" if scale.signed else "max"  # what is beyond the scale has its last colour
    bar = drawn.colorbar(colors, ax=list(panels), orientation=orientation, extend=extend, aspect=14, shrink=0.9)
    bar.set_label(scale.label, fontsize="small")
    bar.ax.tick_params(labelsize="x-small")
    bar.outline.set_visible(False)


def save(drawn: Any, path: Any) -> None:
    drawn.savefig(path, dpi=RESOLUTION, format="png")
