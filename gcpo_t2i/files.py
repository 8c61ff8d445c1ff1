"""Files and folders that are either whole or not there, whatever happens while they are written."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM)


def cannot_write(error: OSError) -> bool:
    """Whether the disk is full or the place is not for us to write to, which the user can mend."""
    return error.errno in _UNWRITABLE


def write_text(path: Path, text: str) -> None:
    """Writes a UTF-8 file: a reader sees the old text or the new one."""
    with whole_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A path beside `path` to write to, which gets its name when it is on the disk: `path` is whole or as it was before."""
    partial = path.with_name(f".partial-{path.name}")
    try:
        yield partial
        _sync(partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """A new folder to write into, which gets its final name when everything in it is on the disk; else it is deleted.

    A folder that has the name already is replaced then.
    """
    partial = path.with_name(f".partial-{path.name}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        for file in partial.rglob("*"):
            _sync(file)
        delete_folder(path)
        partial.replace(path)
        _sync(path.parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def delete_folder(path: Path) -> None:
    """Takes its name away first, so that an interrupted deletion leaves nothing that looks whole."""
    if path.exists():
        doomed = path.with_name(f".deleted-{path.name}")
        shutil.rmtree(doomed, ignore_errors=True)
        path.replace(doomed)
        shutil.rmtree(doomed)


def clear_leftovers(folder: Path) -> None:
    """Deletes what writes and deletions left in a folder when the process was killed in the middle of them."""
    for path in [*folder.glob(".partial-*"), *folder.glob(".deleted-*")]:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def _sync(path: Path) -> None:
    """Waits until the disk has it: a rename may otherwise survive a power cut that the contents do not."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
