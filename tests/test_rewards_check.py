"""`gcpo-t2i rewards check`: known images, what rewards say about them, and the exit code."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gcpo_t2i.cli import main
from gcpo_t2i.config import RewardConfig
from gcpo_t2i.data import Prompt
from gcpo_t2i.errors import UserError
from gcpo_t2i.rewards_check import BAD, BLANK, GOOD, KINDS, NOISE, Known, examine, own_images, shapes_images, verdict
from gcpo_t2i.scoring import RewardSet


def test_shapesworld_is_good_bad_blank_and_noise() -> None:
    known = shapes_images(24, seed=0)
    assert all(len(known.images[kind]) == len(known.prompts) == len(known.other) == 24 for kind in KINDS)
    strict = RewardSet.load([RewardConfig("geneval", kwargs={"score": "strict"})])
    said = {kind: strict.score(images, known.prompts)["geneval"] for kind, images in known.images.items()}
    assert said == {GOOD: [1.0] * 24, BAD: [0.0] * 24, BLANK: [0.0] * 24, NOISE: [0.0] * 24}
    assert all(known.images[BAD][i] is known.images[GOOD][j] for i, j in enumerate(known.other))
    assert all(len(image.getcolors() or ()) == 1 for image in known.images[BLANK])
    again, other = shapes_images(24, seed=0), shapes_images(24, seed=1)
    pixels = [np.stack([np.asarray(image) for image in k.images[NOISE]]) for k in (known, again, other)]
    assert (pixels[0] == pixels[1]).all() and (pixels[0] != pixels[2]).any()


OTHER = [1, 2, 3, 4, 5, 6, 7, 8, 9, 0]
RAMP = [float(i) for i in range(10)]  # ten against ten higher ones: p = 1 / C(20, 10) = 5e-6


@pytest.mark.parametrize(
    ("good", "bad", "blank", "noise", "expected"),
    [
        ([v + 20 for v in RAMP], RAMP, RAMP, RAMP, "ok"),
        (RAMP, [v + 20 for v in RAMP], RAMP, RAMP, "prefers bad images to good ones"),
        (RAMP, RAMP, RAMP, RAMP, "does not tell good from bad"),
        ([0.5] * 10, [0.5] * 10, [0.5] * 10, [0.5] * 10, "constant: 0.5 for every image, so it teaches nothing"),
        ([None] * 10, [None] * 10, [None] * 10, [None] * 10, "applies to none of these prompts (None for every image)"),
        (RAMP, [None] * 10, [-9] * 10, [-9] * 10, "does not tell good from bad: it applies only to images of one kind"),
        (RAMP, [*RAMP[1:], 0], [-9] * 10, RAMP, "does not look at the prompt; scores good images above blank"),
        (RAMP, [*RAMP[1:], 0], [99] * 10, RAMP, "does not look at the prompt; scores good images no higher than blank"),
    ],
)
def test_verdicts(good: list, bad: list, blank: list, noise: list, expected: str) -> None:
    said = verdict({GOOD: good, BAD: bad, BLANK: blank, NOISE: noise}, OTHER)
    assert said == expected or (said.startswith(expected) and len(expected) > 40)


def test_a_difference_that_chance_makes_is_none() -> None:
    # Nine of ten pairs of equal rank sums: shifting ten values by one step is far from p < 0.001
    assert (
        verdict({GOOD: [v + 1 for v in RAMP], BAD: RAMP, BLANK: RAMP, NOISE: RAMP}, OTHER)
        == "does not tell good from bad"
    )


def test_what_fails_is_a_finding_with_the_scores_so_far(tmp_path: Path) -> None:
    (tmp_path / "picky.py").write_text(
        "def picky(images, prompts):\n"
        "    return [float('nan') if image.getpixel((0, 0)) == (0, 0, 0) else 1.0 for image in images]\n"
    )
    white, black = Image.new("RGB", (2, 2), (255,) * 3), Image.new("RGB", (2, 2))
    known = Known([Prompt("a"), Prompt("b")], {GOOD: [white] * 2, BAD: [white] * 2, BLANK: [black] * 2}, [1, 0])
    finding = examine(RewardConfig(f"{tmp_path / 'picky.py'}:picky"), known, "cpu")
    assert finding.failed and "not finite" in finding.verdict and finding.name == "picky"
    assert finding.scores == {GOOD: [1.0, 1.0], BAD: [1.0, 1.0]}


# --- from the command line ----------------------------------------------------


def check(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    code = main(["rewards", "check", "--num_images", "12", "--device", "cpu", *arguments])
    return code, " ".join(capsys.readouterr().out.split())


def test_the_shipped_rewards_pass(capsys: pytest.CaptureFixture[str]) -> None:
    code, out = check(capsys)
    assert code == 0
    assert all(f"{name}: ok" in out for name in ("geneval/dense", "geneval/strict", "clip"))
    assert "aesthetic: does not look at the prompt; scores good images above" in out
    assert "0 to 1" in out and "-1 to 1" in out


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        ("broken", "the GPU caught fire"),
        ("nan", "not finite"),
        ("short", "returned 11 scores, expected 12"),
        ("nope", "has no 'nope'"),
    ],
)
def test_a_reward_that_fails_is_named_and_others_are_checked_all_the_same(
    reward_file: Path, capsys: pytest.CaptureFixture[str], reward: str, message: str
) -> None:
    rewards = [{"name": f"{reward_file}:{name}"} for name in (reward, "constant")]
    code, out = check(capsys, "--rewards", json.dumps(rewards))
    assert code == 1
    assert f"{reward}: FAILED: reward '{reward_file}:{reward}'" in out and message in out
    assert "constant: constant: 1 for every image" in out


def test_a_score_out_of_range_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "far.py").write_text(
        "def far(images, prompts):\n    return [2.0] * len(images)\n\nfar.range = (0, 1)\n"
    )
    code, out = check(capsys, "--rewards", json.dumps([{"name": f"{tmp_path / 'far.py'}:far"}]))
    assert code == 1 and "returned 2.0 for image 0: outside its range [0, 1]" in out


def test_the_rewards_of_a_training_config(
    tmp_path: Path, reward_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "train.yaml").write_text(
        f"steps: 3\nrewards: [{{name: '{reward_file}:bright'}}]\n"
        f"eval: {{seed: 3, rewards: [{{name: '{reward_file}:constant'}}, {{name: '{reward_file}:bright'}}]}}\n"
    )
    code, out = check(capsys, "--config", str(tmp_path / "train.yaml"))
    assert code == 0 and "bright: does not look at the prompt" in out and "constant: constant" in out
    assert out.count("bright:") == 1  # once, though it is there twice


def write_images(folder: Path, names: list[str | None]) -> str:
    for level, name in zip((0, 255), ("black.png", "white.png"), strict=True):
        Image.new("RGB", (5, 3), (level,) * 3).save(folder / name)
    lines = [{"prompt": f"a {name}", **({} if name is None else {"image": name})} for name in names]
    (folder / "known.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(folder / "known.jsonl")


def test_images_of_ones_own(tmp_path: Path, reward_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_images(tmp_path, ["black.png", "white.png", "black.png"])
    known = own_images(path, 2, seed=0)
    assert [image.getpixel((0, 0)) for image in known.images[GOOD]] == [(0, 0, 0), (255, 255, 255)]
    assert [image.getpixel((0, 0)) for image in known.images[BAD]] == [(255, 255, 255), (0, 0, 0)]
    assert {image.size for images in known.images.values() for image in images} == {(5, 3)}
    code, out = check(capsys, "--images", path, "--rewards", json.dumps([{"name": f"{reward_file}:bright"}]))
    assert code == 0 and "bright: does not look at the prompt" in out


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["black.png"], "at least two prompts"),
        (["black.png", None], "the prompt 'a None' has no \"image\""),
        (["black.png", "gone.png"], "'gone.png' cannot be read as an image"),
        (["black.png", "known.jsonl"], "'known.jsonl' cannot be read as an image"),
    ],
)
def test_images_that_cannot_be_used(tmp_path: Path, names: list[str | None], message: str) -> None:
    with pytest.raises(UserError, match=message):
        own_images(write_images(tmp_path, names), 8, seed=0)
