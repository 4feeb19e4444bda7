# SPDX-License-Identifier: Apache-2.0
"""System calls that may never return, made by a thread that can be left behind.

Facts. An access to another process's memory waits for whoever serves its pages: a FUSE daemon, or a
handler of userfaultfd(2). There is no flag for not waiting, and no signal helps.

Choice. The call is made in a worker thread, and the caller waits for it no longer than it wants to.
A worker that does not come back is left alone; the next call gets another one. Idle workers end by
themselves.

Cost. Two changes of threads per call, some 20 us. At most :data:`MOST` calls can be out: beyond,
calls fail at once.
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable
from typing import Any, Final, TypeVar

T = TypeVar("T")

MOST: Final = 256
"""Workers, those left behind included."""
IDLE: Final = 0.5
"""Seconds after which an idle worker ends."""


class _Worker:
    def __init__(self) -> None:
        self.go = threading.Semaphore(0)
        self.done = threading.Semaphore(0)
        self.job: Callable[[], Any] | None = None
        self.result: Any = None
        self.error: BaseException | None = None
        self.left_behind = False

    def run(self) -> None:
        while self.go.acquire(timeout=IDLE) or not _retire(self):
            if self.job is None:
                continue
            try:
                self.result, self.error = self.job(), None
            except BaseException as error:  # noqa: BLE001 - it is raised again where it was asked
                self.result, self.error = None, error
            self.job = None
            with _lock:
                if self.left_behind:
                    _one_less()
                    return
                self.done.release()


_lock = threading.Lock()
_idle: list[_Worker] = []
_count = 0


def call(function: Callable[[], T], timeout: float) -> T:
    """What ``function`` returns, or raises. ``OSError`` ETIMEDOUT if it takes more than ``timeout``
    seconds, EAGAIN if too many do not come back; then it may still be carried out at any time.

    ``function`` must own all it uses. Thread-safe.
    """
    worker = _hire()
    worker.job = function
    worker.go.release()
    if not worker.done.acquire(timeout=timeout):
        with _lock:
            # It may have come back in this very moment.
            if not worker.done.acquire(blocking=False):
                worker.left_behind = True
                raise TimeoutError(errno.ETIMEDOUT, f"no return within {timeout:g} s")
    result, error = worker.result, worker.error
    worker.result = worker.error = None
    with _lock:
        _idle.append(worker)
    if error is not None:
        raise error
    found: T = result
    return found


def _hire() -> _Worker:
    global _count  # noqa: PLW0603 - the state of this module, under its lock
    with _lock:
        if _idle:
            return _idle.pop()
        if _count >= MOST:
            raise BlockingIOError(errno.EAGAIN, f"{_count} calls do not return")
        _count += 1
    worker = _Worker()
    try:
        threading.Thread(target=worker.run, name="holdfast-bounded", daemon=True).start()
    except BaseException:
        with _lock:
            _count -= 1
        raise
    return worker


def _retire(worker: _Worker) -> bool:
    """An idle worker ends, unless it was hired just now."""
    with _lock:
        if worker not in _idle:
            return False
        _idle.remove(worker)
        _one_less()
        return True


def _one_less() -> None:
    """Under the lock."""
    global _count  # noqa: PLW0603
    _count -= 1


def _in_child() -> None:
    """A forked child has none of the threads."""
    global _lock, _count  # noqa: PLW0603
    _lock = threading.Lock()
    _idle.clear()
    _count = 0


os.register_at_fork(after_in_child=_in_child)


def workers() -> int:
    """Threads that there are now."""
    with _lock:
        return _count
