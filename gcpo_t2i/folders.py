"""Which folder a command may write to. Nothing that a user made is replaced unless they say so."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from gcpo_t2i.config import ConfigError
from gcpo_t2i.errors import UserError

LOCK = ".lock"


def next_run_dir(algorithm: str, root: str | Path = "runs") -> Path:
    """The first unused ROOT/ALGORITHM-N, N = 1, 2, …"""
    number = 1
    while (path := Path(root) / f"{algorithm}-{number}").exists():
        number += 1
    return path


def check_output_dir(output_dir: str | Path, *, overwrite: bool, resume: bool | None = None) -> Path:
    """The folder as a path, if a command may write to it; creates and deletes nothing. `resume` None: it cannot resume.

    Raises ConfigError if it holds files and neither `resume` nor `overwrite` is set, if nothing is there to resume, or
    if replacing it would delete the current folder.
    """
    path = Path(output_dir)
    if path.exists() and not path.is_dir():
        raise ConfigError("output_dir", f"output folder '{path}' is a file; name another folder")
    used = path.is_dir() and any(entry.name != LOCK for entry in path.iterdir())
    if resume and not used:
        raise ConfigError("output_dir", f"output folder '{path}' holds no run to resume; drop --resume to start one")
    if overwrite and path.resolve() in (Path.cwd(), *Path.cwd().parents, Path.home()):
        raise ConfigError(
            "output_dir", f"output folder '{path}' holds the current folder; name one that may be deleted"
        )
    if used and not (resume or overwrite):
        cures = (
            "--overwrite to replace it" if resume is None else "--resume to go on with it, --overwrite to replace it"
        )
        raise ConfigError("output_dir", f"output folder '{path}' already holds files; add {cures}, or name another")
    return path


def check_ours(folder: Path, marker: str, kind: str) -> list[Path]:
    """All in a folder but for the lock. UserError if it holds files and not the `marker` that a `kind` of command leaves:
    they may be anything of the user's."""
    entries = [entry for entry in folder.iterdir() if entry.name != LOCK]
    if entries and not (folder / marker).is_file():
        raise UserError(f"output folder '{folder}' holds files that no {kind} wrote; --overwrite only replaces {kind}s")
    return entries


def remove_output(folder: Path, marker: str, kind: str) -> None:
    """Empties a folder of what a `kind` of command left, told by its file `marker`, but for the lock. As `check_ours`."""
    for entry in check_ours(folder, marker, kind):
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keeps other processes out of a folder. The system lets go of it with the process, however that ends."""
    lock = FileLock(folder / LOCK, timeout=0)
    try:
        lock.acquire()
    except Timeout as error:
        raise UserError(
            f"output folder '{folder}' is in use by another process; wait for it, stop it, or name another folder"
        ) from error
    try:
        yield
    finally:
        lock.release()
