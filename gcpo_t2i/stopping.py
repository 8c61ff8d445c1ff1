"""Ctrl-C and SIGTERM: a run ends after the step it is in, with a checkpoint. A second one ends it at once."""

from __future__ import annotations

import signal
import sys
import threading
import time
from types import FrameType, TracebackType

from gcpo_t2i.errors import Stopped
from gcpo_t2i.processes import ALONE, Processes

SIGNALS = (signal.SIGINT, signal.SIGTERM)
ONE_SIGNAL = (
    1.0  # seconds in which a second one is the first once more: a launcher passes on what its workers got as well
)


class Stopping:
    """`with Stopping(processes) as stopping`: notes the first signal. Does nothing outside the main thread, where Python has
    none."""

    def __init__(self, processes: Processes = ALONE) -> None:
        self.processes = processes
        self.signal: int | None = None
        self.since = 0.0

    def __enter__(self) -> Stopping:
        self.before = {}
        if threading.current_thread() is threading.main_thread():
            self.before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.signal is not None and now - self.since > ONE_SIGNAL:
            raise KeyboardInterrupt
        if self.signal is None and self.processes.index == 0:
            print("\nstopping after this step; once more to stop at once, without saving", file=sys.stderr)
        self.signal, self.since = number, now

    def check(self) -> None:
        """Raises Stopped if any process got a signal. All processes must call it at the same point."""
        for number in self.processes.gather(self.signal):
            if number is not None:
                raise Stopped(number)
