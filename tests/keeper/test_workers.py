# SPDX-License-Identifier: Apache-2.0
"""Lanes: blocking calls that may never come back, and what stays bounded all the same."""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

import pytest

from holdfast.errors import DeviceError, DriverFailed, HoldfastError, StaysStuck
from holdfast.keeper import asking
from holdfast.keeper.workers import SWITCH_INTERVAL, Lane

pytestmark = pytest.mark.usefixtures("clean")
LONG = 5.0
Go = Callable[..., Any]


@pytest.fixture
def hold() -> Iterator[threading.Event]:
    """What hanging calls wait for; they come back at the end of the test."""
    event = threading.Event()
    yield event
    event.set()


@pytest.fixture
def lane(hold: threading.Event) -> Iterator[Callable[..., Lane]]:
    made: list[Lane] = []

    def make(width: int = 1, spare: int = 0) -> Lane:
        made.append(Lane("function", width, spare, "a target"))
        return made[-1]

    yield make
    hold.set()
    for each in made:
        each.close()
        assert each.join(LONG)


def run(work: Coroutine[Any, Any, None]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(LONG):
            await work

    asyncio.run(bounded())


async def until(condition: Callable[[], bool]) -> None:
    while not condition():  # noqa: ASYNC110 - a lane tells nobody
        await asyncio.sleep(0.001)


def test_calls_answer_and_raise_as_they_would_by_themselves(lane: Go) -> None:
    async def work() -> None:
        it = lane(2)
        assert await it.call(LONG, lambda: 7) == 7
        with pytest.raises(KeyError):
            await it.call(LONG, lambda: dict[int, int]()[1])
        assert await asyncio.gather(*(it.call(LONG, lambda n=n: n) for n in range(50))) == list(
            range(50)
        )

    run(work())


@pytest.mark.parametrize("kind", [SystemExit, KeyboardInterrupt, GeneratorExit, StopIteration,
                                  asyncio.CancelledError])  # fmt: skip
def test_what_would_end_the_loop_arrives_as_an_error(lane: Go, kind: type[BaseException]) -> None:
    def work() -> None:
        raise kind

    async def ask() -> None:
        with pytest.raises(DeviceError, match=kind.__name__):
            await lane().call(LONG, work)

    run(ask())


def test_a_call_that_is_late_frees_its_caller_and_others_go_on_in_its_place(
    lane: Go, hold: threading.Event
) -> None:
    async def work() -> None:
        it = lane(2, 2)
        for lost in range(1, 4):
            with pytest.raises(StaysStuck, match=r"within 0\.01 s"):
                await it.call(0.01, hold.wait)
            assert it.lost == lost
            assert await it.call(LONG, lambda: 7) == 7
        assert threading.active_count() <= 1 + 4
        hold.set()
        await until(lambda: it.lost == 0)
        assert await it.call(LONG, lambda: 7) == 7
        await until(lambda: sum(each.is_alive() for each in it._threads) <= 2)

    run(work())


def test_with_no_thread_left_calls_fail_at_once_until_one_comes_back(
    lane: Go, hold: threading.Event
) -> None:
    async def work() -> None:
        it = lane(1, 1)
        for _ in range(2):
            with pytest.raises(StaysStuck):
                await it.call(0.01, hold.wait)
        with pytest.raises(StaysStuck, match="not come back"):
            await it.call(1000.0, lambda: 7)
        hold.set()
        await until(lambda: not it.stuck)
        assert await it.call(LONG, lambda: 7) == 7

    run(work())


def test_a_call_that_did_not_begin_in_time_never_has_an_effect(
    lane: Go, hold: threading.Event
) -> None:
    called: list[str] = []

    async def work() -> None:
        it = lane(1)
        first = asyncio.create_task(it.call(LONG, hold.wait))
        await asyncio.sleep(0)
        with pytest.raises(StaysStuck):
            await it.call(0.01, lambda: called.append("late"))
        cancelled = asyncio.create_task(it.call(LONG, lambda: called.append("given up")))
        await asyncio.sleep(0)
        cancelled.cancel()
        await asyncio.sleep(0)
        assert it.lost == 0
        hold.set()
        assert await first
        await it.call(LONG, lambda: called.append("in time"))
        assert called == ["in time"]

    run(work())


def test_a_call_whose_caller_left_still_counts_once_it_is_late(
    lane: Go, hold: threading.Event
) -> None:
    async def work() -> None:
        it = lane(1)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.01):
                await it.call(0.05, hold.wait)
        assert not it.stuck  # it may still come back in time
        await until(lambda: it.stuck)
        hold.set()
        await until(lambda: not it.stuck)

    run(work())


def test_threads_give_way_sooner_while_a_call_may_be_computing(
    lane: Go, hold: threading.Event
) -> None:
    usual = sys.getswitchinterval()

    async def work() -> None:
        it = lane(1)
        with pytest.raises(StaysStuck):
            await it.call(0.01, hold.wait)
        assert sys.getswitchinterval() == pytest.approx(min(usual, SWITCH_INTERVAL))
        hold.set()
        await until(lambda: not it.lost)
        assert sys.getswitchinterval() == pytest.approx(usual)

    run(work())


# -- what a driver answers ------------------------------------------------------------------------


class Answers:
    """A driver of which nothing is known but this."""

    def __init__(self, answer: object) -> None:
        self.answer = answer

    def in_flight(self, channels: object) -> Any:
        return self.answer

    stop = failed = in_flight


@pytest.mark.parametrize("answer", [None, -1, 0.0, "0", [], b"", object()])
def test_an_answer_that_is_no_count_is_no_answer(answer: object) -> None:
    with pytest.raises(DriverFailed):
        asking.in_flight(Answers(answer), ())  # type: ignore[arg-type]


@pytest.mark.parametrize("answer", [None, 0, 1, "yes", [True], object()])
def test_an_answer_that_is_not_true_or_false_is_no_answer(answer: object) -> None:
    for ask in (asking.stop, asking.failed):
        with pytest.raises(DriverFailed):
            ask(Answers(answer), ())  # type: ignore[arg-type]


def test_errors_of_the_backend_pass_and_everything_else_is_the_drivers() -> None:
    for error in (DeviceError("unwell"), ValueError("bug"), KeyboardInterrupt()):

        def fail(error: BaseException = error) -> None:
            raise error

        with pytest.raises(HoldfastError) as seen:
            asking.guarded(fail)
        assert (seen.value is error) is isinstance(error, HoldfastError)
        assert len(str(seen.value)) < 1000
