"""Parts of one piece of work that are made one after another: while one is made, the one before it is used."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any, TypeVar

import torch

P = TypeVar("P")
T = TypeVar("T")
U = TypeVar("U")


def overlapped(
    parts: Sequence[P], make: Callable[[P], T], use: Callable[[T], U], device: torch.device
) -> tuple[list[T], list[U], float]:
    """`make` of every part, `use` of each of these, both in turn, and the seconds for which there was only `use` to wait for.

    While a part is made on `device`, a thread uses the one before it, without gradient. The last part is used by the caller's
    own thread: one part needs no other. An error of `use` is raised here, when the part that is being made is done.
    """

    def finished(part: P) -> T:
        result = make(part)
        if device.type == "cuda":
            torch.cuda.current_stream(device).synchronize()  # another stream would read what is not there yet
        return result

    made, used, waited = [finished(parts[0])], [], 0.0

    def wait(result: Callable[[], U]) -> None:
        nonlocal waited
        start = time.perf_counter()
        used.append(result())
        waited += time.perf_counter() - start

    with ThreadPoolExecutor(1) as worker:  # starts its thread with the first call
        for part in parts[1:]:
            pending = worker.submit(_beside, device, use, made[-1])
            made.append(finished(part))
            wait(pending.result)
    wait(lambda: use(made[-1]))
    return made, used, waited


def _beside(device: torch.device, use: Callable[[T], U], item: T) -> U:
    """In another thread, which knows neither the gradient mode nor the device of the one that started it."""
    with torch.no_grad(), _own_stream(device):
        return use(item)


def _own_stream(device: torch.device) -> AbstractContextManager[Any]:
    """On CUDA a stream: the steps of a rollout are queued all at once, and what came behind them would wait for the last."""
    return torch.cuda.stream(_side_stream(device)) if device.type == "cuda" else nullcontext()


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)  # always the same one: torch keeps freed memory apart for each
