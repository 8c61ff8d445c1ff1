"""The three scores of GenEval, and the reward that runs a detector."""

from __future__ import annotations

import hashlib
import random
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import rewards
from gcpo_t2i import __version__
from rewards import Reward
from rewards.boxes import Detection, closeness, relative_position
from rewards.errors import RewardError
from rewards.geneval import GenEval, dense_score, judge


def seen(
    name: str, x: float = 0.0, y: float = 0.0, confidence: float = 1.0, color: str = "red", probability: float = 1.0
) -> Detection:
    other = "blue" if color == "red" else "red"
    return Detection(name, (x, y, x + 10, y + 10), confidence, {color: probability, other: 1 - probability})


SPECS = {
    "single_object": {"tag": "single_object", "include": [{"class": "cat", "count": 1}]},
    "two_object": {
        "tag": "two_object",
        "include": [{"class": "cat", "count": 1}, {"class": "dog", "count": 1}],
    },
    "counting": {
        "tag": "counting",
        "include": [{"class": "cat", "count": 3}],
        "exclude": [{"class": "cat", "count": 4}],
    },
    "colors": {"tag": "colors", "include": [{"class": "cat", "count": 1, "color": "red"}]},
    "position": {
        "tag": "position",
        "include": [{"class": "dog", "count": 1}, {"class": "cat", "count": 1, "position": ["left of", 0]}],
    },
    "color_attr": {
        "tag": "color_attr",
        "include": [{"class": "cat", "count": 1, "color": "red"}, {"class": "dog", "count": 1, "color": "blue"}],
    },
}
PERFECT = {
    "single_object": [seen("cat")],
    "two_object": [seen("cat"), seen("dog", x=20)],
    "counting": [seen("cat"), seen("cat", x=20), seen("cat", x=40)],
    "colors": [seen("cat")],
    "position": [seen("cat"), seen("dog", x=30)],
    "color_attr": [seen("cat"), seen("dog", x=20, color="blue")],
}


@pytest.mark.parametrize("tag", SPECS)
def test_a_perfect_image_scores_one_and_an_empty_one_zero(tag: str) -> None:
    verdict = judge(PERFECT[tag], SPECS[tag])
    assert (verdict.strict, verdict.partial, verdict.dense, verdict.correct) == (1.0, 1.0, 1.0, True)
    assert verdict.reason == ""
    nothing = judge([], SPECS[tag])
    assert (nothing.strict, nothing.dense, nothing.correct) == (0.0, 0.0, False)
    assert nothing.reason
    assert nothing.objects == {}


def test_partial_is_the_share_of_clauses_met() -> None:
    assert judge([seen("cat")], SPECS["two_object"]).partial == 0.5
    assert judge([seen("cat")] * 4, SPECS["counting"]).partial == 0.5  # three are there, but not fewer than four
    assert judge([], SPECS["counting"]).partial == 0.5
    assert judge([seen("cat", color="blue"), seen("dog", color="blue")], SPECS["color_attr"]).partial == 0.5
    assert judge([], {"tag": "none"}).partial == 1.0


def test_counting_takes_the_stricter_threshold() -> None:
    three = [seen("cat", x=20 * i, confidence=0.85) for i in range(3)]
    assert judge(three, SPECS["counting"]).strict == 0.0
    assert judge(three, {**SPECS["counting"], "tag": "other"}).strict == 1.0


def test_equal_boxes_keep_their_own_colors() -> None:
    both = [seen("cat", color="blue", confidence=0.8), seen("cat", color="red", confidence=0.9)]
    assert judge(both, SPECS["colors"]).strict == 1.0  # the more confident one decides, and it is red
    assert judge(both[::-1], SPECS["colors"]).strict == 1.0


# dense, by hand: an incorrect image scores quality/2, a correct one (1 + quality)/2 -----------------------------------


def dense(detections: list[Detection], tag: str) -> float:
    return judge(detections, SPECS[tag]).dense


def test_dense_grades_presence() -> None:
    # Terms: cat 1, dog 0 → mean 1/2, halved.
    assert dense([seen("cat")], "two_object") == pytest.approx(0.25)
    # A dog below the threshold counts with 0.27 / 0.9 = 0.3: (1 + 0.3) / 2 / 2.
    assert dense([seen("cat"), seen("dog", confidence=0.27)], "two_object") == pytest.approx(0.325)
    # Above it the image is correct: 0.45 / 0.9 = 0.5, quality 0.75.
    assert dense([seen("cat"), seen("dog", confidence=0.45)], "two_object") == pytest.approx(0.875)


def test_dense_grades_the_number() -> None:
    cats = [seen("cat", x=20 * i) for i in range(6)]
    # 1 or 2 of 3 cats: 1/3 and 2/3, halved.
    assert dense(cats[:1], "counting") == pytest.approx(1 / 6)
    assert dense(cats[:2], "counting") == pytest.approx(1 / 3)
    # 4 cats: one beyond the three that `exclude: 4` allows, 4/(4 + 1); clutter one beyond 3, 3/(3 + 1/2).
    assert dense(cats[:4], "counting") == pytest.approx(4 / 5 * 3 / 3.5 / 2)
    assert dense(cats[:5], "counting") == pytest.approx(4 / 6 * 3 / 4 / 2)
    assert dense(cats[:4], "counting") > dense(cats[:5], "counting") > dense(cats[:6], "counting")


def test_dense_grades_the_color() -> None:
    # Terms: presence 1, colour 0.36 / 0.9 = 0.4 → 0.7, halved: blue is likelier, so the image is incorrect.
    assert dense([seen("cat", color="blue", probability=0.64)], "colors") == pytest.approx(0.35)
    # A cat of unknown colour.
    assert dense([Detection("cat", (0, 0, 9, 9), 1.0)], "colors") == pytest.approx(0.25)
    # Right colours on the wrong objects earn presence only: terms 1, 0, 1, 0.
    swapped = [seen("cat", color="blue"), seen("dog", color="red")]
    assert dense(swapped, "color_attr") == pytest.approx(0.25)


def test_dense_grades_the_place() -> None:
    # The cat on the wrong side: presence 1, presence 1, place 0 → 2/3, halved.
    assert dense([seen("cat", x=30), seen("dog")], "position") == pytest.approx(1 / 3)
    # The cat straight below: offset (0, 30), slack 2: (−2 + 30) / 45 of the way.
    assert dense([seen("cat", y=30), seen("dog")], "position") == pytest.approx((2 + 28 / 45) / 3 / 2)
    # No dog: presence 0 and 1, place 0.
    assert dense([seen("cat")], "position") == pytest.approx(1 / 6)
    # An unsure dog dims presence and place alike: 0.27/0.9 = 0.3 → (0.3 + 1 + 0.3) / 3, halved.
    assert dense([seen("cat"), seen("dog", x=30, confidence=0.27)], "position") == pytest.approx(1.6 / 3 / 2)


def test_position_of_several_objects_averages_over_pairs_that_should_exist() -> None:
    spec = {"include": [{"class": "dog", "count": 2}, {"class": "cat", "count": 1, "position": ["left of", -1]}]}
    # One of two dogs: terms 1/2, 1, and one right pair of two.
    assert judge([seen("cat"), seen("dog", x=30)], spec).dense == pytest.approx((0.5 + 1 + 0.5) / 3 / 2)


def test_closeness_is_one_exactly_where_the_relation_holds() -> None:
    rng = random.Random(1)
    for _ in range(500):
        a, b = ((x := rng.uniform(0, 40), y := rng.uniform(0, 40), x + 10, y + 12) for _ in range(2))
        for relation in ("left of", "right of", "above", "below"):
            assert (closeness(relation, a, b) == 1.0) is (relation in relative_position((*a, 1.0), (*b, 1.0)))
    same = (0, 0, 10, 10)
    assert closeness("above", same, same) == 0.0
    assert closeness("inside", (0, 0, 10, 10), (50, 0, 60, 10)) < 1.0


def test_dense_saturates_so_that_a_group_of_right_images_carries_no_noise() -> None:
    assert dense([seen("cat", confidence=0.92)], "single_object") == 1.0
    assert dense([seen("cat", probability=0.93)], "colors") == 1.0
    assert dense([seen("cat", confidence=0.6)], "single_object") == pytest.approx((1 + 0.6 / 0.9) / 2)


@pytest.mark.parametrize("tag", SPECS)
def test_bystanders_never_raise_dense(tag: str) -> None:
    clean = dense(PERFECT[tag], tag)
    for extra in ("owl", "cat", "dog"):
        more = [*PERFECT[tag], seen(extra, x=80, y=80, confidence=0.95)]
        assert dense(more, tag) < clean
    assert judge([*PERFECT["two_object"], seen("owl")], SPECS["two_object"]).strict == 1.0  # the rules do not mind


def test_a_stand_in_for_a_missing_object_is_not_clutter() -> None:
    # An owl instead of the dog must not score below leaving the place empty.
    assert dense([seen("cat"), seen("owl", x=30)], "two_object") == dense([seen("cat")], "two_object")
    # One more than asked for: 2 / (2 + 1/2) of it.
    crowd = [seen("cat"), seen("owl", x=30), seen("owl", x=60)]
    assert dense(crowd, "two_object") == pytest.approx(0.25 * 2 / 2.5)


def random_detections(rng: random.Random) -> list[Detection]:
    return [
        seen(
            rng.choice(["cat", "cat", "dog", "dog", "owl"]),
            rng.uniform(0, 60),
            rng.uniform(0, 60),
            confidence=rng.choice([1.0, rng.uniform(0, 1)]),
            color=rng.choice(["red", "blue"]),
            probability=rng.uniform(0.5, 1),
        )
        for _ in range(rng.randint(0, 5))
    ]


@pytest.mark.parametrize("tag", SPECS)
def test_dense_and_partial_never_contradict_strict(tag: str) -> None:
    rng = random.Random(tag)
    verdicts = [judge(random_detections(rng), SPECS[tag]) for _ in range(400)] + [judge(PERFECT[tag], SPECS[tag])]
    correct = [v for v in verdicts if v.correct]
    wrong = [v for v in verdicts if not v.correct]
    assert len(wrong) > 10
    assert min(v.dense for v in correct) > 0.5 >= max(v.dense for v in wrong)
    assert all(0.0 <= v.dense <= 1.0 for v in verdicts)
    assert all((v.partial == 1.0) is v.correct for v in verdicts)
    # Signal: wrong images are told apart, where `partial` knows two or three values.
    assert len({v.dense for v in wrong}) > len({v.partial for v in wrong})


def test_dense_of_a_specification_that_only_excludes() -> None:
    spec = {"exclude": [{"class": "cat", "count": 1}]}
    assert judge([seen("owl")], spec).dense == 1.0
    # One cat where none is allowed: 1/(1 + 1), halved.
    assert judge([seen("cat")], spec).dense == pytest.approx(0.25)
    # A count of 0 can never be met, and must not divide by zero.
    assert (
        dense_score([], {"include": [{"class": "cat", "count": 0}], "exclude": [{"class": "cat", "count": 0}]}, False)
        == 0
    )


# The reward -----------------------------------------------------------------------------------------------------------


class FakeDetector:
    """Reads an image's red value as the number of cats."""

    classes = ("cat", "dog")
    colors = ("red", "blue")

    def __init__(self) -> None:
        self.calls: list[int] = []

    def __call__(self, images: list[Image.Image]) -> list[list[Detection]]:
        self.calls.append(len(images))
        return [[seen("cat", x=20 * i) for i in range(np.asarray(image)[0, 0, 0])] for image in images]


def images_with(*cats: int) -> list[Image.Image]:
    return [Image.new("RGB", (4, 4), (number, 0, 0)) for number in cats]


def columns(*tags: str | None) -> dict[str, list]:
    specs = [SPECS[tag] if tag else {} for tag in tags]
    return {key: [spec.get(key) for spec in specs] for key in ("tag", "include", "exclude")}


def test_reward_scores_each_image_by_its_own_metadata() -> None:
    detector = FakeDetector()
    reward = GenEval(detector, score="strict")
    scores = reward(images_with(1, 3, 0, 2), [""] * 4, **columns("single_object", "counting", "single_object", None))
    assert scores == [1.0, 1.0, 0.0, None]
    assert detector.calls == [3]  # one pass over the three that have metadata


def test_reward_returns_the_chosen_score() -> None:
    for score, expected in (("strict", 0.0), ("partial", 0.5), ("dense", 1 / 3)):
        reward = GenEval(FakeDetector(), score=score)  # type: ignore[arg-type]
        assert reward(images_with(2), [""], **columns("counting")) == [pytest.approx(expected)]


def test_positions_pass_the_check_of_the_metadata() -> None:
    detector = lambda images: [PERFECT["position"] for _ in images]  # noqa: E731
    assert GenEval(detector)(images_with(1), [""], **columns("position")) == [1.0]


def test_judge_returns_everything_at_once() -> None:
    detector = FakeDetector()
    right, wrong, none = GenEval(detector).judge(images_with(3, 2, 1), **columns("counting", "counting", None))
    assert right is not None and wrong is not None
    assert (right.strict, right.partial, right.dense, right.reason) == (1.0, 1.0, 1.0, "")
    assert wrong.reason == "expected at least 3 cat, found 2"
    assert len(wrong.objects["cat"]) == 2
    assert none is None
    assert detector.calls == [2]


def test_without_any_metadata_nothing_is_detected() -> None:
    detector = FakeDetector()
    assert GenEval(detector)(images_with(1, 2), ["a", "b"]) == [None, None]
    assert detector.calls == []


def test_keys_that_a_table_filled_with_none_are_absent() -> None:
    include = [{"class": "cat", "count": 1, "color": None, "position": None}]
    assert GenEval(FakeDetector())(images_with(1), [""], tag=[None], include=[include]) == [1.0]
    assert GenEval(FakeDetector())(images_with(1), [""], exclude=[[{"class": "dog", "count": 1}]]) == [1.0]


@pytest.mark.parametrize(
    ("clause", "message"),
    [
        ({"class": "cats", "count": 1}, r"the detector knows no class 'cats'; did you mean 'cat'\?"),
        ({"class": "cat", "count": 1, "color": "rad"}, r"the detector knows no color 'rad'; did you mean 'red'\?"),
        ({"class": "cat"}, "GenEval clause {'class': 'cat'} has no 'count'"),
        ({"count": 1}, "GenEval clause {'count': 1} has no 'class'"),
        ({"class": "cat", "count": 1, "position": ["left", 0]}, r"'left' is unknown; did you mean 'left of'\?"),
        ({"class": "cat", "count": 1, "position": ["above", 1]}, "clause 1, which does not come before it"),
        ({"class": "cat", "count": "one"}, "'count' must be a whole number, not 'one'"),
        ({"class": "cat", "count": 1.0}, r"'count' must be a whole number, not 1\.0"),
        ({"class": "cat", "count": True}, "'count' must be a whole number, not True"),
        ({"class": "cat", "count": -1}, "'count' must be >= 0, not -1"),
        ({"class": ["cat"], "count": 1}, r"'class' must be a text, not \['cat'\]"),
        (
            {"class": "cat", "count": 1, "position": "above"},
            r"'position' must be .* such as \[\"left of\", 0\], not 'above'",
        ),
        ({"class": "cat", "count": 1, "position": ["above", "dog"]}, "'position' must be a relation and the number"),
    ],
)
def test_metadata_that_could_only_score_zero_is_an_error(clause: dict, message: str) -> None:
    include = [{"class": "dog", "count": 1}, clause]
    with pytest.raises(RewardError, match=message):
        GenEval(FakeDetector())(images_with(1), [""], include=[include])


@pytest.mark.parametrize("value", ["dog", 3, {"class": "dog", "count": 1}, ["dog"], [["dog", 1]]])
def test_columns_that_hold_no_clauses_are_an_error(value: object) -> None:
    for column in ("include", "exclude"):
        with pytest.raises(RewardError, match=rf"{column} must be a list such as "):
            GenEval(FakeDetector())(images_with(1), [""], **{column: [value]})


def test_excluded_classes_are_checked_too() -> None:
    with pytest.raises(RewardError, match="no class 'owl'"):
        GenEval(FakeDetector())(images_with(1), [""], exclude=[[{"class": "owl", "count": 1}]])


def test_a_detector_without_vocabulary_takes_any_word() -> None:
    reward = GenEval(lambda images: [[] for _ in images])
    assert reward(images_with(1), [""], include=[[{"class": "unicorn", "count": 1}]]) == [0.0]


def test_unknown_score_and_detector_are_errors() -> None:
    with pytest.raises(RewardError, match=r"score 'dens' is unknown; did you mean 'dense'\?"):
        GenEval(score="dens")  # type: ignore[arg-type]
    with pytest.raises(RewardError, match=r"detector 'shape' is unknown; did you mean 'shapes'\?"):
        GenEval(detector="shape")


def test_a_detector_may_be_a_class_or_a_function_in_a_file(tmp_path: Path) -> None:
    file = tmp_path / "detectors.py"
    file.write_text(
        "class Blind:\n"
        "    def __call__(self, images):\n"
        "        return [[] for _ in images]\n\n"
        "def blind(images):\n"
        "    return [[] for _ in images]\n"
    )
    for name in ("Blind", "blind"):
        assert GenEval(f"{file}:{name}")(images_with(1), [""], **columns("counting")) == [0.0]


def test_the_package_gives_score_and_verdict_from_one_pass() -> None:
    detector = FakeDetector()
    reward = Reward("geneval", GenEval(detector, score="partial"), (0.0, 1.0))
    scores, verdicts = rewards.judge(reward, images_with(2, 1), ["", ""], columns("counting", None))
    assert scores == [0.5, None] and verdicts[1] is None
    assert verdicts[0] is not None and verdicts[0].reason == "expected at least 3 cat, found 2"
    assert detector.calls == [1]
    plain = Reward("one", lambda images, prompts: [1.0] * len(images))
    assert rewards.judge(plain, images_with(1), [""]) == ([1.0], [None])


def test_prompts_can_be_checked_before_there_are_images() -> None:
    reward = Reward("geneval", GenEval(FakeDetector()))
    rewards.check_prompts(reward, [""], columns("counting"))
    with pytest.raises(RewardError, match="reward 'geneval': the detector knows no class 'owl'"):
        rewards.check_prompts(reward, [""], {"include": [[{"class": "owl", "count": 1}]]})
    with pytest.raises(RewardError, match="needs the column 'goal'"):
        rewards.check_prompts(Reward("near", lambda images, prompts, goal: [0.0]), [""], {})


def test_versions_tell_files_apart_and_name_the_package(tmp_path: Path) -> None:
    assert rewards.version_of(GenEval()) == rewards.version_of(GenEval().detector) == f"gcpo-t2i {__version__}"
    found = set()
    for number in (0, 1):
        file = tmp_path / f"{number}.py"
        file.write_text(f"class Mine:\n    def __call__(self, images, prompts):\n        return [{number}]\n")
        found.add(rewards.version_of(rewards.load_reward(f"{file}:Mine").fn))
        assert f"sha256:{hashlib.sha256(file.read_bytes()).hexdigest()}" in found
    assert len(found) == 2
    with pytest.raises(RewardError, match="comes from no file"):
        rewards.version_of(len)
