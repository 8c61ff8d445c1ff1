"""The same code on a CUDA device, in bfloat16: nothing that only a CPU has seen."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from gcpo_t2i.cli import main
from gcpo_t2i.models import load_policy
from tests.tiny import train_command

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


def test_rollout_and_replay_agree_on_cuda(tiny_folder: Path) -> None:
    policy = load_policy(tiny_folder, device="cuda")
    cond = policy.condition(["a photo of a red circle", "two blue square"])
    null = policy.condition([None, None], like=cond)
    generator = torch.Generator("cuda").manual_seed(0)
    rollout = policy.sample(cond, null, group=3, guidance=3.0, generator=generator, stats=("exact_kl", "js", "entropy"))
    replay = policy.logp(cond.repeat_interleave(3), rollout.tokens).logp
    assert torch.allclose(rollout.cond_logp, replay, atol=1e-4)
    assert all(tensor.device.type == "cuda" for tensor in (rollout.tokens, *rollout.stats.values()))


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_training_runs_on_cuda(tiny_folder: Path, reward_file: Path, tmp_path: Path, dtype: str) -> None:
    own = ["--device", "cuda", "--loss.beta", "0.01", "--dtype", dtype]
    command = [*train_command(tiny_folder, reward_file, tmp_path), *own]
    assert main(command) == 0
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if "reward" in row]
    assert len(steps) == 3 and all(row["skipped"] == 0 for row in steps)
    # bfloat16 keeps 8 bits of the hidden states: log-probs of two code paths agree to a few hundredths
    assert all(row["logp_gap/replay"] < (0.1 if dtype == "bfloat16" else 1e-3) for row in steps)
