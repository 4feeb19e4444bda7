# SPDX-License-Identifier: Apache-2.0
"""What one function's keeper has its anchor hold, by name.

Names: ``backend`` the way to the function · ``process`` the emulated function's pidfd · ``irqs/N``
interrupt eventfds, :data:`IRQ_CHUNK` to a piece · ``arena`` · ``journal`` · ``listener`` ·
``slab/N`` memory · ``lease/N/socket``, ``lease/N/pidfd``, ``lease/N/memory`` of a client.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol

from holdfast.contracts import FunctionBackend
from holdfast.keeper.anchor_link import AnchorLink
from holdfast.kernel import packets, pidfd
from holdfast.values import Handover

IRQ_CHUNK: Final = 200
"""Interrupt eventfds under one name: they travel in one message."""
assert packets.SCM_MAX_FD > IRQ_CHUNK


class Holder(Protocol):
    """Where descriptors are put so that they outlive this process. Any thread but the loop's."""

    def put(self, name: str, fds: Sequence[int] = (), note: object = None) -> None:
        """Returns once a duplicate is held elsewhere. The caller keeps its own open until then."""
        ...

    def drop(self, name: str) -> None:
        """Nothing under this name needs to be held any more. Does not wait; from any thread."""
        ...

    def release(self, name: str) -> None:
        """Like :meth:`drop`, but returns when it is closed there."""
        ...


@dataclass(frozen=True, slots=True)
class Scope:
    """A :class:`Holder` for one of the functions behind a link."""

    link: AnchorLink
    prefix: str

    def put(self, name: str, fds: Sequence[int] = (), note: object = None) -> None:
        self.link.put(self.prefix + name, fds, note)

    def drop(self, name: str) -> None:
        self.link.drop(self.prefix + name)

    def release(self, name: str) -> None:
        self.link.release(self.prefix + name)

    def find(self, name: str) -> tuple[tuple[int, ...], Any] | None:
        """Descriptors and note under a name."""
        item = self.link.get(self.prefix + name)
        return None if item is None else (item.fds, item.read())

    def names(self, start: str = "") -> list[str]:
        """What is held, by the names that begin with ``start``."""
        whole = self.prefix + start
        return [key.removeprefix(self.prefix) for key in self.link.items(whole)]

    def forget(self, name: str) -> None:
        """Drop what is held under a name, and close what of it came here from a predecessor."""
        found = self.find(name)
        self.drop(name)
        for fd in found[0] if found else ():
            os.close(fd)


def put_handover(holder: Holder, name: str, handover: Handover) -> None:
    """Hold what :meth:`find_handover` finds again. The descriptors stay the giver's."""
    note = {"names": list(handover.fds), "notes": dict(handover.notes)}
    holder.put(name, list(handover.fds.values()), note)


def hold_backend(holder: Holder, backend: FunctionBackend) -> None:
    """Have the way to the function outlive this process, if it can."""
    handover = backend.hand_over()
    if handover is not None:
        put_handover(holder, "backend", handover)


def find_handover(scope: Scope, name: str) -> Handover | None:
    """What was held with :func:`put_handover`. The descriptors belong to the caller."""
    found = scope.find(name)
    if found is None:
        return None
    fds, note = found
    named: Mapping[str, int] = dict(zip(note["names"], fds, strict=True))
    return Handover(named, note["notes"])


@dataclass(slots=True)
class FunctionProcess:
    """The process that emulates a function, started by this keeper or by one before it."""

    pid: int
    pidfd: int

    @classmethod
    def of(cls, pid: int) -> FunctionProcess:
        """Of a child that was not waited for."""
        return cls(pid, os.pidfd_open(pid))

    def gone(self) -> bool:
        """Whether all of it has ended: it writes no more (kernel/exit.c, exit_notify)."""
        return self.pidfd < 0 or pidfd.is_dead(self.pidfd)

    def end(self) -> None:
        """Kill it and wait until it is gone. Idempotent."""
        if self.pidfd < 0:
            return
        pidfd.kill(self.pidfd)
        pidfd.await_death(self.pidfd)
        try:
            os.waitpid(self.pid, 0)
        except ChildProcessError:
            pass  # a predecessor's child: the standby reaps it
        os.close(self.pidfd)
        self.pidfd = -1
