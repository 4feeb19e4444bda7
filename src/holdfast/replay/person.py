# SPDX-License-Identifier: Apache-2.0
"""The processes of a story: real ones, which map pages of the memory that is played with.

All are forked before the story begins, because whoever plays it has threads by then. Each waits on
a socket of its own for orders (one packet of JSON each, answered by one), and ends when nobody has
the other end any more. Only a fork in the story is made when the story has it, by the process that
it says, and inherits what that process had mapped.

A page of its own is a mapping of one page of the file. What a process had there is thus what is in
the file's page, and what a killed process had mapped is gone with it, as the kernel sees to.
"""

from __future__ import annotations

import json
import os
import re
import select
import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

from holdfast.kernel import pidfd
from holdfast.kernel.mapping import PAGE
from holdfast.replay.failure import Disagreement
from holdfast.replay.life import PACKET, Life

TIMEOUT: Final = 5.0
_ROW: Final = re.compile(r"([0-9a-f]+)-([0-9a-f]+) \S+ ([0-9a-f]+) ([0-9a-f]+:[0-9a-f]+) (\d+)")


def pattern(number: int) -> int:
    """The byte with which process ``number`` (of all that are forked) fills its pages."""
    return 0x11 + number


class Person:
    """One process, from outside. Owns its end of the socket and a pidfd."""

    def __init__(self, name: str, number: int, pid: int, sock: socket.socket, ram: int) -> None:
        self.name = name
        self.number = number
        self.pid = pid
        self.sock = sock
        self.alive = True
        """It was not killed."""
        self.executed = False
        self._ram = os.fstat(ram).st_ino
        self._pidfd = os.pidfd_open(pid)

    # -- orders ------------------------------------------------------------

    def ask(self, order: str, **arguments: Any) -> Any:
        """Give an order; returns the answer. Disagreement if the process cannot."""
        self._send(order, arguments, [])
        return self._answer(order)

    def _send(self, order: str, arguments: dict[str, Any], fds: Sequence[int]) -> None:
        data = json.dumps({"order": order} | arguments).encode()
        try:
            socket.send_fds(self.sock, [data], list(fds))
        except OSError as error:
            raise self._failed(order, str(error)) from error

    def _answer(self, order: str) -> Any:
        if not select.select([self.sock], [], [], TIMEOUT)[0]:
            raise self._failed(order, "it does not answer")
        try:
            told = self.sock.recv(PACKET)
        except OSError as error:
            raise self._failed(order, str(error)) from error
        if not told:
            raise self._failed(order, "it has ended")
        answer = json.loads(told)
        if "error" in answer:
            raise self._failed(order, answer["error"])
        return answer.get("value")

    def _failed(self, order: str, why: str) -> Disagreement:
        return Disagreement(f"{self.name} (process {self.pid}): {why}", operation=order)

    def fork(self, name: str, number: int, ram: int) -> Person:
        """Have it fork a child, which gets a socket of its own."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            with theirs:
                self._send("fork", {}, [theirs.fileno()])
                pid = self._answer("fork")
            return Person(name, number, pid, ours, ram)
        except BaseException:
            ours.close()
            raise

    def execute(self) -> None:
        """Have it execute another program, which has none of its memory and obeys like it."""
        self.ask("exec")
        self.executed = True

    # -- what is so ------------------------------------------------------------

    def pages(self) -> dict[int, int]:
        """How often each page of the file is mapped, as the kernel says (proc_pid_maps(5))."""
        return mapped_pages(self.pid, self._ram)

    def kill(self) -> None:
        """SIGKILL."""
        self.alive = False
        if self._pidfd >= 0:
            pidfd.kill(self._pidfd)

    def await_death(self) -> None:
        """Wait until the kernel has taken all it had. Disagreement after some seconds."""
        if not pidfd.await_death(self._pidfd, TIMEOUT):
            raise self._failed("kill", "it lives on")

    def reap(self, parent: Person | None) -> None:
        """Wait for it: here, or in the process of the story that forked it and lives."""
        if parent is not None and parent.alive:
            parent.ask("wait", pid=self.pid)
            return
        if parent is not None:
            parent.await_death()  # it is this process's child then: see become_subreaper
        os.waitpid(self.pid, 0)

    def close(self) -> None:
        self.sock.close()
        if self._pidfd >= 0:
            os.close(self._pidfd)
            self._pidfd = -1


def mapped_pages(pid: int, inode: int) -> dict[int, int]:
    """Page number to how often a process maps it, of the file with this inode."""
    found: dict[int, int] = {}
    try:
        rows = Path(f"/proc/{pid}/maps").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return found
    for row in rows:
        read = _ROW.match(row)
        if read is None or int(read[5]) != inode or "/memfd:" not in row:
            continue
        first = int(read[3], 16) // PAGE
        for page in range(first, first + (int(read[2], 16) - int(read[1], 16)) // PAGE):
            found[page] = found.get(page, 0) + 1
    return found


# -- in the process ------------------------------------------------------------


def start(
    name: str,
    number: int,
    ram: int,
    others: Sequence[socket.socket],
    life: Callable[[socket.socket, int, int], Life] = Life,
) -> Person:
    """Fork one that waits for orders. Call it before there are threads."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    pid = os.fork()
    if pid == 0:
        code = 70
        try:
            for each in (ours, *others):
                each.close()
            life(theirs, ram, pattern(number)).live()
            code = 0
        finally:
            os._exit(code)
    theirs.close()
    return Person(name, number, pid, ours, ram)
