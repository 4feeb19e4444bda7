# SPDX-License-Identifier: Apache-2.0
"""A thread that sleeps on descriptors, and does what others ask of it between two rounds of work.

So that its state needs no lock: whoever wants something of it hands a call over.
"""

from __future__ import annotations

import select
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

from holdfast.errors import Closed
from holdfast.kernel import events

T = TypeVar("T")


class Worker:
    """Subclasses say what a round of work is (:meth:`_round`, which must not raise).

    Only :meth:`call` and :meth:`close` are for other threads. The thread begins with the
    constructor, which a subclass calls last.
    """

    def __init__(self, name: str) -> None:
        self._calls: deque[tuple[Callable[[], None], Callable[[], None]]] = deque()
        self._bell = events.make()
        self._epoll = select.epoll(flags=select.EPOLL_CLOEXEC)
        self._wake: dict[int, Callable[[], object]] = {}
        self._ended = False
        self._lock = threading.Lock()
        self.watch(self._bell, lambda: None)
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def call(self, function: Callable[[], T]) -> Future[T]:
        """Have the thread call ``function`` between two rounds. Closed after :meth:`close`."""
        answer: Future[T] = Future()

        def carry_out() -> None:
            if not answer.set_running_or_notify_cancel():
                return
            try:
                answer.set_result(function())
            except BaseException as error:  # noqa: BLE001 - raised again where it was asked for
                answer.set_exception(error)

        def refuse() -> None:
            # Not cancelled: whoever waits in a coroutine would take it for its own cancellation.
            if answer.set_running_or_notify_cancel():
                answer.set_exception(Closed("the thread has ended", operation="call"))

        with self._lock:
            if self._ended:
                raise Closed("the thread has ended", operation="call")
            self._calls.append((carry_out, refuse))
            events.ring(self._bell)
        return answer

    def cpu_seconds(self) -> float:
        """Processor time that the thread has used. Only while it runs."""
        ident = self._thread.ident
        return time.clock_gettime(time.pthread_getcpuclockid(ident)) if ident else 0.0

    def close(self) -> None:
        """End the thread; what it was asked and has not done ends with Closed. Idempotent."""
        with self._lock:
            if self._ended:
                return
            self._ended = True
            events.ring(self._bell)
        self._thread.join()
        while self._calls:
            self._calls.popleft()[1]()
        self._epoll.close()
        events.close(self._bell)

    # -- only in the thread ------------------------------------------------------------------------

    def watch(self, fd: int, wake: Callable[[], object]) -> None:
        """Call ``wake`` whenever the eventfd is rung; nobody has to take its count."""
        self._wake[fd] = wake
        self._epoll.register(fd, select.EPOLLIN | select.EPOLLET)

    def unwatch(self, fd: int) -> None:
        """Before the descriptor is closed. Nothing happens if it is not watched."""
        if self._wake.pop(fd, None) is not None:
            self._epoll.unregister(fd)

    def _round(self) -> bool:
        """Do some work; True if there is more at once."""
        raise NotImplementedError

    def _patience(self) -> float | None:
        """Seconds after which there is work although nothing was rung."""
        return None

    def _awake(self, fd: int) -> None:
        """A descriptor was rung."""
        if (wake := self._wake.get(fd)) is not None:
            wake()

    def _run(self) -> None:
        more = False
        while not self._ended:
            for fd, _ in self._epoll.poll(0 if more else self._patience()):
                self._awake(fd)
            while self._calls:
                self._calls.popleft()[0]()
            more = self._round()
