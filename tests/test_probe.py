"""`gcpo-t2i probe` on a policy of random weights: each verdict and each cause, brought about."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from gcpo_t2i.cli import main
from gcpo_t2i.config import OptimConfig, ProbeConfig
from gcpo_t2i.models.llamagen import LlamaGenPolicy
from gcpo_t2i.probe import probe_settings, redness
from tests.test_train import error


@pytest.fixture
def command(tiny_folder: Path, tmp_path: Path) -> list[str]:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a photo of a red circle\na blue square\ntwo red square\n")
    return [
        *("probe", "--model", str(tiny_folder), "--train_prompts", str(prompts), "--device", "cpu", "--steps", "10"),
        *("--prompts_per_step", "4", "--group_size", "8", "--micro_batch_size", "32", "--log.images_every", "0"),
        *("--output_dir", str(tmp_path / "probe"), "--optim.learning_rate", "1e-2"),
    ]


def result(tmp_path: Path) -> dict[str, Any]:
    return json.loads((tmp_path / "probe" / "probe.json").read_text())


def causes(tmp_path: Path) -> list[str]:
    return [finding["cause"] for finding in result(tmp_path)["findings"]]


def test_a_set_up_that_learns(command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*command, "--steps", "20", "--group_size", "16", "--loss.beta", "0"]) == 0
    found = result(tmp_path)
    assert found["verdict"] == "learns" and found["gain"] > 3 * found["error"] > 0
    shown = capsys.readouterr().out
    assert "learns: +" in shown and shown.count("●") == 20
    metrics = [json.loads(line) for line in (tmp_path / "probe" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in metrics] == list(range(1, 21))
    assert {path.name for path in (tmp_path / "probe").iterdir()} == {
        *(".lock", "config.yaml", "metrics.jsonl", "probe.json")
    }


def test_every_step_sees_the_same_prompts(command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import gcpo_t2i.train as train

    seen, sample_batch = [], train.sample_batch

    def record(policy: Any, prompts: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(sorted(prompt.text for prompt in prompts))
        return sample_batch(policy, prompts, *args, **kwargs)

    monkeypatch.setattr(train, "sample_batch", record)
    (tmp_path / "prompts.txt").write_text("".join(f"a photo of {i} red circle\n" for i in range(50)))
    main(command)
    assert len(seen) == 10 and len(set(seen[0])) == 4
    assert all(texts == seen[0] for texts in seen)


def test_a_rate_that_moves_nothing(command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*command, "--optim.learning_rate", "1e-12"]) == 1
    assert result(tmp_path)["verdict"] == "does not learn" and causes(tmp_path) == ["learning rate too low"]
    assert "likely cause: learning rate too low" in capsys.readouterr().out
    assert "by orders of magnitude" in result(tmp_path)["findings"][0]["cure"]


def test_a_rate_that_is_a_little_too_low(command: list[str], tmp_path: Path) -> None:
    alike = ["--optim.modules", "null", "--loss.beta", "0.02"]
    assert main([*command, "--optim.learning_rate", "1e-6", "--group_size", "32", "--steps", "15", *alike]) == 1
    assert result(tmp_path)["verdict"] == "does not learn" and causes(tmp_path) == ["learning rate too low"]
    assert "about 100 times, to 0.0001" in result(tmp_path)["findings"][0]["cure"]


def test_a_rate_that_destroys(command: list[str], tmp_path: Path) -> None:
    assert main([*command, "--optim.learning_rate", "3"]) == 1
    assert causes(tmp_path)[0] in ("learning rate too high", "loss not finite")


def test_groups_of_equal_images(command: list[str], tmp_path: Path) -> None:
    assert main([*command, "--top_k", "1"]) == 1
    assert result(tmp_path)["verdict"] == "does not learn" and causes(tmp_path)[0] == "no signal in groups"
    assert "agree in 100% of their codes" in result(tmp_path)["findings"][0]["seen"]


def test_log_probs_that_are_not_those_of_sampling(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    logp = LlamaGenPolicy.logp

    def colder(self: LlamaGenPolicy, *args: Any, **kwargs: Any) -> Any:
        return logp(self, *args, **kwargs | {"temperature": 0.5})

    monkeypatch.setattr(LlamaGenPolicy, "logp", colder)
    main([*command, "--optim.learning_rate", "1e-12"])
    assert causes(tmp_path) == ["gap between rollout and replay"]


def test_an_optimizer_that_holds_the_wrong_parameters(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LlamaGenPolicy, "set_trainable", lambda self: [torch.nn.Parameter(torch.zeros(3))])
    assert main(command) == 1
    assert result(tmp_path)["verdict"] == "does not learn" and causes(tmp_path) == ["zero gradients"]


def test_a_frozen_model_is_named(
    command: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(LlamaGenPolicy, "set_trainable", lambda self: list(self.requires_grad_(False).parameters()))
    assert main(command) == 2
    assert "the model has nothing to train" in error(capsys)
    other = torch.nn.Parameter(torch.zeros(3))
    monkeypatch.setattr(LlamaGenPolicy, "set_trainable", lambda self: [self.requires_grad_(False) and other])
    assert main([*command, "--overwrite"]) == 2
    assert "the log-probs of the model have no gradient" in error(capsys)


def test_a_loss_that_is_not_finite(command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import gcpo_t2i.update as update

    policy_loss = update.policy_loss

    def broken(*args: Any, **kwargs: Any) -> Any:
        loss, metrics = policy_loss(*args, **kwargs)
        return loss * float("nan"), {**metrics, "loss": loss.detach() * float("nan")}

    monkeypatch.setattr(update, "policy_loss", broken)
    assert main(command) == 1
    assert result(tmp_path)["verdict"] == "does not learn" and causes(tmp_path) == ["loss not finite"]


def test_what_is_probed_is_the_run_but_for_what_would_hide_the_answer() -> None:
    config = ProbeConfig(algorithm="grpo", optim=OptimConfig(3e-5, warmup_steps=500), guidance=1.5, dtype="bfloat16")
    run = probe_settings(config, "x")
    assert (run.algorithm, run.guidance, run.dtype, run.steps) == ("grpo", 1.5, "bfloat16", 20)
    assert (run.optim.learning_rate, run.optim.warmup_steps, run.optim.schedule) == (3e-5, 2, "constant")
    assert [reward.name for reward in run.rewards] == ["gcpo_t2i.probe:redness"] and run.eval.rewards == []


def test_redness_by_hand() -> None:
    images = [Image.new("RGB", (2, 2), color) for color in ("red", "cyan", "gray", "white", (255, 102, 0))]
    assert redness(images, [""] * 5) == pytest.approx([1, -1, 0, 0, 1 - 0.2])
    half = Image.new("RGB", (2, 1), "black")
    half.putpixel((0, 0), (255, 0, 0))
    assert redness([half], [""]) == [0.5]


def test_without_a_folder_the_results_are_named(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    command[command.index("--output_dir") : command.index("--output_dir") + 2] = []
    main(command)
    (folder,) = tmp_path.glob("gcpo-t2i-probe-*")
    assert (folder / "probe.json").is_file()
    assert folder.name in capsys.readouterr().out.replace("\n", "")


@pytest.mark.parametrize("steps", ["9", "31"])
def test_steps_that_make_no_probe(command: list[str], capsys: pytest.CaptureFixture[str], steps: str) -> None:
    assert main([*command, "--steps", steps]) == 2
    assert f"steps: a probe takes 10 to 30, not {steps}; add --steps 20" in error(capsys)


def test_a_probe_does_not_go_on(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*command, "--resume"]) == 2
    assert "resume: a probe always starts anew" in error(capsys)
