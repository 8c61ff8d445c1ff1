"""A plan as tables for the terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from gcpo_t2i.config import PlanConfig
from gcpo_t2i.plan.counts import Counts
from gcpo_t2i.plan.memory import Memory
from gcpo_t2i.plan.timing import Times

if TYPE_CHECKING:
    from gcpo_t2i.plan import Plan

MEMORY_NOTES = {
    "libraries": "Python and libraries, measured",
    "rewards": "models and libraries of the rewards, measured",
    "weights": "float32; frozen beside adapters: as the layers",
    "reference": "the starting model, for the KL term",
    "gradients": "of the trained parameters",
    "optimizer": "AdamW, two moments",
    "cache": "keys and values of a rollout, all branches",
    "engine": "weights of a rollout: fewer, larger matrices",
    "image_decoder": "feature maps, while no cache is held",
    "log_probs": "tokens, log-probs, entropy, credit of a step",
    "logits": "of a micro-batch, or of what fits the scoring budget",
    "activations": "of a micro-batch, for the backward pass",
    "attention": "matrices of a micro-batch; none with fused attention",
}


def gigabytes(size: int) -> str:
    return f"{size / 2**30:.2f} GB"


def megabytes(size: int) -> str:
    return f"{size / 2**20:.{0 if size >= 2**20 else 1}f}"


def clock(seconds: float) -> str:
    """12.3 s, 4.5 min or 6.7 h."""
    if seconds < 120:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def show(config: PlanConfig, plan: Plan) -> None:
    console = Console()
    processes = f"{config.processes} process" + ("es" if config.processes > 1 else "")
    console.print(
        f"[bold]{config.algorithm}[/] on {config.model}: {plan.sizes.parameters / 1e6:.1f} M parameters, "
        f"{plan.sizes.trainable / 1e6:.1f} M of them trained; {plan.device}, {processes}\n"
    )
    console.print(_batch_table(config, plan.counts))
    console.print(_memory_table(plan.memory, plan.free_memory))
    if plan.times is not None:
        console.print(_time_table(config, plan.counts, plan.times, plan.checkpoint_bytes))
        console.print(
            "Measured here, at these batch sizes: positions of a rollout at three cache lengths, a micro-batch, an "
            "optimizer step, images, rewards, a write to disk. The rest is scaled from these. Not counted: imports, "
            "loading, messages between processes. Where other work runs now, times come out too long.",
            style="dim",
        )
    for warning in plan.warnings:
        console.print(f"[yellow]warning:[/] {warning}", highlight=False)


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", show_header=False, box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index == 1 else "left")
    return table


def _batch_table(config: PlanConfig, counts: Counts) -> Table:
    table = _table("A step" + (", per process" if config.processes > 1 else ""), "", "", "")
    smaller = f", the last of {counts.last_micro_batch}" if counts.last_micro_batch != counts.micro_batch else ""
    chosen = " (auto)" if config.micro_batch_size == "auto" else ""
    fewer = f", the last of {counts.last_part}" if counts.last_part != counts.at_once else ""
    rows = [
        ("images", counts.images, f"{counts.prompts} prompts × {config.group_size}"),
        ("tokens", counts.tokens, f"{counts.positions} of each image"),
        (
            "parts that are sampled in turn",
            counts.parts if counts.parts > 1 else 0,
            f"of {counts.at_once} images{fewer}",
        ),
        ("rows that decode at once", counts.rows, f"{counts.at_once} images × {counts.branches} branches"),
        ("micro-batches per update", counts.micro_batches, f"of {counts.micro_batch}{smaller}{chosen}"),
        ("optimizer updates", counts.updates, ""),
        ("forward passes", counts.forward_passes, "of which"),
        ("  sampling", counts.parts * counts.positions, f"a position of {counts.rows} rows each"),
        ("  policy", counts.gradient_passes, "with a backward pass"),
        ("  reference", counts.reference_passes, "for the KL"),
        ("  null branch", counts.null_passes, "of the guided mixture"),
        ("  credit scored again", counts.replay_passes, "with and without the prompt"),
    ]
    for name, number, note in rows:
        if number:
            table.add_row(name, str(number), note)
    if counts.rounds > 1:
        table.add_row("sampling rounds", f"1 to {counts.rounds}", "groups without signal are replaced")
    table.add_row()
    return table


def _memory_table(memory: Memory, free: int | None) -> Table:
    table = _table("Memory of a process", "", "MB", "")
    for name, size in memory.parts().items():
        if size:
            table.add_row(name.replace("_", " "), megabytes(size), MEMORY_NOTES[name])
    how = (
        "the larger of rollout and update, and the rest"
        if memory.on_gpu
        else "the sum: what is freed is not given back"
    )
    known = "; rewards not counted" if free is None else f"; {gigabytes(free)} free"
    table.add_row("[bold]peak", f"[bold]{megabytes(memory.peak)}", how + known)
    table.add_row()
    return table


def _time_table(config: PlanConfig, counts: Counts, times: Times, checkpoint_bytes: int) -> Table:
    table = _table("Time", "", "", "")
    images = counts.images * config.processes
    beside = "; less where it goes on beside sampling" if counts.parts > 1 else ""
    notes = {
        "rollout": f"{counts.parts * counts.positions} positions",
        "decode": "images from codes",
        "reward": ", ".join(reward.name for reward in config.rewards) + beside,
        "update": f"{counts.gradient_passes} micro-batches",
        "replay": f"{counts.replay_passes} passes",
        "evaluation": f"each; {counts.evaluations} of {counts.eval_images} images",
        "checkpoint": f"each; {counts.checkpoints}, {gigabytes(counts.checkpoints * checkpoint_bytes)} in all",
        "step": f"{images / times.step:.1f} images/s",
    }
    for name, seconds in times.parts().items():
        if seconds:
            table.add_row(f"[bold]{name}" if name == "step" else name, clock(seconds), notes[name])
    longest = times.run(counts, counts.rounds)
    most = f", up to {clock(longest)} if every step takes {counts.rounds} rounds" if counts.rounds > 1 else ""
    table.add_row("[bold]run", f"[bold]{clock(times.run(counts))}", f"{counts.steps} steps{most}")
    table.add_row()
    return table
