# SPDX-License-Identifier: Apache-2.0
"""Functions that are kept together, and how they go from one user to another."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import SimpleNamespace
from typing import cast

import pytest

from holdfast.contracts import FunctionBackend
from holdfast.errors import Busy, DeviceError
from holdfast.keeper.addresses import iova_range, usable_range
from holdfast.keeper.lease import Lease
from holdfast.keeper.server import Keeper
from holdfast.keeper.state import Machine
from holdfast.keeper.unit import Unit
from holdfast.kernel.pidfd import Peer
from holdfast.values import Area, LeaseId, Policy, Region, Target

ALICE, BOB = 1000, 1001
WINDOW = Region(0, 4096, areas=(Area(0, 4096),))
TRAPPED = Region(0, 4096)


class FakeHost:
    """As much of a function as a hand-over needs."""

    def __init__(self, name: str, region: Region) -> None:
        self.target = Target("pci", name)
        self.happened: list[str] = []
        self.backend = SimpleNamespace(
            regions=(region,), close=lambda: self.happened.append("closed")
        )
        self.holder = SimpleNamespace(release=self.happened.append)
        self.replaced = 0

    async def call_within(self, deadline: float, function: Callable[[], None]) -> None:
        function()

    def replace_backend(self, backend: FunctionBackend) -> None:
        self.replaced += 1


class FakeKeeper:
    """A keeper that only has leases."""

    def __init__(self, unit: Unit, name: str = "0000:00:03.0", region: Region = WINDOW) -> None:
        self.host = FakeHost(name, region)
        self.leases: dict[LeaseId, Lease] = {}
        self.watched = True
        unit.keepers.append(cast(Keeper, self))

    def watch(self) -> None:
        self.watched = True

    def unwatch(self) -> None:
        self.watched = False

    def lease(self, uid: int) -> None:
        number = LeaseId(len(self.leases) + 1)
        peer = Peer(-1, 100 + uid, uid, uid)
        self.leases[number] = Lease(number, peer, Machine(Policy.DRAIN), claimed=True)


class Kernel:
    """Opens functions; ``held`` makes it refuse."""

    def __init__(self) -> None:
        self.opened: list[str] = []
        self.held = False

    def connect(self, target: Target) -> FunctionBackend:
        if self.held:
            raise Busy("held by pid 17", operation="open", target=str(target))
        self.opened.append(str(target))
        return cast(FunctionBackend, SimpleNamespace(close=lambda: None))


def hand_over(unit: Unit, keeper: FakeKeeper, uid: int) -> None:
    """A user asks for a lease, and gets it."""
    asyncio.run(unit.hand_over(cast(Keeper, keeper), uid))
    keeper.lease(uid)


@pytest.fixture
def kernel() -> Kernel:
    return Kernel()


@pytest.fixture
def unit(kernel: Kernel) -> Unit:
    return Unit(kernel.connect)


def test_one_user_opens_again_and_again_without_anything_being_closed(
    unit: Unit, kernel: Kernel
) -> None:
    keeper = FakeKeeper(unit)
    for _ in range(3):
        hand_over(unit, keeper, ALICE)
        keeper.leases.clear()
    assert kernel.opened == []


def test_everything_is_closed_and_opened_before_another_user_gets_it(
    unit: Unit, kernel: Kernel
) -> None:
    first, second = FakeKeeper(unit), FakeKeeper(unit, "0000:00:04.0")
    hand_over(unit, first, ALICE)
    first.leases.clear()
    hand_over(unit, second, BOB)
    assert kernel.opened == ["pci:0000:00:03.0", "pci:0000:00:04.0"]
    assert (first.host.replaced, second.host.replaced, unit.user) == (1, 1, BOB)
    assert first.watched
    assert second.watched


def test_the_anchor_lets_go_before_a_function_is_closed(unit: Unit) -> None:
    keeper = FakeKeeper(unit)
    for user in (ALICE, BOB):
        hand_over(unit, keeper, user)
        keeper.leases.clear()
    assert keeper.host.happened == ["backend", "closed"]


def test_nobody_else_gets_in_while_a_user_has_a_lease_on_any_of_them(
    unit: Unit, kernel: Kernel
) -> None:
    first, second = FakeKeeper(unit), FakeKeeper(unit, "0000:00:04.0")
    hand_over(unit, first, ALICE)
    with pytest.raises(Busy, match="user 1000"):
        hand_over(unit, second, BOB)
    assert kernel.opened == []
    assert unit.user == ALICE


def test_a_function_that_somebody_still_holds_is_refused_until_it_opens(
    unit: Unit, kernel: Kernel
) -> None:
    keeper = FakeKeeper(unit)
    hand_over(unit, keeper, ALICE)
    keeper.leases.clear()
    kernel.held = True
    for uid in (BOB, ALICE):  # not even the first user: what the other one holds is not known
        with pytest.raises(Busy, match="pid 17"):
            hand_over(unit, keeper, uid)
        keeper.leases.clear()
    assert not unit.opened
    kernel.held = False
    hand_over(unit, keeper, BOB)
    assert (unit.opened, unit.user, keeper.host.replaced) == (True, BOB, 1)


def test_registers_that_trap_need_no_proof(unit: Unit, kernel: Kernel) -> None:
    keeper = FakeKeeper(unit, region=TRAPPED)
    for uid in (ALICE, BOB):
        hand_over(unit, keeper, uid)
    assert kernel.opened == []


def test_addresses_keep_clear_of_the_interrupt_window() -> None:
    for bits in range(16, 65):
        base, limit = iova_range(bits) if bits > 16 else (0, 1 << 16)
        assert limit <= 0xFEE0_0000 or base >= 1 << 32


def test_addresses_keep_to_what_the_iommu_maps() -> None:
    ranges = ((0, 0xFEDF_FFFF), (0xFEF0_0000, (1 << 39) - 1))
    assert usable_range(*iova_range(64), ranges) == (1 << 32, 1 << 39)
    assert usable_range(*iova_range(28), ranges) == (1 << 16, 1 << 28)
    assert usable_range(0, 1 << 20, ()) == (0, 1 << 20)
    assert usable_range(0, 1 << 20, ((1, 8191),)) == (4096, 8192)
    with pytest.raises(DeviceError, match="can be mapped"):
        usable_range(1 << 40, 1 << 41, ranges)
