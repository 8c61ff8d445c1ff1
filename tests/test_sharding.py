"""What accelerate is told, and what sharding is predicted to save. That it changes nothing else: tests/test_processes.py."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from gcpo_t2i.cli import main
from gcpo_t2i.config import LoraConfig, PlanConfig
from gcpo_t2i.models import load_policy
from gcpo_t2i.models.sizes import read_sizes
from gcpo_t2i.plan.counts import Counts
from gcpo_t2i.plan.memory import Memory, spread
from gcpo_t2i.sharding import is_wanted
from tests.tiny import train_command

FSDP = {"ACCELERATE_USE_FSDP": "true"}


@pytest.mark.parametrize(
    ("told", "rank", "message"),
    [
        (
            {"ACCELERATE_USE_DEEPSPEED": "true"},
            None,
            "accelerate was told to use DeepSpeed; use configs/accelerate/fsdp2.yaml",
        ),
        (FSDP, None, "accelerate was told to use FSDP 1; set fsdp_version: 2"),
        (FSDP | {"FSDP_VERSION": "2"}, 4, "lora.rank leaves FSDP2 nothing to spread"),
    ],
)
def test_what_is_not_there_is_refused_before_anything_is_loaded(
    told: dict[str, str],
    rank: int | None,
    message: str,
    reward_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for key, value in told.items():
        monkeypatch.setenv(key, value)
    command = train_command(tmp_path / "no model", reward_file, tmp_path)
    assert main([*command, "--lora.rank", "null" if rank is None else str(rank)]) == 2
    assert message in capsys.readouterr().err


def test_what_accelerate_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not is_wanted(LoraConfig())
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "true")
    assert is_wanted(LoraConfig())
    assert os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] == "False"  # else only one process would have weights


def test_memory_of_shards_by_hand(tiny_folder: Path) -> None:
    policy: Any = load_policy(tiny_folder)
    layers = sum(parameter.numel() for parameter in policy.trunk.layers.parameters())
    sizes = read_sizes(tiny_folder)
    assert spread(sizes, 4) == layers * 3 // 4
    config = PlanConfig(processes=4)

    def memory(config: PlanConfig) -> Memory:
        return Memory.of(config, sizes, Counts.of(config, sizes), 8, torch.device("cuda"), 0, 0)

    whole, shared = memory(config), memory(replace(config, sharded=True))
    share = sizes.trainable - layers * 3 // 4
    assert (shared.gradients, shared.optimizer, shared.reference) == (4 * share, 8 * share, 4 * share)
    assert shared.weights == whole.weights + 4 * share and shared.activations == whole.activations


def test_plan_refuses_shards_of_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--sharded"]) == 2
    assert main(["plan", "--sharded", "--processes", "2", "--lora.rank", "4"]) == 2
    assert capsys.readouterr().err.count("sharded needs processes above 1, and weights that are trained") == 2
