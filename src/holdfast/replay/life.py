# SPDX-License-Identifier: Apache-2.0
"""What goes on in a process of a story. It also is the program that such a process executes.

So it imports nothing but the standard library: an ``exec`` in a story takes milliseconds.
"""

from __future__ import annotations

import json
import mmap
import os
import socket
import sys
from typing import Final

PAGE: Final = mmap.PAGESIZE
PACKET: Final = 4096


class Life:
    """Orders from a socket, each answered. Ends when nobody has its other end any more."""

    def __init__(self, sock: socket.socket, ram: int, pattern: int) -> None:
        self.sock = sock
        self.pattern = pattern
        self.ram = ram
        self.pages: dict[int, mmap.mmap] = {}

    def live(self) -> None:
        while True:
            data, fds, _, _ = socket.recv_fds(self.sock, PACKET, 1)
            if not data:
                return
            told = json.loads(data)
            order = told.pop("order")
            try:
                answer = {"value": getattr(self, f"do_{order}")(*fds, **told)}
            except Exception as error:  # noqa: BLE001  (told to who gave the order)
                answer = {"error": f"{type(error).__name__}: {error}"}
            self.sock.send(json.dumps(answer).encode())

    def do_map(self, page: int, fill: bool) -> None:
        memory = mmap.mmap(self.ram, PAGE, offset=page * PAGE)
        if fill:
            memory[:] = bytes([self.pattern]) * PAGE
        self.pages[page] = memory

    def do_unmap(self, page: int) -> None:
        self.pages.pop(page).close()

    def do_discard(self, page: int) -> None:
        self.pages[page].madvise(mmap.MADV_DONTNEED)
        # A private page would be another one at the next touch. This one would come back.
        self.do_unmap(page)

    def do_copy(self, source: int, target: int) -> None:
        """Its page is somewhere else from now on, with the same bytes in it."""
        was = self.pages.pop(source)
        self.do_map(target, fill=False)
        self.pages[target][:] = was[:]
        was.close()

    def do_look(self, page: int, rightful: list[int]) -> int:
        """How many bytes of its page are none of these."""
        seen = self.pages[page][:]
        return len(seen) - sum(seen.count(bytes([byte])) for byte in rightful)

    def do_count(self, byte: int) -> int:
        """How many bytes of all its pages are this one."""
        return sum(memory[:].count(bytes([byte])) for memory in self.pages.values())

    def do_ring(self) -> str:
        """It asks for a transfer: edu's registers are another process's to write."""
        return "post"

    def do_fork(self, fd: int) -> int:
        pid = os.fork()
        if pid == 0:
            self.sock.close()
            os.set_inheritable(fd, False)
            self.sock = socket.socket(fileno=fd)
            try:
                self.live()
            finally:
                os._exit(0)
        os.close(fd)
        return pid

    def do_wait(self, pid: int) -> None:
        os.waitpid(pid, 0)

    def do_exec(self) -> None:
        for fd in (self.sock.fileno(), self.ram):
            os.set_inheritable(fd, True)
        words = [str(self.sock.fileno()), str(self.ram), str(self.pattern)]
        os.execv(sys.executable, [sys.executable, "-I", "-S", __file__, *words])  # noqa: S606


def _after_exec(sock: int, ram: int, pattern: int) -> None:
    """The other program, which is this file."""
    for fd in (sock, ram):
        os.set_inheritable(fd, False)
    end = socket.socket(fileno=sock)
    end.send(json.dumps({"value": None}).encode())
    Life(end, ram, pattern).live()


if __name__ == "__main__":
    _after_exec(*map(int, sys.argv[1:]))
