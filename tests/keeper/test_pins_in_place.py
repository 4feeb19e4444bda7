# SPDX-License-Identifier: Apache-2.0
"""Room for pages that a client pins itself: reserved, written down, mapped, confirmed, undone.

The kernel is a fake that knows what is mapped; the client's half of the work is done by hand, so
that it can die between any two steps.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import cast

import pytest

from holdfast.backends.unmapping import Outcome, one_by_one
from holdfast.contracts import FunctionBackend
from holdfast.dma.iova import IovaSpace
from holdfast.dma.ledger import Ledger
from holdfast.dma.slab import OwnFiles
from holdfast.driver import Driver, FunctionAccess
from holdfast.errors import BadBuffer, Closed, QuotaExceeded, UsageError
from holdfast.keeper.access import BackendAccess
from holdfast.keeper.function import FunctionHost
from holdfast.keeper.journal import Journal
from holdfast.keeper.lease import HeldPin, Lease
from holdfast.keeper.memory import MemoryDesk
from holdfast.keeper.state import Event, Machine
from holdfast.kernel.pidfd import Peer
from holdfast.values import Iova, LeaseId, Policy, Target


class NotHeld:
    """A ``Holder`` that holds nothing: these leases do not outlive their process."""

    def put(self, name: str, fds: Sequence[int] = (), note: object = None) -> None: ...

    def drop(self, name: str) -> None: ...

    def release(self, name: str) -> None: ...


TARGET = Target("pci", "0000:00:03.0")
BASE = 1 << 32
ADDRESS = 0x7F00_0000_0123
NBYTES = 10_000
SPAN = 3 * 4096


@dataclass
class FakeKernel:
    """Maps and unmaps as VFIO does: exact ranges, size 0 for what is not there."""

    mapped: dict[int, int] = field(default_factory=dict)
    forgets: bool = False
    """It answers an unmap by another process than the mapper with size 0."""

    def dma_unmap(self, iova: Iova, size: int) -> int:
        return 0 if self.forgets else self.mapped.pop(int(iova), 0)

    def dma_unmap_many(self, ranges: Sequence[tuple[Iova, int]]) -> list[Outcome]:
        return one_by_one(self.dma_unmap, ranges)

    def close(self) -> None:
        self.mapped.clear()


class Desk:
    """A desk with one lease."""

    def __init__(self) -> None:
        self.kernel = FakeKernel()
        self.host = FunctionHost(
            target=TARGET,
            holder=NotHeld(),
            access=BackendAccess(cast(FunctionBackend, self.kernel), str(TARGET)),
            driver=Driver(cast(FunctionAccess, None)),
            space=IovaSpace(BASE, BASE + (1 << 20)),
            source=OwnFiles(),
            arena_iova=None,
            irq_index=None,
            irq_fds=[],
            free_channels=set(),
        )
        self.journal = Journal.create()
        self.desk = MemoryDesk(self.host, self.journal, NotHeld(), Ledger(1 << 18, 100))
        self.lease = Lease(LeaseId(1), Peer(-1, 1, 0, 0), Machine(Policy.DRAIN))

    def reserve(self, address: int = ADDRESS, nbytes: int = NBYTES) -> HeldPin:
        return asyncio.run(self.desk.reserve_pin(self.lease, address, nbytes))

    def map(self, pin: HeldPin) -> None:
        self.kernel.mapped[int(pin.iova)] = pin.size

    def undo_all(self) -> bool:
        return asyncio.run(self.desk.unmap_all(self.lease, retire=False))


@pytest.fixture
def it() -> Iterator[Desk]:
    desk = Desk()
    yield desk
    desk.host.close()
    for lane in (desk.host.driver_lane, desk.host.function_lane, desk.host.memory_lane):
        assert lane.join(5)


def test_the_whole_pages_around_the_memory_are_reserved_and_charged(it: Desk) -> None:
    pin = it.reserve()
    assert (pin.size, int(pin.iova) % 4096, pin.in_place) == (SPAN, 0, True)
    assert [entry.confirmed for entry in it.journal.entries(it.lease.number)] == [False]
    assert it.desk.ledger.held_by(it.lease.number) == SPAN


@pytest.mark.parametrize("mapped", [False, True])
def test_a_death_before_the_confirmation_is_undone_whether_it_was_mapped_or_not(
    it: Desk, mapped: bool
) -> None:
    pin = it.reserve()
    if mapped:
        it.map(pin)
    it.lease.signal(process_dead=True)
    assert it.undo_all()
    assert it.kernel.mapped == {}
    assert it.host.space.in_use == it.host.space.retired == 0


def test_a_death_after_the_confirmation_is_undone(it: Desk) -> None:
    pin = it.reserve()
    it.map(pin)
    it.desk.confirm_pin(it.lease, pin.number)
    it.lease.signal(process_dead=True)
    assert it.undo_all()
    assert it.kernel.mapped == {}


def test_an_unmap_that_finds_nothing_of_a_confirmed_pin_is_a_failure(it: Desk) -> None:
    pin = it.reserve()
    it.map(pin)
    it.desk.confirm_pin(it.lease, pin.number)
    it.kernel.forgets = True
    assert not it.undo_all()
    assert len(it.journal.entries(it.lease.number)) == 1
    assert it.host.space.in_use == SPAN


def test_room_that_a_living_client_may_still_use_is_not_handed_out_again(it: Desk) -> None:
    it.reserve()
    it.lease.signal(hung_up=True)
    assert it.undo_all()
    assert (it.host.space.in_use, it.host.space.retired) == (0, SPAN)


def test_a_client_whose_map_failed_gives_the_room_back(it: Desk) -> None:
    pin = it.reserve()
    asyncio.run(it.desk.unpin(it.lease, pin.number))
    assert (it.host.space.in_use, it.host.space.retired) == (0, 0)
    assert it.desk.ledger.held_by(it.lease.number) == 0
    assert not it.lease.pins


def test_what_is_pinned_in_place_stays_when_relayed_pins_go(it: Desk) -> None:
    pin = it.reserve()
    it.map(pin)
    asyncio.run(it.desk.unpin_relayed(it.lease))
    assert it.kernel.mapped == {int(pin.iova): SPAN}
    asyncio.run(it.desk.unpin_all(it.lease))
    assert it.kernel.mapped == {}


@pytest.mark.parametrize(
    ("address", "nbytes"),
    [(ADDRESS, 0), (ADDRESS, 1 << 41), ((1 << 47) - 4096, 8192), (1 << 62, 4096)],
)
def test_a_range_that_no_process_has_is_refused_with_nothing_changed(
    it: Desk, address: int, nbytes: int
) -> None:
    with pytest.raises(BadBuffer):
        it.reserve(address, nbytes)
    assert it.journal.entries(it.lease.number) == ()
    assert it.desk.ledger.held_by(it.lease.number) == 0


def test_pins_are_bounded_by_the_quota(it: Desk) -> None:
    it.reserve(nbytes=1 << 17)
    with pytest.raises(QuotaExceeded):
        it.reserve(nbytes=1 << 18)
    assert len(it.journal.entries(it.lease.number)) == 1


def test_a_pin_that_was_never_reserved_cannot_be_confirmed(it: Desk) -> None:
    with pytest.raises(UsageError):
        it.desk.confirm_pin(it.lease, 99)


def test_a_lease_that_has_ended_gets_no_room(it: Desk) -> None:
    it.lease.machine.fire(Event.DEATH)
    with pytest.raises(Closed):
        it.reserve()
