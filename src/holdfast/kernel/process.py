# SPDX-License-Identifier: Apache-2.0
"""What a process that starts others can ask the kernel about them."""

from __future__ import annotations

import os
import resource
import signal
from pathlib import Path
from typing import Final

from holdfast.kernel import libc
from holdfast.kernel.failure import failure

PR_SET_CHILD_SUBREAPER: Final = 36
"""linux/prctl.h"""
_LONGEST_LINE: Final = 1 << 16
"""Generations that are looked at: more than there are pids (proc_sys_kernel(5), pid_max)."""


def become_subreaper() -> None:
    """Have orphaned descendants become children of this process (PR_SET_CHILD_SUBREAPER(2const)).

    So the line of parents of each descendant leads here for as long as this process lives, whatever
    session, process group or parent it has chosen.
    """
    try:
        libc.prctl(PR_SET_CHILD_SUBREAPER, 1)
    except OSError as error:
        raise failure(error, "become subreaper") from error


def parent(pid: int) -> int:
    """The parent of a process; 0 if it has none here, or is gone (proc_pid_stat(5), field 4)."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return 0
    return int(text.rpartition(")")[2].split()[1])


def descends_from(pid: int, ancestor: int) -> bool:
    """Whether ``ancestor`` is among the parents of a living (or unreaped) process."""
    for _ in range(_LONGEST_LINE):
        pid = parent(pid)
        if pid in (0, 1):
            return ancestor == pid == 1
        if pid == ancestor:
            return True
    return False


def die_of(number: int) -> None:
    """End this process by the default action of a signal, without a core file of its own.

    For who reports the death of another process. Returns if the signal does not kill.
    """
    _, hard = resource.getrlimit(resource.RLIMIT_CORE)
    resource.setrlimit(resource.RLIMIT_CORE, (0, hard))
    if number not in (signal.SIGKILL, signal.SIGSTOP):
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [number])
    os.kill(os.getpid(), number)
