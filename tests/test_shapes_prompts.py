"""ShapesWorld prompts, their split, and the scenes and batches that are made for them."""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from gcpo_t2i.models.vq import to_pixels
from gcpo_t2i.shapes import PALETTE, SHAPES, TAGS, Scene, heldout_specs, render, sample_scene, train_specs
from gcpo_t2i.shapes.pretrain.stream import SceneStream
from gcpo_t2i.shapes.prompts import LOOKALIKES, all_specs, misdescribed, reordered, split_key
from rewards.geneval import evaluate

# Changes with any change to a prompt or to the split: then every published number is of another test set.
HELDOUT_SHA256 = "57a86595e7562ddda1928ed49820567130eaab8f169c3f66d50c5bf4167fea49"


def _by_prompt() -> dict[str, dict[str, Any]]:
    return {spec["prompt"]: spec for spec in all_specs()}


def test_there_are_as_many_prompts_as_combinations() -> None:
    assert Counter(spec["tag"] for spec in all_specs()) == {
        "single_object": 8,
        "two_object": 8 * 7,  # ordered pairs of different shapes
        "counting": 8 * 3,  # two, three, four
        "colors": 8 * 8,
        "position": 8 * 7 * 4,
        "color_attr": 8 * 7 * 8 * 7,  # ordered pairs of shapes, of different colours
    }
    assert len(_by_prompt()) == len(all_specs())


def test_metadata_is_genevals() -> None:
    prompts = _by_prompt()
    assert prompts["a photo of three crosses"] == {
        "tag": "counting",
        "include": [{"class": "cross", "count": 3}],
        "exclude": [{"class": "cross", "count": 4}],
        "prompt": "a photo of three crosses",
    }
    assert prompts["a photo of a ring above a star"]["include"] == [
        {"class": "star", "count": 1},
        {"class": "ring", "count": 1, "position": ["above", 0]},
    ]
    assert prompts["a photo of an orange heart"]["include"] == [{"class": "heart", "count": 1, "color": "orange"}]
    assert prompts["a photo of a blue heart and an orange ring"]["include"] == [
        {"class": "heart", "count": 1, "color": "blue"},
        {"class": "ring", "count": 1, "color": "orange"},
    ]


def test_train_and_heldout_share_out_all_prompts() -> None:
    train, heldout = train_specs(), heldout_specs()
    assert len(train) + len(heldout) == len(all_specs()) == 8 + 56 + 24 + 64 + 224 + 3136
    # A quarter of the keys of each tag: 8/4, 28/4 pairs, 24/4, 64/4, 56/4 pairs and axes, 1568/4 pairs.
    keys = defaultdict(set)
    for spec in heldout:
        keys[spec["tag"]].add(split_key(spec))
    assert {tag: len(found) for tag, found in keys.items()} == {
        "single_object": 2,
        "two_object": 7,
        "counting": 6,
        "colors": 16,
        "position": 14,
        "color_attr": 392,
    }


def test_no_heldout_prompt_has_a_twin_in_training() -> None:
    assert not {split_key(spec) for spec in train_specs()} & {split_key(spec) for spec in heldout_specs()}


@pytest.mark.parametrize(
    ("prompt", "twin"),
    [
        ("a photo of a circle and a square", "a photo of a square and a circle"),
        ("a photo of a circle left of a square", "a photo of a square right of a circle"),  # says the same
        ("a photo of a circle above a square", "a photo of a square above a circle"),  # the two objects swapped
        ("a photo of a red circle and a blue square", "a photo of a blue square and a red circle"),
    ],
)
def test_swapping_the_objects_stays_on_one_side_of_the_split(prompt: str, twin: str) -> None:
    prompts = _by_prompt()
    assert split_key(prompts[prompt]) == split_key(prompts[twin])
    sides = [{spec["prompt"] for spec in specs} for specs in (train_specs(), heldout_specs())]
    assert sum({prompt, twin} <= side for side in sides) == 1


def test_other_prompts_have_other_keys() -> None:
    prompts = _by_prompt()
    different = [
        "a photo of a circle left of a square",
        "a photo of a circle above a square",
        "a photo of a circle and a square",
        "a photo of a red circle and a blue square",
        "a photo of a blue circle and a red square",
        "a photo of two circles",
        "a photo of three circles",
    ]
    assert len({split_key(prompts[prompt]) for prompt in different}) == len(different)


def test_every_word_of_a_heldout_prompt_occurs_in_training_of_its_own_tag() -> None:
    words = defaultdict(set)
    for spec in train_specs():
        words[spec["tag"]] |= set(spec["prompt"].split())
    for spec in heldout_specs():
        unknown = set(spec["prompt"].split()) - words[spec["tag"]]
        # A single object is held out by its only word of that tag; the word occurs in every other tag.
        assert spec["tag"] == "single_object" or not unknown, spec["prompt"]
        assert unknown <= words["colors"] & words["two_object"]


def test_the_split_is_frozen() -> None:
    text = "\n".join(spec["prompt"] for spec in heldout_specs())
    assert hashlib.sha256(text.encode()).hexdigest() == HELDOUT_SHA256


# --- scenes for prompts ---------------------------------------------------------


def _verdict(scene: Scene, spec: dict[str, Any]) -> tuple[bool, str]:
    """GenEval's on the exact boxes and colours."""
    boxes: dict[str, list[Any]] = {}
    colors = {}
    for obj in scene.objects:
        boxes.setdefault(obj.shape, []).append((*obj.box, 1.0))
        colors[obj.box] = obj.color

    def named(name: str, found: Sequence[Any]) -> list[str]:
        return [colors[tuple(box[:4])] for box in found]

    return evaluate(boxes, spec, named)


@pytest.mark.parametrize("tag", TAGS)
def test_sampled_scenes_are_what_their_prompts_say(tag: str) -> None:
    rng = np.random.default_rng(0)
    specs = [spec for spec in all_specs() if spec["tag"] == tag]
    for spec in [specs[i] for i in rng.permutation(len(specs))[:60]]:
        scene = sample_scene(spec, rng)
        assert _verdict(scene, spec) == (True, "")
        shown = Counter(obj.shape for obj in scene.objects)
        assert shown == {clause["class"]: clause["count"] for clause in spec["include"]}  # and nothing else


def test_a_scene_of_the_swapped_prompt_is_wrong() -> None:
    prompts, rng = _by_prompt(), np.random.default_rng(0)
    for prompt, other in (
        ("a photo of a star left of a heart", "a photo of a star right of a heart"),
        ("a photo of a red star and a blue heart", "a photo of a blue star and a red heart"),
        ("a photo of two stars", "a photo of three stars"),
        ("a photo of three stars", "a photo of two stars"),
    ):
        assert not _verdict(sample_scene(prompts[prompt], rng), prompts[other])[0]


def test_what_a_prompt_leaves_open_varies() -> None:
    rng = np.random.default_rng(0)
    spec = _by_prompt()["a photo of a circle and a square"]
    objects = [obj for _ in range(200) for obj in sample_scene(spec, rng).objects]
    assert {obj.color for obj in objects} == set(PALETTE)
    assert {obj.size for obj in objects} == {12, 16}
    assert {obj.shape for obj in objects} == {"circle", "square"} <= set(SHAPES)


def test_counted_objects_look_alike() -> None:
    scene = sample_scene(_by_prompt()["a photo of four rings"], np.random.default_rng(1))
    assert len(scene.objects) == 4
    assert len({(obj.shape, obj.color, obj.size) for obj in scene.objects}) == 1


def test_the_seed_decides_the_scene() -> None:
    spec = _by_prompt()["a photo of four rings"]
    scenes = [sample_scene(spec, np.random.default_rng(seed)) for seed in (5, 5, 6)]
    assert scenes[0] == scenes[1] != scenes[2]


# --- wrong captions -------------------------------------------------------------


def test_every_word_is_wrong_with_the_given_probability() -> None:
    rng, prompts = np.random.default_rng(0), _by_prompt()
    spec = prompts["a photo of a red circle and a blue square"]
    assert misdescribed(spec, 0.0, rng) == spec
    assert misdescribed(spec, 1.0, rng)["include"] == prompts["a photo of a pink ring and a purple diamond"]["include"]
    above = prompts["a photo of a heart above a cross"]
    assert misdescribed(above, 1.0, rng)["include"] == prompts["a photo of a triangle below a star"]["include"]
    draws = [misdescribed(spec, 0.35, rng) for _ in range(400)]
    assert all(draw["prompt"] == spec["prompt"] for draw in draws)
    for position, key, own in (
        (0, "class", "circle"),
        (0, "color", "red"),
        (1, "class", "square"),
        (1, "color", "blue"),
    ):
        wrong = sum(draw["include"][position][key] != own for draw in draws)
        assert abs(wrong - 140) < 48  # 0.35 of 400, standard deviation 9.5
    both = sum(draw["include"][0] == {"class": "ring", "count": 1, "color": "pink"} for draw in draws)
    assert abs(both - 49) < 33  # words are wrong independently: 0.35² of 400, standard deviation 6.6
    numbers = Counter(
        misdescribed(prompts["a photo of three rings"], 1.0, rng)["include"][0]["count"] for _ in range(400)
    )
    assert numbers.keys() == {2, 4} and abs(numbers[2] - 200) < 50


def test_the_same_words_in_another_order() -> None:
    prompts = _by_prompt()
    pairs = {
        "a photo of a ring above a star": "a photo of a star above a ring",
        "a photo of a red circle and a blue square": "a photo of a blue circle and a red square",
    }
    for prompt, other in pairs.items():
        assert reordered(prompts[prompt]) == prompts[other] and reordered(prompts[other]) == prompts[prompt]
    for spec in all_specs():
        other = reordered(spec)
        if spec["tag"] in ("position", "color_attr"):
            letters = (
                sorted(spec["prompt"].replace(" an ", " a ")),
                sorted(str(other and other["prompt"]).replace(" an ", " a ")),
            )
            assert letters[0] == letters[1] and other != spec
        else:
            assert other is None


def test_prompts_of_wrongly_captioned_scenes_stay() -> None:
    stream = SceneStream(train_specs(), 200, seed=0)
    for wrong, right in ((0.0, 200), (1.0, 0)):
        batch = stream.batch(0, wrong)
        assert batch.prompts == stream.batch(0).prompts
        verdicts = [
            _verdict(scene, spec)[0]
            for spec, scene in zip(batch.metadata, batch.scenes, strict=True)
            if LOOKALIKES[spec["include"][0]["class"]] != spec["include"][-1]["class"]  # a circle and a ring stay that
        ]
        assert len(verdicts) > 180 and sum(verdicts) == min(right, len(verdicts))


# --- the stream -----------------------------------------------------------------


def test_a_batch_depends_on_seed_and_step_alone() -> None:
    specs = train_specs()
    first, again = SceneStream(specs, 4, seed=3), SceneStream(specs, 4, seed=3)
    again.batch(0)  # drawing another one before changes nothing
    assert first.batch(7).scenes == again.batch(7).scenes
    assert torch.equal(first.batch(7).images, again.batch(7).images)
    assert first.batch(7).scenes != first.batch(8).scenes
    assert first.batch(7).scenes != SceneStream(specs, 4, seed=4).batch(7).scenes


def test_images_of_a_batch_are_the_rendered_scenes_of_its_prompts() -> None:
    batch = SceneStream(heldout_specs(), 6, seed=0).batch(0)
    assert batch.images.shape == (6, 3, 48, 48)
    assert torch.equal(batch.images, to_pixels([render(scene) for scene in batch.scenes]))
    assert batch.images.min() >= -1 and batch.images.max() <= 1
    for spec, scene, prompt in zip(batch.metadata, batch.scenes, batch.prompts, strict=True):
        assert _verdict(scene, spec)[0] and spec["prompt"] == prompt


def test_tags_come_with_their_weights() -> None:
    weights = dict.fromkeys(TAGS, 0.0) | {"counting": 3.0, "colors": 1.0}
    stream = SceneStream(train_specs(), 400, seed=0, tag_weights=weights)
    assert stream.shares.tolist() == [0.0, 0.0, 0.75, 0.25, 0.0, 0.0]
    # 400 draws at 0.75: standard deviation 8.7
    tags = Counter(spec["tag"] for spec in stream.batch(0).metadata)
    assert set(tags) == {"counting", "colors"} and abs(tags["counting"] - 300) < 44
