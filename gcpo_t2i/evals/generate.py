"""Images of an evaluation. Which random numbers an image is drawn with follows from its place in the evaluation alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from rich.progress import track

from gcpo_t2i.config import EvaluationConfig
from gcpo_t2i.data import Prompt
from gcpo_t2i.evals.layout import image_path, write_image
from gcpo_t2i.rollout import Sampling, conditions, draw
from gcpo_t2i.run import autocast, load_model
from gcpo_t2i.seeds import generators


def batches(prompts: int, samples_per_prompt: int, batch_size: int) -> list[list[tuple[int, int]]]:
    """All (prompt_index, sample), prompt by prompt, in batches. They are the same when an evaluation goes on."""
    places = [(prompt, sample) for prompt in range(prompts) for sample in range(samples_per_prompt)]
    return [places[start : start + batch_size] for start in range(0, len(places), batch_size)]


@torch.no_grad()
def generate(config: EvaluationConfig, prompts: Sequence[Prompt], root: Path, device: torch.device) -> None:
    """Writes the images that are missing under `root`. A batch of which one image is missing is sampled as a whole, because
    rounding depends on what is in a batch: going on gives the images that an evaluation in one go gives."""

    def missing(place: tuple[int, int]) -> bool:
        return not image_path(root, *place).exists()

    left = [
        batch
        for batch in batches(len(prompts), config.samples_per_prompt, config.batch_size)
        if any(map(missing, batch))
    ]
    if not left:
        return
    policy = load_model(config.model, device)
    sampling = Sampling(1, config.guidance, config.temperature, config.top_k, config.top_p)
    for batch in track(left, description="sample"):
        with autocast(config.dtype, device):
            own = [prompts[prompt] for prompt, _ in batch]
            cond, null = conditions(policy, own, with_null=config.guidance != 1.0)
            rollout = draw(policy, cond, null, sampling, generators(config.seed, batch))
        for place, image in zip(batch, policy.decode(rollout.tokens), strict=True):
            if missing(place):
                write_image(root, prompts[place[0]], *place, image)
