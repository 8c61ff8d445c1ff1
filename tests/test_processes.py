"""Runs of two processes against the same run of one, and what happens when one of them ends: from the command line."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from gcpo_t2i.processes import buckets
from tests import ranks
from tests.test_train import TIMES
from tests.tiny import train_command

FSDP2 = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}

# In process 1 the reward `bright` kills it, or fails, or asks it to stop; that of process 0 may be deaf meanwhile.
REWARDS = """
import os
import signal
import time

import numpy as np

calls = 0

def coarse(images, prompts):  # most groups of four have four equal scores
    return [float(np.asarray(image).mean() > 153.2) for image in images]

def bright(images, prompts):
    global calls
    calls += 1
    how, rank, due = os.environ.get("HOW"), os.environ.get("RANK", "0"), calls == int(os.environ.get("CALL", "0"))
    if due and rank == os.environ.get("VICTIM", "1"):
        if how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if how == "stop":
            os.kill(os.getpid(), signal.SIGTERM)
        if how == "fail":
            raise RuntimeError("the server is gone")
    elif due and how == "kill" and "DEAF" in os.environ:
        time.sleep(600)
    return [float(np.asarray(image).mean()) / 255 for image in images]
"""


@pytest.fixture(scope="module")
def rewards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("two") / "two.py"
    path.write_text(REWARDS)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


def command(model: Path, rewards: Path, run: Path, *own: str) -> list[str]:
    """Six steps at a constant rate, a checkpoint after the third.

    Agreement to 1e-5 is luck in part: ranks decide the credit, and two codes whose contrasts are equal in seven digits may
    change places when sums are rounded in another order.
    """
    run.mkdir(exist_ok=True)
    steady = ["--optim.schedule", "constant", "--optim.learning_rate", "1e-3", "--optim.warmup_steps", "2"]
    steady += ["--monitor.rewards", "[]"]
    steady += ["--optim.modules", '{"caption_projector": 2, "trunk": 1}']
    return [
        *train_command(model, rewards, run),
        "--steps",
        "6",
        "--save_every",
        "3",
        "--eval_every",
        "3",
        *steady,
        *own,
    ]


def rows(run: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "run" / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in TIMES} for line in lines]


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "run" / "policy" / "trunk" / "model.safetensors")


def agree(one: Path, other: Path) -> None:
    """To 1e-5: rows, but for what is measured of the first process's images only, and weights of the final policy."""
    assert [row["step"] for row in rows(one)] == [row["step"] for row in rows(other)]
    for ours, theirs in zip(rows(one), rows(other), strict=True):
        for name in [name for name in theirs if not name.startswith("monitor/")]:
            assert ours[name] == pytest.approx(theirs[name], rel=1e-5, abs=1e-5), name
    first, second = weights(one), weights(other)
    assert max((first[name] - second[name]).abs().max() for name in first) < 1e-5


def same(one: Path, other: Path) -> None:
    assert rows(one) == rows(other)
    first, second = weights(one), weights(other)
    assert all(torch.equal(first[name], second[name]) for name in first)


# ---- the same run


COARSE = ["--algorithm", "dapo", "--prompts_per_step", "4"]
WHOLE = {  # options, environment of the run by two processes, and the run by one that it must be
    "guidance": ([], {}, "guidance 1"),
    "random": (["--algorithm", "random_credit"], {}, "random 1"),
    "dapo": (COARSE, {}, "dapo 1"),
    "critical": (["--algorithm", "critical_gcpo"], {}, "critical 1"),
    "stage": (["--algorithm", "stage"], {}, "stage 1"),
    "sharded": ([], FSDP2, "guidance 1"),
    "sharded dapo": ([*COARSE, "--gradient_checkpointing", "--micro_batch_size", "3"], FSDP2, "dapo 1"),
}
CHANGES = {  # after three steps of a whole run: processes and environment that go on
    ("guidance 2", "by 1"): (1, {}),
    ("guidance 1", "by 2"): (2, {}),
    ("guidance 2", "by 2"): (2, {}),
    ("sharded 2", "by 1"): (1, {}),
    ("guidance 1", "sharded"): (2, FSDP2),
    ("sharded 2", "sharded"): (2, FSDP2),
}


def make(runs: list[dict[str, Any]], logs: Path) -> None:
    for one, done in zip(runs, ranks.make(runs, logs), strict=True):
        assert set(done.codes) == {0}, (one, done.told)


@pytest.fixture(scope="module")
def whole(tiny_folder: Path, rewards: Path, folder: Path) -> Path:
    """A folder with each run of WHOLE."""
    runs = []
    for name, (own, environment, twin) in WHOLE.items():
        reward = ["--rewards", json.dumps([{"name": f"{rewards}:coarse"}])] if "dapo" in name else []
        for count in (1, 2) if twin == f"{name} 1" else (2,):
            arguments = command(tiny_folder, rewards, folder / f"{name} {count}", *own, *reward)
            runs.append(ranks.run(arguments, count, **(environment if count == 2 else {})))
    make(runs, folder / "whole-logs")
    return folder


@pytest.mark.parametrize("name", WHOLE)
def test_two_processes_make_the_run_of_one(name: str, whole: Path) -> None:
    agree(whole / f"{name} 2", whole / WHOLE[name][2])
    if "dapo" in name:
        assert any(0 < row["frac_reward_zero_std"] < 1 for row in rows(whole / f"{name} 2") if "loss" in row)


@pytest.mark.parametrize("name", ["ddp", "fsdp2"])
def test_the_configs_for_accelerate_work(
    name: str, tiny_folder: Path, rewards: Path, whole: Path, tmp_path: Path
) -> None:
    config = Path(__file__).parent.parent / "configs" / "accelerate" / f"{name}.yaml"
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config), "--num_processes", "2"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*launch, "-m", "gcpo_t2i", *command(tiny_folder, rewards, tmp_path)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"2 processes{', sharded' * (name == 'fsdp2')}" in " ".join(done.stdout.split())
    agree(tmp_path, whole / "guidance 1")


@pytest.fixture(scope="module")
def resumed(whole: Path) -> Path:
    """A folder with the runs of CHANGES: from checkpoint-3 on, which a run that ended after step 3 would have left."""
    runs = []
    for (start, then), (count, environment) in CHANGES.items():
        run = Path(shutil.copytree(whole / start, whole / f"{start}, {then}")) / "run"
        shutil.rmtree(run / "checkpoint-6")
        shutil.rmtree(run / "policy")
        runs.append(ranks.run(["train", "--output_dir", str(run), "--resume"], count, **environment))
    make(runs, whole / "resumed-logs")
    return whole


@pytest.mark.parametrize(("start", "then"), CHANGES)
def test_a_run_goes_on_with_any_number_of_processes(start: str, then: str, resumed: Path) -> None:
    run = resumed / f"{start}, {then}"
    agree(run, resumed / "guidance 1")
    if (start, then) in (("guidance 2", "by 2"), ("sharded 2", "sharded")):
        same(run, resumed / start)


# ---- one of them ends


ENDS = {
    "killed": {"HOW": "kill", "CALL": "3"},
    "the first killed": {"HOW": "kill", "CALL": "3", "VICTIM": "0"},
    "killed while the other is deaf": {"HOW": "kill", "CALL": "3", "DEAF": "yes"},
    "killed while sharded": {"HOW": "kill", "CALL": "3", **FSDP2},
    "failed": {"HOW": "fail", "CALL": "3"},
    "stopped": {"HOW": "stop", "CALL": "3"},
    "failed in an evaluation": {"HOW": "fail", "CALL": "1"},
}


@pytest.fixture(scope="module")
def ended(tiny_folder: Path, rewards: Path, folder: Path) -> dict[str, ranks.Done]:
    """What became of runs, of which process 1 (or 0) ends in its third call of the reward it trains on: of step 3."""
    runs = {}
    for name, environment in ENDS.items():
        own = ["--eval.batch_size", "3", "--save_every", "0"]
        runs[name] = ranks.run(command(tiny_folder, rewards, folder / name, *own), **environment)
    runs["in the way"] = runs["failed"]
    uneven = command(tiny_folder, rewards, folder / "uneven", "--prompts_per_step", "3")
    runs["uneven"] = ranks.run(uneven)
    for name in ("failed", "stopped"):
        resume = ["train", "--output_dir", str(folder / name / "run"), "--resume"]
        runs[f"{name}, resumed"] = ranks.run(resume)
    runs["left alone"] = ranks.run(command(tiny_folder, rewards, folder / "left alone", "--eval.batch_size", "3"))
    return dict(zip(runs, ranks.make(list(runs.values()), folder / "ends"), strict=True))


def line(told: str) -> str:
    """The only line."""
    assert told.strip().count("\n") == 0 and "Traceback" not in told, told
    return told.strip()


@pytest.mark.parametrize("name", [name for name in ENDS if "killed" in name])
def test_when_one_is_killed_the_other_ends_with_a_line(name: str, ended: dict[str, ranks.Done], folder: Path) -> None:
    done, victim = ended[name], 0 if name.startswith("the first") else 1
    assert (done.codes[victim], done.codes[1 - victim]) == (-9, 2)
    assert done.seconds < 60
    expected = f"process {victim} of this run has ended, its own output says why; go on with: accelerate launch ... "
    resume = f"-m gcpo_t2i train --output_dir '{folder / name / 'run'}' --resume"
    assert line(done.told[1 - victim]) == f"gcpo-t2i: error: {expected}{resume}".replace("'", "'" * (" " in name))


@pytest.mark.parametrize(("name", "code"), [("failed", 2), ("stopped", 143)])
def test_what_ends_in_one_ends_all_and_keeps_the_step(
    name: str, code: int, ended: dict[str, ranks.Done], folder: Path
) -> None:
    done = ended[name]
    assert done.codes == [code, code] and done.told[1] == ""
    step = 2 if name == "failed" else 3
    assert f"stopped after step {step}; go on with: accelerate launch" in done.told[0].strip().splitlines()[-1]
    assert ("raised RuntimeError: the server is gone" in done.told[0]) == (name == "failed")
    assert f"checkpoint-{step}" in [path.name for path in (folder / name / "run").glob("checkpoint-*")]
    assert ended[f"{name}, resumed"].codes == [0, 0]
    same(folder / name, folder / "left alone")


def test_what_fails_before_the_first_step_or_in_the_first_process_alone_is_told_once(
    ended: dict[str, ranks.Done], folder: Path
) -> None:
    failed, in_the_way = ended["failed in an evaluation"], ended["in the way"]
    assert failed.codes == in_the_way.codes == [2, 2] and failed.told[1] == in_the_way.told[1] == ""
    assert "the server is gone" in line(failed.told[0])
    assert "already holds files; add --resume" in line(in_the_way.told[0])


def test_prompts_that_do_not_divide(ended: dict[str, ranks.Done], folder: Path) -> None:
    assert ended["uneven"].codes == [2, 2] and not (folder / "uneven" / "run").exists()
    for told in ended["uneven"].told:  # no process has asked another yet
        assert "prompts_per_step 3 cannot be split evenly over 2 processes" in line(told)


# ---- parts


def test_buckets_by_hand() -> None:
    sizes = [3, 3, 1, 9, 1]  # of bytes: 3 + 3 fit into 6, then 1, 9 alone, 1
    tensors = [torch.zeros(size, dtype=torch.uint8) for size in sizes]
    assert [[len(tensor) for tensor in bucket] for bucket in buckets(tensors, 6)] == [[3, 3], [1], [9], [1]]
    assert [len(bucket) for bucket in buckets([*tensors[:1], torch.zeros(1)], 99)] == [1, 1]  # one dtype each
    assert list(buckets([], 6)) == []
