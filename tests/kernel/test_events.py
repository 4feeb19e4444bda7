# SPDX-License-Identifier: Apache-2.0
"""Eventfds count, and waits end when they should."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType

import pytest

from holdfast.kernel import events


@pytest.fixture
def bell() -> Iterator[int]:
    fd = events.make()
    yield fd
    events.close(fd)


def test_rings_add_up_and_drain_takes_them_all(bell: int) -> None:
    events.ring(bell)
    events.ring(bell, 41)
    assert events.drain(bell) == 42
    assert events.drain(bell) == 0


def test_a_counter_is_not_inherited_and_never_blocks(bell: int) -> None:
    assert not os.get_inheritable(bell)
    assert not os.get_blocking(bell)


def test_an_overflow_adds_nothing(bell: int) -> None:
    events.ring(bell, 2**64 - 2)
    with pytest.raises(BlockingIOError):
        events.ring(bell)
    assert events.drain(bell) == 2**64 - 2


def test_wait_sees_a_count_without_taking_it(bell: int) -> None:
    events.ring(bell)
    assert events.wait(bell, None)
    assert events.wait(bell, 0)
    assert events.drain(bell) == 1


def test_wait_ends_at_its_deadline_and_not_before(bell: int) -> None:
    start = time.monotonic()
    assert not events.wait(bell, 0.05)
    assert time.monotonic() - start >= 0.05
    assert not events.wait(bell, -1)


def test_wait_is_woken_by_another_thread(bell: int) -> None:
    ringer = threading.Thread(target=events.ring, args=(bell,))
    ringer.start()
    assert events.wait(bell, 10)
    ringer.join()


def test_a_signal_neither_ends_nor_prolongs_a_wait(bell: int) -> None:
    seen = []
    before = signal.signal(signal.SIGALRM, lambda *_: seen.append(1))
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.01, 0.01)
        start = time.monotonic()
        assert not events.wait(bell, 0.1)
        assert 0.1 <= time.monotonic() - start < 5
        assert seen
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_a_handler_that_raises_ends_the_wait(bell: int) -> None:
    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.01)
        with pytest.raises(KeyboardInterrupt):
            events.wait(bell, None)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
