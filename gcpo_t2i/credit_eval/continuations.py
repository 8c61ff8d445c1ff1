"""The hours of `credit-eval`: continuations, call by call, on the disk every half a minute."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from gcpo_t2i.credit_eval.advantage import UNIT, Call, Tally, calls, departures, units
from gcpo_t2i.credit_eval.samples import Sampler, Samples, read_tensors, write_tensors

CONTINUATIONS = "continuations.safetensors"
SAVE_EVERY = 30.0  # s
OVERHEAD = 20  # codes that decoding and scoring an image take as long as, of the embedded model


def run(sampler: Sampler, samples: Samples, path: Path, console: Console) -> Tally:
    """Makes the continuations that are not in the file yet. Interrupted at any time, it has lost half a minute."""
    planned = units(departures(samples.tensors["sample_logp"].numpy()), sampler.config.continuations)
    todo = list(calls(planned, sampler.config.batch_size))
    tally = read_tally(path) if path.exists() else Tally.empty(*planned.shape)
    if tally.done == len(todo):
        return tally
    number = int(planned.sum()) * UNIT
    console.print(f"{number:,} continuations of {len(planned)} images, {tally.done / len(todo):.0%} of them are there")

    def cost(call: Call) -> int:
        return len(call.rows) * (planned.shape[1] - call.position + OVERHEAD)

    with _progress(console) as progress:
        task = progress.add_task("continue", total=sum(map(cost, todo)))
        progress.advance(task, sum(map(cost, todo[: tally.done])))
        saved = time.monotonic()
        for call in todo[tally.done :]:
            tally.add(call, sampler.continued(samples, call))
            progress.advance(task, cost(call))
            if time.monotonic() - saved > SAVE_EVERY:
                write_tally(tally, path)
                saved = time.monotonic()
    write_tally(tally, path)
    return tally


def _progress(console: Console) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    # over ten minutes: calls of one position follow each other, and the rate of other jobs on the machine changes
    return Progress(*columns, TextColumn("left:"), TimeRemainingColumn(), console=console, speed_estimate_period=600)


def write_tally(tally: Tally, path: Path) -> None:
    numbers = {"sums": tally.sums, "counts": tally.counts, "done": np.asarray([tally.done])}
    write_tensors({name: torch.from_numpy(array) for name, array in numbers.items()}, path)


def read_tally(path: Path) -> Tally:
    """UserError if the file is damaged."""
    found = read_tensors(path)
    return Tally(found["sums"].numpy(), found["counts"].numpy(), int(found["done"]))
