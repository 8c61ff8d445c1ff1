"""The shipped checkpoints do what their cards say, and the main job runs on them without any option but its size."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from gcpo_t2i.cli import main
from gcpo_t2i.config import EvalConfig, RewardConfig, TrainConfig
from gcpo_t2i.data import load_prompts
from gcpo_t2i.evaluate import eval_prompts, evaluate
from gcpo_t2i.models import load_policy
from gcpo_t2i.models.llamagen import LlamaGenPolicy
from gcpo_t2i.rollout import Sampling
from gcpo_t2i.scoring import RewardSet, scored_name
from gcpo_t2i.shapes import TAGS, checkpoint_path, heldout_specs, render, sample_scene


@pytest.fixture(scope="module")
def policy() -> LlamaGenPolicy:
    loaded = load_policy(checkpoint_path("generator"), device="cpu")
    assert isinstance(loaded, LlamaGenPolicy)
    return loaded


def test_codes_are_local_and_reconstructions_keep_every_object(policy: LlamaGenPolicy) -> None:
    rng = np.random.default_rng(0)
    specs = [spec for tag in TAGS for spec in [s for s in heldout_specs() if s["tag"] == tag][:4]]
    images = np.stack([render(sample_scene(spec, rng)) for spec in specs])
    decoded = policy.decode(policy.encode(images))
    reward = RewardSet.load([RewardConfig("geneval", kwargs={"score": "strict"})])
    prompts = [prompt for prompt in load_prompts("shapesworld:heldout") if prompt.text in {s["prompt"] for s in specs}]
    by_text = {prompt.text: prompt for prompt in prompts}
    scores = reward.score(decoded, [by_text[spec["prompt"]] for spec in specs])["geneval"]
    assert np.mean([float(score or 0) for score in scores]) >= 0.95


def test_held_out_captions_explain_their_pictures(policy: LlamaGenPolicy) -> None:
    """log p(codes | caption) − log p(codes | null) over held-out scenes: a model that ignores its prompt has about 0."""
    rng = np.random.default_rng(1)
    specs = [spec for spec in heldout_specs() if spec["tag"] in ("colors", "color_attr")][::40]
    codes = policy.encode(np.stack([render(sample_scene(spec, rng)) for spec in specs]))
    cond = policy.condition([spec["prompt"] for spec in specs])
    null = policy.condition([None] * len(specs), like=cond)
    with torch.no_grad():
        gain = (policy.logp(cond, codes).logp - policy.logp(null, codes).logp).sum(dim=1)
    assert gain.mean().item() > 2.0


def test_the_base_model_leaves_reinforcement_learning_something_to_do(policy: LlamaGenPolicy) -> None:
    prompts = eval_prompts(load_prompts("shapesworld:heldout"), EvalConfig(num_prompts=120, samples_per_prompt=1))
    rewards = RewardSet.load([RewardConfig("geneval", kwargs={"score": "strict"})], label=scored_name)
    found = evaluate(policy, prompts, rewards, Sampling(1, TrainConfig().guidance), 7, 60).metrics()
    assert 0.30 < found["eval/geneval/strict"] < 0.75  # 0.35 to 0.70 on the card, ± the noise of 120 images
    weak = min(found[f"eval/geneval/strict/{tag}"] for tag in ("counting", "position", "color_attr"))
    assert weak < found["eval/geneval/strict/single_object"]


def test_the_main_job_in_small(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    small = ["--steps", "2", "--prompts_per_step", "2", "--group_size", "4", "--eval.num_prompts", "6"]
    assert main(["train", "--output_dir", str(run), "--device", "cpu", *small]) == 0
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    first, last = rows[0], rows[-1]
    for row in (first, last):
        assert row.keys() >= {"eval/geneval/strict", "eval/geneval/strict_ci95", "eval/clip", "eval/aesthetic"}
        assert row.keys() >= {f"eval/geneval/strict/{tag}" for tag in TAGS}
    assert "Look next" in capsys.readouterr().out
    assert load_policy(run / "policy").grid == (12, 12)
