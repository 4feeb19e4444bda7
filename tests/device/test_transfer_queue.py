# SPDX-License-Identifier: Apache-2.0
"""Transfers and their queue, on a function that finishes when the test says so."""

from __future__ import annotations

import asyncio
import gc
import socket
import threading
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast.errors import DeviceReset, HoldfastError, KeeperGone, TransferFailed, WaitTimeout
from holdfast.interrupt import Interrupt
from holdfast.kernel import events
from holdfast.transfer import Queue, Transfer

SOON = 10.0


class Lifeline:
    """The client's end of a lease, as far as a waiter sees it."""

    def __init__(self) -> None:
        self.ours, self.theirs = socket.socketpair()
        self.news = events.make()

    def fileno(self) -> int:
        return self.ours.fileno()

    def pump(self) -> None:
        self.ours.setblocking(False)
        try:
            if not self.ours.recv(1):
                raise KeeperGone("hung up")
        except BlockingIOError:
            return

    def close(self) -> None:
        self.ours.close()
        self.theirs.close()
        events.close(self.news)


class Memory:
    """Something a transfer holds."""

    def __init__(self) -> None:
        self.users = 0

    def hold(self) -> object:
        self.users += 1
        return self

    def release(self) -> None:
        self.users -= 1


class Bench(Queue):
    """A queue whose count the test moves."""

    def __init__(self, *, interrupts: bool = True) -> None:
        self.lifeline = Lifeline()
        self.fd = events.make()
        self.line = Interrupt(0, self.fd, self.lifeline) if interrupts else None
        self.finished = 0
        self.acknowledged = 0
        self.resets = 0
        self.failure: HoldfastError | None = None
        self.looked = threading.Event()
        super().__init__(self.line, lambda: self.resets)

    def completed(self) -> int:
        self.looked.set()
        return self.finished

    def acknowledge(self) -> None:
        self.acknowledged += 1

    def problem(self) -> HoldfastError | None:
        return self.failure

    def post(self, end: int, *held: Memory) -> Transfer:
        with self._lock:
            return self.keep(end, 1, held)

    def finish(self, count: int) -> None:
        self.finished = count
        events.ring(self.fd, 1)

    def shut(self) -> None:
        if self.line is not None:
            self.line.close()
        else:
            events.close(self.fd)
        self.lifeline.close()


@pytest.fixture
def queue() -> Iterator[Bench]:
    bench = Bench()
    yield bench
    bench.shut()


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(4) as executor:
        yield executor


def test_transfers_finish_in_the_order_of_their_counts(queue: Bench) -> None:
    first, second = queue.post(1), queue.post(3)
    assert not first.done
    queue.finished = 2
    assert (first.done, second.done) == (True, False)
    queue.finished = 3
    assert second.wait(SOON) is second


def test_a_timeout_cancels_nothing(queue: Bench) -> None:
    memory = Memory()
    transfer = queue.post(1, memory)
    for timeout in (0.0, 0.01):
        with pytest.raises(WaitTimeout):
            transfer.wait(timeout)
    assert (memory.users, queue.in_flight) == (1, 1)
    queue.finish(1)
    transfer.wait(SOON)
    assert (memory.users, queue.in_flight) == (0, 0)


def test_what_finished_needs_no_time_at_all(queue: Bench) -> None:
    transfer = queue.post(1)
    queue.finished = 1
    transfer.wait(0)


def test_a_dropped_transfer_stays_alive_until_the_function_is_done(queue: Bench) -> None:
    memory = Memory()
    alive = weakref.ref(memory)
    queue.post(1, memory)
    del memory
    gc.collect()
    kept = alive()
    assert kept is not None
    assert kept.users == 1
    del kept
    queue.finished = 1
    queue.reap()
    gc.collect()
    assert alive() is None


def test_an_interrupt_is_acknowledged_once_per_wake(queue: Bench) -> None:
    transfer = queue.post(1)
    queue.finish(1)
    queue.finished = 0
    with pytest.raises(WaitTimeout):
        transfer.wait(0.01)
    assert queue.acknowledged == 1


def test_several_threads_wait_for_one_queue(queue: Bench, pool: ThreadPoolExecutor) -> None:
    transfers = [queue.post(count) for count in (1, 2, 3, 4)]
    waiting = [pool.submit(each.wait, SOON) for each in reversed(transfers)]
    for count in (1, 2, 3, 4):
        queue.finish(count)
        assert waiting[4 - count].result(SOON) is transfers[count - 1]


def test_a_short_waiter_is_not_held_up_by_a_long_one(
    queue: Bench, pool: ThreadPoolExecutor
) -> None:
    early, late = queue.post(1), queue.post(2)
    long = pool.submit(late.wait, SOON)
    queue.looked.wait(SOON)
    short = pool.submit(early.wait, SOON)
    queue.finish(1)
    assert short.result(SOON / 2) is early
    assert not long.done()
    queue.finish(2)
    long.result(SOON)


def test_a_short_timeout_ends_in_time_beside_a_long_wait(
    queue: Bench, pool: ThreadPoolExecutor
) -> None:
    early, late = queue.post(1), queue.post(2)
    long = pool.submit(late.wait, SOON)
    queue.looked.wait(SOON)
    with pytest.raises(WaitTimeout):
        early.wait(0.01)
    queue.finish(2)
    long.result(SOON)


def test_a_thread_and_an_event_loop_wait_for_one_queue(
    queue: Bench, pool: ThreadPoolExecutor
) -> None:
    async def wait(transfer: Transfer) -> None:
        async with asyncio.timeout(SOON):
            await transfer

    for count in range(1, 41, 2):
        first, second = queue.post(count), queue.post(count + 1)
        in_loop = pool.submit(asyncio.run, wait(first))
        in_thread = pool.submit(second.wait, SOON)
        queue.finish(count)
        queue.finish(count + 1)
        in_loop.result(SOON)
        in_thread.result(SOON)


def test_two_event_loops_wait_for_one_queue(queue: Bench, pool: ThreadPoolExecutor) -> None:
    async def wait(transfer: Transfer) -> None:
        async with asyncio.timeout(SOON):
            await transfer

    for count in range(1, 41, 2):
        both = [
            pool.submit(asyncio.run, wait(queue.post(count))),
            pool.submit(asyncio.run, wait(queue.post(count + 1))),
        ]
        queue.finish(count)
        queue.finish(count + 1)
        for each in both:
            each.result(SOON)


def test_several_awaiters_of_one_loop_all_wake(queue: Bench) -> None:
    async def run() -> None:
        tasks = [asyncio.ensure_future(_await(queue.post(count))) for count in (1, 2, 3)]
        await asyncio.sleep(0)
        queue.finish(2)
        await asyncio.gather(*tasks[:2])
        assert not tasks[2].done()
        queue.finish(3)
        await tasks[2]

    asyncio.run(asyncio.wait_for(run(), SOON))


async def _await(transfer: Transfer) -> Transfer:
    return await transfer


def test_cancelling_an_awaiter_leaves_the_transfer_in_flight(queue: Bench) -> None:
    memory = Memory()
    transfer = queue.post(1, memory)

    async def run() -> None:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(_await(transfer), 0.01)
        assert memory.users == 1
        queue.finish(1)
        await transfer

    asyncio.run(run())
    assert memory.users == 0


@pytest.mark.parametrize("kind", ["wait", "await"])
def test_the_end_of_the_keeper_ends_every_wait(
    queue: Bench, pool: ThreadPoolExecutor, kind: str
) -> None:
    transfer = queue.post(1)
    if kind == "wait":
        waiting = pool.submit(transfer.wait)
    else:
        waiting = pool.submit(asyncio.run, _await(transfer))
    queue.looked.wait(SOON)
    queue.lifeline.theirs.close()
    with pytest.raises(KeeperGone):
        waiting.result(SOON)


def test_a_reset_ends_what_was_in_flight(queue: Bench) -> None:
    memory = Memory()
    transfer = queue.post(1, memory)
    queue.resets += 1
    assert queue.stale
    with pytest.raises(DeviceReset):
        transfer.wait(SOON)
    assert memory.users == 0


def test_a_reset_that_another_thread_noticed_first_ends_the_wait(
    queue: Bench, pool: ThreadPoolExecutor
) -> None:
    transfer = queue.post(1)
    waiting = pool.submit(transfer.wait, SOON)
    queue.looked.wait(SOON)
    queue.resets += 1
    events.ring(queue.lifeline.news, 1)
    with pytest.raises(DeviceReset):
        waiting.result(SOON / 2)


def test_after_a_renewal_counting_starts_anew(queue: Bench) -> None:
    before = queue.post(1)
    queue.resets += 1
    queue.renew()
    assert not queue.stale
    again = queue.post(1)
    with pytest.raises(DeviceReset):
        before.wait(0)
    queue.finish(1)
    again.wait(SOON)


def test_an_engine_error_fails_what_is_left_and_keeps_what_was_done(queue: Bench) -> None:
    first, second, third = queue.post(1), queue.post(2), queue.post(3)
    queue.finished = 1
    queue.failure = TransferFailed("the engine stopped")
    first.wait(0)
    for each in (second, third):
        assert each.done
        with pytest.raises(TransferFailed):
            each.wait(0)


def test_the_same_error_is_raised_by_every_wait(queue: Bench) -> None:
    transfer = queue.post(1)
    queue.resets += 1
    for _ in range(2):
        with pytest.raises(DeviceReset):
            transfer.wait()


def test_a_queue_without_an_interrupt_polls() -> None:
    queue = Bench(interrupts=False)
    try:
        transfer = queue.post(1)
        with pytest.raises(WaitTimeout):
            transfer.wait(0.005)
        threading.Timer(0.01, queue.finish, [1]).start()
        transfer.wait(SOON)
        asyncio.run(asyncio.wait_for(_await(transfer), SOON))
    finally:
        queue.shut()


@given(st.lists(st.integers(0, 5), max_size=30))
def test_held_memory_is_released_exactly_when_its_transfer_ends(moves: list[int]) -> None:
    queue = Bench(interrupts=False)
    try:
        posted = 0
        running: list[tuple[int, Memory]] = []
        for move in moves:
            if move:
                posted += move
                memory = Memory()
                queue.post(posted, memory)
                running.append((posted, memory))
            else:
                queue.finished = min(posted, queue.finished + 2)
                queue.reap()
            for end, memory in running:
                done = end <= queue.finished
                assert memory.users in ((0,) if done else (1,)) or (done and move)
    finally:
        queue.shut()
