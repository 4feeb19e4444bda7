# SPDX-License-Identifier: Apache-2.0
"""The processes of a kill campaign: a client that is killed, and a victim that judges.

Both are forked from a warmed process, so that a kill costs milliseconds and not an interpreter's
start. The client keeps a card-to-host transfer running until it is killed. The victim takes memory
right after the kill, the very frames if they were given back, writes its own pattern, and later
looks whether anything else is in them: content is the only judge.
"""

from __future__ import annotations

import contextlib
import os
import signal
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

import holdfast
from holdfast.device import Device
from holdfast.drivers.xdma_engine import XdmaEngine
from holdfast.regs.xdma import Direction

FOREIGN = 0xA5
"""What the card's memory is filled with: never a victim's own byte."""
DEPTH = 3
"""Transfers that a client keeps in flight."""
OPEN_TIMEOUT = 20.0
_HELLO = struct.Struct("<QQ")  # IOVA of the buffer, number of the lease


@dataclass(slots=True)
class Child:
    """A forked process with a pipe in each direction. Owned by the process that forked it."""

    pid: int
    reading: int
    writing: int

    def read(self, count: int, timeout: float = 30.0) -> bytes:
        """Exactly ``count`` bytes from the child, or fewer if it ended."""
        import select

        data = b""
        deadline = time.monotonic() + timeout
        while len(data) < count:
            ready, _, _ = select.select([self.reading], [], [], deadline - time.monotonic())
            if not ready:
                raise TimeoutError(f"process {self.pid} says nothing")
            piece = os.read(self.reading, count - len(data))
            if not piece:
                break
            data += piece
        return data

    def tell(self, data: bytes) -> None:
        with contextlib.suppress(BrokenPipeError):
            os.write(self.writing, data)

    def kill(self) -> int:
        """SIGKILL; returns CLOCK_MONOTONIC nanoseconds of the kill."""
        os.kill(self.pid, signal.SIGKILL)
        return time.monotonic_ns()

    def reap(self) -> int:
        """Wait for the end; returns the raw wait status."""
        _, status = os.waitpid(self.pid, 0)
        os.close(self.reading)
        os.close(self.writing)
        return status


def spawn(body: Callable[[int, int], None]) -> Child:
    """Fork a child that runs ``body(reading, writing)`` and exits; 70 if it raised."""
    up_read, up_write = os.pipe2(os.O_CLOEXEC)
    down_read, down_write = os.pipe2(os.O_CLOEXEC)
    pid = os.fork()
    if pid == 0:
        code = 70
        try:
            os.close(up_read)
            os.close(down_write)
            body(down_read, up_write)
            code = 0
        finally:
            os._exit(code)
    os.close(up_write)
    os.close(down_read)
    return Child(pid, up_read, down_write)


def fill_card(target: str, nbytes: int) -> None:
    """Fill the first bytes of the card's memory with :data:`FOREIGN`."""
    with holdfast.open(target, timeout=OPEN_TIMEOUT) as card:
        source = card.alloc(nbytes)
        source.array[:] = FOREIGN
        card.dma.to_card(source, 0).wait(OPEN_TIMEOUT)


def client(target: str, nbytes: int) -> Callable[[int, int], None]:
    """A client that keeps :data:`DEPTH` card-to-host transfers in flight until it is killed.

    It tells once where its buffer lies, when the first transfer has been posted.
    """

    def body(_: int, writing: int) -> None:
        card = holdfast.open(target, access="shared", timeout=OPEN_TIMEOUT)
        engine = _engine(card)
        buffer = card.alloc(nbytes)
        batch = engine.prepare(Direction.C2H, buffer, 0)
        queue = engine.queue(Direction.C2H)
        running = [queue.post(batch, [buffer]) for _ in range(DEPTH)]
        os.write(writing, _HELLO.pack(int(buffer.iova), card.lease.number))
        while True:
            running.pop(0).wait()
            running.append(queue.post(batch, [buffer]))

    return body


def _engine(card: Device) -> XdmaEngine:
    engine = card.dma
    if not isinstance(engine, XdmaEngine):
        raise TypeError(f"{card} has no XDMA engine")
    return engine


def client_started(child: Child) -> tuple[int, int]:
    """Wait until a client's transfer runs; returns the IOVA of its buffer and its lease."""
    told = child.read(_HELLO.size)
    if len(told) != _HELLO.size:
        raise RuntimeError(f"client {child.pid} ended before its transfer ran")
    iova, lease = _HELLO.unpack(told)
    return int(iova), int(lease)


_VERDICT = struct.Struct("<QQ")


def victim(target: str, nbytes: int) -> Callable[[int, int], None]:
    """A victim: opens a lease of memory only, and waits for orders.

    ``g`` (go): take memory and fill it. ``j`` (judge): look for foreign bytes, answer, end.
    """

    def body(reading: int, writing: int) -> None:
        with holdfast.open(target, access="shared", channels=0, timeout=OPEN_TIMEOUT) as own:
            os.write(writing, b"r")
            if os.read(reading, 1) != b"g":
                return
            buffer = own.alloc(nbytes)
            pattern = np.uint8(os.getpid() % 0x7F + 1)  # 1..127: never FOREIGN, never zero
            buffer.array[:] = pattern
            os.write(writing, b"f")
            if os.read(reading, 1) != b"j":
                return
            foreign = int(np.count_nonzero(buffer.array != pattern))
            os.write(writing, _VERDICT.pack(int(buffer.iova), foreign))

    return body


def judge(child: Child) -> tuple[int, int]:
    """Ask a victim for its verdict: IOVA of its memory, and how many bytes are not its own."""
    child.tell(b"j")
    told = child.read(_VERDICT.size)
    if len(told) != _VERDICT.size:
        raise RuntimeError(f"victim {child.pid} ended without a verdict")
    iova, foreign = _VERDICT.unpack(told)
    return int(iova), int(foreign)
