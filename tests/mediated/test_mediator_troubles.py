# SPDX-License-Identifier: Apache-2.0
"""An engine that stops with an error, or lies, or raises: who is told what, and who goes on."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from holdfast.errors import Closed, DeviceGone
from holdfast.keeper.mediation import Mediation
from holdfast.keeper.mediation_parts import Seat
from holdfast.keeper.mediation_state import MediatorState
from holdfast.keeper.mediator import Mediator
from holdfast.kernel import events
from holdfast.poster import Poster
from holdfast.wire import rings
from holdfast.wire.rings import RING_BYTES, BufferTable, ClientEnd, KeeperEnd, Limits, Op, Status

pytestmark = pytest.mark.usefixtures("clean")
LONG = 10.0


class HeldLane:
    """Finishes what it is told to, when it is told."""

    vector = None

    def __init__(self, room: int = 500) -> None:
        self.cards: list[int] = []
        self.finished = 0
        self.failed = False
        self.raises: Exception | None = None
        self._room = room

    def room(self) -> int:
        return self._room - len(self.cards) + min(self.finished, len(self.cards))

    def post(self, host: rings.U64s, card: rings.U64s, lengths: rings.U64s) -> None:
        if self.raises is not None:
            raise self.raises
        self.cards += card.tolist()

    def completed(self) -> int:
        return self.finished

    def error(self) -> bool:
        return self.failed

    def acknowledge(self) -> None:
        raise AssertionError("there is no interrupt")


class Client:
    def __init__(self, bench: Bench, number: int, quota: int = 1024) -> None:
        self.memory = bytearray(RING_BYTES)
        view = memoryview(self.memory)
        self.end = ClientEnd(view)
        self.submit_bell, self.done = events.make(), events.make()
        table = BufferTable([(number, [(number << 32, 1 << 20)], True)])
        self.seat = Seat(bench.state.take_seat(number), KeeperEnd(view), self.submit_bell,
                         self.done, Limits(0, 1 << 20), quota, table)  # fmt: skip
        self.number = number
        bench.do(lambda m: m.admit(self.seat))

    def submit(self, *cards: int) -> None:
        places = np.array(cards, np.uint64)
        rows = rings.records(Op.TO_CARD, self.number, places, 64, places)
        rows[:, 0] = places
        self.end.submit(rows)
        os.eventfd_write(self.submit_bell, 1)

    def told(self, count: int) -> dict[int, int]:
        found: dict[int, int] = {}
        while len(found) < count:
            assert events.wait(self.done, LONG), found
            events.drain(self.done)
            rows: Any = self.end.reap()
            if rows is not None:
                found.update(zip(rows["tag"].tolist(), rows["status"].tolist(), strict=True))
        return found


class Bench:
    """A mediator on lanes that are held by hand."""

    def __init__(self) -> None:
        self.state = MediatorState.create()
        self.troubles: list[str] = []
        self.trouble = threading.Event()
        self.clients: list[Client] = []
        self.mediator = Mediator(self.state, self._troubled)
        self.lane = HeldLane()
        self.install()

    def _troubled(self, why: str) -> None:
        self.troubles.append(why)
        self.trouble.set()

    def install(self) -> HeldLane:
        self.lane = HeldLane()
        poster = Poster(self.lane, HeldLane(), 1 << 20)
        self.do(lambda m: m.install(poster, [-1, -1]))
        return self.lane

    def client(self, quota: int = 1024) -> Client:
        made = Client(self, len(self.clients) + 1, quota)
        self.clients.append(made)
        return made

    def do(self, function: Any) -> Any:
        return self.mediator.call(lambda: function(self.mediator)).result(LONG)

    def settle(self) -> None:
        """Two rounds of the thread: what was rung before has been seen."""
        for _ in range(2):
            self.do(lambda _: None)

    def close(self) -> None:
        self.mediator.close()
        self.state.close()
        for client in self.clients:
            events.close(client.submit_bell)
            events.close(client.done)


@pytest.fixture
def bench() -> Iterator[Bench]:
    made = Bench()
    yield made
    made.close()


def test_only_the_request_that_failed_is_told_so(bench: Bench) -> None:
    first, second = bench.client(), bench.client()
    first.submit(0, 64, 128)
    bench.settle()
    second.submit(4096, 8192)
    bench.settle()
    lane = bench.lane
    assert lane.cards == [0, 64, 128, 4096, 8192]
    lane.finished, lane.failed = 1, True
    assert bench.trouble.wait(LONG)
    bench.do(Mediator.detach)
    again = bench.install()
    assert again.cards == [128, 4096, 8192]
    again.finished = 3
    assert first.told(3) == {0: Status.DONE, 64: Status.DEVICE, 128: Status.DONE}
    assert second.told(2) == {4096: Status.DONE, 8192: Status.DONE}


def test_a_poster_that_raises_pauses_and_nothing_is_lost(bench: Bench) -> None:
    client = bench.client()
    bench.lane.raises = DeviceGone("gone")
    client.submit(0, 64)
    assert bench.trouble.wait(LONG)
    client.submit(128)
    bench.settle()
    assert len(bench.troubles) == 1
    bench.do(Mediator.detach)
    again = bench.install()
    bench.settle()
    assert again.cards == [0, 64, 128]
    again.finished = 3
    assert set(client.told(3).values()) == {int(Status.DONE)}


def test_an_engine_that_claims_more_than_was_posted_is_believed_up_to_that(bench: Bench) -> None:
    client = bench.client()
    bench.lane.finished = 1 << 20
    client.submit(0, 64)
    assert set(client.told(2)) == {0, 64}
    bench.settle()
    assert bench.do(lambda _: client.seat.in_flight) == 0


def test_a_dropped_client_s_requests_are_not_posted_again(bench: Bench) -> None:
    dead, alive = bench.client(), bench.client()
    dead.submit(0, 64)
    alive.submit(4096)
    bench.settle()
    assert bench.do(lambda m: m.freeze(dead.seat)) == 2
    dead.submit(128)  # into a ring that nobody reads
    dead.seat.dropped = True
    bench.do(Mediator.detach)
    again = bench.install()
    assert again.cards == [4096]
    assert bench.do(lambda _: dead.seat.in_flight) == 0
    again.finished = 1
    assert alive.told(1) == {4096: Status.DONE}
    assert dead.end.reap() is None


def test_a_seat_is_given_away_only_when_nothing_of_it_is_under_way(bench: Bench) -> None:
    gone = bench.client()
    gone.submit(0)
    bench.settle()
    bench.do(lambda m: m.leave(gone.seat))
    assert bench.state.take_seat(77) != gone.seat.number
    bench.do(Mediator.detach)
    assert bench.state.take_seat(78) == gone.seat.number


def test_a_full_lane_is_shared_and_a_quota_is_kept(bench: Bench) -> None:
    bounded, other = bench.client(quota=3), bench.client()
    bounded.submit(*range(0, 640, 64))
    bench.settle()
    assert len(bench.lane.cards) == 3
    other.submit(*range(4096, 4736, 64))
    bench.settle()
    assert len(bench.lane.cards) == 13
    bench.lane.finished = 13
    assert len(other.told(10)) == 10
    bench.lane.finished = 1000
    assert len(bounded.told(10)) == 10


@pytest.mark.parametrize(
    ("mediates", "uids", "mediated", "expected"),
    [
        (True, [], 0, False),
        (True, [1000], 0, False),
        (True, [1000, 1001], 0, True),
        (True, [1000], 1, True),
        (False, [1001], 0, False),
    ],
)
def test_clients_of_a_second_user_are_mediated(
    mediates: bool, uids: list[int], mediated: int, expected: bool
) -> None:
    async def ask() -> bool:
        leases = {at: SimpleNamespace(peer=SimpleNamespace(uid=uid)) for at, uid in enumerate(uids)}
        host = SimpleNamespace(driver=SimpleNamespace(mediates=mediates))
        keeper: Any = SimpleNamespace(host=host, leases=leases)
        found = Mediation(keeper)
        found.leases = dict.fromkeys(range(mediated), cast(Any, None))
        mine: Any = SimpleNamespace(peer=SimpleNamespace(uid=1000))
        return found.preferred(mine)

    assert asyncio.run(ask()) is expected


def test_a_call_after_the_end_says_so(bench: Bench) -> None:
    bench.mediator.close()
    bench.mediator.close()
    with pytest.raises(Closed):
        bench.mediator.call(lambda: None)
