"""Runs of two processes against the same run of one, from the command line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from gcpo_t2i.cli import main
from tests.test_train import TIMES
from tests.tiny import train_command

STEPS = 5


def two_processes(arguments: list[str]) -> subprocess.CompletedProcess[str]:
    """`gcpo-t2i ARGUMENTS` in two processes that talk through gloo."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*launch, "-m", "gcpo_t2i", *arguments], capture_output=True, text=True, env=environment, timeout=300
    )


def rows(run: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in TIMES} for line in lines]


COARSE = """
import numpy as np

def coarse(images, prompts):  # most groups of four have four equal scores
    return [float(np.asarray(image).mean() > 153.2) for image in images]
"""


def command(tiny_folder: Path, reward_file: Path, run: Path, *own: str) -> list[str]:
    run.mkdir(exist_ok=True)
    return [*train_command(tiny_folder, reward_file, run), "--steps", str(STEPS), *own]


@pytest.mark.parametrize("algorithm", ["guidance_gcpo", "random_credit", "dapo", "critical_gcpo", "stage"])
def test_two_processes_make_the_run_of_one(
    algorithm: str, tiny_folder: Path, reward_file: Path, tmp_path: Path
) -> None:
    own = ["--algorithm", algorithm, "--eval_every", "3", "--optim.learning_rate", "1e-3"]
    if algorithm == "dapo":
        (tmp_path / "coarse.py").write_text(COARSE)
        own += ["--rewards", json.dumps([{"name": f"{tmp_path / 'coarse.py'}:coarse"}])]
    one, two = tmp_path / "one", tmp_path / "two"
    assert main(command(tiny_folder, reward_file, one, *own)) == 0
    done = two_processes(command(tiny_folder, reward_file, two, *own))
    assert done.returncode == 0, done.stderr[-3000:]
    if algorithm == "dapo":
        assert any(0 < row["frac_reward_zero_std"] < 1 for row in rows(one / "run") if "loss" in row)
    alone, together = rows(one / "run"), rows(two / "run")
    assert [row["step"] for row in together] == [row["step"] for row in alone]
    for ours, theirs in zip(together, alone, strict=True):
        for name, value in theirs.items():
            if name.startswith("monitor/"):  # of the first process's images
                continue
            assert ours[name] == pytest.approx(value, rel=1e-5, abs=1e-5), name
    weights, others = (load_file(run / "run" / "policy" / "trunk" / "model.safetensors") for run in (one, two))
    assert max((weights[name] - others[name]).abs().max() for name in weights) < 1e-5
