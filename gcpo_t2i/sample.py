"""`gcpo-t2i sample`: images from prompts, one PNG each, and a grid of them all."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from rich.progress import track

from gcpo_t2i.config import SampleConfig
from gcpo_t2i.data import Prompt, load_prompts
from gcpo_t2i.folders import check_output_dir
from gcpo_t2i.images import sample_grid
from gcpo_t2i.rollout import Sampling, conditions, draw
from gcpo_t2i.run import autocast, load_model, resolve_device


def _prompts(config: SampleConfig) -> list[Prompt]:
    prompts = [Prompt(config.prompt)] if config.prompt is not None else load_prompts(str(config.prompts))
    return [Prompt(p.text, p.negative if p.negative is not None else config.negative, p.columns) for p in prompts]


def sample(config: SampleConfig) -> Path:
    """Draws `num_images` of each prompt and returns the folder: `00000-0.png` …, `grid.png`, `samples.jsonl`.

    Same model, prompts, seed and batch size: same images. UserError for bad input, or images that would be replaced.
    """
    prompts = _prompts(config)
    device = resolve_device(config.device)
    folder = check_output_dir(config.out, overwrite=config.overwrite)
    policy = load_model(config.model, device)
    generator = torch.Generator(device).manual_seed(config.seed)
    lower = autocast(config.dtype, device)
    sampling = Sampling(config.num_images, config.guidance, config.temperature, config.top_k, config.top_p)
    per_call = max(1, config.batch_size // config.num_images)
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for start in track(range(0, len(prompts), per_call), description="sample"):
        part = prompts[start : start + per_call]
        with lower:
            cond, null = conditions(policy, part, with_null=config.guidance != 1.0)
            rollout = draw(policy, cond, null, sampling, generator)
        images = policy.decode(rollout.tokens)
        for p, prompt in enumerate(part):
            own = images[p * config.num_images : (p + 1) * config.num_images]
            names = [f"{start + p:05d}-{i}.png" for i in range(len(own))]
            for name, image in zip(names, own, strict=True):
                image.save(folder / name)
            rows.append((prompt, names, own))
    lines = [
        json.dumps({"prompt": prompt.text, "negative": prompt.negative, "images": names}) for prompt, names, _ in rows
    ]
    (folder / "samples.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    sample_grid([(prompt.text, own, None) for prompt, _, own in rows]).save(folder / "grid.png")
    return folder
