# SPDX-License-Identifier: Apache-2.0
"""Blocking calls off the loop, in threads of which some may never come back.

Facts. A call into a driver, a backend or the kernel can take for ever, and a Python thread cannot
be ended from outside. A thread pool whose threads all hang serves nobody, and one whose threads are
waited for at the end keeps its process from ending (``concurrent.futures.thread``,
``_python_exit``).

Consequence. A deadline can free the *caller* of a call, never the thread. What must stay bounded is
how many threads are lost, and whom that concerns.

Choice. Calls go through *lanes*: one for the driver, of one thread, so that its calls never
overlap; one for the function; one for the keeper's own memory, which a hanging function must not
hold up. A call that is past its deadline is abandoned, and another thread takes its thread's place,
as long as the lane has spare ones. When it has none left, further calls fail at once instead of
waiting in vain, until an abandoned one comes back. A call that did not begin in time is withdrawn:
it must not take effect later, when nobody expects it any more. Threads are daemons and are never
waited for.

Cost. An abandoned call that comes back late has its effect then. So whoever goes on without its
answer must not rely on its not having happened (see ``Quiesce`` on resets that come late).
"""

from __future__ import annotations

import asyncio
import queue
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

from holdfast.errors import DeviceError, StaysStuck

T = TypeVar("T")

SWITCH_INTERVAL = 0.0005
"""Seconds after which a computing thread offers the interpreter to another, while some call does
not come back: it may be a loop in Python, and Python's default of 5 ms would then be added to every
step of every other thread."""


class _Job:
    """One call. ``begun`` and ``withdrawn`` are under the lane's lock, the rest is the loop's."""

    def __init__(self, function: Callable[[], Any], loop: asyncio.AbstractEventLoop) -> None:
        self.function = function
        self.loop = loop
        self.answer: asyncio.Future[Any] = loop.create_future()
        self.watchdog: asyncio.TimerHandle | None = None
        self.begun = False
        self.withdrawn = False
        self.abandoned = False
        self.since = time.monotonic()


class Lane:
    """Threads for one kind of call: ``width`` at a time, ``spare`` more in place of abandoned ones.

    Used by the loop's thread only. ``name`` is what the threads and the errors are called by.
    """

    def __init__(self, name: str, width: int, spare: int = 0, target: str = "") -> None:
        self.name = name
        self.target = target
        self.width = width
        self.spare = spare
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._threads: list[threading.Thread] = []
        self._size = 0
        """Threads that have not been told to end."""
        self._pending = 0
        """Calls handed in that are neither answered by their thread nor withdrawn."""
        self._lost: list[_Job] = []
        """Calls that were abandoned and have not come back."""

    @property
    def lost(self) -> int:
        """How many calls were abandoned and have not come back."""
        return len(self._lost)

    @property
    def stuck(self) -> bool:
        """Whether no thread is left: every call fails at once."""
        return len(self._lost) >= self.width + self.spare

    def require(self) -> None:
        """Raise :class:`StaysStuck` if no thread is left."""
        if self.stuck:
            since = time.monotonic() - self._lost[0].since
            raise StaysStuck(
                f"an earlier call of the {self.name} has not come back for {since:.1f} s"
                if self.width == 1
                else f"{len(self._lost)} earlier calls of the {self.name} have not come back",
                operation="call",
                target=self.target,
            )

    async def call(self, deadline: float, function: Callable[[], T]) -> T:
        """Run ``function`` in a thread; raises what it raises, or StaysStuck after ``deadline`` s.

        Cancelled, it leaves the call to itself: withdrawn if it did not begin, else abandoned at
        its deadline. Whatever is no :class:`Exception` arrives as DeviceError.
        """
        self.require()
        job = _Job(function, asyncio.get_running_loop())
        self._pending += 1
        self._jobs.put(job)
        self._grow()
        job.watchdog = job.loop.call_later(deadline, self._expire, job, deadline)
        try:
            answer: T = await job.answer
        except asyncio.CancelledError:
            self._withdraw(job)
            raise
        return answer

    def close(self) -> None:
        """Let every thread end that can. Idempotent; waits for none."""
        for _ in range(self._size):
            self._jobs.put(None)
        self._size = 0

    def join(self, timeout: float) -> bool:
        """After :meth:`close`: wait for the threads to end; False if one has not. Blocking."""
        deadline = time.monotonic() + timeout
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        return not any(thread.is_alive() for thread in self._threads)

    # -- on the loop ------------------------------------------------------------

    def _grow(self) -> None:
        most = self.width + min(len(self._lost), self.spare)
        if self._size < min(self._pending, most):
            self._size += 1
            self._threads = [thread for thread in self._threads if thread.is_alive()]
            thread = threading.Thread(target=self._work, name=f"keeper-{self.name}", daemon=True)
            self._threads.append(thread)
            thread.start()

    def _withdraw(self, job: _Job) -> bool:
        """Keep a call from beginning; False if it has begun."""
        with self._lock:
            if job.begun or job.withdrawn:
                return job.withdrawn
            job.withdrawn = True
        self._pending -= 1
        if job.watchdog is not None:
            job.watchdog.cancel()
        return True

    def _expire(self, job: _Job, deadline: float) -> None:
        if not self._withdraw(job):
            job.abandoned = True
            self._lost.append(job)
            _hurry(True)
            self._grow()
        late = StaysStuck(
            f"no answer from the {self.name} within {deadline:g} s",
            operation="call",
            target=self.target,
        )
        _settle(job.answer, None, late)

    def _came_back(self, job: _Job, value: object, error: BaseException | None) -> None:
        self._pending -= 1
        if job.watchdog is not None:
            job.watchdog.cancel()
        if job.abandoned:
            self._lost.remove(job)
            _hurry(False)
            if self._size > self.width + min(len(self._lost), self.spare):
                self._size -= 1
                self._jobs.put(None)
        if error is not None and not isinstance(error, Exception):
            error = _strayed(error)
        elif isinstance(error, StopIteration | asyncio.InvalidStateError):
            error = _strayed(error)  # a future cannot carry these
        _settle(job.answer, value, error)

    # -- in a thread ------------------------------------------------------------

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            with self._lock:
                job.begun = not job.withdrawn
            if job.begun:
                self._carry_out(job)
            del job  # what it refers to must not wait for the next one

    def _carry_out(self, job: _Job) -> None:
        value, error = None, None
        try:
            value = job.function()
        except BaseException as raised:  # noqa: BLE001 - it is raised again where it was asked for
            error = raised
        try:
            job.loop.call_soon_threadsafe(self._came_back, job, value, error)
        except RuntimeError:
            pass  # the loop has ended; so has whoever asked


def _strayed(error: BaseException) -> DeviceError:
    """What is no ordinary error, such as SystemExit, as one that can be raised in a coroutine."""
    return DeviceError(
        f"{type(error).__name__} was raised",
        operation="call",
        hint="this is a fault in the driver, the backend or the keeper",
    )


def _settle(answer: asyncio.Future[Any], value: object, error: BaseException | None) -> None:
    """Give an answer, unless it was given up or abandoned before."""
    if answer.done():
        return
    if error is not None:
        answer.set_exception(error)
    else:
        answer.set_result(value)


_hurried = 0
_usual = sys.getswitchinterval()


def _hurry(on: bool) -> None:
    """Have threads give way sooner as long as a call that was abandoned may be computing."""
    global _hurried, _usual  # noqa: PLW0603 - the interval is the process's
    if on and not _hurried:
        _usual = sys.getswitchinterval()
        sys.setswitchinterval(min(_usual, SWITCH_INTERVAL))
    _hurried += 1 if on else -1
    if not _hurried:
        sys.setswitchinterval(_usual)
