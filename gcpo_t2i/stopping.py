"""Ctrl-C and SIGTERM: a run ends after the step it is in, with a checkpoint. A second one ends it at once."""

from __future__ import annotations

import signal
import sys
import threading
from types import FrameType, TracebackType

from gcpo_t2i.errors import Stopped
from gcpo_t2i.processes import Processes

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stopping:
    """`with Stopping() as stopping`: notes the first signal. Does nothing outside the main thread, where Python has none."""

    def __init__(self) -> None:
        self.signal: int | None = None

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
        if self.signal is not None:
            raise KeyboardInterrupt
        self.signal = number
        print("\nstopping after this step; once more to stop at once, without saving", file=sys.stderr)

    def check(self, processes: Processes) -> None:
        """Raises Stopped if any process got a signal. All processes must call it at the same point."""
        for number in processes.gather(self.signal):
            if number is not None:
                raise Stopped(number)
