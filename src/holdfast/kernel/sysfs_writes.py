# SPDX-License-Identifier: Apache-2.0
"""Writes to sysfs that may never return, carried out by a child that is waited for only so long.

See ``pci_binding.py`` for why. The child is spawned, not forked: the caller may have threads. It
reports on a pipe when it is up and after each write; when the pipe closes it is done or dead. When
time is up it is sent SIGKILL, so that none of the later writes is carried out. A write that can
be interrupted ends with it. One that cannot keeps the child in the kernel: it is left behind,
and ends by itself when the write returns. Only then is the write said to hang.
"""

from __future__ import annotations

import errno
import os
import select
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from holdfast.errors import SystemFailure
from holdfast.kernel.failure import failure

# Each attribute takes its value in one write, and must exist: never O_CREAT.
_CHILD: Final = """
import os, sys
os.write(1, b"0\\n")
for place, text in zip(sys.argv[1::2], sys.argv[2::2]):
    try:
        fd = os.open(place, os.O_WRONLY | os.O_CLOEXEC)
        os.write(fd, text.encode())
        os.close(fd)
        code = 0
    except OSError as error:
        code = error.errno
    os.write(1, b"%d\\n" % code)
    if code:
        break
"""


_START: Final = 60.0
"""Seconds in which the child's interpreter is up, however busy the machine."""
_LAST_MOMENT: Final = 2.0
"""Seconds in which a child that is through, or killed outside an endless write, ends."""


@dataclass(frozen=True, slots=True)
class Write:
    """One value written to one attribute."""

    path: Path
    text: str

    def __str__(self) -> str:
        return f"echo {self.text.strip() or chr(39) * 2} > {self.path}"


class WriteFailed(Exception):
    """The kernel refused a write; those before it were done, those after it were not tried."""

    def __init__(self, write: Write, code: int) -> None:
        super().__init__(f"{write}: {os.strerror(code)}")
        self.write = write
        self.errno = code


class WriteHangs(Exception):
    """A write had not returned in time; it goes on in the kernel, later ones will not be done."""

    def __init__(self, write: Write) -> None:
        super().__init__(str(write))
        self.write = write


def carry_out(writes: Sequence[Write], deadline: float) -> None:
    """Do the writes in order, within ``deadline`` seconds for all of them.

    Raises WriteFailed at the first that is refused, or (ETIMEDOUT) that took too long and could be
    called off; WriteHangs if it could not; SystemFailure if the child does not come up or dies.
    """
    reading, writing = os.pipe2(os.O_CLOEXEC)
    try:
        try:
            pid = _spawn(writes, writing)
        except OSError as error:
            raise failure(error, "start a child to write to sysfs", sys.executable) from error
        finally:
            os.close(writing)
        report = _Report(reading)
        stuck = False
        try:
            report.follow(_START, lines=1)
            if report.codes:
                report.follow(deadline, lines=1 + len(writes))
        finally:  # also if the user interrupts the wait: nothing goes on behind his back
            stuck = _end(pid, kill=not report.closed)
    finally:
        os.close(reading)
    _judge(writes, report, stuck)


def _judge(writes: Sequence[Write], report: _Report, stuck: bool) -> None:
    """Raise what there is to raise."""
    codes = report.codes[1:]
    for write, code in zip(writes, codes, strict=False):
        if code:
            raise WriteFailed(write, code)
    if len(codes) == len(writes):
        return
    write = writes[len(codes)]
    if stuck and report.codes:
        raise WriteHangs(write)
    if report.closed or not report.codes:
        raise SystemFailure(
            "the child that does it died or did not start", operation="write", target=str(write)
        )
    raise WriteFailed(write, errno.ETIMEDOUT)


class _Report:
    """What the child says: a line when it is up, then one for each write, the errno or 0."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._data = b""
        self.closed = False

    @property
    def codes(self) -> list[int]:
        return [int(line) for line in self._data.split()]

    def follow(self, seconds: float, lines: int) -> None:
        """Read until there are so many lines, the pipe is closed, or time is up."""
        until = time.monotonic() + seconds
        while not self.closed and len(self.codes) < lines:
            ready, _, _ = select.select([self._fd], [], [], max(0.0, until - time.monotonic()))
            if not ready:
                return
            chunk = os.read(self._fd, 4096)
            self._data += chunk
            self.closed = not chunk


def _end(pid: int, *, kill: bool) -> bool:
    """Take leave of the child; True if it does not end although it was killed."""
    process = os.pidfd_open(pid)
    try:
        if kill:
            os.kill(pid, signal.SIGKILL)
        ended, _, _ = select.select([process], [], [], _LAST_MOMENT)
    finally:
        os.close(process)
    os.waitpid(pid, os.WNOHANG)
    return not ended


def _spawn(writes: Sequence[Write], report: int) -> int:
    arguments = [part for write in writes for part in (str(write.path), write.text)]
    return os.posix_spawn(
        sys.executable,
        [sys.executable, "-I", "-S", "-c", _CHILD, *arguments],
        os.environ,
        file_actions=[
            (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
            (os.POSIX_SPAWN_DUP2, report, 1),
            (os.POSIX_SPAWN_OPEN, 2, os.devnull, os.O_WRONLY, 0),
        ],
        setsid=True,
    )
