"""Maps over images: a colour for every cell, the more opaque the more it weighs. Only the colours are matplotlib's."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from gcpo_t2i.algo.credit import CreditSettings
from gcpo_t2i.images import INK, PAD, PAPER, enlarge

LEAST = 384  # px, the shorter side of a map
OPACITY = 0.85
TAIL = 0.99  # share of the values within the scale: a few outliers must not leave all others pale
GREY = (0.299, 0.587, 0.114)  # luma of red, green and blue
FADED = 0.7  # how far an image loses its own colours under a map, where red might else be the circle's or the map's


@dataclass(frozen=True)
class Scale:
    """What the colours mean: `colors` names a colour map of matplotlib, which spans −high … high if signed, else 0 … high.

    Much credit is bright, on a darkened image; advantage has white for 0, on a lightened one.
    """

    label: str  # the quantity and its unit
    high: float
    colors: str
    signed: bool = False

    @property
    def low(self) -> float:
        return -self.high if self.signed else 0.0

    @property
    def ground(self) -> tuple[float, float]:
        """The shade, 0 black to 255 white, that the image is mixed with, and the shade's share."""
        return (255.0, 0.35) if self.signed else (0.0, 0.55)


def credit_scale(credit: Tensor, settings: CreditSettings) -> Scale:
    """For the credit maps (N, T) of images that are to be compared."""
    raw = settings.normalizer == "none"
    label = f"{settings.contrast}, nats" if raw else "credit (mean 1)"
    return Scale(label, _extent(credit, 0.0 if raw else 1.0), "inferno")


def advantage_scale(maps: Tensor) -> Scale:
    """For advantage maps (N, T), with 0 in the middle."""
    return Scale("credit × advantage", _extent(maps, 0.0), "PRGn", signed=True)


def _extent(values: Tensor, least: float) -> float:
    found = float(np.quantile(values.abs().numpy(), TAIL)) if values.numel() else 0.0
    return max(found, least) or 1.0


@cache
def color_table(name: str) -> np.ndarray:
    """(256, 3) float32 in [0, 255]. Do not write to it: it is shared."""
    import matplotlib

    table = (matplotlib.colormaps[name](np.linspace(0, 1, 256))[:, :3] * 255).astype(np.float32)
    table.setflags(write=False)
    return table


def paint(values: np.ndarray, scale: Scale) -> tuple[np.ndarray, np.ndarray]:
    """Values of any shape → colours (…, 3) in [0, 255] and weights in [0, 1]: |value| by the end of the scale."""
    place = np.clip((values - scale.low) / (scale.high - scale.low), 0, 1)
    weight = np.clip(np.abs(values) / scale.high, 0, 1)
    return color_table(scale.colors)[np.rint(place * 255).astype(int)], weight


def overlay(
    image: Image.Image, values: np.ndarray | Tensor, scale: Scale, opacity: float = OPACITY, least: int = LEAST
) -> Image.Image:
    """One map (H, W) over its image, enlarged by a whole factor to at least `least` px. Some milliseconds.

        pixel = (1 − a) · backdrop + a · colour      a = opacity · |value| / end of the scale, at most opacity

    The backdrop is the image, the nearer to grey and to the scale's ground the more opaque the map: 0 is the image itself.
    """
    picture = np.asarray(enlarge(image.convert("RGB"), least), np.float32)
    shade, share = scale.ground
    picture = picture + opacity * FADED * (picture @ np.array(GREY, np.float32)[:, None] - picture)
    picture = picture + opacity * share * (shade - picture)
    color, weight = paint(np.asarray(values, np.float32), scale)
    alpha = (opacity * weight)[..., None]
    rows, columns = (
        np.arange(side) * cells // side for side, cells in zip(picture.shape[:2], values.shape, strict=True)
    )
    spread = np.ix_(rows, columns)
    return Image.fromarray(np.rint(picture + alpha[spread] * (color[spread] - picture)).astype(np.uint8))


def ramp(scale: Scale, length: int = 256) -> np.ndarray:
    """(length, 3) uint8: the scale from its low to its high end, as it looks on a light plain part of an image."""
    values = np.linspace(scale.low, scale.high, length)
    plain = Image.new("RGB", (length, 1), (220, 220, 220))
    return np.asarray(overlay(plain, values[None], scale, least=1))[0]


def font_path() -> Path:
    """DejaVu Sans, which comes with matplotlib and knows × and −, as Pillow's own font does not."""
    import matplotlib

    return Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"


def legend(scale: Scale, meaning: str = "", width: int = 160) -> Image.Image:
    """A line with the scale's ends, its label and what it means."""
    font = ImageFont.truetype(font_path(), 13)
    low, high = (f"{value:+.2f}" if scale.signed else f"{value:.2f}" for value in (scale.low, scale.high))
    text = f"{high}   {scale.label}{f': {meaning}' if meaning else ''}"
    start = int(font.getlength(low)) + 2 * PAD
    line = Image.new("RGB", (start + width + int(font.getlength(text)) + 3 * PAD, 22), PAPER)
    pen = ImageDraw.Draw(line)
    pen.text((PAD, 2), low, INK, font)
    bar = np.repeat(ramp(scale, width)[None], 14, axis=0)
    line.paste(Image.fromarray(bar), (start, 4))
    pen.text((start + width + PAD, 2), text, INK, font)
    return line
