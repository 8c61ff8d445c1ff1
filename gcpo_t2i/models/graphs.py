"""Steps of a rollout as CUDA graphs: the CPU starts one graph per code instead of hundreds of kernels.

A graph is captured for every span of the cache that attention runs over, so that it reads whole blocks in use and no
more. Nothing is kept from one rollout to the next: capturing takes about as long as one step that is not captured, and
goes on while the device is busy with the graphs before it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING

import torch

from gcpo_t2i.models import progress

if TYPE_CHECKING:
    from gcpo_t2i.models.decoding import Decoder

logger = logging.getLogger(__name__)


class Steps:
    """`Decoder.step` by span: replayed on CUDA, but for the very first, and where capturing fails; called elsewhere."""

    def __init__(self, decoder: Decoder) -> None:
        self.decoder = decoder
        self.device = decoder.index.device
        self.ready: dict[int, Callable[[], None]] = {}
        if self.device.type == "cuda":
            self.stream, self.pool = torch.cuda.Stream(self.device), torch.cuda.graph_pool_handle()

    def __call__(self, span: int) -> None:
        if span not in self.ready:
            self.ready[span] = self._prepared(span)
        self.ready[span]()

    def warm_up(self, span: int) -> None:
        """One step that is not captured: libraries load kernels and allocate what they need, which no capture may."""
        if self.device.type != "cuda":
            return self.decoder.step(span)
        current = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            self.decoder.step(span)
        current.wait_stream(self.stream)

    def _prepared(self, span: int) -> Callable[[], None]:
        if self.device.type == "cuda":
            try:
                return self._captured(span).replay
            except RuntimeError as error:
                logger.warning("decoding without CUDA graphs: %s", " ".join(str(error).split()))
                self._prepared = lambda span: partial(self.decoder.step, span)  # the others would fail as well
        return partial(self.decoder.step, span)

    def _captured(self, span: int) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        lower = torch.is_autocast_enabled("cuda")
        # autocast's cache would hand the graph weights that are gone when it is replayed
        uncached = torch.autocast("cuda", torch.get_autocast_dtype("cuda"), enabled=lower, cache_enabled=False)
        with torch.cuda.stream(self.stream), uncached:
            graph.capture_begin(pool=self.pool, capture_error_mode="thread_local")
            try:
                self.decoder.step(span)
            except BaseException:
                with suppress(RuntimeError):  # what began to fail above goes on to fail
                    graph.capture_end()
                raise
            graph.capture_end()
        return graph


def advance(decoder: Decoder, length: int) -> None:
    """From the first code of every image to the last of `length`, without waiting for the device in between."""
    steps = Steps(decoder)
    for drawn in range(1, length):
        span = decoder.span(drawn)
        if drawn == 1:
            steps.warm_up(span)
        else:
            steps(span)
        progress.drawn(drawn + 1)
    if steps.device.type == "cuda":
        torch.cuda.synchronize(steps.device)  # graphs must not be freed while they run
