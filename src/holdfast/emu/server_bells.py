# SPDX-License-Identifier: Apache-2.0
"""Doorbell eventfds: writes to a register that reach the function without a message.

A doorbell rung before a register access must be seen before it: on the bus a read pushes posted
writes ahead of itself. The eventfd was bumped before the message was sent, so draining all
doorbells before carrying out the message keeps that order.
"""

from __future__ import annotations

import errno
import os
import select
from functools import partial

from holdfast.contracts import Doorbell
from holdfast.emu.port import Guest

_BARS = range(6)


class Bells:
    """The doorbells of one connection. Everything but ``rewire`` is the socket thread's.

    Watches duplicates: an epoll entry belongs to the open file, so if the function closed its own
    descriptor while a client keeps a copy, the entry would stay, under a number that is reused.
    """

    def __init__(self, guest: Guest) -> None:
        self._guest = guest
        self._epoll = select.epoll(flags=select.EPOLL_CLOEXEC)
        self._watched: dict[int, int] = {}
        self._stale = True

    def fileno(self) -> int:
        """Readable when something was rung."""
        return self._epoll.fileno()

    def rewire(self) -> None:
        """Ask the function for its doorbells again before the next drain. Any thread."""
        self._stale = True

    def refresh(self) -> None:
        """Watch the doorbells now in force."""
        if not self._stale:
            return
        self._stale = False
        self._forget()
        for fd in {bell.fd for index in _BARS for bell in self._guest.doorbells(index)}:
            try:
                ours = os.dup(fd)
            except OSError as error:
                if error.errno != errno.EBADF:  # else: renewed at this moment, rewire follows
                    raise
                continue
            self._watched[ours] = fd
            self._epoll.register(ours, select.EPOLLIN)

    def drain(self) -> None:
        """Hand everything rung so far to the function."""
        self.refresh()
        if not self._watched:
            return
        for ours, _ in self._epoll.poll(0):
            theirs = self._watched.get(ours)
            if theirs is not None:
                self._guest.rung(theirs, partial(_take, ours))

    def offer(self, index: int) -> list[Doorbell]:
        """The doorbells of a region, as the client may have them. The function owns the fds."""
        self.refresh()
        return list(self._guest.doorbells(index))

    def close(self) -> None:
        """Stop watching."""
        self._forget()
        self._epoll.close()

    def _forget(self) -> None:
        for ours in self._watched:
            self._epoll.unregister(ours)
            os.close(ours)
        self._watched = {}


def _take(fd: int) -> int:
    """The count of an eventfd, or 0. Never blocks, whatever the client did to the shared flags."""
    word = bytearray(8)
    try:
        if os.preadv(fd, [word], -1, os.RWF_NOWAIT) != len(word):
            return 0
    except BlockingIOError:
        return 0
    return int.from_bytes(word, "little")
