"""`micro_batch_size: auto`: the number by hand, from the command line, and when a run goes on."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

from gcpo_t2i.cli import main
from gcpo_t2i.config import PlanConfig
from gcpo_t2i.errors import UserError
from gcpo_t2i.models.sizes import read_sizes
from gcpo_t2i.plan.counts import Counts
from gcpo_t2i.plan.fit import fitting
from gcpo_t2i.plan.memory import Memory
from gcpo_t2i.run import EMBEDDED_MODEL, model_folder
from tests.tiny import train_command

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
EMBEDDED = read_sizes(model_folder(EMBEDDED_MODEL))
AUTO = PlanConfig(micro_batch_size="auto")


HELD = 7  # bytes of libraries and rewards


def peak(size: int) -> int:
    config = replace(AUTO, micro_batch_size=size)
    return Memory.of(config, EMBEDDED, Counts.of(config, EMBEDDED), EMBEDDED.caption_tokens, CPU, HELD, 0).peak


@pytest.mark.parametrize("size", [2, 4, 8, 16])
def test_the_largest_power_of_two_within_nine_tenths(size: int) -> None:
    enough = peak(size) * 10 // 9  # to within a byte
    assert fitting(AUTO, EMBEDDED, CPU, HELD, free=enough + 2) == size
    assert fitting(AUTO, EMBEDDED, CPU, HELD, free=enough - 2) == size // 2


def test_at_most_the_images_of_a_process_and_sixteen_on_a_cpu() -> None:
    assert fitting(AUTO, EMBEDDED, CPU, 0, free=1 << 50) == 16
    assert fitting(AUTO, EMBEDDED, CUDA, 0, free=1 << 50) == 64
    for changes, most in (({"processes": 2}, 32), ({"prompts_per_step": 3}, 16), ({"group_size": 7}, 32)):
        assert fitting(replace(AUTO, **changes), EMBEDDED, CUDA, 0, free=1 << 50) == most  # of 32, 24, 56 images


def test_what_cannot_be_is_told() -> None:
    with pytest.raises(UserError, match=r"even with 1 image 0\.\d\d GB are needed per process, 90% of the 0\.00 GB"):
        fitting(AUTO, EMBEDDED, CPU, 0, free=1000)
    with pytest.raises(UserError, match="goes by the free memory, and cuda is not here to be asked; give a number"):
        fitting(AUTO, EMBEDDED, CUDA, 0, free=None)


@pytest.fixture
def run(tiny_folder: Path, reward_file: Path, tmp_path: Path) -> Callable[..., int]:
    command = [*train_command(tiny_folder, reward_file, tmp_path), "--steps", "1", "--monitor.rewards", "[]"]
    return lambda *options: main([*command, "--micro_batch_size", "auto", *options])


def test_a_run_holds_the_number_and_goes_on_with_it(
    run: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run() == 0
    saved = tmp_path / "run" / "config.yaml"
    assert yaml.safe_load(saved.read_text())["micro_batch_size"] == 8  # 2 prompts × 4 images
    state = json.loads(next((tmp_path / "run").glob("checkpoint-*/state.json")).read_text())
    assert state["settings"]["micro_batch_size"] == 8

    def asked(*_: object) -> int:
        raise AssertionError("a run that goes on asks for no memory")

    monkeypatch.setattr("gcpo_t2i.plan.fit.free_memory", asked)
    capsys.readouterr()
    assert run("--resume", "--steps", "2") == 0
    assert "micro_batch_size" not in capsys.readouterr().out
    assert yaml.safe_load(saved.read_text())["micro_batch_size"] == 8


def test_no_memory_ends_a_run_before_it_leaves_anything(
    run: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("gcpo_t2i.plan.fit.free_memory", lambda *_: 1 << 20)
    assert run() == 2
    told = capsys.readouterr().err
    assert "micro_batch_size auto: even with 1 image" in told and "lower --rollout_batch_size" in told
    assert not (tmp_path / "run").exists()


def test_words_other_than_auto_are_refused(run: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--micro_batch_size", "many") == 2
    assert "micro_batch_size: 'many' is not an int or auto" in capsys.readouterr().err
    assert run("--micro_batch_size", "0") == 2
    assert "micro_batch_size must be > 0, not 0" in capsys.readouterr().err


def test_plan_knows_it(
    tiny_folder: Path, reward_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["plan", *train_command(tiny_folder, reward_file, tmp_path)[1:], "--micro_batch_size", "auto"]
    command = [*command, "--measure", "false", "--eval.batch_size", "3"]
    assert main([*command, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["counts"]["micro_batch"] == 8
    assert main(command) == 0
    assert "of 8 (auto)" in capsys.readouterr().out
    assert main([*command, "--device", "cuda"]) == 2
    assert "give a number" in capsys.readouterr().err
