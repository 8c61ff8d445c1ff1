"""Images that stay tensors: from the decoder to rewards that take them, and PIL images for whoever asks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import rewards
from gcpo_t2i.cli import main
from gcpo_t2i.config import RewardConfig
from gcpo_t2i.data import Prompt
from gcpo_t2i.models.pictures import Pictures, join_pictures
from gcpo_t2i.rollout import Sampling, sample_batch
from gcpo_t2i.scoring import RewardSet
from rewards import Reward, RewardError
from tests.tiny import tiny_policy, train_command

PIXELS = """
import torch


def bright(images, prompts):
    assert images.dtype == torch.uint8 and images.shape[1] == 3 and not images.requires_grad
    return images.float().mean((1, 2, 3)) / 255


bright.takes_pixels = True
"""


@pytest.fixture
def pixel_file(tmp_path: Path) -> Path:
    path = tmp_path / "pixels.py"
    path.write_text(PIXELS)
    return path


def noise(number: int, height: int, width: int) -> torch.Tensor:
    return torch.randint(256, (number, 3, height, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def as_pil(pixels: torch.Tensor) -> list[Image.Image]:
    return [Image.fromarray(np.ascontiguousarray(image)) for image in pixels.permute(0, 2, 3, 1).numpy()]


# ---- pictures


def test_pictures_are_their_pixels() -> None:
    pixels = noise(3, 4, 6)
    pictures, expected = Pictures(pixels), as_pil(pixels)
    assert len(pictures) == 3 and pictures[0].size == (6, 4) and pictures[0].mode == "RGB"
    assert [image.tobytes() for image in pictures] == [image.tobytes() for image in expected]
    assert pictures[-1] is pictures[2] and pictures[1:] == [pictures[1], pictures[2]]  # made once
    with pytest.raises(IndexError):
        pictures[3]


def test_joined_pictures_stay_pixels_where_they_can() -> None:
    wide, more, tall = (Pictures(noise(*size)) for size in ((2, 4, 6), (1, 4, 6), (1, 6, 4)))
    joined = join_pictures([wide, more])
    assert isinstance(joined, Pictures) and torch.equal(joined.pixels, torch.cat([wide.pixels, more.pixels]))
    assert join_pictures([wide]) is wide
    assert join_pictures([wide, tall]) == [*wide, *tall]
    assert join_pictures([wide, [tall[0]]]) == [*wide, tall[0]]


def test_a_step_makes_no_pil_image_for_rewards_that_take_pixels(
    pixel_file: Path, reward_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts, sampling, made = [Prompt("blue"), Prompt("a circle")], Sampling(2), []
    fromarray = Image.fromarray
    monkeypatch.setattr(Image, "fromarray", lambda *args: made.append(1) or fromarray(*args))

    def rewarded(file: Path, batch_size: int | None) -> torch.Tensor:
        loaded = RewardSet.load([RewardConfig(f"{file}:bright")])
        generator = [torch.Generator().manual_seed(i) for i in range(4)]
        return sample_batch(tiny_policy(), prompts, loaded, sampling, generator, batch_size=batch_size).rewards

    scores = rewarded(pixel_file, None)
    assert not made and torch.allclose(rewarded(pixel_file, 2), scores, atol=1e-6) and not made
    assert torch.allclose(rewarded(reward_file, None), scores, atol=1e-6) and len(made) == 4


# ---- rewards


def reward(fn: Any) -> Reward:
    fn.takes_pixels = True
    return Reward("own", fn)


def test_pixels_are_handed_on_as_they_are_and_made_of_pil_images() -> None:
    seen: list[torch.Tensor] = []
    pixels = noise(3, 4, 6)
    own = reward(lambda images, prompts: seen.append(images) or [float(len(prompt)) for prompt in prompts])
    for images in (Pictures(pixels), as_pil(pixels)):
        assert rewards.score(own, images, ["a", "bb", "ccc"]) == [1, 2, 3]
    assert seen[0] is pixels and torch.equal(seen[1], pixels)


def test_images_of_several_sizes_come_in_a_call_for_each() -> None:
    calls: list[tuple[Any, ...]] = []

    def score(images: torch.Tensor, prompts: list[str], level: list[float]) -> list[float | None]:
        calls.append((tuple(images.shape), prompts, level))
        return [value or None for value in level]

    images = [*as_pil(noise(1, 4, 6)), *as_pil(noise(1, 5, 5)), *as_pil(noise(1, 4, 6))]
    assert rewards.score(reward(score), images, ["a", "b", "c"], {"level": [1.0, 0.0, 3.0]}) == [1.0, None, 3.0]
    assert calls == [((2, 3, 4, 6), ["a", "c"], [1.0, 3.0]), ((1, 3, 5, 5), ["b"], [0.0])]
    assert rewards.score(reward(score), [], [], {"level": []}) == []


def test_what_is_wrong_is_told_as_of_any_reward() -> None:
    with pytest.raises(RewardError, match="reward 'own' returned 1 scores, expected 2"):
        rewards.score(reward(lambda images, prompts: [0.0]), Pictures(noise(2, 4, 6)), ["a", "b"])
    with pytest.raises(RewardError, match="reward 'own' raised ZeroDivisionError"):
        rewards.score(reward(lambda images, prompts: 1 / 0), Pictures(noise(2, 4, 6)), ["a", "b"])


@pytest.mark.parametrize("name", ["clip", "aesthetic"])
@pytest.mark.parametrize("side", [48, 96])
def test_clip_scores_of_pixels_are_those_of_pil_images(name: str, side: int) -> None:
    """48 is the size that the shipped model takes; others are resized by PIL, as open_clip does."""
    loaded, pixels = rewards.load_reward(name, "cpu"), noise(3, side, side)
    prompts = ["a red circle", "a blue star", "two squares"]
    assert rewards.score(loaded, Pictures(pixels), prompts) == list(loaded.fn(as_pil(pixels), prompts))


# ---- from the command line


def test_a_step_from_pixels_is_the_step_from_images(
    tiny_folder: Path, reward_file: Path, pixel_file: Path, tmp_path: Path
) -> None:
    found = {}
    for name, file in {"images": reward_file, "pixels": pixel_file}.items():
        command = [*train_command(tiny_folder, file, tmp_path), "--output_dir", str(tmp_path / name)]
        assert main([*command, "--monitor.rewards", "[]", "--steps", "1"]) == 0
        rows = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        found[name] = [row[key] for row in rows for key in ("eval/bright", "reward") if key in row][:2]
    assert len(found["pixels"]) == 2 and found["pixels"] == pytest.approx(found["images"], abs=1e-6)
