"""`gcpo-t2i compare`: several algorithms × seeds with one budget; a table, a figure, and intervals that are paired.

    runs/compare/
      compare.yaml              the shared settings; another comparison is refused
      grpo-seed0/ …             one run of `gcpo-t2i train` (or `cot train`) each, with its log in grpo-seed0.log
      compare.json .md .png     the results, of the runs that are finished

What is finished is not repeated and what is half done goes on, so that the same command again continues a comparison.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from gcpo_t2i.compare.figure import draw
from gcpo_t2i.compare.processes import Run, run_all
from gcpo_t2i.compare.results import Outcome, Row, as_json, cells, compare_outcomes, markdown, read_outcome
from gcpo_t2i.config import CompareConfig, CotTrainConfig, TrainConfig
from gcpo_t2i.errors import UserError
from gcpo_t2i.files import write_text
from gcpo_t2i.folders import check_output_dir, locked
from gcpo_t2i.parsing import load_config
from gcpo_t2i.resume import differences, settings_as_json
from gcpo_t2i.yaml_files import to_yaml

PER_RUN = ("algorithm", "seed", "output_dir")  # settings that a comparison gives to each run
PROGRAMS = {"images": ("train",), "texts": ("cot", "train")}
SAMPLES = {"images": "images", "texts": "answers"}
SETTINGS = "compare.yaml"
SCORES = 7  # columns of a score, before those of the effects
NOTE = (
    "Means over seeds and held-out prompts (every tag weighs the same), with 95 % intervals in brackets: bootstrap over seeds "
    "and, within tags, over prompts. Differences are paired by seed and by prompt. Images, answers: all that a run sampled "
    "in training. Minutes: of its training steps, beside the other runs."
)


def compare(config: CompareConfig) -> Path:
    """Makes the runs, writes `compare.json`, `.md` and `.png`, prints the table, and returns the folder.

    UserError for a folder with something else in it, and, at the end, for runs that failed.
    """
    folder = Path(config.output_dir)
    console = Console(highlight=False)
    shared = shared_settings(config)
    open_comparison(folder, shared, config.group)
    program = PROGRAMS[config.of]
    runs = [
        Run(name, seed, folder / f"{name}-seed{seed}", program) for seed in config.seeds for name in config.algorithms
    ]
    places = environments(config)
    console.print(f"{len(runs)} runs of {shared.steps} steps, {len(places)} at a time, results in {folder}")
    with locked(folder):
        failed = run_all(runs, folder / SETTINGS, shared.steps, places, console)
        outcomes = [read_outcome(run, shared.steps) for run in runs if run not in failed]
        if outcomes:
            report(folder, outcomes, config.algorithms, console, SAMPLES[config.of])
    if failed:
        first, words = next(iter(failed.items()))
        raise UserError(
            f"{len(failed)} of {len(runs)} runs failed ({', '.join(run.name for run in failed)}); {first.log} ends with: "
            f"{words}; the same command again repeats them and keeps the others"
        )
    return folder


def shared_settings(config: CompareConfig) -> TrainConfig | CotTrainConfig:
    """The training settings of all runs; what each gets of its own is set to its default."""
    defaults = type(config.runs)()
    return replace(config.runs, **{name: getattr(defaults, name) for name in PER_RUN})


def open_comparison(folder: Path, shared: TrainConfig | CotTrainConfig, group: str = "train") -> None:
    """Makes the folder and writes the shared settings. UserError if it holds a comparison with others, or anything else."""
    path = folder / SETTINGS
    if not path.is_file():
        check_output_dir(folder, overwrite=False, resume=None)
        folder.mkdir(parents=True, exist_ok=True)
        write_text(path, to_yaml(shared))
        return
    try:
        found = settings_as_json(load_config(path, type(shared)))
    except UserError as error:
        raise UserError(
            f"'{folder}' holds a comparison of other models ({error}); name another --output_dir"
        ) from error
    changed = differences(found, settings_as_json(shared))
    other = [f"{group}.{key} (there {there}, now {wanted})" for key, there, wanted in changed]
    if other:
        raise UserError(
            f"'{folder}' holds a comparison with other settings: {', '.join(other)}; take its own with --{group} {path}, or "
            "name another --output_dir"
        )


def environments(config: CompareConfig) -> list[dict[str, str]]:
    """What each of the runs that go on at a time gets of its own: threads, and on a machine with GPUs one of them."""
    threads = {"OMP_NUM_THREADS": str(config.threads)}
    gpus = _gpus(config.runs.device)
    if gpus:
        return [{**threads, "CUDA_VISIBLE_DEVICES": gpus[i % len(gpus)]} for i in range(config.jobs or len(gpus))]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return [threads] * (config.jobs or max(1, cores // config.threads))


def _gpus(device: str | None) -> list[str]:
    """Names for CUDA_VISIBLE_DEVICES, [] where runs use none, or one that is named in the settings."""
    if device is not None:
        return []
    import torch

    given = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    return given or [str(i) for i in range(torch.cuda.device_count())]


def report(
    folder: Path, outcomes: list[Outcome], algorithms: list[str], console: Console, samples: str = "images"
) -> None:
    """Tables to the terminal and to files, and the figure of the first score. `samples`: what runs are made of."""
    scores = {label: rows for label, rows in compare_outcomes(outcomes, algorithms).items() if rows}
    if not scores:
        raise UserError(
            "none of the scores of the evaluation applies to its prompts; use others, by --train.eval.rewards"
        )
    write_text(folder / "compare.json", json.dumps(as_json(scores), indent=2) + "\n")
    tables = [markdown(f"Held-out {label}", rows, samples) for label, rows in scores.items()]
    write_text(folder / "compare.md", "\n".join([*tables, f"{NOTE}\n"]))
    label, rows = next(iter(scores.items()))
    console.print(*_tables(f"Held-out {label}", rows, samples), NOTE)
    draw(folder / "compare.png", label, rows, outcomes)


def _tables(title: str, rows: list[Row], samples: str) -> Iterator[Table]:
    """Two that fit into a terminal: the scores, and the effects."""
    header, *lines = cells(rows, samples)
    parts = {title: list(range(SCORES))}
    if len(header) > SCORES:
        parts["Difference after training"] = [0, *range(SCORES, len(header))]
    for name, columns in parts.items():
        table = Table(title=name, title_justify="left", box=None, padding=(0, 2, 0, 0), pad_edge=False)
        for column in columns:
            table.add_column(header[column], justify="right" if column else "left")
        for line in lines:
            table.add_row(*(escape(line[column].replace(" [", "\n[")) for column in columns))
        yield table
