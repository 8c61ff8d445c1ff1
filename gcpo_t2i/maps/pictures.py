"""Picture files of unknown origin → images that a policy can encode."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from PIL import Image, ImageOps

from gcpo_t2i.errors import UserError
from gcpo_t2i.models.policy import Policy

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")  # others start programs (EPS) or have readers that few look after
MAX_PIXELS = 32_000_000  # 8000 × 4000; a file of some kB may hold any number of pixels
DEEP = ("I", "F")  # modes with more than 8 bits per channel, which a conversion to RGB would clip to white


@dataclass(frozen=True)
class Picture:
    """An RGB image, and what was done to the file's picture to make it."""

    image: Image.Image
    notes: tuple[str, ...] = ()


def read_picture(source: str | Path | BinaryIO) -> Picture:
    """A picture file, or an open one, the way a viewer shows it on a white page. Of an animation the first frame.

    UserError if it is no picture of `FORMATS`, or damaged, or larger than MAX_PIXELS: that is seen in the header, and
    nothing is decoded then.
    """
    name = f"image '{source}'" if isinstance(source, (str, Path)) else "the image"
    try:
        with Image.open(source, formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise UserError(f"{name} has {image.width} × {image.height} pixels; make it smaller: {_limit()}")
            if image.mode.startswith(DEEP):
                raise UserError(f"{name} has more than 8 bits per channel; save it with 8")
            return _on_white(ImageOps.exif_transpose(image))
    except UserError:
        raise
    except Image.DecompressionBombError as error:
        raise UserError(f"{name} is too large; make it smaller: {_limit()}") from error
    except (OSError, SyntaxError, ValueError, EOFError) as error:  # all that Pillow's readers raise on damaged files
        reason = (
            error.strerror if isinstance(error, OSError) and error.strerror else f"no whole {', '.join(FORMATS)} file"
        )
        raise UserError(f"{name} cannot be read as a picture ({reason})") from error


def fit(picture: Picture, policy: Policy) -> Picture:
    """The picture in the size of the policy's own images, cut to their shape around the middle."""
    size = image_size(policy)
    if picture.image.size == size:
        return picture
    notes = [*picture.notes]
    width, height = picture.image.size
    if width * size[1] != height * size[0]:
        notes.append(f"{width} × {height} pixels were cut to a middle part of the shape {size[0]} × {size[1]}")
    notes.append(f"the model sees it in {size[0]} × {size[1]} pixels")
    # the mean of each box: gives an enlarged sample back exactly
    return Picture(ImageOps.fit(picture.image, size, Image.Resampling.BOX), tuple(notes))


def image_size(policy: Policy) -> tuple[int, int]:
    """(width, height) of the images that the policy makes."""
    import torch

    return policy.decode(torch.zeros(1, policy.grid[0] * policy.grid[1], dtype=torch.long))[0].size


def _on_white(image: Image.Image) -> Picture:
    if not image.has_transparency_data:
        return Picture(image.convert("RGB"))
    layers = image.convert("RGBA")
    opaque = layers.getchannel("A").getextrema() == (255, 255)
    white = Image.new("RGBA", layers.size, "white")
    notes = () if opaque else ("transparent parts were put on white",)
    return Picture(Image.alpha_composite(white, layers).convert("RGB"), notes)


def _limit() -> str:
    return f"at most {MAX_PIXELS // 1_000_000} million pixels are decoded"
