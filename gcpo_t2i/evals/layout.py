"""GenEval's folder of images (github.com/djghosh13/geneval), written and read.

00000/metadata.jsonl      the first prompt with its columns, one JSON object on one line
00000/samples/0000.png    its images
00000/grid.png            all of them in one picture, for people
00001/ …
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from gcpo_t2i.data import Prompt, load_prompts
from gcpo_t2i.errors import UserError
from gcpo_t2i.files import whole_file
from gcpo_t2i.images import sample_grid

METADATA, SAMPLES, GRID = "metadata.jsonl", "samples", "grid.png"


@dataclass(frozen=True)
class Sample:
    """An image on disk and the prompt that it was made for."""

    prompt: Prompt
    prompt_index: int  # number of the prompt in its file, and of its folder
    sample: int  # number of the image among those of the prompt
    path: Path

    def image(self) -> Image.Image:
        """RGB. UserError if the file cannot be read as an image."""
        try:
            with Image.open(self.path) as image:
                return image.convert("RGB")
        except (OSError, SyntaxError, ValueError) as error:  # SyntaxError: what pillow raises on a broken PNG
            raise UserError(
                f"{self.path}: not an image that can be read ({error}); delete it and make it again"
            ) from error


def prompt_folder(root: Path, prompt_index: int) -> Path:
    return root / f"{prompt_index:05d}"


def image_path(root: Path, prompt_index: int, sample: int) -> Path:
    return prompt_folder(root, prompt_index) / SAMPLES / f"{sample:04d}.png"


def canonical(prompt: Prompt) -> str:
    """The JSON object that the prompt was read from, as one line with its keys in a fixed order."""
    negative = {} if prompt.negative is None else {"negative": prompt.negative}
    return json.dumps({**prompt.columns, "prompt": prompt.text, **negative}, sort_keys=True)


def write_image(root: Path, prompt: Prompt, prompt_index: int, sample: int, image: Image.Image) -> None:
    """The image, and the prompt's metadata if it is the first one of its folder."""
    path = image_path(root, prompt_index, sample)
    path.parent.mkdir(parents=True, exist_ok=True)
    described = prompt_folder(root, prompt_index) / METADATA
    if not described.exists():
        with whole_file(described) as partial:
            partial.write_text(canonical(prompt) + "\n", encoding="utf-8")
    with whole_file(path) as partial:
        image.save(partial, format="PNG")


def write_grids(root: Path, samples: Sequence[Sample]) -> None:
    """`grid.png` of every prompt that has none yet."""
    groups: dict[int, list[Sample]] = {}
    for sample in samples:
        groups.setdefault(sample.prompt_index, []).append(sample)
    for prompt_index, group in groups.items():
        path = prompt_folder(root, prompt_index) / GRID
        if not path.exists():
            with whole_file(path) as partial:
                row = (group[0].prompt.text, [sample.image() for sample in group], None)
                sample_grid([row]).save(partial, format="PNG")


def scan(root: Path) -> list[Sample]:
    """All images of a folder in GenEval's layout, prompt by prompt; every prompt has the same number of them.

    UserError names the first thing that is missing: the folder, a prompt's folder among those numbered from 0, its
    metadata, or an image that the first prompt's folder has and this one lacks.
    """
    if not root.is_dir():
        raise UserError(f"no folder of images at {root}")
    folders = sorted((path for path in root.iterdir() if path.is_dir() and _is_number(path.name)), key=_number)
    if not folders:
        raise UserError(f"{root}: no folders 00000, 00001, … in it; images are expected in GenEval's layout, {_SHAPE}")
    for expected, folder in enumerate(folders):
        if _number(folder) != expected:
            raise UserError(f"{root}: folder {expected:05d} is missing or there twice, before {folder.name}")
    numbers = _images(folders[0]).keys()
    if not numbers:
        raise UserError(f"{folders[0] / SAMPLES}: no images in it; expected {_SHAPE}")
    return [sample for folder in folders for sample in _samples(folder, numbers)]


_SHAPE = "00000/metadata.jsonl and 00000/samples/0000.png"


def _samples(folder: Path, numbers: Any) -> Iterator[Sample]:
    prompts = load_prompts(str(folder / METADATA))
    if len(prompts) != 1:
        raise UserError(f"{folder / METADATA}: {len(prompts)} lines; expected the one prompt of this folder")
    images = _images(folder)
    for number in sorted(images.keys() ^ numbers):
        which = "is missing" if number in numbers else "is one more than folder 00000 has"
        raise UserError(
            f"{folder / SAMPLES}: image {number:04d}.png {which}; every prompt needs the same number of images"
        )
    for number in sorted(images):
        yield Sample(prompts[0], _number(folder), number, images[number])


def _images(folder: Path) -> dict[int, Path]:
    """Number → file. GenEval's page names them 0000.png, its own script 00000.png: any number of digits will do."""
    found = (folder / SAMPLES).iterdir() if (folder / SAMPLES).is_dir() else ()
    return {_number(path): path for path in found if path.suffix == ".png" and _is_number(path.stem)}


def _is_number(name: str) -> bool:
    return re.fullmatch("[0-9]+", name) is not None


def _number(path: Path) -> int:
    return int(path.stem)
