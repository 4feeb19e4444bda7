# SPDX-License-Identifier: Apache-2.0
"""The standby: has everything imported, and forks a keeper whenever the anchor says so.

Facts. An interpreter with everything a keeper needs takes a third of a second to start, more on a
busy machine; a fork of one takes milliseconds. A fork is safe only while there is one thread.

Choice. ``holdfast serve`` imports, and forks: its child is the keeper, and it itself becomes the
standby, which does nothing but wait. It has no descriptor of the function and none of its memory.
It adopts what its keepers leave behind (prctl(2), PR_SET_CHILD_SUBREAPER), so that nothing stays a
zombie, passes signals on to the keeper, and ends with the keeper's exit status once both keeper
and anchor are gone.
"""

from __future__ import annotations

import gc
import json
import os
import select
import signal
import socket
import sys
from contextlib import suppress
from dataclasses import dataclass
from types import FrameType

from holdfast.kernel import libc, packets

_MAX_ORDER = 4096


@dataclass(frozen=True, slots=True)
class Orders:
    """What a forked keeper is told. ``standby`` (first keeper) or ``link`` (successor) is set."""

    standby: socket.socket | None = None
    link: socket.socket | None = None
    safe: bool = False
    successions: int = 0


def split(anchor: socket.socket | None, unneeded: list[int]) -> Orders:
    """Become the standby; returns in each forked keeper with what it is to do.

    ``anchor`` is the way to an anchor that waits for a standby; without one a first keeper is
    forked, which gets the other end. ``unneeded`` are descriptors that only the keeper needs. Call
    it from a process with one thread. The standby itself never returns: it exits.
    """
    libc.set_child_subreaper()
    gc.collect()
    gc.freeze()
    if anchor is None:
        anchor, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        keeper = os.fork()
        if keeper == 0:
            anchor.close()
            return Orders(standby=theirs)
        theirs.close()
    else:
        keeper = 0
    for fd in unneeded:
        os.close(fd)
    return _Standby(anchor, keeper).run()


class _Standby:
    def __init__(self, anchor: socket.socket, keeper: int) -> None:
        self.anchor = anchor
        self.keeper = keeper
        self.status = 0
        self._wake, self._woken = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        signal.set_wakeup_fd(self._woken, warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._pass_on)
        signal.signal(signal.SIGCHLD, lambda *_: None)

    def _pass_on(self, number: int, _: FrameType | None) -> None:
        if self.keeper:
            with suppress(ProcessLookupError):
                os.kill(self.keeper, number)

    def run(self) -> Orders:
        while True:
            self._reap()
            ready, _, _ = select.select([self.anchor.fileno(), self._wake], [], [])
            if self._wake in ready:
                with suppress(BlockingIOError):
                    os.read(self._wake, 4096)
            if self.anchor.fileno() in ready:
                orders = self._ordered()
                if orders is not None:
                    return orders

    def _reap(self) -> None:
        with suppress(ChildProcessError):
            while True:
                pid, status = os.waitpid(-1, os.WNOHANG)
                if not pid:
                    return
                if pid == self.keeper:
                    self.keeper, self.status = 0, os.waitstatus_to_exitcode(status)

    def _ordered(self) -> Orders | None:
        try:
            packet, fds = packets.receive(self.anchor, _MAX_ORDER, 1)
        except ConnectionError:
            packet, fds = b"", []
        if not packet or len(fds) != 1:
            self._end()
        order = json.loads(packet[1:])
        # The keeper before it is dead, and must not be taken for the one that comes.
        self._reap()
        pid = os.fork()
        if pid == 0:
            self._become_keeper()
            link = socket.socket(fileno=fds[0])
            return Orders(link=link, safe=order["safe"], successions=order["successions"])
        self.keeper = pid
        os.close(fds[0])
        return None

    def _become_keeper(self) -> None:
        signal.set_wakeup_fd(-1)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGCHLD):
            signal.signal(number, signal.SIG_DFL)
        self.anchor.close()
        os.close(self._wake)
        os.close(self._woken)

    def _end(self) -> None:
        """Keeper and anchor are gone: end as the keeper did."""
        if self.keeper:
            with suppress(ChildProcessError):
                _, status = os.waitpid(self.keeper, 0)
                self.status = os.waitstatus_to_exitcode(status)
        self._reap()
        sys.stdout.flush()
        os._exit(self.status if self.status >= 0 else 128 - self.status)
