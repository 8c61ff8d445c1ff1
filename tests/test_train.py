"""The loop from the command line, on a policy of random weights: what it writes, resumes, refuses, and that it learns."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from gcpo_t2i.algo.rows import ROWS
from gcpo_t2i.cli import main
from gcpo_t2i.config import OptimConfig
from gcpo_t2i.metrics import diversity
from gcpo_t2i.update import learning_rate
from tests.tiny import train_command

TIMES = {
    "step_time",
    "rollout_time",
    "reward_time",
    "update_time",
    "monitor_time",
    "images_per_second",
    "tokens_per_second",
    "peak_memory_mb",
}

STEP_METRICS = TIMES | {
    "step",
    "reward",
    "reward_std",
    "frac_reward_zero_std",
    "rewards/bright/mean",
    "kl",
    "entropy",
    "clip_ratio",
    "grad_norm",
    "credit/top40_mass",
    "logp_gap/replay",
    "logp_gap/guided",
    "diversity",
}


@pytest.fixture
def command(tiny_folder: Path, reward_file: Path, tmp_path: Path) -> list[str]:
    return train_command(tiny_folder, reward_file, tmp_path)


def rows(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def train_rows(run: Path) -> list[dict[str, Any]]:
    return [row for row in rows(run) if "reward" in row]


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "policy" / "trunk" / "model.safetensors")


def test_a_run_leaves_what_the_readme_promises(command: list[str], tmp_path: Path) -> None:
    assert main([*command, "--loss.beta", "0.01", "--log.images_every", "2"]) == 0
    run = tmp_path / "run"
    assert [row["step"] for row in train_rows(run)] == [1, 2, 3]
    for row in train_rows(run):
        assert row.keys() >= STEP_METRICS
        assert row["clip_ratio"] == 0 and row["ratio"] == pytest.approx(1)  # one update per rollout is on-policy
        assert row["logp_gap/replay"] < 1e-4
        assert row["logp_gap/guided"] > 1e-2  # guidance 3 samples from another distribution than the conditional one
    assert train_rows(run)[0]["kl"] == pytest.approx(0, abs=1e-6)  # before the first update policy and reference agree
    assert train_rows(run)[-1]["kl"] > 1e-6
    evaluations = [row for row in rows(run) if "eval/bright" in row]
    assert [row["step"] for row in evaluations] == [0, 3]
    assert all(row["eval/bright_ci95"] > 0 for row in evaluations)
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["steps"] == 3 and config["algorithm"] == "guidance_gcpo"
    assert {path.name for path in (run / "samples").iterdir()} == {"step-000002.png", "step-000003.png"}
    assert "eval" not in (run / "policy" / "README.md").read_text().split("held-out")[0]
    assert (run / "policy" / "model_index.json").is_file()


def test_the_saved_policy_is_the_trained_one(command: list[str], tmp_path: Path, tiny_folder: Path) -> None:
    assert main(command) == 0
    before = load_file(tiny_folder / "trunk" / "model.safetensors")
    after = weights(tmp_path / "run")
    assert any(not torch.equal(before[name], after[name]) for name in before)
    out = tmp_path / "samples"
    assert (
        main(["sample", "--model", str(tmp_path / "run" / "policy"), "--prompt", "a red circle", "--out", str(out)])
        == 0
    )
    assert len(list(out.glob("00000-*.png"))) == 4 and (out / "grid.png").is_file()


@pytest.mark.parametrize("algorithm", [name for name in ROWS if name != "gold_gcpo"])  # which has a module of tests
def test_every_algorithm_learns_to_paint_brightly(command: list[str], tmp_path: Path, algorithm: str) -> None:
    """Four dozen steps at a high rate move a policy of random weights well beyond the noise of the evaluation."""
    fast = ["--steps", "48", "--group_size", "16", "--optim.learning_rate", "1e-2", "--eval.samples_per_prompt", "16"]
    short = ["--optim.betas", "[0.9, 0.95]", "--optim.modules", "null"]  # means that are full before the run is over
    assert main([*command, "--algorithm", algorithm, *fast, *short]) == 0
    first, last = (row for row in rows(tmp_path / "run") if "eval/bright" in row)
    assert last["eval/bright"] - first["eval/bright"] > 3 * first["eval/bright_ci95"]


def test_same_seed_same_run_and_another_seed_another(command: list[str], tmp_path: Path) -> None:
    def run(name: str, seed: int) -> list[dict[str, Any]]:
        assert main([*command, "--output_dir", str(tmp_path / name), "--seed", str(seed)]) == 0
        return [{key: row[key] for key in row.keys() - TIMES} for row in rows(tmp_path / name)]

    first, again, other = run("a", 5), run("b", 5), run("c", 6)
    assert first == again
    assert first != other
    assert all(torch.equal(w, weights(tmp_path / "b")[name]) for name, w in weights(tmp_path / "a").items())


def test_precisions_in_one_process(command: list[str], tmp_path: Path) -> None:
    """bfloat16 keeps 8 bits of the hidden states: gradients agree to a few hundredths, and not better."""
    for dtype in ("float32", "bfloat16", "auto"):
        assert main([*command, "--dtype", dtype, "--output_dir", str(tmp_path / dtype)]) == 0
    exact, rounded, chosen = (train_rows(tmp_path / dtype)[0] for dtype in ("float32", "bfloat16", "auto"))
    assert chosen["grad_norm"] == exact["grad_norm"] != rounded["grad_norm"]
    assert rounded["grad_norm"] == pytest.approx(exact["grad_norm"], rel=0.1)
    assert rounded["logp_gap/replay"] < 0.1


def test_auto_is_bfloat16_where_the_device_multiplies_it(
    one_precision: Callable[[torch.device], bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    cpu, cuda, meta = (torch.device(name) for name in ("cpu", "cuda", "meta"))
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda: False, raising=False)
    assert [one_precision(device) for device in (cpu, cuda, meta)] == [False, True, False]
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    assert one_precision(cpu)


def test_micro_batches_do_not_change_the_update(command: list[str], tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    extra = ["--loss.beta", "0.1", "--loss.entropy_coef", "0.01", "--steps", "1"]
    assert main([*command, *extra, "--output_dir", str(whole), "--micro_batch_size", "8"]) == 0
    assert main([*command, *extra, "--output_dir", str(parts), "--micro_batch_size", "3"]) == 0
    one, other = train_rows(whole)[0], train_rows(parts)[0]
    for key in ("loss", "grad_norm", "kl", "entropy"):
        assert one[key] == pytest.approx(other[key], rel=1e-4, abs=1e-7)


def test_resume_goes_on_bit_for_bit(command: list[str], tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    constant = ["--optim.schedule", "constant", "--save_every", "2"]
    assert main([*command, *constant, "--output_dir", str(whole), "--steps", "4"]) == 0
    assert main([*command, *constant, "--output_dir", str(parts), "--steps", "2"]) == 0
    assert main(["train", "--output_dir", str(parts), "--resume", "--steps", "4"]) == 0
    assert [row["step"] for row in train_rows(parts)] == [1, 2, 3, 4]
    for one, other in zip(train_rows(whole), train_rows(parts), strict=True):
        assert {k: v for k, v in one.items() if k not in TIMES} == {k: v for k, v in other.items() if k not in TIMES}
    assert all(torch.equal(w, weights(parts)[name]) for name, w in weights(whole).items())


def test_stale_updates_clip_and_guided_scoring_replays_the_mixture(command: list[str], tmp_path: Path) -> None:
    extra = ["--updates_per_rollout", "4", "--optim.learning_rate", "3e-2", "--optim.warmup_steps", "0"]
    assert main([*command, *extra]) == 0
    assert max(row["clip_ratio"] for row in train_rows(tmp_path / "run")) > 0
    assert main([*command, "--scoring", "guided", "--output_dir", str(tmp_path / "guided")]) == 0
    assert all(row["logp_gap/replay"] < 1e-3 for row in train_rows(tmp_path / "guided"))


def test_replayed_credit_is_the_rollouts_until_the_policy_moves(command: list[str], tmp_path: Path) -> None:
    once, twice = ["--steps", "1"], ["--steps", "1", "--updates_per_rollout", "2", "--optim.learning_rate", "3e-2"]
    after = {}
    for name, extra in {"once": once, "twice": twice}.items():
        for source in ("rollout", "replay"):
            run = tmp_path / f"{name}-{source}"
            assert main([*command, *extra, "--credit.source", source, "--output_dir", str(run)]) == 0
            after[name, source] = torch.cat([weight.flatten() for weight in weights(run).values()])
    # Adam's first step is the sign of the gradient: rounding can turn a few of them, a change of credit many.
    start = torch.cat(
        [weight.flatten() for weight in load_file(Path(command[2]) / "trunk" / "model.safetensors").values()]
    )
    same = (after["once", "rollout"] - after["once", "replay"]).abs() < 1e-6
    assert same.float().mean() > 0.999 and not torch.equal(after["once", "rollout"], start)
    moved = (after["twice", "rollout"] - after["twice", "replay"]).abs() > 1e-6
    assert moved.float().mean() > 0.5


@pytest.mark.parametrize("contrast", ["exact_kl", "js"])
def test_contrasts_over_the_vocabulary_come_from_the_rollout(command: list[str], tmp_path: Path, contrast: str) -> None:
    assert main([*command, "--credit.contrast", contrast, "--steps", "1"]) == 0
    assert train_rows(tmp_path / "run")[0]["credit/top40_mass"] > 0.7
    replayed = tmp_path / "replayed"
    replay = ["--credit.source", "replay", "--output_dir", str(replayed)]
    assert main([*command, "--credit.contrast", contrast, "--steps", "1", *replay]) == 0
    first, second = train_rows(tmp_path / "run")[0], train_rows(replayed)[0]
    assert second["loss"] == pytest.approx(first["loss"], abs=1e-5) and second["entropy"] == first["entropy"]


def test_guidance_credit_works_without_guided_sampling(command: list[str], tmp_path: Path) -> None:
    assert main([*command, "--guidance", "1", "--steps", "1"]) == 0
    row = train_rows(tmp_path / "run")[0]
    assert row["logp_gap/guided"] == 0 and row["credit/top40_mass"] > 0.7


def test_tensorboard_gets_the_metrics(command: list[str], tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    assert main([*command, "--log.report_to", "[tensorboard]"]) == 0
    assert list((tmp_path / "run").rglob("events.out.tfevents*"))


# ---- bad input: one line, exit code 2, nothing lost


def error(capsys: pytest.CaptureFixture[str]) -> str:
    return capsys.readouterr().err.strip().splitlines()[-1]


@pytest.mark.parametrize(
    ("reward", "message"),
    [("broken", "the GPU caught fire"), ("nan", "not finite"), ("short", "returned 7 scores, expected 8")],
)
def test_a_reward_that_fails_is_named(
    command: list[str], reward_file: Path, capsys: pytest.CaptureFixture[str], reward: str, message: str
) -> None:
    assert main([*command, "--rewards", json.dumps([{"name": f"{reward_file}:{reward}"}])]) == 2
    line = error(capsys)
    assert message in line and f"my_rewards.py:{reward}" in line


def test_an_existing_run_is_kept_unless_told_otherwise(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*command, "--steps", "1"]) == 0
    kept = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert main(command) == 2
    assert "--overwrite" in error(capsys)
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == kept
    assert main([*command, "--overwrite"]) == 0
    assert len(train_rows(tmp_path / "run")) == 3


def test_overwrite_does_not_delete_a_folder_that_is_no_run(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    precious = tmp_path / "run" / "thesis.tex"
    precious.parent.mkdir()
    precious.write_text("chapter 1")
    assert main([*command, "--overwrite"]) == 2
    assert "no run wrote" in error(capsys)
    assert precious.read_text() == "chapter 1"


def test_a_loss_that_stays_nan_stops_the_run(
    command: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import gcpo_t2i.update as update

    policy_loss = update.policy_loss

    def broken(*args: Any, **kwargs: Any) -> Any:
        loss, metrics = policy_loss(*args, **kwargs)
        return loss * float("nan"), {**metrics, "loss": loss.detach() * float("nan")}

    monkeypatch.setattr(update, "policy_loss", broken)
    assert main([*command, "--steps", "9"]) == 2
    assert "not finite in 5 steps in a row" in error(capsys)
    assert [row["skipped"] for row in train_rows(tmp_path / "run")] == [1.0] * 4


def test_a_reward_that_applies_to_no_prompt_is_an_error_and_not_a_silent_zero(
    command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*command, "--rewards", '[{"name": "geneval"}]']) == 2
    assert "reward 'geneval' applies to none of the prompts" in error(capsys)


def test_without_a_reference_kl_is_there_and_empty(command: list[str], tmp_path: Path) -> None:
    assert main([*command, "--steps", "1", "--monitor.kl", "false"]) == 0
    assert train_rows(tmp_path / "run")[0]["kl"] is None


def test_a_device_that_is_not_there(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*command, "--device", "cuda:77"]) == 2
    assert "cuda:77" in error(capsys)


# ---- parts


def test_learning_rate_by_hand() -> None:
    config = OptimConfig(learning_rate=1.0, warmup_steps=2, schedule="cosine")
    # warm-up thirds; then cos over 4 steps: 1, (1 + cos 45°)/2, 1/2, (1 − cos 45°)/2
    expected = [1 / 3, 2 / 3, 1.0, 0.853553, 0.5, 0.146447]
    assert [learning_rate(config, step, 6) for step in range(6)] == pytest.approx(expected, abs=1e-6)
    constant = OptimConfig(learning_rate=1.0, warmup_steps=0, schedule="constant")
    assert learning_rate(constant, 5, 6) == 1.0


def test_diversity_by_hand() -> None:
    # one group of three: pairs differ in 0, 1 and 1 of 2 positions → mean (0 + 0.5 + 0.5) / 3
    assert diversity(torch.tensor([[1, 2], [1, 2], [1, 3]]), group=3) == pytest.approx(1 / 3)
