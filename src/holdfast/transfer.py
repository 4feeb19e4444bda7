# SPDX-License-Identifier: Apache-2.0
"""Transfers in flight, and the queues that finish them.

Facts. Hardware finishes the transfers of one queue in the order they were posted, and tells by a
count. An interrupt says only that the count may have risen. The user may drop every reference to a
transfer and its array while the card still writes.

Consequence. What is in flight must be kept alive by the queue, not by the user, and a waiter must
look at the count after every wake-up and before every sleep. One interrupt may finish several
transfers, so whoever took it has to tell the others.

Choice. A :class:`Queue` keeps its transfers, oldest first, each with the count at which it is done.
Subclasses say what the count is, and how an interrupt is acknowledged. Of the
threads that wait for one queue one watches the interrupt, and wakes the others after every look.
``wait`` never cancels anything: after a timeout the transfer is still in flight.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Sequence
from typing import Protocol

from holdfast import steps
from holdfast.errors import DeviceReset, HoldfastError, WaitTimeout
from holdfast.interrupt import Interrupt

POLL = 0.001
"""Seconds between two looks at a queue that has no interrupt."""


class Held(Protocol):
    """Memory that must outlive a transfer (``Buffer``, ``Pin``)."""

    def hold(self) -> object:
        """Begin to use the memory; the transfer keeps what this returns until it is done."""
        ...

    def release(self) -> None:
        """The transfer is done."""
        ...


class Transfer:
    """One posted transfer. Awaitable. Any thread may wait.

    ``nbytes`` is how much it moves. It holds its buffers until the function is done with them,
    also if nobody holds the transfer.
    """

    __slots__ = ("_end", "_error", "_finished", "_held", "_kept", "_queue", "nbytes")

    def __init__(
        self, queue: Queue, end: int, nbytes: int, held: Sequence[Held], kept: Sequence[object]
    ) -> None:
        self._queue = queue
        self._end = end
        self._held = held
        self._kept = kept
        self._finished = False
        self._error: HoldfastError | None = None
        self.nbytes = nbytes

    @property
    def done(self) -> bool:
        """True once the function is done with the memory, with or without success."""
        if not self._finished:
            self._queue.reap()
        return self._finished

    def wait(self, timeout: float | None = None) -> Transfer:
        """Block until done; returns itself.

        Raises WaitTimeout after ``timeout`` seconds (nothing is cancelled), TransferFailed or
        DeviceReset if the function failed, KeeperGone if the keeper ended.
        """
        if not self._finished:
            steps.reach("client.wait")
            self._queue.wait(self, timeout)
        steps.reach("client.complete")
        return self._result()

    def __await__(self) -> Generator[object, None, Transfer]:
        return self._wait_async().__await__()

    async def _wait_async(self) -> Transfer:
        if not self._finished:
            steps.reach("client.wait")
            await self._queue.wait_async(self)
        steps.reach("client.complete")
        return self._result()

    def _result(self) -> Transfer:
        if self._error is not None:
            raise self._error
        return self

    def _finish(self, error: HoldfastError | None) -> None:
        self._error = error
        self._finished = True
        for memory in self._held:
            memory.release()
        self._held = self._kept = ()


class Queue:
    """Transfers of one hardware queue, oldest first. Thread-safe.

    ``generation`` tells how often the function was reset or the lease's channels were started
    anew; when it changes, what was in flight is lost. ``granted`` is the generation in which the
    channel was started last.
    """

    def __init__(
        self,
        interrupt: Interrupt | None,
        generation: Callable[[], int],
        granted: Callable[[], int] | None = None,
    ) -> None:
        self._interrupt = interrupt
        self._generation = generation
        # Not the present one: it may have changed again since the channel was granted.
        self._granted = granted or generation
        self._born = self._granted()
        self._lock = threading.RLock()
        self._news = threading.Condition()
        self._watched = False
        """True while a thread sleeps on the interrupt. Under ``_news``."""
        self._transfers: deque[Transfer] = deque()

    # -- what subclasses say ------------------------------------------------------------

    def completed(self) -> int:
        """The count up to which everything is finished. Called under the queue's lock."""
        raise NotImplementedError

    def acknowledge(self) -> None:
        """An interrupt was taken; let the function raise the next one."""

    def problem(self) -> HoldfastError | None:
        """The error that stopped the queue, if one did."""
        return None

    # -- posting and finishing ------------------------------------------------------------

    def keep(self, end: int, nbytes: int, held: Sequence[Held]) -> Transfer:
        """Remember a transfer that is about to be posted; done when the count reaches ``end``."""
        kept: list[object] = []
        try:
            for memory in held:
                kept.append(memory.hold())  # noqa: PERF401 - known how far it came if one refuses
        except BaseException:
            for memory in held[: len(kept)]:
                memory.release()
            raise
        transfer = Transfer(self, end, nbytes, held, kept)
        self._transfers.append(transfer)
        return transfer

    @property
    def stale(self) -> bool:
        """True if the function was reset since the channel was started."""
        return self._generation() != self._born

    @property
    def in_flight(self) -> int:
        """Transfers not known to be finished."""
        return len(self._transfers)

    def reap(self) -> None:
        """Finish what the function has finished. Never blocks on it."""
        with self._lock:
            if self.stale:
                self._lose(DeviceReset("the function was reset under it", operation="transfer"))
                return
            if not self._transfers:
                return
            count = self.completed()
            while self._transfers and self._transfers[0]._end <= count:
                self._transfers.popleft()._finish(None)
            if self._transfers and (problem := self.problem()) is not None:
                self._lose(problem)

    def renew(self) -> None:
        """The channel was started anew: what was in flight is lost, counting starts at 0."""
        with self._lock:
            self._lose(DeviceReset("the channel was started anew", operation="transfer"))
            self._born = self._granted()

    def _lose(self, error: HoldfastError) -> None:
        while self._transfers:
            self._transfers.popleft()._finish(error)

    # -- waiting ------------------------------------------------------------

    def wait(self, transfer: Transfer, timeout: float | None) -> None:
        """Block until ``transfer`` is finished."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            self.reap()
            if transfer._finished:
                return
            remaining = None if deadline is None else deadline - time.monotonic()
            if remaining is not None and remaining <= 0:
                raise _late(timeout)
            with self._news:
                if self._watched:
                    if not transfer._finished:
                        self._news.wait(remaining)
                    continue
                self._watched = True
            try:
                # Look again, now that nobody else can take the interrupt of what has finished.
                self.reap()
                if not transfer._finished:
                    self._sleep(remaining)
            finally:
                with self._news:
                    self._watched = False
                    self._news.notify_all()

    def _sleep(self, remaining: float | None) -> None:
        if self._interrupt is None:
            time.sleep(POLL if remaining is None else min(POLL, remaining))
        elif self._interrupt.pause(remaining):
            self.acknowledge()

    async def wait_async(self, transfer: Transfer) -> None:
        """Wait on the running loop until ``transfer`` is finished."""

        def finished() -> bool:
            self.reap()
            return transfer._finished

        while not finished():
            if self._interrupt is None:
                await asyncio.sleep(POLL)
                continue
            await self._interrupt.readable(unless=finished)
            with self._news:
                # A thread that watches would sleep on; it wakes the loops after its look.
                count = 0 if self._watched else self._interrupt.take()
            if count:
                self.acknowledge()


def _late(timeout: float | None) -> WaitTimeout:
    return WaitTimeout(f"not finished within {timeout:g} s", operation="wait for transfer")
