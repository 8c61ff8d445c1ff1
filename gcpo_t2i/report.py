"""What a run tells: `metrics.jsonl`, trackers, the live display, sample grids, and the summary at the end."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from accelerate import Accelerator
from PIL import Image
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor

from gcpo_t2i.config import TrainConfig
from gcpo_t2i.errors import UserError
from gcpo_t2i.evaluate import Evaluation
from gcpo_t2i.files import whole_file, whole_folder, write_text
from gcpo_t2i.image_scores import scores_path, write_scores
from gcpo_t2i.maps.training import grid_with_maps
from gcpo_t2i.models.policy import Policy
from gcpo_t2i.monitor import Monitor
from gcpo_t2i.processes import Processes
from gcpo_t2i.rollout import Batch
from gcpo_t2i.run import Run
from gcpo_t2i.sharding import is_wanted

Metrics = dict[str, Any]

TRACKER_PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb", "trackio": "trackio"}
GRID_PROMPTS = 8  # rows of a sample grid


def _trackio_image(tracker: Any, image: Image.Image, step: int) -> None:
    import trackio  # pyright: ignore[reportMissingImports]

    tracker.log({"samples": trackio.Image(image)}, step=step)


SEND_IMAGE: dict[str, Callable[[Any, Image.Image, int], None]] = {
    "tensorboard": lambda tracker, image, step: tracker.log_images(
        {"samples": np.asarray(image)[None]}, step, dataformats="NHWC"
    ),
    "wandb": lambda tracker, image, step: tracker.log_images({"samples": [image]}, step),
    "trackio": _trackio_image,
}


def truncate_metrics(path: Path, step: int) -> None:
    """Drops the rows after `step`, which a run that goes on from there will write again."""
    if not path.exists():
        return
    rows = [line for line in path.read_text(encoding="utf-8").splitlines() if _row_step(line) <= step]
    write_text(path, "".join(f"{row}\n" for row in rows))


def _row_step(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except json.JSONDecodeError:
        return float("inf")  # the last line of an interrupted run may be half written


def run_progress(console: Console) -> Progress:
    """The bar of a run: task, steps, times, and a note."""
    return Progress(
        TextColumn("[bold]{task.description:>8}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
        console=console,
    )


class Report:
    """Everything that leaves the training loop goes through here; only the main process writes and shows."""

    def __init__(self, config: TrainConfig, run: Run, accelerator: Accelerator, start: int) -> None:
        self.config, self.run, self.folder, self.accelerator, self.start = config, run, run.folder, accelerator, start
        self.main = accelerator.is_main_process
        self.console = Console(quiet=not self.main)
        self.evaluations: list[tuple[int, Metrics]] = []
        self.monitor = Monitor()
        self.progress = run_progress(self.console)

    def __enter__(self) -> Report:
        for name in self.config.log.report_to:
            _require_tracker(name)
        self.accelerator.log_with = []
        if self.config.log.report_to:
            self._start_trackers()
        if self.main:
            truncate_metrics(self.folder / "metrics.jsonl", self.start if self.run.checkpoint else -1)
            self.evaluations = _read_evaluations(self.folder / "metrics.jsonl")
            self.monitor = Monitor(row for row in _read_rows(self.folder / "metrics.jsonl") if "reward" in row)
        processes = Processes.of(self.accelerator)
        # All must know which are made, to make the others together.
        self.evaluations = processes.gather(self.evaluations)[0]
        config, where = self.config, str(self.accelerator.device)
        if processes.count > 1:
            where = f"{processes.count} processes{', sharded' if is_wanted(config.lora) else ''} on {where}"
        self.console.print(
            f"[bold]{config.algorithm}[/] on {config.model}: {config.steps} steps of {config.prompts_per_step} prompts × "
            f"{config.group_size} images, guidance {config.guidance:g}, {where}, results in {self.folder}"
        )
        self.progress.start()
        self.bar = self.progress.add_task("train", total=config.steps, completed=self.start, note="")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.progress.stop()
        self.accelerator.end_training()

    def _start_trackers(self) -> None:
        from accelerate.tracking import filter_trackers

        names = filter_trackers(list(self.config.log.report_to), self.folder)
        self.accelerator.log_with = names
        self.accelerator.project_configuration.logging_dir = str(self.folder)
        self.accelerator.init_trackers(self.config.log.project, config=_flat(asdict(self.config)))

    @property
    def evaluated(self) -> set[int]:
        """The steps after which an evaluation is there."""
        return {step for step, _ in self.evaluations}

    @contextmanager
    def task(self, name: str, total: int) -> Iterator[Callable[[int], None]]:
        """A second bar while something other than training goes on; yields a function that takes what is done."""
        bar = self.progress.add_task(name, total=total, note="")
        try:
            yield lambda done: self.progress.update(bar, completed=done)
        finally:
            self.progress.remove_task(bar)

    def step(self, step: int, metrics: Metrics, batch: Batch, maps: Tensor) -> None:
        alarms = self.monitor.judge({"step": step, **metrics})
        self._write({"step": step, **metrics, "monitor/warnings": len(self.monitor.active)})
        kl = "" if metrics["kl"] is None else f" kl {metrics['kl']:.4f}"
        note = f"reward {metrics['reward']:.3f}{kl} entropy {metrics['entropy']:.2f} {metrics['images_per_second']:.1f} img/s"
        if self.monitor.active:
            note = f"[yellow]warning: {escape(', '.join(self.monitor.active))}[/] {note}"  # first: a narrow screen cuts the end
        self.progress.update(self.bar, completed=step, note=note)
        for alarm in alarms:
            self.warn(f"step {step}: {alarm.text}")
        if metrics["skipped"]:
            self.console.print(f"[yellow]step {step}: the loss was not finite, update skipped")
        every = self.config.log.images_every
        if self.main and every and (step % every == 0 or step == self.config.steps):
            self._save_samples(step, grid_with_maps(batch, maps, GRID_PROMPTS))

    def warn(self, text: str) -> None:
        self.console.print(f"[yellow]{escape(text)}")

    def _save_samples(self, step: int, samples: Image.Image) -> None:
        path = self.folder / "samples" / f"step-{step:06d}.png"
        path.parent.mkdir(exist_ok=True)
        with whole_file(path) as partial:
            samples.save(partial, format="PNG")
        for tracker in self.accelerator.trackers:
            SEND_IMAGE[tracker.name](tracker, samples, step)

    def evaluation(self, step: int, evaluation: Evaluation) -> None:
        metrics = evaluation.metrics()
        self.evaluations.append((step, metrics))
        if self.main:
            write_scores(scores_path(self.folder, step), evaluation)
        self._write({"step": step, **metrics})  # last: an evaluation whose row is there is not made again
        main = next(iter(evaluation.scores))
        if f"eval/{main}" in metrics:
            score, half = metrics[f"eval/{main}"], metrics[f"eval/{main}_ci95"]
            self.console.print(f"held-out {main} after step {step}: [bold]{score:.3f}[/] ± {half:.3f}")

    def _write(self, row: Metrics) -> None:
        if not self.main:
            return
        with (self.folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
            file.flush()
            os.fsync(file.fileno())  # a checkpoint must not outlive the rows of the steps before it
        if self.config.log.report_to:
            self.accelerator.log(
                {key: value for key, value in row.items() if key != "step" and value is not None}, step=row["step"]
            )

    def finish(self, policy: Policy) -> None:
        """Saves the policy with its model card, and prints what came of the run and where to look next."""
        self.progress.stop()
        if not self.main:
            return
        with whole_folder(self.folder / "policy") as folder:
            policy.save_pretrained(folder)
            (folder / "README.md").write_text(self._model_card(), encoding="utf-8")
        self.console.print(self._table())
        self._print_warnings()
        self.console.print(
            f"\nmetrics  {self.folder / 'metrics.jsonl'}\nsamples  {self.folder / 'samples'}\n"
            f"policy   {self.folder / 'policy'}\n"
            + (f"adapter  {self.folder / 'adapter'}\n" if self.config.lora.rank else "")
            + "\nLook next:\n"
            f'  gcpo-t2i sample --model {self.folder / "policy"} --prompt "a photo of a red circle and a blue square"\n'
            f"  gcpo-t2i train --algorithm grpo --seed {self.config.seed}        # the same run with uniform credit"
        )

    def _table(self) -> Table:
        (first, before), (last, after) = self.evaluations[0], self.evaluations[-1]
        table = Table(title="Held-out prompts", title_justify="left")
        for column in ("score", f"step {first}", f"step {last}", "change"):
            table.add_column(column, justify="left" if column == "score" else "right")
        for key in (key for key in after if not key.endswith("_ci95") and key in before):
            change = after[key] - before[key]
            cells = [f"{row[key]:.3f} ± {row[f'{key}_ci95']:.3f}" for row in (before, after)]
            table.add_row(key.removeprefix("eval/"), *cells, f"{change:+.3f}")
        return table

    def _print_warnings(self) -> None:
        if not self.monitor.alarms:
            return
        self.console.print("\n[bold yellow]Is the reward being hacked?[/] Look at the samples before you trust it.")
        for alarm in self.monitor.alarms.values():
            since = (
                f"since step {alarm.step}" if alarm.kind in self.monitor.active else f"at step {alarm.step}, no longer"
            )
            self.console.print(f"\n[yellow]{escape(alarm.kind)}[/] ({since}): {escape(alarm.text)}")

    def _model_card(self) -> str:
        (_, before), (step, after) = self.evaluations[0], self.evaluations[-1]
        lines = [
            f"| {key.removeprefix('eval/')} | {before[key]:.3f} | {after[key]:.3f} ± {after[f'{key}_ci95']:.3f} |"
            for key in after
            if not key.endswith("_ci95") and key in before
        ]
        config = self.config
        return "\n".join(
            [
                "---",
                "library_name: gcpo-t2i",
                "pipeline_tag: text-to-image",
                "---",
                f"# {config.model} after {step} steps of {config.algorithm}",
                "",
                f"Trained with `gcpo-t2i train --config {self.folder / 'config.yaml'}` (seed {config.seed}), "
                f"{config.prompts_per_step} prompts × {config.group_size} images per step, guidance {config.guidance:g}.",
                "",
                "```python",
                "from gcpo_t2i.models import load_policy",
                "",
                f'policy = load_policy("{self.folder / "policy"}")',
                "```",
                "",
                "| held-out score | before | after (95 %) |",
                "|---|---|---|",
                *lines,
                "",
            ]
        )


def _require_tracker(name: str) -> None:
    from importlib.util import find_spec

    if find_spec(TRACKER_PACKAGES[name]) is None:
        raise UserError(f"report_to '{name}' needs a package that is missing; pip install 'gcpo-t2i[{name}]'")


def _read_rows(path: Path) -> list[Metrics]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def _read_evaluations(path: Path) -> list[tuple[int, Metrics]]:
    return [
        (row["step"], {key: value for key, value in row.items() if key != "step"})
        for row in _read_rows(path)
        if any(key.startswith("eval/") for key in row)
    ]


def _flat(settings: Any, prefix: str = "") -> dict[str, Any]:
    """Nested settings as one level of simple values, which is all that every tracker takes."""
    if not isinstance(settings, dict):
        simple = isinstance(settings, (int, float, str, bool))
        return {prefix.rstrip("."): settings if simple else json.dumps(settings)}
    return {key: value for name, inner in settings.items() for key, value in _flat(inner, f"{prefix}{name}.").items()}
