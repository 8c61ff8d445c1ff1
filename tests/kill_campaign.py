"""Kills training runs with SIGKILL, resumes them, and compares them with one that was left alone.

    python -m tests.kill_campaign FOLDER --kills 200

Every run is a fork of this process, which has no threads, and has imported everything, so that a kill at a random time
falls into the run and not into its imports. Half of the kills come from outside at a random time, half from inside before
a random write. The last line is JSON: how many, where, and what was lost.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import gcpo_t2i.models.llamagen
import gcpo_t2i.train
from gcpo_t2i import checkpoint, files, report
from gcpo_t2i.cli import main as gcpo_t2i
from tests.test_train import TIMES
from tests.tiny import BRIGHT, train_command, write_tiny_policy

WRITES = (
    (checkpoint, "save_file"),
    (checkpoint.torch, "save"),
    (files, "_sync"),
    (files.shutil, "rmtree"),
    (report.Report, "_write"),
    (report.Report, "finish"),
    (Path, "replace"),
)


def fork(arguments: list[str], log: Path, prepare: Callable[[], None] = lambda: None) -> int:
    """Starts the command in a process of its own and returns its number."""
    child = os.fork()
    if child == 0:
        out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(out, 1)
        os.dup2(out, 2)
        prepare()
        os._exit(gcpo_t2i(arguments))
    return child


def exit_code(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def die_before_write(number: int, note: Path) -> None:
    """The process will kill itself before its `number`-th write, and leaves in `note` what that was."""
    count = 0

    def wrap(name: str, call: Any) -> Any:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            count += 1
            if count == number:
                note.write_text(name)
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*args, **kwargs)

        return wrapper

    for owner, name in WRITES:
        setattr(owner, name, wrap(name, getattr(owner, name)))


def contents(run: Path) -> tuple[list[dict[str, Any]], dict[str, bytes]]:
    """The rows of metrics.jsonl without times, and the files of the policy."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    weights = {
        str(path.relative_to(run)): path.read_bytes() for path in sorted((run / "policy").rglob("*.safetensors"))
    }
    return [{key: value for key, value in row.items() if key not in TIMES} for row in rows], weights


def count_writes(arguments: list[str], folder: Path) -> tuple[int, float]:
    """How many writes a whole run makes, and its seconds."""
    counted = folder / "writes"

    def prepare() -> None:
        def wrap(call: Any) -> Any:
            def wrapper(*args: Any, **kwargs: Any) -> Any:
                with counted.open("a") as file:
                    file.write(".")
                return call(*args, **kwargs)

            return wrapper

        for owner, name in WRITES:
            setattr(owner, name, wrap(getattr(owner, name)))

    started = time.monotonic()
    if exit_code(fork([*arguments, "--output_dir", str(folder / "whole")], folder / "whole.log", prepare)):
        raise SystemExit((folder / "whole.log").read_text())
    return len(counted.read_text()), time.monotonic() - started


def campaign(arguments: list[str], folder: Path, kills: int, rng: random.Random) -> dict[str, Any]:
    writes, seconds = count_writes(arguments, folder)
    expected = contents(folder / "whole")
    where: Counter[str] = Counter()
    done, inside, resumed, lost = 0, 0, 0, []
    note = folder / "note"
    while done < kills:
        run, log = folder / f"run-{done}", folder / f"run-{done}.log"
        resume = ["--output_dir", str(run)]
        for _ in range(rng.choice((1, 1, 2))):  # some are killed again while they go on
            note.unlink(missing_ok=True)
            if rng.random() < 0.5:
                number = rng.randrange(1, writes + 1)
                child = fork([*arguments, *resume], log, lambda number=number: die_before_write(number, note))
            else:
                child = fork([*arguments, *resume], log)
                time.sleep(rng.uniform(0, seconds))
                os.kill(child, signal.SIGKILL)
            if exit_code(child) == -signal.SIGKILL:
                done += 1
                where[note.read_text() if note.exists() else "random time"] += 1
                inside += bool(list(run.glob(".partial-checkpoint-*")))
                resumed += bool(list(run.glob("checkpoint-*")))
            resume = ["--output_dir", str(run), "--resume" if (run / "config.yaml").exists() else "--overwrite"]
        if exit_code(fork([*arguments, *resume], log)) or contents(run) != expected:
            lost.append(f"{run.name}: {log.read_text()[-500:]}")
        elif list(run.glob(".partial-*")) + list(run.glob(".deleted-*")):
            lost.append(f"{run.name}: left behind {[path.name for path in run.glob('.*')]}")
        else:
            shutil.rmtree(run)
    return {
        "kills": done,
        "where": dict(where),
        "inside a checkpoint": inside,
        "resumed from a checkpoint": resumed,
        "lost": lost,
    }


def set_up(folder: Path) -> list[str]:
    """A run of six steps with three checkpoints, and an evaluation in the middle."""
    rewards = folder / "my_rewards.py"
    rewards.write_text(BRIGHT)
    command = train_command(write_tiny_policy(folder), rewards, folder)
    return [*command, "--steps", "6", "--save_every", "2", "--eval_every", "3"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="an empty folder, for the runs")
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)  # before anything computes: a fork does not take threads along
    print(json.dumps(campaign(set_up(args.folder), args.folder, args.kills, random.Random(args.seed))))


if __name__ == "__main__":
    main()
