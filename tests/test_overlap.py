"""Rollouts in parts: the same samples as at once, and rewards that score one part while the next is sampled."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from gcpo_t2i.cli import main
from gcpo_t2i.config import RewardConfig
from gcpo_t2i.data import Prompt
from gcpo_t2i.models.llamagen import LlamaGenPolicy
from gcpo_t2i.overlap import overlapped
from gcpo_t2i.rollout import Batch, Sampling, sample_batch
from gcpo_t2i.scoring import RewardFailed, RewardSet
from gcpo_t2i.seeds import generators
from tests.tiny import tiny_policy, train_command

CPU = torch.device("cpu")
PATIENCE = 20.0  # s until a thread that nobody meets gives up: what passes never waits so long
PROMPTS = [Prompt(text) for text in ("a photo of a red circle", "blue", "two square")]


class Calls(RewardSet):
    """Rewards that do `act` before they score, in `threads`."""

    def __init__(self, file: Path, name: str = "bright", act: Callable[[], object] = lambda: None) -> None:
        loaded = RewardSet.load([RewardConfig(f"{file}:{name}")])
        super().__init__(loaded.rewards, loaded.weights)
        object.__setattr__(self, "act", act)  # frozen, as sets of rewards are
        object.__setattr__(self, "threads", [])

    act: Callable[[], object]
    threads: list[bool]  # whether it was the main one

    def score(self, *args: Any) -> Any:
        self.threads.append(threading.current_thread() is threading.main_thread())
        self.act()
        return super().score(*args)


def sampled(rewards: RewardSet, batch_size: int | None, policy: LlamaGenPolicy | None = None) -> Batch:
    """3 prompts × 2 images."""
    places = [(place, image) for place in range(3) for image in range(2)]
    return sample_batch(
        policy or tiny_policy(),
        PROMPTS,
        rewards,
        Sampling(2, guidance=3.0),
        generators(7, places),
        stats=("exact_kl", "entropy"),
        batch_size=batch_size,
    )


@pytest.mark.parametrize("batch_size", [2, 4])
def test_parts_are_the_same_samples(reward_file: Path, batch_size: int) -> None:
    whole, parts = (sampled(Calls(reward_file), size) for size in (None, batch_size))
    assert torch.equal(parts.rollout.tokens, whole.rollout.tokens)
    assert parts.tensors().keys() == whole.tensors().keys() == {"cond_logp", "null_logp", "exact_kl", "entropy"}
    for name, tensor in whole.tensors().items():
        assert torch.allclose(parts.tensors()[name], tensor, atol=1e-5), name
    assert torch.allclose(parts.rollout.sample_logp, whole.rollout.sample_logp, atol=1e-5)
    assert torch.allclose(parts.rewards, whole.rewards, atol=1e-6) and parts.rewards.shape == (3, 2)
    assert parts.scores["bright"] == pytest.approx(whole.scores["bright"]) and len(parts.images) == 6
    assert parts.prompts == whole.prompts and len(parts.cond) == 3 and parts.null is not None


def test_no_thread_for_one_part_and_one_for_all_but_the_last(reward_file: Path) -> None:
    for batch_size, expected in ((None, [True]), (6, [True]), (64, [True]), (2, [False, False, True])):
        rewards = Calls(reward_file)
        sampled(rewards, batch_size)
        assert rewards.threads == expected


def test_a_part_is_scored_while_the_next_is_sampled(reward_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each waits for the other to have begun: one after the other, neither would come to an end before PATIENCE."""
    scoring, sampling, policy = threading.Event(), threading.Event(), tiny_policy()
    sample, calls, met = policy.sample, [], []

    def second_waits(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            sampling.set()
            met.append(scoring.wait(PATIENCE))
        return sample(*args, **kwargs)

    def first_waits() -> None:
        scoring.set()
        met.append(sampling.wait(PATIENCE))

    monkeypatch.setattr(policy, "sample", second_waits)
    rewards = Calls(reward_file, act=first_waits)
    batch = sampled(rewards, 4, policy)
    assert met == [True, True, True] and rewards.threads == [False, True]  # the last part's scoring meets nobody anew
    assert batch.seconds.keys() == {"rollout", "reward"} and min(batch.seconds.values()) >= 0


@pytest.mark.parametrize("batch_size", [None, 2])
def test_what_a_reward_raises_comes_out(reward_file: Path, batch_size: int | None) -> None:
    with pytest.raises(RewardFailed, match="broken' raised RuntimeError: the GPU caught fire"):
        sampled(Calls(reward_file, "broken"), batch_size)


def test_an_error_ends_the_rollout_after_the_part_at_work(reward_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    policy, parts = tiny_policy(), []
    sample = policy.sample
    monkeypatch.setattr(policy, "sample", lambda *args, **kwargs: parts.append(1) or sample(*args, **kwargs))
    with pytest.raises(RewardFailed):
        sampled(Calls(reward_file, "broken"), 2, policy)
    assert len(parts) == 2  # of 3


def test_rewards_run_in_their_own_precision_and_without_gradient(tmp_path: Path) -> None:
    file = tmp_path / "modes.py"
    file.write_text(
        "import torch\n\n\ndef modes(images, prompts):\n"
        "    return [2.0 * torch.is_autocast_enabled('cpu') + torch.is_grad_enabled()] * len(images)\n"
    )
    for batch_size in (None, 2):
        with torch.autocast("cpu", torch.bfloat16):
            assert sampled(Calls(file, "modes"), batch_size).scores["modes"] == [0.0] * 6


def test_only_what_was_waited_for_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a clock that the work itself moves on: what is used within the time of the next part costs nothing."""
    now, used = [0.0], threading.Event()
    monkeypatch.setattr("gcpo_t2i.overlap.time.perf_counter", lambda: now[0])

    def make(part: int) -> int:
        if part == 1:
            assert used.wait(PATIENCE)  # the first is used before the second is there
        now[0] += 10
        return part

    def use(part: int) -> int:
        now[0] += 3
        used.set()
        return part * part

    assert overlapped([0, 1], make, use, CPU) == ([0, 1], [0, 1], 3.0)


def test_a_step_in_parts_is_the_step_at_once(tiny_folder: Path, reward_file: Path, tmp_path: Path) -> None:
    command = train_command(tiny_folder, reward_file, tmp_path)
    rows = {}
    for name, extra in {"whole": [], "parts": ["--rollout_batch_size", "4"]}.items():
        assert main([*command, *extra, "--steps", "1", "--output_dir", str(tmp_path / name)]) == 0
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        rows[name] = next(row for row in map(json.loads, lines) if "loss" in row)
    for key in ("reward", "entropy", "grad_norm", "logp_gap/guided", "credit/top40_mass"):
        assert rows["whole"][key] == pytest.approx(rows["parts"][key], rel=1e-3, abs=1e-6), key
