"""Runs that are killed, stopped and gone on with: from the command line, in processes of their own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from gcpo_t2i.cli import main
from gcpo_t2i.config import TrainConfig
from gcpo_t2i.errors import Stopped, UserError
from gcpo_t2i.resume import FREE, check_settings, differences, settings_as_json
from gcpo_t2i.stopping import Stopping
from tests.test_train import TIMES
from tests.tiny import train_command

STEPS = 6


@pytest.fixture
def arguments(tiny_folder: Path, reward_file: Path, tmp_path: Path) -> list[str]:
    own = ["--steps", str(STEPS), "--save_every", "2", "--eval_every", "3"]
    return [*train_command(tiny_folder, reward_file, tmp_path), *own]


def rows(run: Path) -> list[dict[str, Any]]:
    """What is in metrics.jsonl but for times and memory."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in TIMES} for line in lines]


def same_run(one: Path, other: Path) -> None:
    assert rows(one) == rows(other)
    weights, others = (load_file(run / "policy" / "trunk" / "model.safetensors") for run in (one, other))
    assert all((weights[name] == others[name]).all() for name in weights)


def start(arguments: list[str]) -> subprocess.Popen[str]:
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    command = [sys.executable, "-m", "gcpo_t2i", *arguments]
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def wait_for(condition: Any, process: subprocess.Popen[str]) -> None:
    for _ in range(6000):
        if condition() or process.poll() is not None:
            return
        time.sleep(0.01)
    raise AssertionError("it did not happen within a minute")


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_and_says_how_to_go_on(arguments: list[str], tmp_path: Path, sent: int, code: int) -> None:
    assert main([*arguments, "--output_dir", str(tmp_path / "whole")]) == 0
    run = tmp_path / "run"
    process = start([*arguments, "--output_dir", str(run)])
    wait_for(lambda: (run / "metrics.jsonl").exists() and len(rows(run)) >= 2, process)
    process.send_signal(sent)
    _, told = process.communicate(timeout=60)
    assert process.returncode == code
    assert f"gcpo-t2i train --output_dir {run} --resume" in told and "Traceback" not in told
    assert main(["train", "--output_dir", str(run), "--resume"]) == 0
    same_run(tmp_path / "whole", run)


def test_a_signal_that_a_launcher_passes_on_once_more_is_one_signal() -> None:
    with Stopping() as stopping:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(Stopped):
            stopping.check()
        stopping.since -= 2  # seconds
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)


def test_kill_9_at_any_moment_loses_nothing(tmp_path: Path) -> None:
    """Twenty-four kills: at random times, and before random writes, most of which belong to a checkpoint."""
    command = [sys.executable, "-m", "tests.kill_campaign", str(tmp_path), "--kills", "24", "--seed", "0"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["kills"] >= 24 and found["lost"] == []
    assert found["inside a checkpoint"] >= 5 and found["resumed from a checkpoint"] >= 5


# ---- what may change in between


def contradictions(**changes: Any) -> str:
    saved = {"settings": settings_as_json(TrainConfig(steps=9)), "step": 4}
    with pytest.raises(UserError) as caught:
        check_settings("checkpoint-4", saved, TrainConfig(**{"steps": 9, **changes}))
    return str(caught.value)


def test_contradicting_settings_are_named_with_both_values() -> None:
    told = contradictions(algorithm="grpo", seed=3)
    assert 'algorithm "guidance_gcpo" → "grpo"; seed 0 → 3' in told
    assert "less than the 4 steps that were made" in contradictions(steps=3)


def test_settings_that_no_weight_depends_on_may_change() -> None:
    saved = {"settings": settings_as_json(TrainConfig(steps=9)), "step": 4}
    assert check_settings("x", saved, TrainConfig(steps=9, save_every=1, keep_last=None, eval_every=3)) == []
    notes = check_settings("x", saved, TrainConfig(steps=12, micro_batch_size=4))
    assert [note.split(":")[0] for note in notes] == ["micro_batch_size 16 → 4", "steps 9 → 12"]


def test_differences_of_nested_settings() -> None:
    saved, now = settings_as_json(TrainConfig()), settings_as_json(TrainConfig())
    now["loss"]["beta"], now["log"]["images_every"] = 0.5, 1
    assert list(differences(saved, now, FREE)) == [("loss.beta", 0.0, 0.5)]


def test_a_contradiction_leaves_the_run_as_it_is(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert main([*arguments, "--output_dir", str(run)]) == 0
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert main(["train", "--output_dir", str(run), "--resume", "--guidance", "5"]) == 2
    assert "guidance 2.0 → 5.0" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_a_run_that_never_reached_a_checkpoint_starts_again(arguments: list[str], tmp_path: Path) -> None:
    whole, run = tmp_path / "whole", tmp_path / "run"
    assert main([*arguments, "--output_dir", str(whole)]) == 0
    assert main([*arguments, "--output_dir", str(run), "--steps", "1"]) == 0
    for path in run.glob("checkpoint-*"):
        path.rename(tmp_path / path.name)
    assert main([*arguments, "--output_dir", str(run), "--resume"]) == 0
    same_run(whole, run)


def test_one_folder_one_process(arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    process = start([*arguments, "--output_dir", str(run), "--steps", "100000"])
    try:
        wait_for(lambda: list(run.glob("checkpoint-*")), process)
        for flag in ("--resume", "--overwrite"):
            assert main([*arguments, "--output_dir", str(run), flag]) == 2
            assert f"output folder '{run}' is in use by another process" in capsys.readouterr().err
        assert process.poll() is None
    finally:
        process.kill()
        process.communicate()
