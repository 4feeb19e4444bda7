# SPDX-License-Identifier: Apache-2.0
"""The processes of a kill campaign on an edu device, emulated or real.

The client has the whole function and starts a card-to-host transfer, in which it is killed. The
victim is innocent in several places at once, because a freed frame waits for its next owner on a
list of its kind, on the processor that freed it (mm/page_alloc.c, ``free_frozen_page_commit``):

* as a *tenant*: a lease of memory only, mapped for the function right after the dead one's was
  given back. Memory that is faulted in by a pin is not movable (``memalloc_pin_save``), so this is
  where a frame that was pinned goes next;
* as a *bystander* with anonymous memory, some from each processor: where movable frames go;
* as a *bystander* with bytes in pipes, which are kernel memory that can be looked at: the other
  place where unmovable frames go, and the worst to write into.

It writes its own pattern everywhere, and later looks whether anything else is in there: content is
the only judge.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import signal
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import numpy as np
import numpy.typing as npt

import holdfast
from holdfast.drivers.edu import EduEngine
from holdfast.errors import NoPermission, UsageError
from holdfast.kernel import pagemap
from holdfast.regs import edu as regs
from holdfast.torture.actors import FOREIGN, OPEN_TIMEOUT, Child, spawn

WINDOW = 0.1
"""Seconds from the command to the transfer (QEMU docs/specs/edu.rst)."""
NBYTES = regs.BUFFER_SIZE - 64
"""Bytes of one transfer: before QEMU 9.0 edu refuses one that ends with its buffer."""
TENANT = 256 << 10
"""Bytes that a tenant takes: the smallest slab."""
ANONYMOUS = 1 << 20
"""Bytes of anonymous memory that a bystander takes on each processor."""
PIPE = 1 << 20
"""Bytes that a bystander puts into a pipe on each processor (/proc/sys/fs/pipe-max-size)."""
MOST_PROCESSORS = 4
PAGE = mmap.PAGESIZE

Body = Callable[[int, int], None]
_HELLO = struct.Struct("<QQQQQ")
_VERDICT = struct.Struct("<QQQ")


@dataclass(frozen=True, slots=True)
class Started:
    """A client whose transfer runs: what its memory is, and between when and when it was posted."""

    iova: int
    lease: int
    frame: int
    """Physical address of its page; 0 if this user may not know."""
    before_ns: int
    """CLOCK_MONOTONIC; the write comes :data:`WINDOW` after that or later."""
    posted_ns: int

    def under_way(self, at_ns: int) -> bool:
        """Whether the card had certainly been started then, and had certainly not written yet."""
        return self.posted_ns <= at_ns < self.before_ns + int(WINDOW * 1e9)


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a victim saw: where its lease's memory lay, whose frame it had, what was foreign."""

    iova: int
    recycled: bool
    """The dead process's frame was among the memory whose frames it can tell."""
    foreign: int


def engine_of(card: holdfast.Device) -> EduEngine:
    """The edu client half of an open device. UsageError if it is another device."""
    if not isinstance(card.dma, EduEngine):
        raise UsageError(
            f"its driver is {card.driver!r}, not 'edu'",
            operation="kill campaign",
            target=str(card.target),
            hint="name an edu device (QEMU docs/specs/edu.rst), such as emu:edu",
        )
    return card.dma


def fill_card(target: str) -> None:
    """Fill the device's buffer with :data:`~holdfast.torture.actors.FOREIGN`."""

    def body(_: int, writing: int) -> None:
        try:
            with holdfast.open(target, access="exclusive", timeout=OPEN_TIMEOUT) as card:
                source = card.alloc(NBYTES, align=PAGE)
                source.array[:] = FOREIGN
                engine_of(card).to_card(source).wait(OPEN_TIMEOUT)
        except holdfast.HoldfastError as error:
            os.write(writing, str(error).encode()[:PAGE])

    # In a child: a campaign forks, and whoever forks must not have opened a device before.
    child = spawn(body)
    said = child.read(PAGE)
    if child.reap() != 0 or said:
        raise UsageError(
            said.decode(errors="replace") or "the device could not be filled",
            operation="kill campaign",
            target=target,
        )


def client(target: str) -> Body:
    """A client that, once told to, starts a card-to-host transfer and waits to be killed.

    ``g`` (go): open, post, say so. Forked ahead of its turn.
    """

    def body(reading: int, writing: int) -> None:
        if os.read(reading, 1) != b"g":
            return
        card = holdfast.open(target, access="exclusive", timeout=OPEN_TIMEOUT)
        engine = engine_of(card)
        buffer = card.alloc(NBYTES, align=PAGE)
        buffer.array[:] = 0
        frame = int(frames(buffer.array)[0])
        before = time.monotonic_ns()
        transfer = engine.from_card(buffer)
        posted = time.monotonic_ns()
        told = _HELLO.pack(int(buffer.iova), card.lease.number, frame, before, posted)
        os.write(writing, told)
        transfer.wait()
        signal.pause()

    return body


def client_started(child: Child) -> Started:
    """Wait until a client's transfer runs."""
    told = child.read(_HELLO.size)
    if len(told) != _HELLO.size:
        raise RuntimeError(f"client {child.pid} ended before its transfer ran")
    return Started(*_HELLO.unpack(told))


def victim(target: str) -> Body:
    """A victim, for one dead process after the other, until its orders end.

    ``o`` (open): take a new lease of memory only. ``g`` and 8 bytes (go; the dead process's frame):
    take memory and fill it. ``j`` (judge): look for foreign bytes, answer, give everything back.
    """

    def body(reading: int, writing: int) -> None:
        while os.read(reading, 1) == b"o":
            with holdfast.open(target, access="shared", channels=0, timeout=OPEN_TIMEOUT) as own:
                os.write(writing, b"r")
                order = os.read(reading, 9)
                if order[:1] != b"g":
                    return
                frame = int.from_bytes(order[1:], "little")
                _be_a_victim(own, frame, reading, writing)

    return body


def _be_a_victim(own: holdfast.Device, frame: int, reading: int, writing: int) -> None:
    pattern = os.getpid() % 0x7F + 1  # 1..127: never FOREIGN, never zero
    tenant = own.alloc(TENANT, align=PAGE)
    tenant.array[:] = pattern
    with Bystander(pattern) as bystander:
        os.write(writing, b"f")
        if os.read(reading, 1) != b"j":
            return
        known = (tenant.array, *bystander.arrays)
        recycled = bool(frame) and any(frame in frames(piece) for piece in known)
        pieces = (*known, *bystander.drained())
        foreign = sum(int(np.count_nonzero(piece != pattern)) for piece in pieces)
    os.write(writing, _VERDICT.pack(int(tenant.iova), recycled, foreign))


def prepare(child: Child) -> None:
    """Let a victim open its lease; :func:`go` waits for it."""
    child.tell(b"o")


def go(child: Child, started: Started) -> None:
    """Let a victim take its memory; :func:`settled` tells when it has."""
    if child.read(1) != b"r":
        raise RuntimeError(f"victim {child.pid} got no lease")
    child.tell(b"g" + started.frame.to_bytes(8, "little"))


def settled(child: Child) -> None:
    """Wait until a victim has its memory."""
    if child.read(1) != b"f":
        raise RuntimeError(f"victim {child.pid} got no memory")


def judge(child: Child) -> Verdict:
    """Ask a victim what it sees; it gives its memory back and can be prepared again."""
    child.tell(b"j")
    told = child.read(_VERDICT.size)
    if len(told) != _VERDICT.size:
        raise RuntimeError(f"victim {child.pid} ended without a verdict")
    iova, recycled, foreign = _VERDICT.unpack(told)
    return Verdict(iova, bool(recycled), foreign)


class Bystander:
    """Plenty of memory from each processor, full of one byte. A context manager."""

    def __init__(self, pattern: int) -> None:
        self.arrays: list[npt.NDArray[np.uint8]] = []
        """Anonymous memory, in small pages."""
        self._pipes: list[tuple[int, int]] = []
        allowed = os.sched_getaffinity(0)
        for processor in sorted(allowed)[:MOST_PROCESSORS]:
            os.sched_setaffinity(0, {processor})
            self._fill_pipe(pattern)
            self._fill_memory(pattern)
        os.sched_setaffinity(0, allowed)

    def _fill_memory(self, pattern: int) -> None:
        memory = mmap.mmap(-1, ANONYMOUS, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        # Huge pages come from elsewhere: a freed single frame is never in one so soon.
        memory.madvise(mmap.MADV_NOHUGEPAGE)
        piece = np.frombuffer(memory, np.uint8)
        piece[:] = pattern
        self.arrays.append(piece)

    def _fill_pipe(self, pattern: int) -> None:
        reading, writing = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._pipes.append((reading, writing))
        room = fcntl.fcntl(writing, fcntl.F_SETPIPE_SZ, PIPE)
        os.write(writing, bytes([pattern]) * room)

    def drained(self) -> list[npt.NDArray[np.uint8]]:
        """What is in the pipes; it can be taken out once."""
        return [np.frombuffer(os.read(reading, PIPE), np.uint8) for reading, _ in self._pipes]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.arrays.clear()
        for ends in self._pipes:
            for end in ends:
                os.close(end)
        self._pipes.clear()


def frames(memory: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint64]:
    """Physical addresses of the pages that ``memory`` begins in; zeros if not to be known."""
    first = memory.ctypes.data // PAGE * PAGE
    count = -(-(memory.ctypes.data + memory.nbytes - first) // PAGE)
    try:
        return pagemap.physical(first, count * PAGE, PAGE)
    except NoPermission:
        return np.zeros(count, np.uint64)
