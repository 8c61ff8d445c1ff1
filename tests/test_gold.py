"""References in the places of failed samples: what they replace, what they are worth, and runs from the command line."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from gcpo_t2i.cli import main
from gcpo_t2i.config import RewardConfig
from gcpo_t2i.data import Prompt, PromptSampler, load_prompts
from gcpo_t2i.gold import References, inject
from gcpo_t2i.models.llamagen import LlamaGenPolicy
from gcpo_t2i.rollout import Batch, Sampling, sample_batch
from gcpo_t2i.run import load_model
from gcpo_t2i.scoring import RewardSet
from gcpo_t2i.seeds import generators
from tests import ranks
from tests.test_train import TIMES, weights
from tests.tiny import tiny_policy, train_command

SAMPLING = Sampling(group=3, guidance=2.0)


def brightness(policy: LlamaGenPolicy, codes: Sequence[int]) -> float:
    return float(np.asarray(policy.decode(torch.tensor([list(codes)]))[0]).mean()) / 255


def extremes(policy: LlamaGenPolicy) -> tuple[list[int], list[int]]:
    """Codes of the brightest and of the darkest picture of one code."""
    ordered = sorted(range(32), key=lambda code: brightness(policy, [code] * 16))
    return [ordered[-1]] * 16, [ordered[0]] * 16


def sampled(prompts: list[Prompt], reward_file: Path, success: float) -> tuple[References, Batch, RewardSet]:
    policy = tiny_policy()
    rewards = replace(RewardSet.load([RewardConfig(f"{reward_file}:bright")]), success=success)
    places = [(p, g) for p in range(len(prompts)) for g in range(SAMPLING.group)]
    batch = sample_batch(policy, prompts, rewards, SAMPLING, generators(0, places), stats=["entropy", "js"])
    return References(policy, "prompts.jsonl", seed=0), batch, rewards


def test_a_reference_takes_the_place_of_the_worst(reward_file: Path) -> None:
    bright, _ = extremes(tiny_policy())
    worth = brightness(tiny_policy(), bright)
    prompts = [Prompt("a red circle", None, {"gold": bright}), Prompt("blue", None, {"gold": bright}), Prompt("a")]
    references, before, rewards = sampled(prompts, reward_file, success=worth - 1e-6)
    assert before.success is not None and not before.success.any()
    after, injected, refused = inject(references, before, [0, 2], rewards, SAMPLING)
    assert (injected, refused) == (1, 0)  # the second was not asked for, and the third has no reference
    row = int(before.rewards[0].argmin())
    others = [i for i in range(9) if i != row]
    assert after.rollout.tokens[row].tolist() == bright
    assert after.rewards[0, row].item() == pytest.approx(worth) and after.scores["bright"][row] == pytest.approx(worth)
    assert after.success is not None and after.success.nonzero().tolist() == [[0, row]]
    assert after.images[row].tobytes() == references.policy.decode(torch.tensor([bright]))[0].tobytes()
    for name, tensor in after.tensors().items():
        assert torch.equal(tensor[others], before.tensors()[name][others]), name
    assert torch.equal(after.rewards.flatten()[others], before.rewards.flatten()[others])
    assert [after.images[i] is before.images[i] for i in others] == [True] * 8
    # what is known of it is teacher-forced, under its own prompt
    policy, codes = references.policy, torch.tensor([bright])
    torch.testing.assert_close(after.rollout.cond_logp[row], policy.logp(before.cond[[0]], codes).logp[0].detach())
    assert before.null is not None and after.rollout.null_logp is not None
    torch.testing.assert_close(after.rollout.null_logp[row], policy.logp(before.null[[0]], codes).logp[0].detach())
    mixture = policy.logp(before.cond[[0]], codes, null=before.null[[0]], guidance=2.0, entropy=True)
    torch.testing.assert_close(after.rollout.sample_logp[row], mixture.logp[0].detach())
    assert mixture.entropy is not None
    torch.testing.assert_close(after.rollout.stats["entropy"][row], mixture.entropy[0].detach())


def test_a_reference_that_fails_itself_stays_out(reward_file: Path) -> None:
    bright, dark = extremes(tiny_policy())
    prompts = [Prompt("a red circle", None, {"gold": dark}), Prompt("blue", None, {"gold": bright})]
    references, before, rewards = sampled(prompts, reward_file, brightness(tiny_policy(), bright) - 1e-6)
    after, injected, refused = inject(references, before, [0, 1], rewards, SAMPLING)
    assert (injected, refused) == (1, 1)
    assert torch.equal(after.rewards[0], before.rewards[0]) and not torch.equal(after.rewards[1], before.rewards[1])
    row = 3 + int(before.rewards[1].argmin())
    own = references.policy.logp(before.cond[[1]], torch.tensor([bright])).logp[0].detach()  # under its own prompt
    torch.testing.assert_close(after.rollout.cond_logp[row], own)


def test_pictures_are_encoded_by_the_policys_tokenizer(tmp_path: Path) -> None:
    policy = tiny_policy()
    picture = Image.effect_noise((16, 16), 90).convert("RGB")
    picture.save(tmp_path / "gold.png")
    references = References(policy, str(tmp_path / "prompts.jsonl"), seed=0)
    found = references.codes([Prompt("a", None, {"gold": [3] * 16}), Prompt("b", None, {"gold": "gold.png"})])
    assert found[0].tolist() == [3] * 16
    assert torch.equal(found[1], policy.encode([picture])[0])


def test_shapesworld_draws_references_that_fulfil_their_prompts() -> None:
    policy: Any = load_model("shapesworld", torch.device("cpu"))
    rewards = RewardSet.load([RewardConfig("geneval", kwargs={"score": "dense"})])
    prompts = PromptSampler(load_prompts("shapesworld:train"), seed=0).batch(0, 24)
    references = References(policy, "shapesworld:train", seed=0)
    assert references.checked(prompts) == []
    codes = references.codes(prompts)
    right = rewards.successes(rewards.score(policy.decode(codes), prompts))
    assert right is not None and sum(right) >= 0.9 * len(right)
    assert torch.equal(references.codes(prompts[3:4])[0], codes[3])  # whatever else is asked for
    assert not torch.equal(replace(references, seed=1).codes(prompts), codes)
    assert not references.has(Prompt("a photo of a cat"))


def test_none_are_drawn_where_a_prompt_brings_its_own() -> None:
    """Those without, or with an empty cell, are to stay as they are, whatever their text is."""
    policy: Any = load_model("shapesworld", torch.device("cpu"))
    text = "a photo of a red circle"
    assert References.of(policy, "own.jsonl", [Prompt(text), Prompt(text, None, {"gold": " "})], seed=0).has(
        Prompt(text)
    )
    prompts = [Prompt(text, None, {"gold": [3] * 144}), Prompt(text), Prompt(text, None, {"gold": ""})]
    references = References.of(policy, "own.jsonl", prompts, seed=0)
    assert [references.has(prompt) for prompt in prompts] == [True, False, False]
    assert references.checked(prompts) == [
        f"own.jsonl: 2 of 3 prompts have no reference (gold), such as '{text}'; their groups stay as they are"
    ]


# --- success ------------------------------------------------------------------


def test_success_is_geneval_verdict_or_a_sum() -> None:
    for score in ("dense", "partial", "strict"):
        rewards = RewardSet.load([RewardConfig("geneval", kwargs={"score": score}), RewardConfig("clip")])
        assert rewards.successes({"geneval": [1.0, 0.5, 0.0, None], "clip": [0.1] * 4}) == [True, False, False, True]
    dense = RewardSet.load([RewardConfig("geneval")])
    assert dense.successes({"geneval": [0.5, 0.5 + 1e-9]}) == [False, True]  # a right image is above one half
    given = replace(dense, success=0.7)
    assert given.successes({"geneval": [0.69, 0.7]}) == [False, True]
    assert RewardSet.load([RewardConfig("clip")]).successes({"clip": [0.9]}) is None


# --- from the command line ----------------------------------------------------------


@pytest.fixture
def command(tiny_folder: Path, reward_file: Path, tmp_path: Path) -> list[str]:
    """Three prompts: one with codes that are right, one with codes that are wrong, one without a reference."""
    policy = tiny_policy()
    bright, dark = extremes(policy)
    arguments = train_command(tiny_folder, reward_file, tmp_path)
    golds = {"a photo of a red circle": bright, "a blue square": dark, "two red square": None}
    lines = [json.dumps({"prompt": text, "gold": gold}) + "\n" for text, gold in golds.items()]
    (tmp_path / "gold.jsonl").write_text("".join(lines))
    least = str(brightness(policy, bright) - 1e-6)
    own = ["--algorithm", "gold_gcpo", "--train_prompts", str(tmp_path / "gold.jsonl"), "--success_reward", least]
    return [*arguments, *own, "--prompts_per_step", "6", "--optim.learning_rate", "1e-3"]


def rows(run: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in TIMES} for line in lines]


def test_a_run_with_references(command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*command, "--loss.beta", "0"]) == 0
    captured = capsys.readouterr()
    said = " ".join((captured.out + captured.err).split())
    assert said.count("1 of 3 prompts have no reference (gold), such as 'two red square'") == 1
    steps = [row for row in rows(tmp_path / "run") if "reward" in row]
    for row in steps:
        assert row["gold/all_failed"] == 6 and row["frac_all_failed"] == 1.0
        assert (row["gold/injected"], row["gold/rejected"]) == (2, 2)
        assert row["ratio"] == pytest.approx(1) and row["clip_ratio"] == 0  # that of references, too
        assert row["logp_gap/replay"] < 1e-4
        assert row["rewards/bright/max"] < brightness(tiny_policy(), extremes(tiny_policy())[0])  # of samples alone


def test_references_are_learned(command: list[str], tmp_path: Path) -> None:
    """Only the first prompt has one that is right; its images come nearer to it than those of the same run without."""

    def change(name: str, *own: str) -> float:
        folder = tmp_path / name
        fast = ["--steps", "8", "--optim.learning_rate", "1e-2", "--loss.advantage_scale", "group"]
        assert main([*command, *fast, "--output_dir", str(folder), *own]) == 0
        found = [row["reward"] for row in rows(folder) if "reward" in row]
        return found[-1] - found[0]

    assert change("gold") > change("gspo", "--algorithm", "gspo")


@pytest.mark.parametrize("credit", ["guidance", "stage", "entropy"])
def test_any_credit_goes_with_references(command: list[str], tmp_path: Path, credit: str) -> None:
    assert main([*command, "--steps", "1", "--credit.rule", credit]) == 0
    row = next(row for row in rows(tmp_path / "run") if "reward" in row)
    assert row["gold/injected"] == 2 and row["grad_norm"] > 0 and row["credit/top40_mass"] > 0.4


def test_resumed_and_shared_runs_are_the_same(command: list[str], tmp_path: Path) -> None:
    # a low rate: Adam blows the rounding of sums up until, some steps later, a code is drawn differently
    constant = ["--optim.schedule", "constant", "--credit.rule", "guidance", "--optim.learning_rate", "1e-4"]
    assert main([*command, *constant, "--output_dir", str(tmp_path / "whole"), "--steps", "3"]) == 0
    assert main([*command, *constant, "--output_dir", str(tmp_path / "parts"), "--steps", "1"]) == 0
    assert main(["train", "--output_dir", str(tmp_path / "parts"), "--resume", "--steps", "3"]) == 0
    whole = [row for row in rows(tmp_path / "whole") if "reward" in row]
    assert whole == [row for row in rows(tmp_path / "parts") if "reward" in row]
    assert all(torch.equal(w, weights(tmp_path / "parts")[name]) for name, w in weights(tmp_path / "whole").items())
    two = ranks.run([*command, *constant, "--output_dir", str(tmp_path / "two"), "--steps", "3"])
    (done,) = ranks.make([two], tmp_path / "logs")
    assert done.codes == [0, 0], done.told
    for ours, theirs in zip([row for row in rows(tmp_path / "two") if "reward" in row], whole, strict=True):
        for name, value in theirs.items():
            if not name.startswith("monitor/"):  # of the first process's images
                assert ours[name] == pytest.approx(value, rel=1e-3, abs=1e-5), name
