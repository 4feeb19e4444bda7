# SPDX-License-Identifier: Apache-2.0
"""Interrupts as something to wait for: blocking, awaitable, or as an asynchronous iterator.

An interrupt vector is an eventfd that the function writes; the keeper is not involved. Each
:class:`Interrupt` watches it together with the lease's socket, so that a wait ends with a clear
error when the keeper goes away. Several interrupts may coalesce into one count.
"""

from __future__ import annotations

import asyncio
import contextlib
import select
import time
from collections.abc import AsyncIterator, Callable, Generator
from typing import Protocol

from holdfast.errors import Closed, WaitTimeout
from holdfast.kernel import events


class LeaseEnd(Protocol):
    """The client's end of the lease, as far as a waiter needs it.

    ``news`` is an eventfd that is rung, and never drained, when something happened to the lease
    that another thread may have taken note of first.
    """

    @property
    def news(self) -> int: ...

    def fileno(self) -> int: ...

    def pump(self) -> None:
        """Take notices; raise KeeperGone if the keeper is gone. Never blocks for long."""
        ...


class Interrupt:
    """One vector. Owns the eventfd ``fd``. Any thread may wait; one count wakes one waiter.

    ``drain`` takes the count, for what is no eventfd.

    A level-triggered line (INTx) masks itself when it is raised; ``unmask`` lets it be raised
    again. It is called when somebody waits anew: by then what raised it has been acknowledged, or
    it is raised once more for nothing.
    """

    def __init__(
        self,
        vector: int,
        fd: int,
        lease: LeaseEnd,
        unmask: Callable[[], None] | None = None,
        drain: Callable[[int], int] = events.drain,
    ) -> None:
        self.vector = vector
        self._fd = fd
        self._lease = lease
        self._unmask = unmask
        self._drain = drain
        self._masked = False
        self._epoll = select.epoll()
        self._epoll.register(fd, select.EPOLLIN)
        self._epoll.register(lease.fileno(), select.EPOLLIN)
        # Edge-triggered: each ring wakes every waiter once, and nobody has to take it.
        self._epoll.register(lease.news, select.EPOLLIN | select.EPOLLET)
        self._waiters: dict[asyncio.AbstractEventLoop, set[asyncio.Future[None]]] = {}

    def fileno(self) -> int:
        """A descriptor that is readable when there is something to take or the lease ended."""
        return self._epoll.fileno()

    def take(self) -> int:
        """How often it was raised since last taken; 0 if it was not. Never blocks."""
        if self._fd < 0:
            raise Closed("the device is closed", operation="wait for interrupt")
        count = self._drain(self._fd)
        self._masked |= bool(count and self._unmask)
        if count and self._waiters:
            self._tell_loops()
        return count

    def _arm(self) -> None:
        if self._masked and self._unmask is not None:
            self._masked = False
            self._unmask()

    def _tell_loops(self) -> None:
        """What one waiter took may be news for those in event loops, too."""
        for loop in list(self._waiters):
            with contextlib.suppress(RuntimeError):  # the loop has been closed since
                loop.call_soon_threadsafe(self._wake, loop)

    def wait(self, timeout: float | None = None) -> int:
        """Block until raised; returns the count. Raises WaitTimeout after ``timeout`` seconds."""
        deadline = None if timeout is None else time.monotonic() + timeout
        self._arm()
        while not (count := self.take()):
            remaining = None if deadline is None else deadline - time.monotonic()
            if remaining is not None and remaining <= 0:
                raise WaitTimeout(
                    f"not raised within {timeout:g} s",
                    operation="wait for interrupt",
                    target=f"vector {self.vector}",
                )
            self._look(remaining)
        return count

    def pause(self, timeout: float | None) -> int:
        """Block until raised, or until something else happened to the lease; returns the count."""
        self._look(timeout)
        return self.take()

    def _look(self, timeout: float | None) -> None:
        self._arm()
        for fd, _ in self._epoll.poll(timeout):
            if fd != self._fd:
                self._lease.pump()

    async def readable(self, unless: Callable[[], bool] = lambda: False) -> None:
        """Wait on the running loop until :meth:`take` may have something; checks the lease.

        ``unless`` is asked once, after any later interrupt would end the wait: if it is true there
        is no wait.
        """
        self._arm()
        loop = asyncio.get_running_loop()
        future: asyncio.Future[None] = loop.create_future()
        mine = self._waiters.setdefault(loop, set())
        if not mine:
            loop.add_reader(self.fileno(), self._wake, loop)
        mine.add(future)
        try:
            if not unless():
                await future
        finally:
            mine.discard(future)
            if not mine:
                del self._waiters[loop]
                if not self._epoll.closed:
                    loop.remove_reader(self.fileno())
        self._look(0)

    def _wake(self, loop: asyncio.AbstractEventLoop) -> None:
        for future in self._waiters.get(loop, ()):
            if not future.done():
                future.set_result(None)

    def __await__(self) -> Generator[object, None, int]:
        return self._wait_async().__await__()

    async def _wait_async(self) -> int:
        while not (count := self.take()):
            await self.readable()
        return count

    async def __aiter__(self) -> AsyncIterator[int]:
        while True:
            yield await self._wait_async()

    def close(self) -> None:
        """Let the eventfd go. Idempotent."""
        if self._fd >= 0:
            self._epoll.close()
            events.close(self._fd)
            self._fd = -1
