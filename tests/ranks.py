"""Runs `gcpo-t2i` in several processes that talk through gloo, as a launcher would, but without its imports for each of them.

python -m tests.ranks RUNS.json, with a list of {"processes", "arguments", "environment"}: one run after another, each process a
fork of this one. Prints a list with the exit codes, output and seconds of each run's processes.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import Any, NamedTuple


class Done(NamedTuple):
    """By process: exit code (negative: the signal that ended it), stderr; and the seconds of all together."""

    codes: list[int]
    told: list[str]
    seconds: float


def run(arguments: list[str], processes: int = 2, **environment: str) -> dict[str, Any]:
    return {"processes": processes, "arguments": arguments, "environment": environment}


def make(runs: list[dict[str, Any]], folder: Path) -> list[Done]:
    """Makes the runs in a process of its own; `folder` is for what they print."""
    folder.mkdir()
    (folder / "runs.json").write_text(json.dumps(runs))
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.ranks", str(folder / "runs.json")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=1800)
    assert done.returncode == 0, done.stderr[-3000:]
    return [Done(*found) for found in json.loads(done.stdout.splitlines()[-1])]


def main(file: Path) -> None:
    import torch

    from gcpo_t2i import rewards_check, train  # noqa: F401  # and with them all that is slow to import

    torch.set_num_threads(1)  # before anything computes: a fork does not take threads along
    print(
        json.dumps([_made(one, file.parent / str(number)) for number, one in enumerate(json.loads(file.read_text()))])
    )


def _made(one: dict[str, Any], log: Path) -> Done:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    started, logs = time.monotonic(), [log.with_suffix(f".{rank}") for rank in range(one["processes"])]
    children = [_fork(one, rank, port, own) for rank, own in enumerate(logs)]
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    return Done(codes, [own.read_text() for own in logs], time.monotonic() - started)


def _fork(one: dict[str, Any], rank: int, port: int, log: Path) -> int:
    child = os.fork()
    if child:
        return child
    count = one["processes"]
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({key: str(value) for key, value in place.items()} if count > 1 else {})
    os.environ.update(one["environment"])
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
    from gcpo_t2i.cli import main as gcpo_t2i

    code = 1
    try:
        code = gcpo_t2i(one["arguments"])
    except BaseException:  # noqa: BLE001  # a fork must not return to where it came from
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)
    return 0


if __name__ == "__main__":
    main(Path(sys.argv[1]))
