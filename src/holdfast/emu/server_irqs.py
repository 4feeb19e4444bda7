# SPDX-License-Identifier: Apache-2.0
"""Interrupt wiring of one connection: which vector rings which of the client's eventfds.

INTx is level-triggered and *automasked* (linux/vfio.h, VFIO_IRQ_INFO_AUTOMASKED): once it was
signalled it is masked until the client unmasks it, and if the function still asserts the line then,
it is signalled again. Message vectors are edges: one that is raised while masked is kept pending.

Connecting an eventfd starts a vector afresh: unmasked, nothing pending.
"""

from __future__ import annotations

import errno
import fcntl
import os
import select
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from holdfast.uapi import vfio_user as u
from holdfast.values import IrqIndex
from holdfast.wire.vfio_user.messages import IrqSet


class _Eventfd:
    """A client's eventfd, written without ever blocking and without touching its flags.

    O_NONBLOCK belongs to the open file that the client shares, so it is not ours to set. A blocking
    one is asked first: only its owner could fill it in between.
    """

    __slots__ = ("_fd", "_poll")

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._poll: select.poll | None = None
        if not fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_NONBLOCK:
            self._poll = select.poll()
            self._poll.register(fd, select.POLLOUT)

    def ring(self) -> None:
        if self._poll is not None and not self._poll.poll(0):
            return
        try:
            os.eventfd_write(self._fd, 1)
        except BlockingIOError:
            pass  # at its maximum: the client will see that it was rung

    def close(self) -> None:
        os.close(self._fd)


@dataclass(slots=True)
class _Type:
    """One interrupt type."""

    count: int
    wires: dict[int, _Eventfd] = field(default_factory=dict)
    masked: set[int] = field(default_factory=set)
    pending: set[int] = field(default_factory=set)


class Irqs:
    """All interrupt types of a function. ``signal`` and ``wired`` may come from any thread."""

    def __init__(self, counts: Sequence[int], asserted: Callable[[], bool]) -> None:
        """``asserted`` tells the level of the INTx line."""
        self._types = [_Type(count) for count in counts]
        self._asserted = asserted
        self._lock = threading.Lock()

    def count(self, index: int) -> int:
        """Vectors of a type; ``OSError`` EINVAL if there is no such type."""
        if index >= len(self._types):
            raise OSError(errno.EINVAL, f"interrupt type {index}")
        return self._types[index].count

    def wired(self, index: IrqIndex) -> bool:
        """True if any vector of this type has an eventfd."""
        with self._lock:
            return bool(self._types[index].wires)

    def signal(self, index: IrqIndex, vector: int) -> None:
        """Raise one vector. Without an eventfd it is dropped."""
        with self._lock:
            self._raise(self._types[index], index, vector)

    def close(self) -> None:
        """Disconnect everything."""
        with self._lock:
            for kind in self._types:
                self._disable(kind)

    def apply(self, what: IrqSet, fds: list[int]) -> None:
        """Carry out a DEVICE_SET_IRQS. Takes ownership of ``fds`` in every case.

        ``OSError`` EINVAL for what the function does not have; nothing is changed then.
        """
        try:
            kind = self._checked(what, fds)
        except OSError:
            for fd in fds:
                os.close(fd)
            raise
        vectors = range(what.start, what.start + what.count)
        if what.data_kind == u.IRQ_DATA_BOOL:
            vectors_set = [v for v, on in zip(vectors, what.data, strict=True) if on]
        else:
            vectors_set = list(vectors)
        asserted = what.index == IrqIndex.INTX and self._asserted()
        with self._lock:
            if what.action == u.IRQ_ACTION_MASK:
                kind.masked.update(vectors_set)
            elif what.action == u.IRQ_ACTION_UNMASK:
                self._unmask(kind, what.index, vectors_set, asserted=asserted)
            elif what.data_kind == u.IRQ_DATA_EVENTFD:
                self._connect(kind, vectors_set, fds)
                self._unmask(kind, what.index, vectors_set, asserted=asserted)
            elif what.count == 0:
                self._disable(kind)
            else:
                for vector in vectors_set:
                    self._raise(kind, what.index, vector)

    def _checked(self, what: IrqSet, fds: list[int]) -> _Type:
        count = self.count(what.index)
        if what.count and (what.start >= count or what.start + what.count > count):
            raise OSError(errno.EINVAL, f"vectors {what.start}+{what.count} of {count}")
        triggers = what.action == u.IRQ_ACTION_TRIGGER
        if what.index in (IrqIndex.ERR, IrqIndex.REQ) and not triggers:
            raise OSError(errno.EINVAL, "this interrupt type cannot be masked")
        if what.data_kind == u.IRQ_DATA_EVENTFD and not triggers:
            raise OSError(errno.EINVAL, "masking through an eventfd is not offered")
        for fd in fds:
            if not _is_eventfd(fd):
                raise OSError(errno.EINVAL, "the descriptor is not an eventfd")
        return self._types[what.index]

    @staticmethod
    def _disable(kind: _Type) -> None:
        for wire in kind.wires.values():
            wire.close()
        kind.wires.clear()
        kind.masked.clear()
        kind.pending.clear()

    @staticmethod
    def _connect(kind: _Type, vectors: list[int], fds: list[int]) -> None:
        """Connect the vectors to ``fds``, or disconnect them if there are none."""
        for vector in vectors:
            old = kind.wires.pop(vector, None)
            if old is not None:
                old.close()
            kind.pending.discard(vector)
        for vector, fd in zip(vectors, fds, strict=False):
            kind.wires[vector] = _Eventfd(fd)

    def _unmask(self, kind: _Type, index: int, vectors: list[int], *, asserted: bool) -> None:
        kind.masked.difference_update(vectors)
        for vector in vectors:
            if vector in kind.pending or asserted:
                kind.pending.discard(vector)
                self._raise(kind, index, vector)

    @staticmethod
    def _raise(kind: _Type, index: int, vector: int) -> None:
        if vector in kind.masked:
            if index != IrqIndex.INTX:  # INTx is a level: whoever unmasks it asks for the level
                kind.pending.add(vector)
            return
        wire = kind.wires.get(vector)
        if wire is not None:
            wire.ring()
            if index == IrqIndex.INTX:
                kind.masked.add(vector)


def _is_eventfd(fd: int) -> bool:
    try:
        return os.readlink(f"/proc/self/fd/{fd}") == "anon_inode:[eventfd]"
    except OSError:
        return False
