"""Training runs in parallel processes, and how far they are."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

POLL_SECONDS = 0.2
GRACE_SECONDS = 60  # for a stopped run to end its step and save
TAIL_BYTES = 8192  # of metrics.jsonl, enough for its last line


@dataclass(frozen=True)
class Run:
    """One training run of a comparison, in a folder of its own with its log beside it."""

    algorithm: str
    seed: int
    folder: Path
    program: tuple[str, ...] = ("train",)  # words of its command

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def log(self) -> Path:
        return self.folder.with_name(f"{self.name}.log")

    def finished(self) -> bool:
        """The model card is the last thing that a run writes."""
        return (self.folder / "policy" / "README.md").is_file()

    def command(self, settings: Path) -> list[str]:
        """Starts the run, or goes on with it."""
        own = ["--algorithm", self.algorithm, "--seed", str(self.seed), "--output_dir", str(self.folder)]
        go_on = ["--resume"] if (self.folder / "config.yaml").is_file() else []
        return [sys.executable, "-m", "gcpo_t2i", *self.program, "--config", str(settings), *own, *go_on]


def run_all(
    runs: Sequence[Run],
    settings: Path,
    steps: int,
    environments: Sequence[dict[str, str]],
    console: Console,
) -> dict[Run, str]:
    """Makes all runs that are not finished, as many at a time as there are environments, and each in one of them.

    Returns the runs that failed, each with the last line of its log. Ctrl-C and termination stop the running ones.
    """
    waiting = [run for run in runs if not run.finished()]
    free = list(range(len(environments)))
    active: dict[Run, tuple[subprocess.Popen[bytes], int]] = {}
    failed: dict[Run, str] = {}
    with _display(runs, steps, console) as show, _terminated_like_ctrl_c():
        try:
            while waiting or active:
                while waiting and free:
                    run, slot = waiting.pop(0), free.pop(0)
                    active[run] = _start(run, settings, environments[slot]), slot
                time.sleep(POLL_SECONDS)
                for run, (process, slot) in list(active.items()):
                    show(run, "")
                    if process.poll() is None:
                        continue
                    del active[run]
                    free.append(slot)
                    if process.returncode or not run.finished():
                        failed[run] = _last_words(run, process.returncode)
                        console.print(f"[red]{run.name} failed[/]: {failed[run]}", soft_wrap=True)
                    show(run, "[red]failed" if run in failed else "[green]finished")
        finally:
            _stop([process for process, _ in active.values()])
    return failed


def _start(run: Run, settings: Path, environment: dict[str, str]) -> subprocess.Popen[bytes]:
    with run.log.open("ab") as log:
        return subprocess.Popen(
            run.command(settings),
            env={**os.environ, **environment},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
        )


def _stop(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    for process in processes:
        process.terminate()
    for process in processes:
        try:
            process.wait(GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _last_words(run: Run, code: int) -> str:
    if code < 0:
        return f"killed by signal {-code} ({signal.Signals(-code).name}); too little memory for so many --jobs?"
    lines = [line for line in run.log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return lines[-1].strip() if lines else f"exit code {code}, and an empty log"


@contextmanager
def _terminated_like_ctrl_c() -> Iterator[None]:
    """`kill` and a closed terminal end this process the way Ctrl-C does, so that no run is left behind."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _display(runs: Sequence[Run], steps: int, console: Console) -> Iterator[Callable[[Run, str], None]]:
    """A bar for every run; yields a function that reads how far a run is and shows it with a word on its state."""
    columns = [TextColumn("{task.description}"), BarColumn(bar_width=20), MofNCompleteColumn(), TimeElapsedColumn()]
    with Progress(*columns, TextColumn("{task.fields[note]}"), console=console) as progress:
        tasks: dict[Run, TaskID] = {
            run: progress.add_task(run.name, total=steps, start=False, note="waiting") for run in runs
        }

        def show(run: Run, state: str) -> None:
            row = last_step(run.folder / "metrics.jsonl")
            if progress.tasks[tasks[run]].start_time is None:
                progress.start_task(tasks[run])
            reward = f"reward {row['reward']:.3f}" if row else "starting"
            progress.update(tasks[run], completed=row.get("step", 0), note=state or reward)
            if state:
                progress.stop_task(tasks[run])

        for run in runs:
            if run.finished():
                show(run, "[green]finished before")
        yield show


def last_step(path: Path) -> dict[str, Any]:
    """The newest whole line of a training step in metrics.jsonl; {} if there is none yet."""
    if not path.exists():
        return {}
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - TAIL_BYTES))
        lines = file.read().decode("utf-8", errors="replace").split("\n")
    for line in reversed(lines[:-1]):  # what stands after the last line end is half written
        try:
            row = json.loads(line)
        except json.JSONDecodeError:  # the first one may be cut
            continue
        if "reward" in row:
            return row
    return {}
