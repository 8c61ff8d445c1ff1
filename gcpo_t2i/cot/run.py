"""What a run leaves in its folder, and what it shows while it goes on.

config.yaml               every setting; --config reads it
metrics.jsonl             one line per step, what TRL logs, and one per evaluation
eval/step-000000.jsonl    every answer of an evaluation
checkpoint-50/ …          TRL's, with save_every, and in settings.json the settings it was made with
policy/                   the trained model and its tokenizer
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers import TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from gcpo_t2i.config import CotTrainConfig
from gcpo_t2i.cot.evaluation import Evaluation
from gcpo_t2i.errors import UserError
from gcpo_t2i.files import write_text
from gcpo_t2i.folders import LOCK, check_output_dir, locked, next_run_dir, remove_output
from gcpo_t2i.image_scores import scores_path
from gcpo_t2i.report import run_progress, truncate_metrics
from gcpo_t2i.resume import allowed_changes, settings_as_json
from gcpo_t2i.yaml_files import read_yaml

CONFIG = "config.yaml"
METRICS = "metrics.jsonl"
SETTINGS = "settings.json"
# What may be another when a run goes on: settings that no weight depends on, and those that a run may need to get through.
FREE = ("output_dir", "resume", "overwrite", "save_every", "eval")
INEXACT = ("steps", "micro_batch_size", "device", "dtype")


@contextmanager
def opened_folder(config: CotTrainConfig) -> Iterator[Path]:
    """The run's folder, made if it is not there, and locked. If it was, and the run is refused before it has a result, it is
    taken away again.

    UserError if it holds what neither flag allows to touch, or another process is in it.
    """
    folder = Path(config.output_dir) if config.output_dir else next_run_dir(f"cot_{config.algorithm}")
    check_output_dir(folder, overwrite=config.overwrite, resume=config.resume)
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder):
        try:
            yield folder
        except UserError:
            if made and {entry.name for entry in folder.iterdir()} <= {LOCK, CONFIG}:
                shutil.rmtree(folder)
                with suppress(OSError):  # by now another run has begun beside it
                    for path in made[1:]:
                        path.rmdir()
            raise


def clear(folder: Path) -> None:
    remove_output(folder, CONFIG, "run")


def to_resume(folder: Path, config: CotTrainConfig) -> tuple[str | None, list[str]]:
    """The newest checkpoint, and notes on settings that make it another run from there on. Without a checkpoint the run starts
    again, and what it wrote is deleted.

    UserError if it never began, or began with settings that `config` contradicts.
    """
    if not (folder / CONFIG).is_file():
        raise UserError(f"output folder '{folder}' holds no run to resume; drop --resume, and name an empty folder")
    path = get_last_checkpoint(str(folder))
    if path is None:
        clear(folder)
        return None, []
    kept = Path(path) / SETTINGS  # not config.yaml, which may have been edited since
    settings = json.loads(kept.read_text(encoding="utf-8")) if kept.is_file() else read_yaml(folder / CONFIG)
    changes = allowed_changes(str(folder), settings, config, FREE, INEXACT)
    truncate_metrics(folder / METRICS, int(path.rpartition("-")[2]))
    return path, [f"{change}: what comes is not exactly what would have come" for change in changes.values()]


def add_row(folder: Path, row: dict[str, Any]) -> None:
    with (folder / METRICS).open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def write_evaluation(folder: Path, step: int, evaluation: Evaluation, label: str) -> None:
    """One line per answer, in the format of image evaluations; then the row of the mean."""
    path = scores_path(folder, step)
    path.parent.mkdir(exist_ok=True)
    each = len(evaluation.scores) // len(evaluation.questions)
    lines = []
    for place, (text, score) in enumerate(zip(evaluation.answers, evaluation.scores, strict=True)):
        question = evaluation.questions[place // each]
        row = {"prompt": question["question"], "tag": question.get("tag"), "sample": place % each}
        lines.append(json.dumps({**row, "scores": {label: score}, "text": text}, ensure_ascii=False) + "\n")
    write_text(path, "".join(lines))
    add_row(folder, {"step": step, f"eval/{label}": evaluation.mean, f"eval/{label}_ci95": evaluation.ci95})


def write_card(folder: Path, config: CotTrainConfig, label: str, found: Sequence[Evaluation]) -> None:
    """The policy's model card, the last thing that a run writes. `found`: the evaluations, of which there may be none."""
    scores = [f"{one.mean:.3f} ± {one.ci95:.3f}" for one in found]
    table = [f"| held-out {label} | {' | '.join(scores)} |"] if len(scores) == 2 else []
    lines = [
        *("---", "library_name: transformers", "pipeline_tag: text-generation", "---"),
        f"# {config.model} after {config.steps} steps of {config.algorithm}",
        "",
        f"Trained with `gcpo-t2i cot train --config {folder / CONFIG}` (seed {config.seed}), "
        f"{config.questions_per_step} questions × {config.group_size} answers per step.",
        "",
        *(["| | before | after (95 %) |", "|---|---|---|", *table, ""] if table else []),
    ]
    write_text(folder / "policy" / "README.md", "\n".join(lines))


class Progressing(TrainerCallback):
    """Rows of metrics and a bar, in place of TRL's lines of output, and settings in checkpoints; of the main process only."""

    def __init__(self, folder: Path, config: CotTrainConfig, console: Console) -> None:
        self.folder, self.settings = folder, settings_as_json(config)
        self.answers = config.questions_per_step * config.group_size
        self.bar = run_progress(console)

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.is_world_process_zero:
            self.bar.start()
            self.task = self.bar.add_task("train", total=state.max_steps, completed=state.global_step, note="")

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        if not state.is_world_process_zero or not logs or "loss" not in logs:
            return
        row = {"step": state.global_step, **{key: value for key, value in logs.items() if key != "epoch"}}
        if row.get("step_time"):
            row["answers_per_second"] = self.answers / row["step_time"]
        add_row(self.folder, row)
        if "reward" in row:  # not there in a second update with the same answers
            self.bar.update(self.task, note=f"reward {row['reward']:.3f} entropy {row['entropy']:.2f}")
        self.bar.update(self.task, completed=state.global_step)

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.is_world_process_zero:
            write_text(self.folder / f"checkpoint-{state.global_step}" / SETTINGS, json.dumps(self.settings, indent=1))

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.bar.stop()
