"""`gcpo-t2i eval`: a policy or a folder of images, scored; a finished evaluation, shown again; two of them, compared."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import track

from gcpo_t2i.config import EvaluationConfig
from gcpo_t2i.config.evaluation import DEFAULT_PROMPTS
from gcpo_t2i.data import Prompt, load_prompts
from gcpo_t2i.errors import UserError
from gcpo_t2i.evals import layout
from gcpo_t2i.evals.compare import compare
from gcpo_t2i.evals.generate import generate
from gcpo_t2i.evals.recipe import (
    RECIPE,
    Recipe,
    check_comparable,
    check_resumable,
    is_external,
    make_recipe,
    write_recipe,
)
from gcpo_t2i.evals.results import RESULTS, Results, make_rows, read_results, write_results
from gcpo_t2i.evals.tables import change_table, described, score_table
from gcpo_t2i.files import write_text
from gcpo_t2i.folders import check_output_dir, next_run_dir, remove_output
from gcpo_t2i.run import resolve_device
from gcpo_t2i.scoring import RewardSet, Scores, scored_name
from gcpo_t2i.yaml_files import save_config

COMPARISON = "comparison.json"


def evaluate(config: EvaluationConfig) -> Path:
    """Does what `config` describes, prints the scores, and returns the folder with recipe.json, results.jsonl, scores.json.

    UserError for what the user can mend; what can be known before sampling is known before sampling.
    """
    console = Console()
    other = None if config.against is None else read_results(config.against)
    if config.results is None:
        ours = make_results(config, other, console)
    else:
        ours = read_results(config.results)
        if other is not None:
            check_comparable(ours.recipe, other.recipe, other.folder)
        console.print(f"[bold]{escape(described(ours.recipe))}")
    scores = ours.estimates()
    console.print(score_table(scores))
    for label in ours.recipe["evaluator"]["rewards"]:
        if label not in scores:
            console.print(f"[yellow]{label} applies to none of these prompts: they lack the columns that it reads")
    if other is not None:
        show_comparison(ours, other, console)
    return ours.folder


def make_results(config: EvaluationConfig, other: Results | None, console: Console) -> Results:
    """Samples what is missing, scores all of it, and writes it down."""
    device = resolve_device(config.device)
    rewards = RewardSet.load(config.rewards, str(device), label=scored_name)
    samples = None if config.images is None else layout.scan(Path(config.images))
    prompts = chosen_prompts(config) if samples is None else prompts_of(config, samples)
    rewards.check(prompts)
    count = config.samples_per_prompt if samples is None else len(samples) // len(prompts)
    recipe = make_recipe(config, prompts, count, rewards.versions(config.rewards), device)
    if other is not None:
        check_comparable(recipe, other.recipe, other.folder)
    folder = open_folder(config, recipe)
    console.print(f"[bold]{escape(described(recipe))}[/], {device}, results in {escape(str(folder))}")
    root = folder if config.images is None else Path(config.images)
    if samples is None:
        generate(config, prompts, root, device)
        samples = layout.scan(root)
        layout.write_grids(root, samples)
    scores, verdicts = score_images(rewards, samples, config.batch_size)
    if all(value is None for values in scores.values() for value in values):
        raise UserError(f"none of the rewards ({', '.join(scores)}) applies to any of the prompts; choose others")
    results = Results(folder, recipe, make_rows(root, samples, scores, verdicts, recipe))
    write_results(results)
    return results


def chosen_prompts(config: EvaluationConfig) -> list[Prompt]:
    """Those of the source, in its order; of each tag at most `prompts_per_tag`, the same whatever the seed."""
    prompts = load_prompts(config.prompts or DEFAULT_PROMPTS)
    if config.prompts_per_tag is None:
        return prompts
    groups: dict[str, list[int]] = {}
    for index, prompt in enumerate(prompts):
        groups.setdefault(str(prompt.columns.get("tag")), []).append(index)
    kept = {
        index
        for tag, own in groups.items()
        for index in random.Random(tag).sample(own, min(config.prompts_per_tag, len(own)))
    }
    return [prompt for index, prompt in enumerate(prompts) if index in kept]


def prompts_of(config: EvaluationConfig, samples: Sequence[layout.Sample]) -> list[Prompt]:
    """The prompts that are written beside the images. UserError if `config` names a file with others."""
    found = list({sample.prompt_index: sample.prompt for sample in samples}.values())
    if config.prompts is not None:
        expected = load_prompts(config.prompts)
        for index, (ours, theirs) in enumerate(zip(expected, found, strict=False)):
            if ours != theirs:
                where = layout.prompt_folder(Path(config.images or ""), index) / layout.METADATA
                raise UserError(
                    f"{where} has the prompt '{theirs.text}', prompt {index} of {config.prompts} is '{ours.text}'"
                )
        if len(expected) != len(found):
            raise UserError(f"{config.images} holds {len(found)} prompts, {config.prompts} has {len(expected)}")
    return found


def open_folder(config: EvaluationConfig, recipe: Recipe) -> Path:
    """Makes the folder of the evaluation and writes its recipe. UserError if that would touch what is to be kept."""
    name = Path(config.images or config.model)
    name = name.parent if name.name == "policy" and name.parent.name else name  # runs/grpo-1/policy is evals/grpo-1-N
    folder = Path(config.output_dir or next_run_dir(name.resolve().name, "evals"))
    for key, used in {"images": config.images, "against": config.against}.items():
        if used is not None and folder.resolve() in (Path(used).resolve(), *Path(used).resolve().parents):
            raise UserError(f"output_dir '{folder}' is or holds the folder of --{key}; name another folder")
    check_output_dir(folder, overwrite=config.overwrite, resume=config.resume)
    if config.resume:
        check_resumable(recipe, folder, scored=(folder / RESULTS).is_file())
    elif config.overwrite and folder.exists():
        remove_output(folder, RECIPE, "evaluation")
    folder.mkdir(parents=True, exist_ok=True)
    write_recipe(recipe, folder)
    config.output_dir = str(folder)
    save_config(config, folder / "config.yaml")
    return folder


@torch.no_grad()
def score_images(rewards: RewardSet, samples: Sequence[layout.Sample], batch_size: int) -> tuple[Scores, list[Any]]:
    """Label → a score per image, and GenEval's verdict on each image; both from the files, as anybody else would see them."""
    scores: Scores = {label: [] for label in rewards.rewards}
    verdicts: list[Any] = []
    for start in track(range(0, len(samples), batch_size), description="score"):
        part = samples[start : start + batch_size]
        found, own = rewards.judge([sample.image() for sample in part], [sample.prompt for sample in part])
        verdicts += own
        for label, values in found.items():
            scores[label] += values
    return scores, verdicts


def show_comparison(ours: Results, other: Results, console: Console) -> None:
    changes = compare(ours, other)
    pairs = "prompt and number" if is_external(ours.recipe) or is_external(other.recipe) else "prompt and seed"
    console.print(f"this: {escape(str(ours.folder))}\nother: {escape(str(other.folder))}\npaired by {pairs}")
    console.print(change_table(changes))
    content = {"other": str(other.folder), "policy": other.recipe["policy"]}
    content |= {"changes": {label: change.as_json() for label, change in changes.items()}}
    write_text(ours.folder / COMPARISON, json.dumps(content, indent=2) + "\n")
