"""A directory that appears whole or not at all, and the checks to make before the work that fills it.

Knows nothing of checkpoints. A directory under construction is the hidden sibling ``.NAME.XXXXXXXX.partial`` of
its target (same file system, so the final rename is atomic). Its writer holds a lock on it; the kernel drops the
lock however the writer dies, so the next writer of the same target recognises and removes what a killed one left.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import PrismError


def check_output(out: Path) -> None:
    """Refuse a target that cannot become a new directory; call it before any work.

    Raises:
        PrismError: ``out`` is a file or a non-empty directory, or its nearest existing parent is not a
            writable directory.
    """
    out = out.expanduser().resolve()
    if out.is_dir():
        if any(out.iterdir()):
            raise PrismError(f"output directory {out} exists and is not empty; remove it or name another")
    elif out.exists():
        raise PrismError(f"output {out} is a file; name a new or empty directory")
    parent = _existing_parent(out.parent)
    if not parent.is_dir():
        raise PrismError(f"output {out} cannot be made: {parent} is not a directory; name another place")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise PrismError(f"output {out} cannot be made: no permission to write into {parent}; name another place")


def check_disk_space(out: Path, needed_bytes: int) -> None:
    """Refuse to start when the file system of ``out`` has less than ``needed_bytes`` free.

    Raises:
        PrismError: too little space; says how much there is and how much is needed.
    """
    parent = _existing_parent(out.expanduser().resolve())
    free = shutil.disk_usage(parent).free
    if free < needed_bytes:
        raise PrismError(
            f"not enough disk space for {out}: about {needed_bytes / 1e6:,.1f} MB are needed, {free / 1e6:,.1f} MB "
            f"are free in {parent}; free some or name an output on another disk"
        )


@contextmanager
def atomic_directory(out: Path) -> Iterator[Path]:
    """A temporary directory to fill, renamed to ``out`` when the block ends without an exception.

    On an exception it is removed and ``out`` stays absent. Leftovers of killed writers of the same ``out`` are
    removed first.

    Raises:
        PrismError: as :func:`check_output`, before the block and again at the rename.
    """
    check_output(out)
    out = out.expanduser().resolve()
    out.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(out)
    partial = out.parent / f".{out.name}.{secrets.token_hex(4)}.partial"
    partial.mkdir()
    lock = os.open(partial, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield partial
        sync_tree(partial)
        try:
            partial.rename(out)  # an empty directory in its place is replaced
        except OSError as error:
            raise PrismError(f"output {out} was taken while it was being written: {error}") from error
        sync(out.parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    finally:
        os.close(lock)


def replace_file(path: Path, content: bytes) -> None:
    """Write a file in one step: readers see the old content or the new one, whole.

    Raises:
        OSError: it cannot be written; what was there stays.
    """
    draft = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    try:
        draft.write_bytes(content)
        sync(draft)
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)


def sync_tree(root: Path) -> None:
    """Flush every file and folder below ``root`` to the disk, so that a rename cannot overtake their content."""
    for folder, _, files in os.walk(root):
        for name in files:
            sync(Path(folder) / name)
        sync(Path(folder))


def sync(path: Path) -> None:
    """Flush one file, or one folder's list of names."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove_leftovers(out: Path) -> None:
    # The random part has no dot, so the leftovers of a target "a" are not mistaken for those of "a.b".
    prefix, suffix = f".{out.name}.", ".partial"
    for entry in out.parent.iterdir():
        name = entry.name
        if not (name.startswith(prefix) and name.endswith(suffix)) or "." in name[len(prefix) : -len(suffix)]:
            continue
        lock = os.open(entry, os.O_RDONLY)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            continue  # its writer lives
        else:
            shutil.rmtree(entry, ignore_errors=True)
        finally:
            os.close(lock)


def _existing_parent(path: Path) -> Path:
    while not path.exists():
        path = path.parent
    return path
