# SPDX-License-Identifier: Apache-2.0
"""Named steps of client, keeper and function, at which a campaign can kill.

Facts. A process that dies between two statements leaves behind what was true between them, and
which two statements matter is known to whoever wrote them, not to a clock. Every participant of a
lease passes such places: the client that opens, posts and closes, the keeper that journals, maps
and releases, the function that fetches and moves.

Choice. Each such place has a name in :data:`STEPS` and calls :func:`reach`. A campaign makes one
small file, a :class:`Board`, which every process of the stack maps because its path is inherited in
an environment variable. In a *slot* of it the campaign writes: at the n-th time that this step is
reached, kill these. The process that comes by kills others first (through a pidfd that was
compared with the start time, so that a reused pid is never hit), waits until they are dead, and
itself last: everybody dies at exactly this place. Words are written singly and in an order in which
a half-written slot is not armed; one process at a time counts a slot down, because a slot belongs
to one client, or to the one keeper or function there is.

Cost. Without the variable a step is one look at a global; with it, a microsecond or two.
"""

from __future__ import annotations

import mmap
import os
import select
import signal
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Final, Self

STEPS: Final[dict[str, str]] = {
    # opening
    "client.connecting": "it is about to connect to the keeper's socket",
    "client.connected": "it is connected and has said nothing",
    "client.greeted": "the keeper knows who it is; no lease was asked for",
    "client.opened": "the lease and its descriptors arrived; nothing is mapped",
    "client.mapped": "registers, interrupts, doorbells and rings are in place",
    # memory
    "client.alloc": "it is about to ask for a slab",
    "client.alloc.granted": "the slab's descriptor arrived; it is not mapped",
    "client.alloc.mapped": "the slab is mapped; no buffer is cut from it",
    "client.alloc.cut": "a buffer was cut from a slab",
    "client.pin": "it is about to ask for a pin",
    "client.pin.reserved": "room for its pages is reserved; the kernel was not asked (in place)",
    "client.pin.placed": "the kernel pinned its pages; the keeper does not know (in place)",
    "client.pinned": "its pages are reachable and the keeper knows",
    # transfers
    "client.post": "a transfer is remembered; no descriptor is written",
    "client.posted": "the descriptors are written; the doorbell was not rung",
    "client.doorbell": "the doorbell was rung",
    "client.wait": "it is about to wait for a transfer",
    "client.complete": "it knows that a transfer is finished",
    # giving back
    "client.unpin": "it is about to take a pin away",
    "client.unpinned": "the pin is taken away",
    "client.free": "it is about to give a buffer up",
    "client.freed": "nobody can use the buffer any more; its bytes go back to the slab",
    "client.trim": "it is about to give a slab back",
    "client.trimmed": "the keeper took the slab back; it is still mapped",
    "client.closing": "it is about to let go of the device",
    "client.unmapped": "windows are unmapped and doorbells closed; no goodbye was said",
    "client.closed": "the goodbye was answered; the socket is still open",
    # the keeper, for a client
    "keeper.accepted": "a client is connected",
    "keeper.admitted": "a lease exists and its death is watched",
    "keeper.granted": "the channels of a lease are started",
    "keeper.answered": "a request was answered",
    "keeper.alloc.reserved": "a slab is journalled; it is not mapped",
    "keeper.alloc.mapped": "the slab is mapped for the function; that is not journalled",
    "keeper.alloc.confirmed": "the journal says that the slab is mapped",
    "keeper.pin.reserved": "a pin is journalled; nothing is mapped",
    "keeper.pin.mapped": "the pin is mapped for the function; that is not journalled",
    "keeper.pin.confirmed": "the journal says that the pin is mapped",
    "keeper.unmapping": "something is about to be unmapped",
    "keeper.unmapped": "it is unmapped; the journal says that it is mapped",
    "keeper.anchor.sent": "descriptors were sent to the anchor; it has not acknowledged",
    "keeper.anchor.acknowledged": "the anchor has duplicates of the descriptors",
    "keeper.request_sent": "a request is on its way to the function; nobody read the answer",
    "keeper.relay_found": "the function asks for an access to a client's memory; it is not done",
    "keeper.relay_done": "the access is done; that is not written down",
    "keeper.relay_carried": "it is written down that the access is done; no answer was given",
    "keeper.relay_answered": "the function was answered; that is not written down",
    "keeper.relay_noted": "it is written down; the request is still in the socket",
    "keeper.relay_taken": "its request was taken from the socket",
    # the keeper, posting for clients
    "keeper.mediation.check": "a batch was copied and checked; nothing of it is written down",
    "keeper.mediation.accept": "what was accepted is written down; the ring still has it",
    "keeper.mediation.consume": "it is taken from the client's ring; nothing is posted",
    "keeper.mediation.post": "it is posted to the function",
    "keeper.mediation.told": "what has finished is told and taken from the table",
    "keeper.mediation.put": "ends are in the completion ring; nothing says so",
    "keeper.mediation.produce": "they are counted in the keeper's memory; the client cannot see",
    "keeper.mediation.publish": "the client can see them; its doorbell was not rung",
    "keeper.mediation.reinstate": "a successor has a channel's table back; nothing is posted anew",
    # the keeper, after a death
    "keeper.death.frozen": "a dead client's lease is frozen",
    "keeper.death.quiet": "its memory cannot be written any more; nothing was given back",
    "keeper.death.unmapped": "nothing of it is mapped any more; its pages are still its own",
    "keeper.death.punched": "its pages were given back to the kernel",
    "keeper.death.released": "its lease is released; the journal is not closed",
    "keeper.adopting": "a successor has the descriptors and has read nothing",
    "keeper.adopted": "a successor has taken every lease over",
    # the function
    "function.fetch": "it is about to fetch descriptors, or was told of a transfer",
    "function.fetched": "it has descriptors and has moved nothing of them",
    "function.move": "it is about to move a piece of a transfer",
    "function.moved": "a piece is in memory; nobody was told",
    "function.written": "the count is written back; no interrupt was raised",
    "function.complete": "everybody was told",
}
"""Name to what is true there. The first part of a name is the role that reaches the step."""

VARIABLE: Final = "HOLDFAST_STEPS"
"""Environment variable with the path of the board; absent: steps do nothing."""
ROLES: Final = ("client", "keeper", "anchor", "function", "standby")
_SELF_TELLING: Final = frozenset({"keeper", "function"})
"""Roles that pass steps, and so tell their pid themselves."""
DEATH_TIMEOUT: Final = 2.0
"""Seconds that whoever kills another process waits for its end."""

SLOTS: Final = 24
_SIZE: Final = 4096
_SLOT_WORDS: Final = 16
_FIRST: Final = 32
"""Word at which the slots begin; before it are pid and start time of each role."""
_FREE, _ASLEEP, _ARMED, _HIT = range(4)
_STATE, _STEP, _LEFT, _SUBJECT, _MASK, _CLIENT, _CLIENT_START, _AT, _BY, _KILLED = range(10)
_NUMBERS: Final = {name: number for number, name in enumerate(STEPS, 1)}

_hook: Callable[[str], None] | None = None


def reach(step: str) -> None:
    """Say that this process has come to a named step."""
    if _hook is not None:
        _hook(step)


def arm(hook: Callable[[str], None] | None) -> None:
    """Have ``hook`` called at every step from now on; None: nobody."""
    global _hook  # noqa: PLW0603 - one switch for the whole process
    _hook = hook


@dataclass(frozen=True, slots=True)
class Hit:
    """What became of a slot: when its step was reached (CLOCK_MONOTONIC), by whom, who was hit."""

    at_ns: int
    by: int
    killed: frozenset[str]


class Board:
    """The file that arms steps, mapped. Owned by whoever made or opened it; a context manager.

    Several processes may use it at once, as long as each slot is armed by one of them.
    """

    def __init__(self, path: Path, *, create: bool = False) -> None:
        """Map the board at ``path``. Raises OSError."""
        flags = os.O_RDWR | os.O_CLOEXEC | (os.O_CREAT | os.O_EXCL if create else 0)
        fd = os.open(path, flags, 0o600)
        try:
            if create:
                os.truncate(fd, _SIZE)
            self._memory = mmap.mmap(fd, _SIZE)
        finally:
            os.close(fd)
        self._words = memoryview(self._memory).cast("Q")
        self._told: dict[str, int] = {}
        self.path = path

    # -- the campaign's side ------------------------------------------------------------

    def set_role(self, role: str, pid: int | None) -> None:
        """Say which process has a role; None: nobody."""
        at = 2 * ROLES.index(role)
        self._words[at] = 0
        self._words[at + 1] = (start_time(pid) or 0) if pid else 0
        self._words[at] = pid or 0

    def role(self, role: str) -> int:
        """The process that has a role, or 0."""
        return self._words[2 * ROLES.index(role)]

    def arm(
        self,
        slot: int,
        step: str,
        kill: Iterable[str],
        *,
        count: int = 1,
        client: int = 0,
        asleep: bool = False,
    ) -> None:
        """At the ``count``-th time from now that ``step`` is reached, kill these roles.

        ``client`` is the process meant by the role "client"; a client's step is its own only. Until
        :meth:`enlist` it may be unknown. ``asleep``: the slot waits for :meth:`wake`.
        """
        words, base = self._words, _base(slot)
        words[base + _STATE] = _FREE
        words[base + _STEP] = _NUMBERS[step]
        words[base + _LEFT] = count
        words[base + _SUBJECT] = int(step.startswith("client."))
        words[base + _MASK] = sum(1 << ROLES.index(role) for role in kill)
        words[base + _CLIENT] = client
        words[base + _CLIENT_START] = (start_time(client) or 0) if client else 0
        words[base + _AT] = words[base + _BY] = words[base + _KILLED] = 0
        words[base + _STATE] = _ASLEEP if asleep else _ARMED

    def clear(self, slot: int) -> None:
        """Disarm a slot."""
        self._words[_base(slot) + _STATE] = _FREE

    def hit(self, slot: int) -> Hit | None:
        """What became of an armed slot; None: its step was not reached."""
        words, base = self._words, _base(slot)
        if words[base + _STATE] != _HIT:
            return None
        killed = words[base + _KILLED]
        names = frozenset(role for bit, role in enumerate(ROLES) if killed >> bit & 1)
        return Hit(words[base + _AT], words[base + _BY], names)

    # -- a participant's side ------------------------------------------------------------

    def enlist(self, slots: Iterable[int]) -> None:
        """In a client: these slots mean this process."""
        own = os.getpid()
        for slot in slots:
            base = _base(slot)
            self._words[base + _CLIENT_START] = start_time(own) or 0
            self._words[base + _CLIENT] = own

    def wake(self, slots: Iterable[int]) -> None:
        """Arm these slots, if they are asleep."""
        for slot in slots:
            base = _base(slot)
            if self._words[base + _STATE] == _ASLEEP:
                self._words[base + _STATE] = _ARMED

    def look(self, step: str) -> None:
        """The hook: count slots of this step down, and kill where one comes to zero."""
        words = self._words
        role = step.partition(".")[0]
        if role in _SELF_TELLING and self._told.get(role) != os.getpid():
            self.set_role(role, os.getpid())
            self._told[role] = os.getpid()
        number = _NUMBERS.get(step, 0)
        for base in range(_FIRST, _FIRST + SLOTS * _SLOT_WORDS, _SLOT_WORDS):
            if words[base] != _ARMED or words[base + _STEP] != number:
                continue
            if words[base + _SUBJECT] and words[base + _CLIENT] != os.getpid():
                continue
            left = words[base + _LEFT] - 1
            words[base + _LEFT] = max(0, left)
            if left <= 0:
                self._strike(base)

    def _strike(self, base: int) -> None:
        words, own = self._words, os.getpid()
        words[base + _AT], words[base + _BY] = time.monotonic_ns(), own
        mask = words[base + _MASK]
        killed, last = 0, False
        waiting: list[int] = []
        for bit, role in enumerate(ROLES):
            if not mask >> bit & 1:
                continue
            at = base + _CLIENT if role == "client" else 2 * bit
            pid, start = words[at], words[at + 1]
            if pid == own:
                killed, last = killed | 1 << bit, True
            elif (pidfd := kill(pid, start)) is not None:
                killed |= 1 << bit
                waiting.append(pidfd)
        words[base + _KILLED] = killed
        words[base + _STATE] = _HIT
        for pidfd in waiting:
            # Whoever goes on here does so in a world in which the other is dead.
            select.select([pidfd], [], [], DEATH_TIMEOUT)
            os.close(pidfd)
        if last:
            os.kill(own, signal.SIGKILL)

    def close(self) -> None:
        """Unmap. Idempotent."""
        self._words.release()
        self._memory.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _base(slot: int) -> int:
    if not 0 <= slot < SLOTS:
        raise IndexError(slot)
    return _FIRST + slot * _SLOT_WORDS


def start_time(pid: int) -> int | None:
    """When a process started, in ticks since boot (proc_pid_stat(5), field 22); None if it ended.

    With the pid it names a process for ever: pids are used again.
    """
    try:
        text = Path(f"/proc/{pid}/stat").read_bytes()
    except OSError:
        return None
    fields = text.rpartition(b")")[2].split()
    return None if fields[0] in (b"Z", b"X") else int(fields[19])


def kill(pid: int, started: int) -> int | None:
    """SIGKILL the process that has this pid and start time; its pidfd, or None if it is gone.

    The caller closes the descriptor, which becomes readable when the process has ended.
    """
    if not pid:
        return None
    try:
        pidfd = os.pidfd_open(pid)
    except OSError:
        return None
    if start_time(pid) == started:  # looked at behind the pidfd: this very process
        try:
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
            return pidfd
        except OSError:
            pass  # it ended a moment ago
    os.close(pidfd)
    return None


def join(path: str | None) -> Board | None:
    """Map the board at ``path``, if there is one, and let it decide at every step of this process.

    A board that is gone belonged to a campaign that is over.
    """
    if not path:
        return None
    try:
        board = Board(Path(path))
    except OSError:
        return None
    arm(board.look)
    return board


board: Board | None = join(os.environ.get(VARIABLE))
"""The board that this process was started under, if any. Forked children share it."""
