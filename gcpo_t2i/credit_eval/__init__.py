"""`gcpo-t2i credit-eval`: are the credit maps right? Held against where objects are, against phrases, and against the true
advantage of every token.

    runs/credit-eval/
      recipe.json                   what the numbers depend on; another recipe is refused
      samples.safetensors           the model's own images: codes, log-probs, statistics, rewards
      companions-*.safetensors      more images of the same prompts, for the rules that compare images of a group
      continuations.safetensors     sums of rewards of continuations: what hours went into
      credit.json .md .png          the results

What is there is not made again, so that the same command again goes on, or scores all rules again in seconds.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from gcpo_t2i import __version__
from gcpo_t2i.config import CreditEvalConfig
from gcpo_t2i.credit_eval import continuations, objects, phrases, samples
from gcpo_t2i.credit_eval.companions import group_scores
from gcpo_t2i.credit_eval.decisions import find_decisions
from gcpo_t2i.credit_eval.figure import draw
from gcpo_t2i.credit_eval.report import as_json, markdown, sheets
from gcpo_t2i.credit_eval.samples import Sampler, Samples
from gcpo_t2i.data import Prompt, PromptSampler, load_prompts
from gcpo_t2i.errors import UserError
from gcpo_t2i.evals.layout import canonical
from gcpo_t2i.evals.recipe import RECIPE, Recipe, differences, policy_hash, prompts_hash
from gcpo_t2i.files import clear_leftovers, write_text
from gcpo_t2i.folders import check_output_dir, locked
from gcpo_t2i.run import load_model, model_folder, resolve_device, use_bfloat16
from gcpo_t2i.scoring import RewardSet, scored_name
from gcpo_t2i.shapes import render

FORMAT = 1
MAY_DIFFER = ("policy.model", "prompts.source", "environment")  # when the same command goes on


def credit_eval(config: CreditEvalConfig) -> Path:
    """Measures what `config.truths` name, writes `credit.json`, `.md` and `.png`, prints the tables, returns the folder.

    UserError for a folder with other contents, and for a model or prompts that a truth does not exist for.
    """
    console = Console(highlight=False)
    device = resolve_device(config.device)
    rewards = RewardSet.load(config.rewards, str(device), label=scored_name)
    prompts = chosen_prompts(config, config.images_per_tag)
    rewards.check(prompts)
    policy = load_model(config.model, device)
    if set(config.truths) & {"objects", "phrases"}:
        objects.check_world(policy.grid, prompts)
    folder = Path(config.output_dir)
    open_folder(folder, make_recipe(config, prompts, rewards, device))
    with locked(folder):
        clear_leftovers(folder)
        found = measure(Sampler(policy, rewards, config, device), prompts, folder, console)
        write_text(folder / "credit.json", json.dumps(as_json(found), indent=2) + "\n")
        write_text(folder / "credit.md", markdown(sheets(found)))
        draw(folder / "credit.png", found, policy.grid)
    for sheet in sheets(found):
        console.print(sheet.table(), sheet.note, "", markup=False)
    return folder


def chosen_prompts(config: CreditEvalConfig, per_tag: int) -> list[Prompt]:
    """`per_tag` of each tag, in turns over the tags, as training would draw them."""
    order = PromptSampler(load_prompts(config.prompts), config.seed)
    return order.batch(0, per_tag * len(order.groups))


def measure(sampler: Sampler, prompts: list[Prompt], folder: Path, console: Console) -> dict[str, Any]:
    """Truth → what was found."""
    config = sampler.config
    own = own_samples(sampler, prompts, folder / samples.SAMPLES)
    if set(config.truths) & {"objects", "advantage"}:
        own.tensors.update(group_scores(sampler, prompts, own.tokens, own.tensors["entropy"], "images", folder))
    found: dict[str, Any] = {}
    seen = None
    if set(config.truths) & {"objects", "phrases"}:
        seen = objects.of_images(sampler.policy.decode(own.tokens))
        drawn_prompts = chosen_prompts(config, config.scenes_per_tag)
        scenes = objects.scenes(drawn_prompts, config.seed)
        codes = sampler.policy.encode(np.stack([render(scene) for scene in scenes])).cpu()
        sources = {
            "scenes": (drawn_prompts, codes, [objects.of_scene(scene) for scene in scenes]),
            "images": (own.prompts, own.tokens, seen),
        }
        if "objects" in config.truths:
            found["objects"] = {name: _objects(sampler, name, folder, *source) for name, source in sources.items()}
        if "phrases" in config.truths:
            found["phrases"] = {name: _phrases(sampler, *source) for name, source in sources.items()}
    if "advantage" in config.truths:
        tally = continuations.run(sampler, own, folder / continuations.CONTINUATIONS, console)
        masks = None if seen is None else [[mask for *_, mask in each] for each in seen]
        found["advantage"] = find_decisions(own, tally, masks, config.seed)
    return found


def own_samples(sampler: Sampler, prompts: list[Prompt], path: Path) -> Samples:
    """The model's images, made if they are not there."""
    if not path.exists():
        samples.write_samples(sampler.images(prompts), path)
    return samples.read_samples(prompts, path)


def _objects(
    sampler: Sampler,
    source: str,
    folder: Path,
    prompts: list[Prompt],
    codes: torch.Tensor,
    found: list[objects.Objects],
) -> Any:
    masks = np.stack([objects.union(own, codes.shape[1]) for own in found])
    tensors = sampler.rescored(prompts, codes)
    tensors |= group_scores(sampler, prompts, codes, tensors["entropy"], source, folder)
    return objects.find_objects(tensors, masks, samples.tags_of(prompts), sampler.config.seed)


def _phrases(sampler: Sampler, prompts: list[Prompt], codes: torch.Tensor, found: list[objects.Objects]) -> Any:
    every = phrases.cases(prompts, found)
    if not every:
        return {"images": {}, "ratios": {}}
    tensors = sampler.rescored([case.prompt for case in every], codes[[case.image for case in every]])
    return {"images": phrases.images_of(every), "ratios": phrases.find_phrases(every, tensors)}


def make_recipe(config: CreditEvalConfig, prompts: list[Prompt], rewards: RewardSet, device: torch.device) -> Recipe:
    """What the stored samples and continuations depend on."""
    names = ("seed", "guidance", "temperature", "images_per_tag", "continuations", "batch_size")
    precision = "bfloat16" if use_bfloat16(config.dtype, device) else "float32"
    return {
        "format": FORMAT,
        "policy": {"model": config.model, "sha256": policy_hash(model_folder(config.model))},
        "prompts": {
            "source": config.prompts,
            "number": len(prompts),
            "sha256": prompts_hash([canonical(prompt) for prompt in prompts]),
        },
        "sampling": {name: getattr(config, name) for name in names} | {"dtype": precision},
        "evaluator": {"version": __version__, "rewards": rewards.versions(config.rewards)},
        "weights": rewards.weights,
        "environment": {"device": str(device), "torch": torch.__version__},
    }


def open_folder(folder: Path, recipe: Recipe) -> None:
    """Makes the folder and writes the recipe. UserError if it holds numbers made with another one, or anything else."""
    path = folder / RECIPE
    if not path.is_file():
        check_output_dir(folder, overwrite=False, resume=None)
        folder.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(recipe, indent=2) + "\n")
        return
    try:
        there = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: damaged ({error}); name another --output_dir") from error
    if found := differences(recipe, there, MAY_DIFFER):
        raise UserError(
            f"'{folder}' holds numbers made with another recipe: {'; '.join(found)}; give the same settings, or name "
            "another --output_dir"
        )
