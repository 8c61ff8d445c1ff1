"""What a bench found, as tables for the terminal and as a figure."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from gcpo_t2i.bench.contest import Result
from gcpo_t2i.config import BenchConfig
from gcpo_t2i.files import whole_file
from gcpo_t2i.plan.show import megabytes

if TYPE_CHECKING:
    from gcpo_t2i.bench.command import Found

TITLES = {
    "rollout": "Rollout: {images} images of {codes} codes, guidance {guidance:g}",
    "step": "Step: {images} images of {codes} codes, guidance {guidance:g}, micro-batches of {micro}",
    "log_probs": "Log-probs of an update: 16 images of 576 codes, vocabulary 16384",
}
AXES = {"group": "images per prompt", "codes": "codes per image", "vocabulary": "vocabulary", "width": "width"}


def show(console: Console, config: BenchConfig, found: Found) -> None:
    facts, seconds = found.machine, "processor seconds" if config.busy else "seconds"
    console.print(
        f"[bold]{config.shape}[/] on {facts['device']}, {facts['threads']} threads, torch {facts['torch']}, transformers "
        f"{facts['transformers']}; {facts['bytes_per_second'] / 1e9:.3g} GB/s copied; {seconds}, medians of {config.repeats}\n",
        soft_wrap=True,
    )
    for part, results in found.results.items():
        title = TITLES[part].format(
            images=found.images, codes=found.codes, guidance=config.guidance, micro=config.micro_batch_size
        )
        console.print(f"[bold]{title}")
        console.print(_contest(results, None if part == "log_probs" else found))
    if "rollout" in found.results and found.roofline_seconds is not None:
        share = found.roofline_seconds / found.results["rollout"]["ours"].total
        console.print(
            f"Reading weights and filled cache at the speed of a copy: {found.roofline_seconds:.3g} s, {share:.0%} of ours.\n"
        )
    if found.rows:
        console.print("[bold]Scaling of one step, measured and by the fitted model")
        console.print(_scaling(found))
        console.print(
            f"[bold]Images/s of all devices, predicted: {found.images} images per device, all weights trained"
        )
        console.print(_predictions(found))


def _contest(results: dict[str, Result], found: Found | None) -> Table:
    """A way per column; below the seconds how they compare with ours, where there is one that is called so."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("")
    for name in results:
        table.add_column(name, justify="right")
    first = next(iter(results.values()))
    for phase in first.seconds:
        if any(result.seconds[phase] for result in results.values()):
            table.add_row(phase, *(f"{result.seconds[phase]:.3g}" for result in results.values()))
    if len(first.seconds) > 1:
        table.add_row("[bold]all", *(f"[bold]{result.total:.3g}" for result in results.values()))
    table.add_row("× ours", *(f"{result.total / _ours(results, name).total:.2f}" for name, result in results.items()))
    if found is not None:
        rates = [found.images / result.total for result in results.values()]
        table.add_row("images/s", *(f"{rate:.3g}" for rate in rates))
        table.add_row("codes/s", *(f"{rate * found.codes:.4g}" for rate in rates))
    table.add_row("peak MB on top", *(megabytes(result.peak_bytes) for result in results.values()))
    table.add_row()
    return table


def _ours(results: dict[str, Result], name: str) -> Result:
    """That a way is compared with: ours under the same head, where there are several."""
    twin = name.replace("plain,", "ours,") if "," in name else "ours"
    return results.get(twin, results[name])


def _scaling(found: Found) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for column in ("", "", "images", "rollout (s)", "model", "update (s)", "model", "cache (MB)"):
        table.add_column(column, justify="left" if column == "" else "right")
    assert found.model is not None
    last = ""
    for row in found.rows:
        seconds = (f"{number:.3g}" for number in (row.rollout, found.model.rollout(row.load)))
        updates = (f"{number:.3g}" for number in (row.update, found.model.update(row.load)))
        name = AXES[row.axis] if row.axis != last else ""
        table.add_row(name, str(row.value), str(row.images), *seconds, *updates, megabytes(row.cache_bytes))
        last = row.axis
    table.add_row()
    return table


def _predictions(found: Found) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    counts = list(next(iter(found.predictions.values())))
    for column in ("", *(f"{count} device" + ("s" if count > 1 else "") for count in counts)):
        table.add_column(column, justify="right" if column else "left")
    for name, steps in found.predictions.items():
        rates = [f"{count * found.images / seconds:.3g}" for count, seconds in steps.items()]
        table.add_row(name, *rates)
    return table


def draw(path: Path, found: Found) -> None:
    """Writes a PNG: seconds of rollout and update over each axis, dots measured and lines of the model."""
    from matplotlib.figure import Figure  # pyright: ignore[reportMissingImports]

    assert found.model is not None
    figure = Figure(figsize=(4.0 * len(AXES), 3.6), layout="constrained")
    panels: Any = figure.subplots(1, len(AXES), squeeze=False, sharey=True)[0]
    for axes, (axis, label) in zip(panels, AXES.items(), strict=True):
        rows = [row for row in found.rows if row.axis == axis]
        values = [row.value for row in rows]
        for color, name, times, model in (
            ("C0", "rollout", [row.rollout for row in rows], [found.model.rollout(row.load) for row in rows]),
            ("C1", "update", [row.update for row in rows], [found.model.update(row.load) for row in rows]),
        ):
            axes.loglog(values, times, "o", color=color, label=name)
            axes.loglog(values, model, "-", color=color, linewidth=1)
        axes.set_xticks(values, [str(value) for value in values])
        axes.minorticks_off()
        axes.set_xlabel(label)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("seconds per step")
    panels[0].legend(frameon=False, fontsize="small", title="dots measured, lines fitted", title_fontsize="small")
    with whole_file(path) as partial:
        figure.savefig(partial, dpi=150, format="png")
