"""What a finished stage is worth, measured on held-out prompts, and the model card that says so.

`scores.json` beside each card holds the same numbers for programs; it is written last and marks a finished stage.
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import VQModel
from open_clip import CLIP
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from gcpo_t2i.config import EvalConfig, RewardConfig, TrainConfig
from gcpo_t2i.data import Prompt, load_prompts
from gcpo_t2i.evaluate import Evaluation, eval_prompts, evaluate
from gcpo_t2i.models.llamagen import LlamaGenPolicy
from gcpo_t2i.models.vq import decode_codes, decode_pixels, encode_images, to_pixels
from gcpo_t2i.rollout import Sampling
from gcpo_t2i.scoring import RewardSet, scored_name
from gcpo_t2i.shapes.pretrain.aesthetic import correlation
from gcpo_t2i.shapes.pretrain.clip import retrieval
from gcpo_t2i.shapes.pretrain.fit import progress_bar
from gcpo_t2i.shapes.pretrain.stream import SceneStream
from gcpo_t2i.shapes.pretrain.vq import code_noise
from gcpo_t2i.shapes.prompts import TAGS, heldout_specs, sample_scene
from gcpo_t2i.shapes.scenes import GRID, render

Scores = dict[str, dict[str, float]]  # column of the card's table → row → value; "row_ci95" is a row's half-width

HELD_OUT = "shapesworld:heldout"
SEED = 1234  # of everything that is drawn for measuring
SCORES_FILE = "scores.json"
METRIC = "geneval/strict"
NOISE_SCENES = 256  # whose codes are looked at for the code noise


@dataclass(frozen=True)
class Measured:
    """What a checkpoint holds and what it is worth."""

    parameters: int
    scores: Scores


@dataclass(frozen=True)
class Sizes:
    """How much is measured."""

    scenes: int = 600  # for the tokenizer, balanced over the six tags
    images: int = 480  # from the generator, two per prompt, balanced over the tags, at each guidance scale
    draws: int = 20  # of 64 captions, for the CLIP
    batches: int = 8  # of pictures, for the aesthetic head
    questions: int = 400  # for the reasoner, each asked four times


def _strict() -> RewardSet:
    return RewardSet.load([RewardConfig("geneval", kwargs={"score": "strict"})], label=scored_name)


def _by_tag(evaluation: Evaluation) -> dict[str, float]:
    """`overall`, then every tag, each with its `_ci95`."""
    rows: dict[str, float] = {}
    for key, value in evaluation.metrics().items():
        name = key.removeprefix(f"eval/{METRIC}").removeprefix("/")
        rows[f"overall{name}" if name in ("", "_ci95") else name] = value
    return rows


def score_images(images: list[Image.Image], prompts: list[Prompt]) -> dict[str, float]:
    """Strict GenEval with the `shapes` detector: N images and their N prompts → `overall` and a row for each tag."""
    scores = _strict().score(images, prompts)[METRIC]
    return _by_tag(Evaluation(prompts, {METRIC: scores}, images))


def measure_vq(vq: VQModel, sizes: Sizes) -> Measured:
    """Strict GenEval of perfect scenes, and of what the tokenizer leaves of them: the ceiling of any generator."""
    rng = np.random.default_rng(SEED)
    prompts = eval_prompts(
        load_prompts(HELD_OUT), EvalConfig(num_prompts=sizes.scenes, samples_per_prompt=1, seed=SEED)
    )
    pictures = [render(sample_scene(dict(prompt.columns), rng)) for prompt in prompts]
    codes = encode_images(vq, pictures, (GRID, GRID))
    columns = {
        "rendered": [Image.fromarray(picture) for picture in pictures],
        "reconstructed": list(decode_codes(vq, codes, (GRID, GRID))),
    }
    scores = {name: score_images(images, prompts) for name, images in columns.items()}
    noise = code_noise(codes[:NOISE_SCENES], to_pixels(pictures[:NOISE_SCENES]).to(codes.device))
    scores["reconstructed"]["code noise (nats)"] = noise
    return Measured(_parameters(vq), scores)


def measure_generator(policy: LlamaGenPolicy, sizes: Sizes, device: torch.device) -> Measured:
    """Strict GenEval of samples for held-out prompts, without guidance and with that of `gcpo-t2i train`."""
    config = EvalConfig(num_prompts=sizes.images // 2, samples_per_prompt=2, seed=SEED)
    prompts = eval_prompts(load_prompts(HELD_OUT), config)
    scores: Scores = {}
    for guidance in (1.0, TrainConfig().guidance):
        with progress_bar() as progress:
            bar = progress.add_task(f"guidance {guidance:g}", total=len(prompts), note="")
            evaluation = evaluate(
                policy,
                prompts,
                _strict(),
                Sampling(1, guidance),
                SEED,
                config.batch_size,
                lambda done, progress=progress, bar=bar: progress.update(bar, completed=done),
            )
        scores[f"guidance {guidance:g}"] = _by_tag(evaluation)
    return Measured(_parameters(policy), scores)


def measure_clip(model: CLIP, vq: VQModel, sizes: Sizes, device: torch.device) -> Measured:
    """Image → text retrieval among 64 held-out captions of distinct meaning, on renderings and on reconstructions."""
    draws = {"uniform": None, "balanced": dict.fromkeys(TAGS, 1.0)}
    repaints = {
        "rendered": lambda images: images,
        "reconstructed": lambda images: decode_pixels(vq, encode_images(vq, images, (GRID, GRID)), (GRID, GRID)),
    }
    scores = {
        f"{drawn}, {pictures}": retrieval(
            model, heldout_specs(), SEED, device, weights, draws=sizes.draws, repaint=repaint
        )
        for drawn, weights in draws.items()
        for pictures, repaint in repaints.items()
    }
    return Measured(_parameters(model), scores)


def measure_aesthetic(clip: CLIP, head: nn.Module, sizes: Sizes, device: torch.device) -> Measured:
    """Correlation of the head with its target on held-out scenes, over all pictures and over the undamaged ones."""
    stream = SceneStream(heldout_specs(), 128, SEED)
    return Measured(_parameters(head), correlation(clip, head, stream, sizes.batches, device))


# --- cards ----------------------------------------------------------------------

CARDS = {  # stage → title and text
    "vq": (
        "ShapesWorld image tokenizer",
        "A `diffusers.VQModel`: 48 px images as 12 × 12 codes of a 512-entry codebook, with 4 px cells.\n\n"
        "Scores: strict GenEval (`shapes` detector) of rendered held-out scenes, and of their reconstructions, which is "
        "the ceiling of any generator that uses it. Overall is the mean over tags; 95 % half-widths. Code noise: the "
        "entropy of a code given the pixels of its own cell, which no caption can tell.",
    ),
    "generator": (
        "ShapesWorld generator",
        "A small LlamaGen policy: T5 text encoder, Llama trunk, and the image tokenizer in `vq/`, trained on ShapesWorld "
        "scenes with a tenth of the captions dropped. In its last steps many words of the captions are wrong, so that it "
        "trusts a caption less than it could: what it knows and does not do, reinforcement learning is there to bring out. "
        "`gcpo_t2i.models.load_policy(folder)` loads it.\n\n"
        "Scores: strict GenEval (`shapes` detector) of samples at temperature 1 for held-out prompts. Overall is the "
        "mean over tags; 95 % half-widths.",
    ),
    "clip": (
        "ShapesWorld CLIP",
        "A tiny CLIP in open_clip's own format, trained with open_clip's own loss on ShapesWorld scenes and their "
        'captions. `open_clip.create_model_and_transforms("local-dir:FOLDER")` loads it.\n\n'
        "Scores: image → text retrieval, top-1 among 64 held-out captions of distinct meaning, drawn uniformly (nearly "
        "all then name two coloured objects), or balanced over the tags as far as they have captions. Images are "
        "renderings, or what the tokenizer leaves of them. A caption may also fit another's image (a circle, a red "
        "circle), and then nothing in the image says which one it was.",
    ),
    "aesthetic": (
        "ShapesWorld aesthetic head",
        "A head on the normalised image features of the ShapesWorld CLIP, on LAION's scale of 1 to 10. Nobody rated "
        "these pictures: it is a stand-in with the interface of LAION's predictor, which has learned a formula "
        "(`gcpo_t2i.shapes.pretrain.aesthetic`), high for balanced, roomy, contrasting, harmonious pictures, low for "
        "blur, noise, tints, holes and clutter.\n\n"
        "Scores: correlation with that formula on held-out scenes, over all of them with their random damage, and over "
        "the clean ones, where composition alone decides.",
    ),
    "reasoner": (
        "Arithmetic reasoner",
        "A small Llama that answers questions of arithmetic in words, step by step. It has learned from the solutions of "
        "pupils of whom three in five take doubling for adding two, and halving for taking two away "
        "(`gcpo_t2i.cot.arithmetic.corpus`): reinforcement learning has something to fix. "
        "`transformers.AutoModelForCausalLM.from_pretrained(folder)` loads it.\n\n"
        "Scores: share of right answers to held-out questions, sampled at temperature 1, and with the likeliest token each "
        "time; as asked, and where the user asks for a wrong answer. 95 % half-widths.",
    ),
}


def _parameters(*modules: nn.Module) -> int:
    return sum(parameter.numel() for module in modules for parameter in module.parameters())


def stored_parameters(folder: Path) -> int:
    """How many numbers the .safetensors files of a folder hold; tied weights are stored once."""
    return sum(tensor.numel() for path in folder.glob("*.safetensors") for tensor in load_file(path).values())


def machine(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """What the time depends on. Names the kind of machine, never the machine."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.machine()} CPU"
    return {
        "device": name,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "dtype": str(dtype).removeprefix("torch."),
        "torch": torch.__version__,
    }


def _cell(rows: Mapping[str, float], row: str) -> str:
    if row not in rows:
        return ""
    half = rows.get(f"{row}_ci95")
    return f"{rows[row]:.3f}" if half is None else f"{rows[row]:.3f} ± {half:.3f}"


def table(scores: Scores) -> Iterator[str]:
    """The lines of a Markdown table, one column per key."""
    rows = dict.fromkeys(row for column in scores.values() for row in column if not row.endswith("_ci95"))
    yield f"| | {' | '.join(scores)} |"
    yield "|---" * (len(scores) + 1) + "|"
    for row in rows:
        yield f"| {row} | {' | '.join(_cell(column, row) for column in scores.values())} |"


def write_card(folder: Path, facts: Mapping[str, Any], measured: Measured) -> None:
    """Writes README.md, then scores.json, into `folder`.

    `facts`: stage, command, seed, steps, seconds, and what `machine` says.
    """
    title, text = CARDS[facts["stage"]]
    lines = [
        *("---", "library_name: gcpo-t2i", "license: apache-2.0", "---", f"# {title}", "", text, ""),
        *("```bash", facts["command"], "```", ""),
        f"{facts['steps']} steps, seed {facts['seed']}: {facts['seconds'] / 60:.1f} minutes on {facts['device']}, "
        f"{facts['cores']} cores, threads: {facts['threads']}, {facts['dtype']}, torch {facts['torch']}. "
        f"{measured.parameters:,} parameters.",
        "",
        *table(measured.scores),
        "",
    ]
    (folder / "README.md").write_text("\n".join(lines), encoding="utf-8")
    content = json.dumps({**facts, "parameters": measured.parameters, "scores": measured.scores}, indent=2) + "\n"
    partial = folder / "scores.partial"
    partial.write_text(content, encoding="utf-8")
    partial.replace(folder / SCORES_FILE)
