"""Stage `aesthetic`: a head on the tiny CLIP that tells clean, well-composed pictures from spoilt ones.

LAION's predictor learned what people rated (1 to 10); nobody rated ShapesWorld. Its stand-in has the same interface and
scale, and a taste that is written down here: `composition` says how well the objects are placed and coloured, and what
random damage leaves of the picture lowers the score:

    score = 1 + 9 · (1 + composition)/2 · Π over damages (1 − harm · strength)

so an undamaged picture lies between 5.5 and 10, and a picture with everything wrong with it near 1.
"""

from __future__ import annotations

import colorsys
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch
from open_clip import CLIP
from scipy.stats import rankdata
from torch import Tensor, nn
from torch.nn import functional as F

from gcpo_t2i.scoring import rewards_package
from gcpo_t2i.shapes.pretrain.clip import EMBED_DIM, blur
from gcpo_t2i.shapes.pretrain.fit import Metrics, Schedule, autocast, fit
from gcpo_t2i.shapes.pretrain.stream import SceneStream
from gcpo_t2i.shapes.scenes import CELL, GRID, IMAGE_SIZE, PALETTE, Object, Scene

BATCH = 128
DAMAGE_CHANCE = 0.25  # of each kind, independently: a quarter of the pictures stays clean

_SHARES = {"balance": 0.4, "room": 0.25, "contrast": 0.2, "harmony": 0.15}
_LUMINANCE = np.array([0.2126, 0.7152, 0.0722])  # Rec. 709


def balance(scene: Scene) -> float:
    """1 with the centre of the objects' mass (their areas) in the middle of the picture, 0 from 18 px away from it."""
    area = np.array([obj.size**2 for obj in scene.objects], float)
    centres = np.array([(obj.x + obj.size / 2, obj.y + obj.size / 2) for obj in scene.objects])
    offset = area @ centres / area.sum() - IMAGE_SIZE / 2
    return max(0.0, 1 - float(np.hypot(*offset)) / 18)


def _gap(a: Object, b: Object) -> int:
    """px between two boxes along the axis that separates them more."""
    return max(a.x - b.x - b.size, b.x - a.x - a.size, a.y - b.y - b.size, b.y - a.y - a.size)


def room(scene: Scene) -> float:
    """The tightest distance between two objects, or an object and the frame: 0 if they touch, 1 from 8 px on."""
    margins = [min(obj.x, obj.y, IMAGE_SIZE - obj.x - obj.size, IMAGE_SIZE - obj.y - obj.size) for obj in scene.objects]
    gaps = [_gap(a, b) for a, b in combinations(scene.objects, 2)]
    return min(1.0, max(0, min(margins + gaps)) / 8)


def contrast(scene: Scene) -> float:
    """Mean difference in luminance of objects and background, 1 from 0.7 of the range on."""
    difference = [abs((np.array(PALETTE[obj.color]) - scene.background) @ _LUMINANCE) / 255 for obj in scene.objects]
    return min(1.0, float(np.mean(difference)) / 0.7)


def harmony(scene: Scene) -> float:
    """Mean |cos| of the hue differences: 1 for equal or opposite hues, 0 for hues a quarter of the circle apart."""
    hues = [colorsys.rgb_to_hsv(*PALETTE[obj.color])[0] * 2 * math.pi for obj in scene.objects]
    pairs = [abs(math.cos(a - b)) for a, b in combinations(hues, 2)]
    return sum(pairs) / len(pairs) if pairs else 1.0


def composition(scene: Scene) -> float:
    """In [0, 1]: the weighted mean of balance, room, contrast and harmony."""
    parts = {"balance": balance, "room": room, "contrast": contrast, "harmony": harmony}
    return sum(_SHARES[name] * part(scene) for name, part in parts.items())


# --- damage: images (N, 3, 48, 48) in [-1, 1], strength (N,) in [0, 1] ---------


def _column(values: Tensor) -> Tensor:
    return values[:, None, None, None]


def _cells(strength: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """Random cells of the code map as a mask (N, 1, 48, 48); `share` of them at full strength."""
    hit = torch.rand(len(strength), 1, GRID, GRID, generator=generator) < _column(share * strength)
    return hit.repeat_interleave(CELL, dim=2).repeat_interleave(CELL, dim=3)


def _clutter(images: Tensor, strength: Tensor, generator: torch.Generator) -> Tensor:
    """Cells in random palette colours."""
    palette = torch.tensor(list(PALETTE.values())) / 127.5 - 1
    which = torch.randint(len(palette), (len(images), GRID, GRID), generator=generator)
    paint = palette[which].permute(0, 3, 1, 2).repeat_interleave(CELL, dim=2).repeat_interleave(CELL, dim=3)
    return torch.where(_cells(strength, 0.25, generator), paint, images)


def _holes(images: Tensor, strength: Tensor, generator: torch.Generator) -> Tensor:
    """Black cells."""
    return torch.where(_cells(strength, 0.25, generator), -1.0, images)


def _blur(images: Tensor, strength: Tensor, generator: torch.Generator) -> Tensor:
    return blur(images, 2.5 * strength)


def _tint(images: Tensor, strength: Tensor, generator: torch.Generator) -> Tensor:
    """A shift of the whole picture towards a random colour."""
    shift = F.normalize(torch.randn(len(images), 3, generator=generator), dim=1)
    return images + (0.6 * strength[:, None] * shift)[:, :, None, None]


def _noise(images: Tensor, strength: Tensor, generator: torch.Generator) -> Tensor:
    return images + 0.5 * _column(strength) * torch.randn(images.shape, generator=generator)


@dataclass(frozen=True)
class Damage:
    """`harm`: the share of the score that is lost at full strength."""

    apply: Callable[[Tensor, Tensor, torch.Generator], Tensor]
    harm: float


DAMAGES = (Damage(_clutter, 0.8), Damage(_holes, 0.8), Damage(_blur, 0.7), Damage(_tint, 0.5), Damage(_noise, 0.7))


def draw_strengths(count: int, generator: torch.Generator) -> Tensor:
    """How strong each kind of damage is in each picture: (count, kinds) in [0, 1], mostly 0."""
    chance, strength = torch.rand(2, count, len(DAMAGES), generator=generator)
    return strength * (chance < DAMAGE_CHANCE)


def spoil(images: Tensor, strengths: Tensor, generator: torch.Generator) -> Tensor:
    """Damaged images (N, 3, 48, 48) in [-1, 1]; `strengths` (N, kinds) as in `DAMAGES`. Zeros leave them as they are."""
    for damage, strength in zip(DAMAGES, strengths.unbind(dim=1), strict=True):
        images = damage.apply(images, strength, generator)
    return images.clamp(-1, 1)


def target(scenes: Sequence[Scene], strengths: Tensor) -> Tensor:
    """Scores (N,) in [1, 10] of N scenes with damage `strengths` (N, kinds). See the module's docstring."""
    composed = torch.tensor([composition(scene) for scene in scenes])
    harm = torch.tensor([damage.harm for damage in DAMAGES])
    return 1 + 9 * (1 + composed) / 2 * (1 - harm * strengths).prod(dim=1)


# --- the head -----------------------------------------------------------------


def _head_class() -> Any:
    """`rewards.aesthetic.AestheticHead`. By name, because only `gcpo_t2i.scoring` imports `rewards`."""
    return rewards_package().load_object("rewards.aesthetic:AestheticHead")


def load_head(folder: Path, device: torch.device) -> nn.Module:
    return _head_class().from_pretrained(folder).to(device).eval()


@torch.no_grad()
def _examples(
    clip: CLIP, stream: SceneStream, step: int, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Features (N, D) and scores (N,) of damaged scenes, on `device`, and which of them are undamaged, (N,) bool."""
    batch = stream.batch(step)
    generator = torch.Generator().manual_seed(stream.seed * 10**9 + step)
    strengths = draw_strengths(len(batch.scenes), generator)
    images = spoil(batch.images, strengths, generator).to(device)
    with autocast(device, dtype):
        features = clip.encode_image(images)
    clean = (strengths == 0).all(dim=1)
    return F.normalize(features.float(), dim=-1), target(batch.scenes, strengths).to(device), clean


def train_aesthetic(
    clip: CLIP,
    stream: SceneStream,
    steps: int,
    folder: Path,
    seed: int,
    device: torch.device,
    dtype: torch.dtype,
) -> tuple[Any, Metrics]:
    """Regression of `target` on the frozen CLIP's image features (mean squared error). State and log go to `folder`."""
    torch.manual_seed(seed)
    head: nn.Module = _head_class()(EMBED_DIM).to(device)

    def loss_at(step: int) -> tuple[Tensor, Metrics]:
        features, scores, _ = _examples(clip, stream, step, device, dtype)
        loss = F.mse_loss(head(features), scores)
        return loss, {"rmse": math.sqrt(loss.item())}

    metrics = fit("aesthetic", head, loss_at, Schedule(steps, 5e-3), folder / "aesthetic.pt")
    return head.eval(), metrics


def _pearson(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.corrcoef(a, b)[0, 1])


@torch.no_grad()
def correlation(
    clip: CLIP, head: nn.Module, stream: SceneStream, batches: int, device: torch.device
) -> dict[str, dict[str, float]]:
    """Pearson and Spearman correlation of head and target, over all pictures and over the undamaged ones."""
    parts = [_examples(clip, stream, step, device, torch.float32) for step in range(batches)]
    guesses = torch.cat([head(features) for features, _, _ in parts]).cpu().numpy()
    scores = torch.cat([scores for _, scores, _ in parts]).cpu().numpy()
    clean = torch.cat([clean for _, _, clean in parts]).numpy()
    return {
        name: {
            "pearson": _pearson(guesses[chosen], scores[chosen]),
            "spearman": _pearson(rankdata(guesses[chosen]), rankdata(scores[chosen])),
        }
        for name, chosen in {"all": np.ones_like(clean), "clean": clean}.items()
    }
