"""The shapes detector on hand-built images and on rendered scenes, clean and degraded as a VQ decoder degrades them."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from gcpo_t2i.shapes import (
    BACKGROUNDS,
    PALETTE,
    SHAPES,
    SIZES,
    TAGS,
    Object,
    Scene,
    heldout_specs,
    object_masks,
    render,
    sample_scene,
)
from rewards import load_reward, score
from rewards.boxes import COUNTING_THRESHOLD, THRESHOLD, Detection
from rewards.detectors import ShapesDetector, detect
from rewards.errors import RewardError
from rewards.geneval import judge


def picture(*objects: Object, background: int = 0) -> np.ndarray:
    return render(Scene(objects, BACKGROUNDS[background]))


def look(pixels: np.ndarray) -> list[Detection]:
    return detect(Image.fromarray(pixels))


def degrade(pixels: np.ndarray, blur: float, noise: float, rng: np.random.Generator) -> np.ndarray:
    blurred = ndimage.gaussian_filter(pixels.astype(float), (blur, blur, 0))
    return np.clip(blurred + rng.normal(0, noise, pixels.shape), 0, 255).round().astype(np.uint8)


@pytest.mark.parametrize("background", range(len(BACKGROUNDS)))
@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_color_and_size_is_seen_for_what_it_is(shape: str, background: int) -> None:
    for color in PALETTE:
        for size in SIZES:
            (found,) = look(picture(Object(shape, color, size, 16, 20), background=background))
            assert (found.name, found.color) == (shape, color)
            assert found.confidence == pytest.approx(1.0)
            assert found.colors[color] > 0.95
            assert sum(found.colors.values()) == pytest.approx(1.0)
            assert set(found.colors) == set(PALETTE)


def test_the_box_is_that_of_the_painted_pixels() -> None:
    (found,) = look(picture(Object("square", "red", 12, 8, 20)))
    assert found.box == (8.0, 20.0, 20.0, 32.0)
    scene = Scene((Object("heart", "blue", 16, 4, 24),))
    (mask,) = object_masks(scene)
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    (found,) = look(render(scene))
    assert found.box == (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)


def test_objects_in_the_corners_are_whole() -> None:
    corners = [Object("circle", "green", 12, x, y) for x in (0, 36) for y in (0, 36)]
    found = look(picture(*corners))
    assert [d.name for d in found] == ["circle"] * 4
    assert {d.box[:2] for d in found} == {(0, 0), (0, 36), (36, 0), (36, 36)}
    assert min(d.confidence for d in found) > COUNTING_THRESHOLD


def test_an_object_between_the_lattice_points_is_still_itself() -> None:
    for x, y in ((17, 18), (19, 21)):
        (found,) = look(picture(Object("cross", "brown", 16, x, y)))
        assert (found.name, found.color) == ("cross", "brown")
        assert found.confidence > COUNTING_THRESHOLD


def test_an_empty_image_holds_nothing() -> None:
    for grey in (0, 90, 184, 255):
        assert look(np.full((48, 48, 3), grey, np.uint8)) == []


def test_a_painted_over_image_is_no_object() -> None:
    for color in PALETTE.values():
        assert all(d.confidence < THRESHOLD for d in look(np.full((48, 48, 3), color, np.uint8)))


def test_specks_are_ignored() -> None:
    pixels = picture(Object("square", "red", 16, 4, 4))
    pixels[40:43, 40:43] = PALETTE["blue"]  # 9 px
    pixels[5, 30] = PALETTE["green"]
    assert [d.name for d in look(pixels)] == ["square"]


def test_touching_objects_of_different_color_are_two() -> None:
    pixels = picture(Object("square", "red", 12, 8, 16), Object("square", "blue", 12, 20, 16))
    found = sorted(look(pixels), key=lambda d: d.box)
    assert [(d.name, d.color, d.box) for d in found] == [
        ("square", "red", (8, 16, 20, 28)),
        ("square", "blue", (20, 16, 32, 28)),
    ]
    assert min(d.confidence for d in found) > COUNTING_THRESHOLD


@pytest.mark.parametrize("shape", ["circle", "square", "cross", "heart", "star"])
def test_merged_objects_of_one_color_do_not_count(shape: str) -> None:
    pixels = picture(Object(shape, "purple", 16, 12, 16), Object(shape, "purple", 16, 20, 16))
    assert all(d.confidence < THRESHOLD for d in look(pixels))


@pytest.mark.parametrize("shape", SHAPES)
def test_half_an_object_does_not_count(shape: str) -> None:
    pixels = picture(Object(shape, "orange", 16, 16, 16))
    left = pixels.copy()
    left[:, :24] = BACKGROUNDS[0]
    assert all(d.confidence < THRESHOLD for d in look(left))
    top = pixels.copy()
    top[24:] = BACKGROUNDS[0]
    assert all(d.confidence < COUNTING_THRESHOLD for d in look(top))


def test_confidence_falls_as_an_object_is_cut_away() -> None:
    pixels = picture(Object("ring", "green", 16, 16, 16))
    confidences = []
    for cut in (0, 2, 4, 6, 8):
        part = pixels.copy()
        part[:, : 16 + cut] = BACKGROUNDS[0]
        confidences.append(max(d.confidence for d in look(part)))
    assert confidences[0] == pytest.approx(1.0)
    assert confidences == sorted(confidences, reverse=True)
    assert confidences[2] < THRESHOLD


def test_blobs_are_hardly_ever_taken_for_shapes() -> None:
    rng = np.random.default_rng(0)
    confidences = []
    for _ in range(60):
        field = ndimage.gaussian_filter(rng.normal(size=(48, 48)), rng.uniform(2.5, 4.5))
        pixels = np.full((48, 48, 3), BACKGROUNDS[1], np.uint8)
        pixels[field > np.quantile(field, 0.85)] = PALETTE["blue"]
        confidences += [d.confidence for d in look(pixels)]
    assert len(confidences) > 100
    assert np.mean(np.asarray(confidences) > THRESHOLD) < 0.1
    assert np.mean(np.asarray(confidences) > COUNTING_THRESHOLD) < 0.03


def test_color_probability_is_shared_between_near_colors() -> None:
    between = (np.asarray(PALETTE["red"], float) + np.asarray(PALETTE["orange"], float)) / 2
    pixels = np.full((48, 48, 3), BACKGROUNDS[0], np.uint8)
    pixels[16:32, 16:32] = between.round()
    (found,) = look(pixels)
    assert found.name == "square"
    assert 0.3 < found.colors["red"] < 0.7
    assert found.colors["red"] + found.colors["orange"] > 0.95


@pytest.mark.parametrize(("blur", "noise"), [(0.0, 0.0), (0.0, 15.0), (0.6, 10.0), (0.8, 5.0)])
def test_scenes_score_what_they_are_made_of(blur: float, noise: float) -> None:
    """Ten held-out scenes per category. A scene that fulfils its prompt is strictly correct, also blurred and noisy."""
    rng = np.random.default_rng(0)
    for tag in TAGS:
        specs = [spec for spec in heldout_specs() if spec["tag"] == tag]
        for _ in range(10):
            spec = specs[rng.integers(len(specs))]
            scene = sample_scene(spec, rng)
            found = look(degrade(render(scene), blur, noise, rng))
            verdict = judge(found, spec)
            assert verdict.correct, (spec["prompt"], verdict.reason)
            assert sorted((d.name, d.color) for d in found) == sorted((o.shape, o.color) for o in scene.objects)
            if noise == 0:
                assert verdict.dense == pytest.approx(1.0)


def test_wrong_scenes_are_wrong() -> None:
    rng = np.random.default_rng(1)
    specs = heldout_specs()
    verdicts = []
    for _ in range(100):
        mine, other = (specs[i] for i in rng.choice(len(specs), 2, replace=False))
        verdicts.append(judge(look(render(sample_scene(mine, rng))), other).correct)
    assert np.mean(verdicts) < 0.1


def test_the_reward_end_to_end() -> None:
    red, blue = (Image.fromarray(picture(Object("star", color, 16, 16, 16))) for color in ("red", "blue"))
    include = [[{"class": "star", "count": 1, "color": "red"}]] * 2
    columns = {"tag": ["colors"] * 2, "include": include, "exclude": [None] * 2}
    # The blue star is there (1) but has not the colour (0): half of the terms, halved.
    scores = score(load_reward("geneval"), [red, blue], ["a photo of a red star"] * 2, columns)
    assert scores == [pytest.approx(1.0), pytest.approx(0.25, abs=1e-3)]
    assert score(load_reward("geneval", score="strict"), [red, blue], ["", ""], columns) == [1.0, 0.0]
    with pytest.raises(RewardError, match="reward 'geneval': the detector knows no class 'dog'"):
        score(load_reward("geneval"), [red], [""], {"include": [[{"class": "dog", "count": 1}]]})


def test_other_image_sizes_and_modes() -> None:
    with pytest.raises(RewardError, match="reads 48x48 px ShapesWorld images, got 64x32"):
        ShapesDetector()([Image.new("RGB", (64, 32))])
    image = Image.fromarray(picture(Object("star", "red", 16, 16, 16))).convert("RGBA")
    assert [d.name for (d,) in ShapesDetector()([image, image])] == ["star", "star"]
    assert ShapesDetector()([]) == []
