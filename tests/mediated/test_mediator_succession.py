# SPDX-License-Identifier: Apache-2.0
"""A mediator is killed at every named step; its successor goes on with the same memory.

The mediator is a process of its own here, killed with SIGKILL at the n-th time that it comes to a
step. Its engine is a log in shared memory: what was posted is carried out when it is looked at.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt
import pytest

from holdfast import steps
from holdfast.keeper.mediation_parts import Seat
from holdfast.keeper.mediation_state import STATE_BYTES, MediatorState
from holdfast.keeper.mediator import Mediator
from holdfast.kernel import events, memfd
from holdfast.kernel.mapping import Mapping
from holdfast.poster import Poster
from holdfast.wire import rings
from holdfast.wire.rings import RING_BYTES, BufferTable, ClientEnd, KeeperEnd, Limits, Op

pytestmark = [
    pytest.mark.usefixtures("clean"),
    pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning"),
]
LONG = 15.0
REQUESTS = 24
LOG = 1 << 16
STEPS = (
    "keeper.mediation.check",
    "keeper.mediation.accept",
    "keeper.mediation.consume",
    "keeper.mediation.post",
    "keeper.mediation.put",
    "keeper.mediation.produce",
    "keeper.mediation.publish",
    "keeper.mediation.told",
)


class LoggedLane:
    """Carries requests out as soon as it is asked what has finished, half of them at a time.

    ``log[0]`` counts; behind it are the card addresses of what was carried out, in order.
    """

    vector = None

    def __init__(self, log: npt.NDArray[np.uint64]) -> None:
        self._log = log
        self._posted: list[int] = []
        self._done = 0

    def room(self) -> int:
        return 16 - len(self._posted) + self._done

    def post(self, host: rings.U64s, card: rings.U64s, lengths: rings.U64s) -> None:
        self._posted += card.tolist()

    def completed(self) -> int:
        for card in self._posted[self._done : self._done + 5]:
            self._log[1 + int(self._log[0])] = card
            self._log[0] += 1
            self._done += 1
        return self._done

    def error(self) -> bool:
        return False

    def acknowledge(self) -> None:
        raise AssertionError("there is no interrupt")


class Shared:
    """What outlives the mediators: state, rings, bells and the engine's logs."""

    def __init__(self) -> None:
        self.state = MediatorState.create()
        self.row = self.state.take_seat(1)
        self.ring_fd = memfd.create("rings", RING_BYTES)
        self.rings = Mapping(self.ring_fd, RING_BYTES)
        self.client = ClientEnd(self.rings.array.data)
        self.submit, self.done = events.make(), events.make()
        self.log_fd = memfd.create("log", 2 * LOG)
        self.log = Mapping(self.log_fd, 2 * LOG)

    def logs(self) -> list[npt.NDArray[np.uint64]]:
        words = self.log.array.view(np.uint64)
        return [words[: LOG // 8], words[LOG // 8 :]]

    def looked_at(self) -> list[int]:
        """How much there is in each log."""
        return [int(log[0]) for log in self.logs()]

    def carried_out(self, since: list[int]) -> list[int]:
        """Requests that were carried out after the logs were looked at, in no order."""
        return [
            int(card) // 64
            for log, seen in zip(self.logs(), since, strict=True)
            for card in log[1 + seen : 1 + int(log[0])]
        ]

    def visible(self, first: int) -> set[int]:
        """Requests whose end the client could see if it looked."""
        again = ClientEnd(self.rings.array.data)
        again.seen = self.client.seen
        found = again.reap()
        return set() if found is None else {tag - first for tag in found["tag"].tolist()}

    def close(self) -> None:
        self.state.close()
        for mapping in (self.rings, self.log):
            mapping.close()
        for fd in (self.ring_fd, self.log_fd, self.submit, self.done):
            os.close(fd)


@pytest.fixture
def shared() -> Iterator[Shared]:
    made = Shared()
    yield made
    made.close()


def mediate(shared: Shared, step: str, nth: int) -> None:
    """In a child: be a keeper's mediator, until killed at the n-th ``step`` (0: never)."""
    left = nth

    def reached(name: str) -> None:
        nonlocal left
        if name == step:
            left -= 1
            if not left:
                os.kill(os.getpid(), signal.SIGKILL)

    if nth:
        steps.arm(reached)
    state = MediatorState(os.dup(shared.state.fd))
    mapping = Mapping(shared.ring_fd, RING_BYTES)
    end = KeeperEnd(mapping.array.data, *state.counts(shared.row))
    table = BufferTable([(7, [(1 << 32, 1 << 20)], True)])
    seat = Seat(shared.row, end, shared.submit, shared.done, Limits(0, 1 << 20), 8, table)
    mediator = Mediator(state, lambda _: os._exit(90))
    lanes = [LoggedLane(log) for log in shared.logs()]
    mediator.call(lambda: mediator.admit(seat)).result(LONG)
    mediator.call(mediator.reinstate).result(LONG)
    mediator.call(lambda: mediator.install(Poster(lanes[0], lanes[1], 1 << 20), [-1, -1])).result(
        LONG
    )
    while True:
        signal.pause()


@contextmanager
def mediator_process(shared: Shared, step: str = "", nth: int = 0) -> Iterator[int]:
    pid = os.fork()
    if not pid:
        try:
            mediate(shared, step, nth)
        finally:
            os._exit(91)
    try:
        yield pid
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def submit(shared: Shared, first: int) -> None:
    """Requests of both directions, every fifth one bad. The card address tells which one it is."""
    number = np.arange(REQUESTS, dtype=np.uint64)
    rows = rings.records(Op.TO_CARD, 7, number * 64, 64, number * 64)
    rows[1::2, 1] = int(Op.FROM_CARD)
    rows[4::5, 2] = 8
    rows[:, 0] = number + np.uint64(first)
    shared.client.submit(rows)
    os.eventfd_write(shared.submit, 1)


def collect(shared: Shared, told: dict[int, int], first: int) -> None:
    """Take completions; what was told before may be told again."""
    events.drain(shared.done)
    found = shared.client.reap()
    if found is not None:
        pairs = zip(found["tag"].tolist(), found["status"].tolist(), strict=True)
        told.update((tag - first, status) for tag, status in pairs if tag >= first)


@pytest.mark.parametrize("step", STEPS)
def test_every_request_ends_and_none_is_carried_out_after_its_end_was_told(
    shared: Shared, step: str
) -> None:
    bad = set(range(4, REQUESTS, 5))
    killed = 0
    for nth in (1, 2, 3, 4, 6, 9, 13, 18):
        told: dict[int, int] = {}
        first = nth * REQUESTS
        base = shared.looked_at()
        with mediator_process(shared, step, nth) as pid:
            submit(shared, first)
            deadline = time.monotonic() + LONG
            died = False
            while len(told) < REQUESTS and not died:
                if events.wait(shared.done, 0.001):
                    collect(shared, told, first)
                died = bool(os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT | os.WNOHANG))
                assert time.monotonic() < deadline
        killed += died
        if not died:
            break
        before, known = set(told) | shared.visible(first), shared.looked_at()
        with mediator_process(shared):
            while len(told) < REQUESTS:
                assert events.wait(shared.done, LONG), (told, nth)
                collect(shared, told, first)
        again = shared.carried_out(known)
        assert not set(again) & before, "carried out after its end was told"
        assert len(set(again)) == len(again), "carried out twice by one mediator"
        assert set(shared.carried_out(base)) == set(range(REQUESTS)) - bad
        assert {tag for tag, status in told.items() if status} == bad
    assert killed >= 2, "the step was never reached"


def test_the_state_is_private_and_bounded(shared: Shared) -> None:
    assert os.fstat(shared.state.fd).st_size == STATE_BYTES
    seats = [shared.state.take_seat(lease) for lease in range(2, 50)]
    assert len(set(seats)) == len(seats)
    assert shared.state.find_seat(10) == seats[8]
    shared.state.free_seat(seats[8])
    assert shared.state.find_seat(10) is None
