"""Checkpoints: a round trip, and every way in which one can be unusable."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from gcpo_t2i import checkpoint
from gcpo_t2i.errors import UserError
from gcpo_t2i.processes import Processes


def state(width: int = 3, seed: int = 0) -> checkpoint.TrainState:
    torch.manual_seed(seed)
    model = nn.Linear(width, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(torch.ones(1, width)).sum().backward()
    optimizer.step()
    return checkpoint.TrainState(model, optimizer)


def test_round_trip(tmp_path: Path) -> None:
    saved, other = state(seed=0), state(seed=1)
    saved.step, saved.prompts_drawn, saved.bad_steps = 7, 56, 2
    folder = save(tmp_path, saved)
    assert folder.name == "checkpoint-7"
    checkpoint.load(folder, other)
    assert (other.step, other.prompts_drawn, other.bad_steps) == (7, 56, 2)
    for one, two in zip(saved.policy.parameters(), other.policy.parameters(), strict=True):
        assert torch.equal(one, two)
        momentum = [s.optimizer.state[p]["exp_avg"] for s, p in ((saved, one), (other, two))]
        assert torch.equal(*momentum)


def save(run: Path, own: checkpoint.TrainState, keep_last: int | None = None) -> Path:
    return checkpoint.save(run, own, {"steps": 9}, [own.random()], keep_last)


def test_newest_is_the_highest_step_and_ignores_unfinished_ones(tmp_path: Path) -> None:
    for name in ("checkpoint-9", "checkpoint-10", ".partial-checkpoint-11", "checkpoint-best"):
        (tmp_path / name).mkdir()
    assert [path.name for path in checkpoint.all_in(tmp_path)] == ["checkpoint-9", "checkpoint-10"]


def test_an_interrupted_write_leaves_the_old_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = state()
    own.step = 1
    save(tmp_path, own)

    def no_space(*args: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(torch, "save", no_space)
    own.step = 2
    with pytest.raises(UserError, match=r"No space left on device.*go on from checkpoint-1 with --resume"):
        save(tmp_path, own)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]


def test_global_random_numbers_go_on_too(tmp_path: Path) -> None:
    own = state()
    folder = save(tmp_path, own)

    def draw() -> list[float]:
        return [random.random(), float(np.random.rand()), torch.rand(1).item()]

    first = draw()
    assert draw() != first
    checkpoint.load(folder, own)
    assert draw() == first


def test_only_the_last_ones_are_kept(tmp_path: Path) -> None:
    own = state()
    for own.step in (1, 2, 10):
        save(tmp_path, own, keep_last=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-10", "checkpoint-2"]
    own.step = 11
    save(tmp_path, own, keep_last=None)
    assert len(checkpoint.all_in(tmp_path)) == 3


def test_another_number_of_processes_goes_on_and_is_told(tmp_path: Path) -> None:
    saved, other = state(seed=0), state(seed=1)
    saved.step = 3
    (note,) = checkpoint.load(save(tmp_path, saved), other, Processes(1, 2))
    assert "was written by 1 process, now there are 2" in note
    assert other.step == 3 and torch.equal(*(own.policy.weight for own in (saved, other)))


@pytest.mark.parametrize("damage", ["truncated", "missing", "newer", "older", "other model"])
def test_unusable_checkpoints_say_why(tmp_path: Path, damage: str) -> None:
    folder = save(tmp_path, state())
    into, expected = state(), "cannot be read"
    if damage == "truncated":
        path = folder / "model.safetensors"
        path.write_bytes(path.read_bytes()[:-8])
    elif damage == "missing":
        (folder / "optimizer.pt").unlink()
    elif damage in ("newer", "older"):
        about = json.loads((folder / "state.json").read_text())
        (folder / "state.json").write_text(json.dumps({**about, "format": 99 if damage == "newer" else 1}))
        expected = f"{damage} gcpo-t2i"
    else:
        into, expected = state(width=4), "'weight' and 0 more tensors"
    with pytest.raises(UserError, match=expected):
        checkpoint.load(folder, into)
