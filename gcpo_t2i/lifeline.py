"""Do the other processes of a run still live?

A process that waits in NCCL for one that has ended waits for ten minutes and is then aborted, and one that samples notices
nothing. So every process holds a connection to the first one, over which only partings are sent: when a process ends, the
system closes its connection, and all that are left are told which it was.
"""

from __future__ import annotations

import os
import secrets
import selectors
import socket
import sys
import threading
import time
from contextlib import suppress
from types import TracebackType

from rich.console import Console

from gcpo_t2i.errors import ProcessLost, UserError
from gcpo_t2i.processes import Processes

BYE = b"bye\n"  # said by a process that has all it needs of the others
PATIENCE = 5.0  # seconds in which a process should notice by itself that it cannot go on
CONNECT = 20.0  # seconds in which all processes should be connected


class Lifeline:
    """`with Lifeline(processes, cure):` ends this process soon after another has, with one line that names it and the cure.

    A ProcessLost inside becomes a UserError of that line. An exception that only this process raises tells the others. Without
    a connection, as where only NCCL's network is open between machines, nothing is watched.
    """

    def __init__(self, processes: Processes, cure: str) -> None:
        self.processes, self.cure = processes, cure
        self.peers: dict[
            socket.socket, int
        ] = {}  # and their numbers; the first process has all, the others have the first
        self.lost: int | None = None
        self.noticed, self.leaving = threading.Event(), threading.Event()

    def __enter__(self) -> Lifeline:
        if self.processes.count > 1:
            self.peers = self._listen() if self.processes.index == 0 else self._connect()
            threading.Thread(target=self._watch, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if isinstance(error, ProcessLost) and self.peers:
            self.noticed.wait(PATIENCE / 2)
        self.leaving.set()
        if error is None or getattr(error, "everywhere", False):
            self._tell(BYE)
        else:
            for peer in self.peers:
                with suppress(OSError):
                    peer.shutdown(socket.SHUT_RDWR)
        if isinstance(error, ProcessLost):
            ended = UserError(self._line(str(error)))
            ended.everywhere = self._is_told_by_the_first()
            raise ended from error

    def _line(self, otherwise: str) -> str:
        who = otherwise if self.lost is None else f"process {self.lost} of this run has ended, its own output says why"
        return f"{who}; {self.cure}"

    def _is_told_by_the_first(self) -> bool:
        return self.lost not in (None, 0)

    # ---- connections

    def _listen(self) -> dict[socket.socket, int]:
        """Of the first process: a connection to each of the others."""
        found: dict[socket.socket, int] = {}
        with socket.create_server(("", 0), backlog=self.processes.count) as server:
            token = secrets.token_bytes(16)
            self.processes.gather((server.getsockname()[1], token))
            end = time.monotonic() + CONNECT
            while len(found) < self.processes.count - 1 and (left := end - time.monotonic()) > 0:
                server.settimeout(left)
                try:
                    peer, _ = server.accept()
                    peer.settimeout(left)
                    said = peer.recv(len(token) + 8, socket.MSG_WAITALL)
                except OSError:  # also a timeout
                    continue
                if secrets.compare_digest(said[: len(token)], token):
                    found[peer] = int.from_bytes(said[len(token) :], "big")
                    peer.settimeout(None)
        return found

    def _connect(self) -> dict[socket.socket, int]:
        port, token = self.processes.gather((0, b""))[0]
        try:
            first = socket.create_connection((os.environ.get("MASTER_ADDR", "127.0.0.1"), port), timeout=CONNECT)
            first.sendall(token + self.processes.index.to_bytes(8, "big"))
        except OSError:
            return {}
        first.settimeout(None)
        return {first: 0}

    def _tell(self, line: bytes) -> None:
        for peer in self.peers:
            with suppress(OSError):
                peer.sendall(line)

    # ---- watching, in a thread of its own

    def _watch(self) -> None:
        waiting = selectors.DefaultSelector()
        for peer in self.peers:
            peer.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            waiting.register(peer, selectors.EVENT_READ)
        while waiting.get_map():
            for key, _ in waiting.select():
                peer = key.fileobj
                assert isinstance(peer, socket.socket)
                said = _first_line(peer)
                if said == BYE.strip():
                    waiting.unregister(peer)
                elif self.leaving.is_set():
                    return
                else:
                    self.lost = int(said) if said else self.peers[peer]
                    self._tell(b"%d\n" % self.lost)
                    self.noticed.set()
                    return self._end()

    def _end(self) -> None:
        """Ends the process where it does not end by itself: what it waits for may be deaf to everything."""
        if self.leaving.wait(PATIENCE):
            time.sleep(4 * PATIENCE)  # long enough to end in order, unless that waits for the lost process too
        elif self.processes.index == 0 or not self._is_told_by_the_first():
            Console(stderr=True).show_cursor()
            print(f"\ngcpo-t2i: error: {self._line('')}", file=sys.stderr, flush=True)
        os._exit(2)


def _first_line(peer: socket.socket) -> bytes:
    """What it says; nothing if it has closed the connection."""
    try:
        return peer.recv(64).partition(b"\n")[0]
    except OSError:
        return b""
