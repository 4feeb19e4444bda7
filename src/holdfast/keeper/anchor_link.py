# SPDX-License-Identifier: Apache-2.0
"""The keeper's end of the link to its anchor: what must survive the keeper is put here first.

The anchor can die, too. Then this end, which has the same descriptors, starts another one and
gives it everything again; whoever waits for an acknowledgement gets it from the new one. An anchor
that does not answer is killed and replaced: it has nothing that is not here as well.

Blocking and thread-safe: called from worker threads, never from the keeper's loop, except for
:meth:`AnchorLink.beat`, :meth:`AnchorLink.quiet` and :meth:`AnchorLink.drop`, which do not wait.
"""

from __future__ import annotations

import json
import os
import select
import socket
import struct
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from holdfast import steps
from holdfast.errors import ProtocolError, SystemFailure
from holdfast.kernel import packets, pidfd

ANCHOR: Final = Path(__file__).with_name("anchor.py")
HEAD: Final = struct.Struct("<cI")
MAX_PACKET: Final = 192 * 1024
PATIENCE: Final = 5.0
"""Seconds for an anchor's answer; then it is replaced."""
HEARTBEAT: Final = 10.0
"""Seconds without a heartbeat after which the anchor kills the keeper."""
SAFE_AFTER: Final = 3
"""Crashes within ten seconds after which a successor runs no driver."""
AT_ONCE: Final = 32
"""Messages to a fresh anchor for one answer. The kernel bounds the descriptors of a user that are
on their way (net/unix/scm.c, too_many_unix_fds)."""
TRIES: Final = 20
"""How many anchors are started for one acknowledgement."""


@dataclass(frozen=True, slots=True)
class Guard:
    """When an anchor acts by itself."""

    heartbeat: float = HEARTBEAT
    safe_after: int = SAFE_AFTER


@dataclass(frozen=True, slots=True)
class Item:
    """What is held under a key. The descriptors belong to whoever put them."""

    note: bytes
    fds: tuple[int, ...]

    def read(self) -> Any:
        """The note, which was JSON."""
        return json.loads(self.note) if self.note else {}


class AnchorLink:
    """What the anchor holds for this keeper, and the way to it."""

    def __init__(self, sock: socket.socket, guard: Guard) -> None:
        sock.settimeout(PATIENCE)
        self._sock = sock
        self._guard = guard
        self._lock = threading.RLock()
        self._items: dict[str, Item] = {}
        self._dropped: deque[str] = deque()
        self._number = 0
        self._ended = False
        self._process: subprocess.Popen[bytes] | None = None
        self.pid = 0
        self.pidfd = -1
        """The anchor's; another one after each :meth:`replace`. Readable once it is dead."""
        self.standby = 0
        """The standby's pid, as the anchor knows it."""

    @classmethod
    def start(cls, standby: socket.socket, command: Sequence[str], guard: Guard) -> AnchorLink:
        """Start an anchor for a keeper that has none. ``standby`` is its way to the standby,
        ``command`` starts another one."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        theirs.close()
        self = cls(ours, guard)
        fd = standby.detach()
        self._items["command"] = Item(json.dumps(list(command)).encode(), ())
        self._items["standby"] = Item(str(os.getppid()).encode(), (fd,))
        self._restart()
        return self

    @classmethod
    def inherit(cls, sock: socket.socket, guard: Guard) -> AnchorLink:
        """Go on with the anchor of a predecessor: everything that it holds is in :attr:`items`."""
        self = cls(sock, guard)
        self.pid = _peer_pid(sock)
        with self._lock:
            self._hello()
            number = self._send(b"G")
            while True:
                kind, answered, body, fds = self._receive()
                if kind == b"a" and answered == number:
                    break
                key, _, note = body.partition(b"\0")
                self._items[key.decode()] = Item(note, tuple(fds))
            # It has just answered, so the pid is still its own.
            self.pidfd = os.pidfd_open(self.pid)
        return self

    @classmethod
    def revive(
        cls, standby: socket.socket, command: Sequence[str], guard: Guard, items: dict[str, Item]
    ) -> None:
        """Start an anchor that holds ``items``, and leave it as a killed keeper would.

        It orders a successor of ``standby``, the other end of which is this process's.
        """
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        theirs.close()
        self = cls(ours, guard)
        with standby:
            self._items = {
                "command": Item(json.dumps(list(command)).encode(), ()),
                "standby": Item(str(os.getpid()).encode(), (standby.fileno(),)),
                **items,
            }
            ours.close()
            self._spawn()
            for key, item in self._items.items():
                self._await(self._send(b"P", key.encode() + b"\0" + item.note, item.fds))
            self._sock.close()
        if self._process is not None:
            self._process.returncode = 0  # the standby reaps it
        os.close(self.pidfd)

    # -- what is held ------------------------------------------------------------

    def items(self, prefix: str = "") -> dict[str, Item]:
        """Everything put and not dropped whose key begins with ``prefix``."""
        with self._lock:
            return {key: item for key, item in self._items.items() if key.startswith(prefix)}

    def get(self, key: str) -> Item | None:
        """What is held under a key."""
        return self._items.get(key)

    def put(self, key: str, fds: Sequence[int] = (), note: object = None) -> None:
        """Have the anchor hold duplicates; returns when it has said that it does.

        The descriptors stay the caller's, who keeps them open until :meth:`drop`.
        """
        text = b"" if note is None else json.dumps(note).encode()
        if len(text) + len(key) > MAX_PACKET - 64:
            raise ProtocolError(f"a note of {len(text)} bytes", operation="anchor", target=key)
        with self._lock:
            self._items[key] = Item(text, tuple(fds))
            self._ask(b"P", key.encode() + b"\0" + text, fds)

    def drop(self, key: str) -> None:
        """Have the anchor close what it holds under a key: now, or with the next heartbeat.

        Never waits. What was put may be closed as soon as this returns.
        """
        if self._items.pop(key, None) is not None and not self._ended:
            self._dropped.append(key)
            self._tell()

    def release(self, key: str) -> None:
        """Like :meth:`drop`, but returns when the anchor has closed it."""
        with self._lock:
            if self._items.pop(key, None) is not None:
                self._ask(b"D", key.encode())

    def beat(self) -> None:
        """Say that the keeper's loop runs. Never blocks."""
        self._tell(b"B")

    def quiet(self) -> None:
        """Say that there will be no more heartbeats, because the keeper is ending."""
        self._tell(b"Q")

    def refresh(self) -> None:
        """Ask who the standby is."""
        with self._lock:
            self._ask(b"W")

    def end(self) -> None:
        """Say that nothing needs to be held any more. The anchor ends. Idempotent."""
        self._ended = True
        with self._lock:
            with suppress(OSError):
                self._send(b"E")
            # Not closed before it has read that: with anything unread here it would see a crash.
            if not pidfd.await_death(self.pidfd, PATIENCE):
                pidfd.kill(self.pidfd)
                pidfd.await_death(self.pidfd)
            self._sock.close()
            for fd in self._items.pop("standby", Item(b"", ())).fds:
                os.close(fd)
            if self._process is not None:
                self._process.wait()
            os.close(self.pidfd)
            self.pidfd = -1

    # -- the link ------------------------------------------------------------

    def _tell(self, kind: bytes = b"") -> None:
        """Send what is not answered, unless that would block."""
        if not self._lock.acquire(blocking=False):
            return  # whoever has it sends what was dropped; a heartbeat can be missed
        try:
            if self._writable():
                self._send_dropped()
                if kind:
                    self._send(kind)
        except OSError:
            pass  # it is gone, and another one will not get what was dropped
        finally:
            self._lock.release()

    def _writable(self) -> bool:
        poller = select.poll()
        poller.register(self._sock.fileno(), select.POLLOUT)
        return bool(poller.poll(0))

    def _send_dropped(self) -> None:
        while self._dropped:
            self._send(b"d", self._dropped[0].encode())
            self._dropped.popleft()

    def _ask(self, kind: bytes, body: bytes = b"", fds: Sequence[int] = ()) -> None:
        """Send and wait for the answer, from the anchor that there is by then."""
        for _ in range(TRIES):
            try:
                self._send_dropped()
                number = self._send(kind, body, fds)
                steps.reach("keeper.anchor.sent")
                self._await(number)
            except (OSError, ProtocolError):
                if self._ended:
                    raise
                self._restart()
            else:
                steps.reach("keeper.anchor.acknowledged")
                return
            if kind == b"P":
                return  # it was given everything, this too
        raise SystemFailure("no anchor stays alive", operation="anchor")

    def _await(self, number: int) -> None:
        while True:
            kind, answered, body, fds = self._receive()
            for fd in fds:
                os.close(fd)
            if kind == b"a":
                self.standby = int(body or b"0")
                if answered == number:
                    return

    def _send(self, kind: bytes, body: bytes = b"", fds: Sequence[int] = ()) -> int:
        self._number = (self._number + 1) & 0xFFFF_FFFF
        packets.send(self._sock, HEAD.pack(kind, self._number) + body, fds)
        return self._number

    def _receive(self) -> tuple[bytes, int, bytes, list[int]]:
        data, fds = packets.receive(self._sock, MAX_PACKET, packets.SCM_MAX_FD)
        if len(data) < HEAD.size:
            raise ConnectionResetError("the anchor hung up")
        kind, number = HEAD.unpack_from(data)
        return kind, number, data[HEAD.size :], fds

    def _hello(self) -> None:
        own = pidfd.open_self()
        try:
            self._await(self._send(b"H", fds=[own]))
        finally:
            os.close(own)

    # -- another anchor ------------------------------------------------------------

    def replace(self, dead: int) -> None:
        """Start another anchor, if the one with the pidfd ``dead`` is still the last one."""
        with self._lock:
            if self.pidfd == dead and not self._ended:
                self._restart()

    def _restart(self) -> None:
        """Start an anchor and give it everything. Raises if none can be had: nothing is mapped."""
        for attempt in range(TRIES):
            self._put_away()
            try:
                self._spawn()
                self._dropped.clear()
                self._hello()
                self._give_all()
            except (OSError, ProtocolError) as error:
                if attempt == TRIES - 1:
                    raise SystemFailure(
                        str(error), operation="start anchor",
                        hint="nothing is mapped for DMA without one",
                    ) from error  # fmt: skip
            else:
                return

    def _give_all(self) -> None:
        """Give a fresh anchor everything; returns when it has said that it holds the last of it.

        It carries messages out in order, so one answer stands for all before it.
        """
        items = list(self._items.items())
        for place, (key, item) in enumerate(items, 1):
            body = key.encode() + b"\0" + item.note
            if place % AT_ONCE and place < len(items):
                self._send(b"p", body, item.fds)
            else:
                self._await(self._send(b"P", body, item.fds))

    def _put_away(self) -> None:
        """See to it that the former anchor is dead: two could start a successor each."""
        self._sock.close()
        if self.pidfd < 0:
            return
        pidfd.kill(self.pidfd)
        pidfd.await_death(self.pidfd)
        if self._process is not None:
            self._process.wait()
            self._process = None
        os.close(self.pidfd)
        self.pidfd = -1

    def _spawn(self) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.settimeout(PATIENCE)
        self._sock = ours
        with theirs:
            # In a session of its own: what is typed at a terminal is not for it.
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-S", str(ANCHOR), str(theirs.fileno()),
                 str(self._guard.heartbeat), str(self._guard.safe_after)],
                stdin=subprocess.DEVNULL, pass_fds=[theirs.fileno()], start_new_session=True,
            )  # fmt: skip
        self.pid = self._process.pid
        self.pidfd = os.pidfd_open(self.pid)


def _peer_pid(sock: socket.socket) -> int:
    """Who made the pair that ``sock`` is an end of (SO_PEERCRED, unix(7))."""
    raw = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    return int(struct.unpack("3i", raw)[0])
