"""`gcpo-t2i heatmap`: images of one prompt and their maps, in one figure, in single files, and as arrays."""

from __future__ import annotations

from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from gcpo_t2i.config import HeatmapConfig
from gcpo_t2i.data import Prompt, described
from gcpo_t2i.errors import UserError
from gcpo_t2i.files import whole_folder
from gcpo_t2i.folders import check_ours, check_output_dir
from gcpo_t2i.maps import remarks
from gcpo_t2i.maps.arrays import DESCRIPTION
from gcpo_t2i.maps.pictures import Picture, fit, read_picture
from gcpo_t2i.maps.results import FIGURE, Group, best_first, heading, write
from gcpo_t2i.maps.scored import ScoredImages, explain_images, phrase_maps, sample_images, without
from gcpo_t2i.rollout import Sampling
from gcpo_t2i.run import autocast, load_model, resolve_device
from gcpo_t2i.scoring import RewardSet


def heatmap(config: HeatmapConfig) -> Path:
    """Does what `config` describes and returns the folder: heatmap.png, the single maps, arrays.npz, arrays.json.

    UserError for what the user can mend, as far as possible before a model is loaded. An old folder is replaced as a whole,
    when the new one is there.
    """
    console = Console()
    folder = open_folder(config)
    prompt, settings = described(config.prompt, config.negative), config.credit()
    for phrase in config.phrases:
        without(prompt.text, phrase)
    picture = None if config.image is None else read_picture(config.image)
    device = resolve_device(config.device)
    rewards = RewardSet.load(config.rewards, str(device))
    rewards.check([prompt])
    models = [config.model] if config.compare is None else [config.compare, config.model]
    groups = [make_group(config, model, prompt, picture, rewards, device, console) for model in models]
    with whole_folder(folder) as partial:
        write(partial, groups, settings, None if picture else config.seed)
    console.print(f"pictures with their maps: [bold]{escape(str(folder / FIGURE))}", soft_wrap=True)
    return folder


def open_folder(config: HeatmapConfig) -> Path:
    """The output folder, which nothing is done to yet. UserError if replacing it would lose what is to be kept."""
    folder = check_output_dir(config.out, overwrite=config.overwrite)
    if folder.resolve() == Path.cwd():
        raise UserError(f"output folder '{folder}' is the current folder; name one in it, which may be replaced")
    if folder.is_dir():
        check_ours(folder, DESCRIPTION, "heatmap")
    return folder


def make_group(
    config: HeatmapConfig,
    model: str,
    prompt: Prompt,
    picture: Picture | None,
    rewards: RewardSet,
    device: torch.device,
    console: Console,
) -> Group:
    """Samples or explains, and prints what should be known of it."""
    policy = load_model(model, device)
    notes = remarks.of_prompt(policy, prompt)
    with autocast(config.dtype, device):
        if picture is None:
            sampling = Sampling(config.num_images, config.guidance, config.temperature)
            generator = torch.Generator(device).manual_seed(config.seed)
            scored = sample_images(policy, prompt, rewards, sampling, generator)
        else:
            fitted = fit(picture, policy)
            notes += [f"{config.image}: {note}" for note in fitted.notes]
            scored = explain_images(policy, prompt, rewards, [fitted.image], config.temperature)
        group = Group(model, scored, phrase_maps(policy, scored, config.phrases))
    notes += remarks.of_group(scored) + [
        f"no map of '{phrase}': the prompt without it predicts every code alike"
        for phrase, own in group.phrases.items()
        if own.unmoved.all()
    ]
    console.print(f"[bold]{escape(model)}[/], {device}: {escape(heading(scored))}", soft_wrap=True)
    for note in notes:
        console.print(f"[yellow]{escape(note)}", soft_wrap=True)
    console.print(score_table(scored))
    return group


def score_table(scored: ScoredImages) -> Table:
    """A line per image, the best first."""
    table = Table()
    for column in ("image", *scored.scores, "reward", "advantage", "GenEval says"):
        table.add_column(column, justify="left" if column == "GenEval says" else "right")
    for i in best_first(scored):
        cells = ["–" if values[i] is None else f"{values[i]:.3f}" for values in scored.scores.values()]
        verdict = scored.verdicts[i]
        reason = "–" if verdict is None else getattr(verdict, "reason", "") or "correct"
        reward = f"{scored.rewards[i]:.3f}" if scored.judged else "–"
        advantage = f"{scored.advantage[i]:+.2f}" if scored.no_advantage is None else "–"
        table.add_row(str(i), *cells, reward, advantage, escape(reason))
    return table
