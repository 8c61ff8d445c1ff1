"""The bridge to the rewards package: labels, weighted sums, and a package of the same name in the way."""

from __future__ import annotations

import json
import types
from pathlib import Path

import pytest
import torch
from PIL import Image

from gcpo_t2i import scoring
from gcpo_t2i.config import RewardConfig
from gcpo_t2i.data import Prompt, load_prompts
from gcpo_t2i.errors import UserError
from gcpo_t2i.scoring import RewardSet, scored_name


def test_scores_are_weighted_and_named(reward_file: Path) -> None:
    configs = [
        RewardConfig(f"{reward_file}:bright", weight=2.0),
        RewardConfig(f"{reward_file}:constant", weight=-1.0),
        RewardConfig("geneval", kwargs={"score": "strict"}),
    ]
    rewards = RewardSet.load(configs)
    assert list(rewards.rewards) == ["bright", "constant", "geneval"]
    assert list(RewardSet.load(configs, label=scored_name).rewards) == ["bright", "constant", "geneval/strict"]
    white = Image.new("RGB", (48, 48), (255, 255, 255))
    scores = rewards.score([white], [Prompt("a photo")])
    assert list(scores.values()) == [[1.0], [1.0], [None]]  # GenEval has no say without metadata
    assert rewards.total(scores) == [2.0 - 1.0]


def test_a_score_does_not_depend_on_the_precision_that_the_policy_samples_in() -> None:
    rewards = RewardSet.load([RewardConfig("clip"), RewardConfig("aesthetic")])
    images, prompts = [Image.new("RGB", (48, 48), (200, 30, 40))], [Prompt("a photo of a red circle")]
    scores = rewards.score(images, prompts)
    with torch.autocast("cpu", torch.bfloat16):
        assert rewards.score(images, prompts) == scores
        assert rewards.judge(images, prompts)[0] == scores


def test_two_rewards_of_one_function_name_keep_their_full_names(reward_file: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.py"
    other.write_text(reward_file.read_text())
    rewards = RewardSet.load([RewardConfig(f"{path}:bright") for path in (reward_file, other)])
    assert list(rewards.rewards) == [f"{reward_file}:bright", f"{other}:bright"]


def test_an_unknown_reward_is_a_user_error() -> None:
    with pytest.raises(UserError, match="did you mean 'geneval'"):
        RewardSet.load([RewardConfig("genval")])


def test_a_package_that_shadows_ours_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    stranger = types.ModuleType("rewards")
    stranger.__file__ = "/somewhere/site-packages/rewards/__init__.py"
    monkeypatch.setattr(scoring.importlib, "import_module", lambda name: stranger)
    with pytest.raises(UserError, match=r"/somewhere/site-packages/rewards/__init__\.py"):
        scoring.rewards_package()


def write_prompts(folder: Path, *specs: dict) -> str:
    path = folder / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"prompt {i}"} | spec) + "\n" for i, spec in enumerate(specs)))
    return str(path)


ONE = {"tag": "single_object", "include": [{"class": "star", "count": 1}]}


def test_a_prompt_without_specification_among_others_is_named_with_its_line(tmp_path: Path) -> None:
    rewards = RewardSet.load([RewardConfig("geneval"), RewardConfig("clip")], "cpu")
    path = write_prompts(tmp_path, ONE, {}, ONE, {"tag": "colors"})
    with pytest.raises(
        UserError,
        match=rf"^{path}, line 2: the prompt 'prompt 1' has no \"include\", by which reward 'geneval' judges the others "
        r"\(2 of 4 have none\); add it, or \"include\": null if it shall not be judged$",
    ):
        rewards.check(load_prompts(path))
    rewards.check(load_prompts(write_prompts(tmp_path, ONE, {"include": None}, {"exclude": []})))  # they say so
    rewards.check(load_prompts(write_prompts(tmp_path, {}, {})))  # no prompt is for GenEval: a matter of other rewards
    rewards.check([])
    RewardSet.load([RewardConfig("clip")], "cpu").check(load_prompts(path))


def test_a_specification_that_is_wrong_is_named_with_its_line(tmp_path: Path) -> None:
    rewards = RewardSet.load([RewardConfig("geneval")])
    for clause, message in (
        ({"class": "dog", "count": 1}, "the detector knows no class 'dog'"),
        ({"class": "star"}, "has no 'count'"),
    ):
        path = write_prompts(tmp_path, ONE, ONE, {"include": [clause]})
        with pytest.raises(UserError, match=rf"^{path}, line 3: reward 'geneval': .*{message}"):
            rewards.check(load_prompts(path))


def test_classes_with_a_device_get_the_runs_unless_they_are_told_another(tmp_path: Path) -> None:
    file = tmp_path / "own.py"
    file.write_text(
        "class Own:\n    def __init__(self, device=None):\n        self.device = device\n\n"
        "    def __call__(self, images, prompts):\n        return [0.0] * len(images)\n"
    )
    configs = [RewardConfig(f"{file}:Own"), RewardConfig(f"{file}:Own", kwargs={"device": "meta"})]
    made = [RewardSet.load([config], "cpu").rewards["Own"].fn.device for config in configs]
    assert made == ["cpu", "meta"]
