"""The bridge to the rewards package: labels, weighted sums, and a package of the same name in the way."""

from __future__ import annotations

import types
from pathlib import Path

import pytest
from PIL import Image

from gcpo_t2i import scoring
from gcpo_t2i.config import RewardConfig
from gcpo_t2i.data import Prompt
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
