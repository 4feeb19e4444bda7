# SPDX-License-Identifier: Apache-2.0
"""What can be seen of a running stack without asking it: ``/proc`` only, never the ledger."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from holdfast.kernel import procfs


@dataclass(frozen=True, slots=True)
class Machine:
    """Memory that can outlive processes, in bytes: what the machine holds, and what explains it.

    Other programs use shared memory, too. What they have mapped, what lies in mounted tmpfs and
    the files of other keepers are theirs; growth that none of these explains is a leak, and so is
    any file of the observed stack that is left over anywhere.
    """

    shmem: int
    hugepages: int
    mapped: int
    files: dict[int, int]
    """DMA memory files by inode, wherever a process has one open or mapped."""

    @classmethod
    def look(cls) -> Machine:
        info = procfs.meminfo()
        size = info.get("Hugepagesize", 0)
        used = info.get("HugePages_Total", 0) - info.get("HugePages_Free", 0)
        mapped = procfs.mapped_shared() + procfs.in_tmpfs()
        return cls(info["Shmem"], used * size, mapped, procfs.memfds_named("holdfast-"))

    def leaked_since(self, before: Machine, stack: frozenset[int]) -> int:
        """Bytes held now and not ``before``; ``stack`` are the inodes of the stack's own files."""
        left = sum(size for inode, size in self.files.items() if inode in stack)
        others = sum(size for inode, size in self.files.items() if inode not in stack)
        others_before = sum(before.files.values())
        explained = max(0, self.mapped - before.mapped) + max(0, others - others_before)
        unexplained = max(0, self.shmem - before.shmem - explained)
        return max(unexplained, left) + max(0, self.hugepages - before.hugepages)


@dataclass(frozen=True, slots=True)
class Processes:
    """Descriptors and anonymous files held by the keeper and the function."""

    descriptors: int
    memfds: dict[int, int]
    """Inode to allocated bytes."""

    @classmethod
    def look(cls, pids: list[int]) -> Processes:
        memfds: dict[int, int] = {}
        for pid in pids:
            memfds |= procfs.memfds_of(pid)
        return cls(sum(len(procfs.open_descriptors(pid)) for pid in pids), memfds)

    @property
    def memfd_bytes(self) -> int:
        return sum(self.memfds.values())


def processes_under(variable: str, value: str) -> list[int]:
    """Pids of other processes that were started with an environment variable at this value."""
    wanted = f"{variable}={value}".encode()
    found = []
    for name in os.listdir("/proc"):
        if name.isdecimal() and int(name) != os.getpid():
            try:
                environment = Path(f"/proc/{name}/environ").read_bytes().split(b"\0")
            except OSError:
                continue  # gone, or another user's
            if wanted in environment:
                found.append(int(name))
    return found


def settle(read: Callable[[], int], *, goal: int, timeout: float) -> int:
    """Read until the value is down to ``goal`` or ``timeout`` seconds passed; the last value.

    The kernel frees memory and descriptors of an ended process a moment after its death is seen.
    """
    deadline = time.monotonic() + timeout
    while (value := read()) > goal and time.monotonic() < deadline:
        time.sleep(0.01)
    return value
