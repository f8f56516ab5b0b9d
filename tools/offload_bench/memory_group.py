"""A limit on the memory of a process that counts what the page cache keeps for it: a control group of its own.

A process that maps a file larger than its memory keeps as much of it as the machine has room for, and no limit of the
process itself (``ulimit``) counts that. The memory controller of control groups does: pages of files belong to the
group that read them first. Version 1 only, where this process may make a group below its own; version 2 allows no
groups below one that has processes. Knows nothing of engines.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

_LIMIT, _MOST, _FAILED = "memory.limit_in_bytes", "memory.max_usage_in_bytes", "memory.failcnt"
# Runs what follows in a group: the shell enters it, then becomes the program.
_ENTER = 'echo $$ > "$0/cgroup.procs" && exec "$@"'


class NoLimit(Exception):
    """A limit cannot be set here; the message says why."""


@dataclass(frozen=True)
class MemoryGroup:
    """A group with a limit.

    Attributes:
        folder: where the system shows it.
    """

    folder: Path

    def command(self, words: list[str]) -> list[str]:
        """A command line that runs in the group."""
        return ["sh", "-c", _ENTER, str(self.folder), *words]

    @property
    def most(self) -> int:
        """The most bytes that it has had, of processes and of files."""
        return int((self.folder / _MOST).read_text())

    @property
    def reached(self) -> int:
        """How often the limit was reached."""
        return int((self.folder / _FAILED).read_text())


def own_group(cgroups: str, mounts: str) -> Path:
    """The group that a process is in.

    Args:
        cgroups: what /proc/self/cgroup says.
        mounts: what /proc/self/mounts says.

    Raises:
        NoLimit: there is no memory controller of version 1.
    """
    mounted = [line.split() for line in mounts.splitlines()]
    at = [words[1] for words in mounted if words[2] == "cgroup" and "memory" in words[3].split(",")]
    lines = [line.split(":", 2) for line in cgroups.splitlines()]
    path = [path for _, controllers, path in lines if "memory" in controllers.split(",")]
    if not at or not path:
        raise NoLimit("this machine has no memory controller of control groups, version 1")
    return Path(at[0]) / path[0].lstrip("/")


@contextmanager
def memory_group(limit: int) -> Iterator[MemoryGroup]:
    """A group below this process's own, until it is left; all of its processes must have ended then.

    Args:
        limit: bytes, rounded down to pages.

    Raises:
        NoLimit: it cannot be made or limited.
    """
    proc = Path("/proc/self")
    parent = own_group((proc / "cgroup").read_text(), (proc / "mounts").read_text())
    folder = parent / f"offload-bench-{os.getpid()}"
    try:
        folder.mkdir()
    except OSError as error:
        raise NoLimit(f"no group can be made in {parent}: {error.strerror}") from None
    try:
        try:
            (folder / _LIMIT).write_text(str(limit))
        except OSError as error:
            raise NoLimit(f"the memory of {folder} cannot be limited: {error.strerror}") from None
        yield MemoryGroup(folder)
    finally:
        folder.rmdir()
