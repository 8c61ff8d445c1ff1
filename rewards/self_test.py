"""Before a run: does a detector find anything at all?

A detector with the wrong checkpoint, labels or preparation of images finds nothing, every reward is 0, and the run teaches
nothing for hours. So it must first find, on pictures with known content, at least one of the objects that are there.

A detector declares its pictures with a method `known`: pairs of an image and the classes that are on it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from rewards.boxes import Detection
from rewards.errors import RewardError

Known = tuple[Image.Image, Sequence[str]]
_SIDE = 384  # px


def check_detector(detector: Any, source: bool | str, threshold: float) -> None:
    """RewardError unless some known object of some picture is found with a confidence above the threshold.

    source: a .jsonl file with pictures, or True for those that the detector declares; one that declares none passes.
    """
    pictures = read_known(Path(source)) if isinstance(source, str) else getattr(detector, "known", list)()
    if not pictures:
        return
    found = detector([image for image, _ in pictures])
    best = [_best(own, names) for own, (_, names) in zip(found, pictures, strict=True)]
    if max(best) > threshold:
        return
    seen = "; ".join(
        f"{' and '.join(names)}: {confidence:.2f}" for (_, names), confidence in zip(pictures, best, strict=True)
    )
    raise RewardError(
        f"the self-test found no known object on any of {len(pictures)} pictures with a confidence above {threshold:g} "
        f"({seen}), so every score would be 0; check the detector's model, or test with pictures of your own "
        "(self_test: FILE.jsonl), or do without (self_test: false)"
    )


def _best(detections: Sequence[Detection], names: Sequence[str]) -> float:
    return max((detection.confidence for detection in detections if detection.name in names), default=0.0)


def read_known(path: Path) -> list[Known]:
    """Pictures of a .jsonl file with `image`, a path beside it, and GenEval's `include`, per line: the format of
    `gcpo-t2i rewards check --images`. RewardError names the line."""
    pictures: list[Known] = []
    try:
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise RewardError(f"self_test '{path}' cannot be read: {error}") from error
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            image = Image.open(path.parent / row["image"]).convert("RGB")
            pictures.append((image, [clause["class"] for clause in row["include"]]))
        except (ValueError, KeyError, TypeError, OSError) as error:
            raise RewardError(
                f'self_test \'{path}\', line {number}: expected {{"image": "FILE.png", "include": [{{"class": ...}}]}} '
                f"({type(error).__name__}: {error})"
            ) from error
    if not pictures:
        raise RewardError(f"self_test '{path}' is empty")
    return pictures


def drawings() -> list[Known]:
    """A stop sign, a traffic light, a clock and a donut: COCO's classes that a few shapes draw best."""
    return [
        (_drawn(_stop_sign, (150, 190, 230)), ["stop sign"]),
        (_drawn(_traffic_light, (170, 205, 240)), ["traffic light"]),
        (_drawn(_clock, (225, 215, 195)), ["clock"]),
        (_drawn(_donut, (235, 235, 240)), ["donut"]),
    ]


def _drawn(paint: Any, background: tuple[int, int, int]) -> Image.Image:
    """Drawn at twice the size and halved, for smooth edges."""
    image = Image.new("RGB", (2 * _SIDE, 2 * _SIDE), background)
    paint(ImageDraw.Draw(image))
    return image.resize((_SIDE, _SIDE), Image.Resampling.LANCZOS)


def _ring(radius: float, corners: int, turn: float = 0.0, center: tuple[float, float] = (384, 384)) -> list[Any]:
    angles = (2 * math.pi * (i + turn) / corners for i in range(corners))
    return [(center[0] + radius * math.cos(angle), center[1] + radius * math.sin(angle)) for angle in angles]


def _stop_sign(draw: ImageDraw.ImageDraw) -> None:
    draw.rectangle((370, 500, 398, 768), fill=(120, 120, 125))
    draw.polygon(_ring(250, 8, 0.5, (384, 320)), fill=(255, 255, 255))
    draw.polygon(_ring(232, 8, 0.5, (384, 320)), fill=(190, 25, 35))
    draw.text((384, 320), "STOP", fill=(255, 255, 255), font=ImageFont.load_default(150), anchor="mm", stroke_width=4)


def _traffic_light(draw: ImageDraw.ImageDraw) -> None:
    draw.rectangle((368, 560, 400, 768), fill=(70, 70, 75))
    draw.rounded_rectangle((274, 90, 494, 600), 40, fill=(35, 38, 40))
    for y, color in ((180, (230, 40, 35)), (345, (90, 75, 25)), (510, (20, 80, 40))):
        draw.ellipse((310, y - 70, 458, y + 70), fill=color)


def _clock(draw: ImageDraw.ImageDraw) -> None:
    draw.ellipse((104, 104, 664, 664), fill=(40, 40, 45))
    draw.ellipse((130, 130, 638, 638), fill=(250, 250, 245))
    for number, (x, y) in enumerate(_ring(205, 12, -2), start=1):
        draw.text((x, y), str(number), fill=(20, 20, 25), font=ImageFont.load_default(64), anchor="mm")
    draw.line((384, 384, 290, 300), fill=(20, 20, 25), width=18)
    draw.line((384, 384, 480, 225), fill=(20, 20, 25), width=12)
    draw.ellipse((366, 366, 402, 402), fill=(20, 20, 25))


def _donut(draw: ImageDraw.ImageDraw) -> None:
    draw.ellipse((94, 150, 674, 690), fill=(205, 150, 90))
    draw.ellipse((110, 140, 658, 650), fill=(235, 130, 165))
    draw.ellipse((304, 320, 464, 470), fill=(205, 150, 90))
    draw.ellipse((318, 338, 450, 462), fill=(235, 235, 240))
    colors = ((255, 255, 255), (250, 220, 80), (90, 160, 230), (110, 190, 110))
    for number, (x, y) in enumerate(_ring(195, 24, 0.3, (384, 395))):
        radius = 0.72 + 0.2 * (number % 3)
        x, y = 384 + (x - 384) * radius, 395 + (y - 395) * radius
        draw.line((x - 12, y - 8 * (number % 2), x + 12, y + 8), fill=colors[number % 4], width=9)
