"""Checkpoints: a round trip, and every way in which one can be unusable."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from gcpo_t2i import checkpoint
from gcpo_t2i.errors import UserError


def state(width: int = 3, seed: int = 0) -> checkpoint.TrainState:
    torch.manual_seed(seed)
    model = nn.Linear(width, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(torch.ones(1, width)).sum().backward()
    optimizer.step()
    return checkpoint.TrainState(model, optimizer, {"sample": torch.Generator().manual_seed(seed)})


def test_round_trip(tmp_path: Path) -> None:
    saved, other = state(seed=0), state(seed=1)
    saved.step, saved.prompts_drawn, saved.bad_steps = 7, 56, 2
    torch.rand(5, generator=saved.generators["sample"])
    folder = checkpoint.save(tmp_path, saved)
    assert folder.name == "checkpoint-7"
    checkpoint.load(folder, other)
    assert (other.step, other.prompts_drawn, other.bad_steps) == (7, 56, 2)
    for one, two in zip(saved.policy.parameters(), other.policy.parameters(), strict=True):
        assert torch.equal(one, two)
        momentum = [s.optimizer.state[p]["exp_avg"] for s, p in ((saved, one), (other, two))]
        assert torch.equal(*momentum)
    draws = [torch.rand(3, generator=s.generators["sample"]) for s in (saved, other)]
    assert torch.equal(*draws)


def test_newest_is_the_highest_step_and_ignores_unfinished_ones(tmp_path: Path) -> None:
    for name in ("checkpoint-9", "checkpoint-10", ".partial-checkpoint-11", "checkpoint-best"):
        (tmp_path / name).mkdir()
    assert checkpoint.newest(tmp_path).name == "checkpoint-10"


def test_nothing_to_resume(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no checkpoint to resume from"):
        checkpoint.newest(tmp_path)


def test_an_interrupted_write_leaves_the_old_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = state()
    own.step = 1
    checkpoint.save(tmp_path, own)

    def no_space(*args: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(torch, "save", no_space)
    own.step = 2
    with pytest.raises(OSError, match="No space"):
        checkpoint.save(tmp_path, own)
    assert checkpoint.newest(tmp_path).name == "checkpoint-1"


@pytest.mark.parametrize("damage", ["truncated", "missing", "newer", "other model"])
def test_unusable_checkpoints_say_why(tmp_path: Path, damage: str) -> None:
    folder = checkpoint.save(tmp_path, state())
    into, expected = state(), "cannot be read"
    if damage == "truncated":
        path = folder / "model.safetensors"
        path.write_bytes(path.read_bytes()[:-8])
    elif damage == "missing":
        (folder / "optimizer.pt").unlink()
    elif damage == "newer":
        counters = json.loads((folder / "state.json").read_text())
        (folder / "state.json").write_text(json.dumps({**counters, "format": 99}))
        expected = "newer gcpo-t2i"
    else:
        into, expected = state(width=4), "'weight' and 0 more tensors"
    with pytest.raises(UserError, match=expected):
        checkpoint.load(folder, into)
