"""Loading rewards, checking what they return, and summing them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from rewards import BUILT_IN, Reward, RewardError, load_reward, score, weighted_sum

IMAGES = [Image.new("RGB", (4, 4), (level, 0, 0)) for level in (10, 20, 30)]
PROMPTS = ["a", "b", "c"]


def brightness(images: list[Image.Image], prompts: list[str], **columns: list) -> list[float]:
    return [float(np.asarray(image).mean()) for image in images]


class Scaled:
    range = (0.0, 1.0)

    def __init__(self, factor: float = 1.0) -> None:
        if factor < 0:
            raise RewardError("factor must not be negative")
        self.factor = 1 / factor if factor != 1 else 1.0

    def __call__(self, images: list, prompts: list[str]) -> list[float]:
        return [self.factor] * len(images)


class NotCallable:
    pass


class TakesAnything:
    def __init__(self, **settings: Any) -> None:
        self.settings = settings

    def __call__(self, images: list, prompts: list[str]) -> list[float]:
        return [float(len(self.settings))] * len(images)


A_NUMBER = 3


# Loading --------------------------------------------------------------------------------------------------------------


def test_importing_the_package_imports_no_framework() -> None:
    code = (
        "import sys, rewards; print([m for m in ('torch', 'open_clip', 'scipy', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_geneval_is_built_in_with_its_settings_and_range() -> None:
    reward = load_reward("geneval", score="strict")
    assert (reward.name, reward.range) == ("geneval", (0.0, 1.0))
    assert reward.fn.score == "strict"  # type: ignore[attr-defined]
    assert set(BUILT_IN) == {"clip", "aesthetic", "geneval", "hps", "pickscore", "remote"}


def test_a_function_by_module_name() -> None:
    reward = load_reward(f"{__name__}:brightness")
    assert (reward.name, reward.range) == (f"{__name__}:brightness", None)
    assert score(reward, IMAGES, PROMPTS) == [pytest.approx(x / 3) for x in (10, 20, 30)]


def test_a_class_by_module_name_gets_its_settings() -> None:
    reward = load_reward(f"{__name__}:Scaled", factor=2)
    assert reward.range == (0.0, 1.0)
    assert score(reward, IMAGES, PROMPTS) == [0.5, 0.5, 0.5]
    assert score(load_reward(f"{__name__}:TakesAnything", a=1, b=2), IMAGES, PROMPTS) == [2.0, 2.0, 2.0]


@pytest.fixture
def reward_file(tmp_path: Path) -> Path:
    file = tmp_path / "own reward.py"
    file.write_text(
        "from __future__ import annotations\n"
        "from dataclasses import dataclass\n\n"
        "def number(images, prompts):\n"
        "    return [float(i) for i, _ in enumerate(images)]\n\n"
        "@dataclass\n"
        "class Constant:\n"
        "    value: float = 1.0\n"
        "    range = (0, 5)\n\n"
        "    def __call__(self, images, prompts):\n"
        "        return [self.value for _ in images]\n"
    )
    return file


def test_function_and_class_in_a_file(reward_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = list(sys.path)
    assert score(load_reward(f"{reward_file}:number"), IMAGES, PROMPTS) == [0.0, 1.0, 2.0]
    assert score(load_reward(f"{reward_file}:Constant", value=4), IMAGES, PROMPTS) == [4.0, 4.0, 4.0]
    monkeypatch.chdir(reward_file.parent)
    assert score(load_reward("own reward.py:number"), IMAGES, PROMPTS) == [0.0, 1.0, 2.0]
    assert sys.path == before


def test_files_of_one_name_are_different_modules(reward_file: Path) -> None:
    other = reward_file.parent / "other" / reward_file.name
    other.parent.mkdir()
    other.write_text("def number(images, prompts):\n    return [7.0 for _ in images]\n")
    first, second = load_reward(f"{reward_file}:number"), load_reward(f"{other}:number")
    assert score(first, IMAGES, PROMPTS) == [0.0, 1.0, 2.0]
    assert score(second, IMAGES, PROMPTS) == [7.0, 7.0, 7.0]


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("genevall", {}, r"reward 'genevall' is unknown; did you mean 'geneval'\?"),
        (
            "zzz",
            {},
            r"is unknown; known: aesthetic, clip, geneval, hps, pickscore, remote; your own is named as pkg.module:name",
        ),
        ("geneval", {"scores": "dense"}, r"reward 'geneval' has no setting 'scores'; did you mean 'score'\?"),
        ("geneval", {"score": "hard"}, "reward 'geneval': score 'hard' is unknown"),
        ("no_such_package.sub:fn", {}, "no module named 'no_such_package'"),
        ("rewards.nothing:fn", {}, "no module named 'rewards.nothing'"),
        ("rewards:weighted_summ", {}, r"rewards has no 'weighted_summ'; did you mean 'weighted_sum'\?"),
        ("nowhere/file.py:fn", {}, "no such file: .*nowhere/file.py"),
        (":fn", {}, "is not of the form"),
        ("rewards:", {}, "is not of the form"),
        (f"{__name__}:brightness", {"factor": 1}, "is a function and takes no settings, got factor"),
        (f"{__name__}:A_NUMBER", {}, "is int, not a function or a class"),
        (f"{__name__}:NotCallable", {}, "objects of class NotCallable are not callable"),
        (f"{__name__}:Scaled", {"factor": 0}, "could not be made: ZeroDivisionError"),
        (f"{__name__}:Scaled", {"factor": -1}, "Scaled': factor must not be negative"),
    ],
)
def test_what_cannot_be_loaded_is_named(name: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(RewardError, match=message):
        load_reward(name, **settings)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("raise OSError('no disk')\n", "failed to load: OSError: no disk"),
        ("def broken(:\n", "failed to load: SyntaxError"),
        ("import no_such_package\n", "failed to load: ModuleNotFoundError: No module named 'no_such_package'"),
    ],
)
def test_a_file_that_fails_names_file_and_reason(tmp_path: Path, body: str, message: str) -> None:
    file = tmp_path / "bad.py"
    file.write_text(body)
    modules = set(sys.modules)
    with pytest.raises(RewardError, match=rf"bad\.py {message}"):
        load_reward(f"{file}:fn")
    assert set(sys.modules) == modules


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("import no_such_package\n", "module 'own_broken' failed to import: No module named 'no_such_package'"),
        ("1 / 0\n", "module 'own_broken' failed to import: ZeroDivisionError"),
    ],
)
def test_a_module_that_fails_names_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str, message: str
) -> None:
    (tmp_path / "own_broken.py").write_text(body)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(RewardError, match=message):
        load_reward("own_broken:fn")


# Scoring --------------------------------------------------------------------------------------------------------------


def returning(values: Any, bounds: tuple[float, float] | None = None) -> Reward:
    return Reward("mine", lambda images, prompts: values, bounds)


@pytest.mark.parametrize(
    "values",
    [
        [1, 0.5, None],
        (True, np.float32(0.5), None),
        [np.array(1.0), np.array(0.5), None],
        np.array([1.0, 0.5, None], dtype=object),
    ],
)
def test_scores_become_floats_and_none_stays(values: Any) -> None:
    scores = score(returning(values), IMAGES, PROMPTS)
    assert scores == [1.0, 0.5, None]
    assert [type(value) for value in scores] == [float, float, type(None)]


def test_a_tensor_is_a_list_of_scores() -> None:
    torch = pytest.importorskip("torch")
    assert score(returning(torch.tensor([1.0, 2.0, 3.0])), IMAGES, PROMPTS) == [1.0, 2.0, 3.0]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([1.0, 2.0], "reward 'mine' returned 2 scores, expected 3"),
        ([1.0] * 4, "reward 'mine' returned 4 scores, expected 3"),
        (1.0, "reward 'mine' returned float, expected a list of 3 scores"),
        (None, "reward 'mine' returned NoneType, expected a list of 3 scores"),
        ("abc", "reward 'mine' returned str, expected a list of 3 scores"),
        ({0: 1.0, 1: 1.0, 2: 1.0}, "reward 'mine' returned dict, expected a list"),
        ([1.0, float("nan"), 1.0], "reward 'mine' returned nan for image 1: not finite"),
        ([1.0, 1.0, float("-inf")], "reward 'mine' returned -inf for image 2: not finite"),
        (["1", 1.0, 1.0], "reward 'mine' returned '1' for image 0: not a number"),
        ([[1.0], 1.0, 1.0], r"reward 'mine' returned \[1.0\] for image 0: not a number"),
        ([1j, 1.0, 1.0], "reward 'mine' returned 1j for image 0: not a number"),
    ],
)
def test_what_is_no_list_of_finite_numbers_is_an_error(values: Any, message: str) -> None:
    with pytest.raises(RewardError, match=message):
        score(returning(values), IMAGES, PROMPTS)


def test_a_declared_range_holds_up_to_rounding() -> None:
    inside = returning([0.0, 1.0, 1.0 + 1e-6], (0.0, 1.0))
    assert score(inside, IMAGES, PROMPTS) == [0.0, 1.0, 1.0 + 1e-6]
    for value in (-0.01, 1.01, 80.0):
        with pytest.raises(RewardError, match=r"for image 1: outside its range \[0, 1\]"):
            score(returning([0.5, value, 0.5], (0.0, 1.0)), IMAGES, PROMPTS)


def test_a_reward_that_raises_is_named_with_its_exception() -> None:
    def broken(images: list, prompts: list) -> list[float]:
        raise KeyError("colour")

    def refusing(images: list, prompts: list) -> list[float]:
        raise RewardError("no such class")

    with pytest.raises(RewardError, match="reward 'mine' raised KeyError: 'colour'") as caught:
        score(Reward("mine", broken), IMAGES, PROMPTS)
    assert isinstance(caught.value.__cause__, KeyError)
    with pytest.raises(RewardError, match=r"^reward 'mine': no such class$"):
        score(Reward("mine", refusing), IMAGES, PROMPTS)


def test_a_function_gets_the_columns_that_it_names() -> None:
    columns = {"gold": (1.0, 2.0, 3.0), "tag": ["x", "y", "z"]}

    def some(images: list, prompts: list, gold: list) -> list[float]:
        assert isinstance(gold, list)
        return gold

    def every(images: list, prompts: list, *, tag: list, **others: list) -> list[float]:
        assert tag == ["x", "y", "z"]
        assert set(others) == {"gold"}
        return [0.0] * len(images)

    def optional(images: list, prompts: list, absent: list | None = None) -> list[float]:
        assert absent is None
        return [5.0] * len(images)

    def needy(images: list, prompts: list, target: list) -> list[float]:
        return target

    assert score(Reward("mine", some), IMAGES, PROMPTS, columns) == [1.0, 2.0, 3.0]
    assert score(Reward("mine", every), IMAGES, PROMPTS, columns) == [0.0, 0.0, 0.0]
    assert score(Reward("mine", optional), IMAGES, PROMPTS, columns) == [5.0, 5.0, 5.0]
    with pytest.raises(RewardError, match="reward 'mine' needs the column 'target'; the prompts have: gold, tag"):
        score(Reward("mine", needy), IMAGES, PROMPTS, columns)
    with pytest.raises(RewardError, match="needs the column 'target'; the prompts have: none"):
        score(Reward("mine", needy), IMAGES, PROMPTS)


def test_a_reward_cannot_change_the_callers_lists() -> None:
    def greedy(images: list, prompts: list, gold: list) -> list[float]:
        number = len(images)
        images.clear(), prompts.clear(), gold.clear()
        return [0.0] * number

    images, prompts, columns = list(IMAGES), list(PROMPTS), {"gold": [1, 2, 3]}
    score(Reward("mine", greedy), images, prompts, columns)
    assert (len(images), len(prompts), columns) == (3, 3, {"gold": [1, 2, 3]})


# Sums -----------------------------------------------------------------------------------------------------------------


def test_weighted_sum_by_hand() -> None:
    scores = {"a": [1.0, 0.5, None], "b": [2.0, None, None]}
    # 0.5·1 + 2·2, 0.5·0.5 + 0, 0: weights are not normalised and None counts 0.
    assert weighted_sum(scores, {"a": 0.5, "b": 2.0}) == [4.5, 0.25, 0.0]
    assert weighted_sum(scores, {"b": -1.0, "a": 1.0}) == [-1.0, 0.5, 0.0]


def test_weighted_sum_refuses_what_does_not_fit() -> None:
    with pytest.raises(RewardError, match=r"rewards \['a'\] and weights \['b'\]"):
        weighted_sum({"a": [1.0]}, {"b": 1.0})
    with pytest.raises(RewardError, match=r"differ in their number of scores: \{'a': 1, 'b': 2\}"):
        weighted_sum({"a": [1.0], "b": [1.0, 2.0]}, {"a": 1.0, "b": 1.0})
