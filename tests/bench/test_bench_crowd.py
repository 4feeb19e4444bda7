# SPDX-License-Identifier: Apache-2.0
"""The crowd of stub clients: real leases, killed at once, and nothing of them left behind."""

from __future__ import annotations

import os
import resource
from collections.abc import Callable
from typing import Any

import pytest

from holdfast.bench import crowd as stubs
from holdfast.bench.crowd import BUFFER_BYTES, BUFFERS, SLAB_BYTES, Crowd, require_room
from holdfast.bench.death import ended, entered
from holdfast.bench.plan import QUICK, Run
from holdfast.bench.scale import _returned
from holdfast.bench.silence import keeper_messages, scheduled
from holdfast.errors import HoldfastError, SystemFailure
from holdfast.kernel import procfs
from holdfast.torture.outside import settle
from holdfast.torture.stack import Stack

pytestmark = pytest.mark.usefixtures("clean")
SOME = 12


def leases(stack: Stack, numbers: set[int]) -> list[dict[str, Any]]:
    return [lease for lease in stack.ps()["leases"] if lease["lease"] in numbers]


def unreleased(stack: Stack, numbers: set[int]) -> int:
    return len(numbers - {one["lease"] for one in leases(stack, numbers) if over(one)})


def over(lease: dict[str, Any]) -> bool:
    return bool(lease["state"] == "released")


def test_each_stub_holds_a_lease_of_its_own_with_a_slab(xdma: Stack) -> None:
    with Crowd(xdma.target) as crowd:
        crowd.join(SOME)
        found = leases(xdma, set(crowd.leases.values()))
        assert {lease["pid"] for lease in found} == set(crowd.leases)
        assert {lease["bytes"] for lease in found} == {SLAB_BYTES}
        assert {lease["state"] for lease in found} == {"alive"}
        assert all(lease["channels"] == [] for lease in found)
    assert BUFFERS * BUFFER_BYTES <= SLAB_BYTES


def test_a_crowd_that_is_killed_at_once_is_released_by_the_death_protocol(xdma: Stack) -> None:
    with Crowd(xdma.target) as crowd:
        crowd.join(2)
        crowd.join(SOME)
        numbers = set(crowd.leases.values())
        killed = crowd.kill()
        assert settle(lambda: unreleased(xdma, numbers), goal=0, timeout=10.0) == 0
        for lease in leases(xdma, numbers):
            assert killed < entered(lease, "frozen") <= entered(lease, "quiet")
            assert lease["hung_up"] or lease["process_dead"]
            returned, punched = _returned(lease)
            assert 0 < punched < 10**9
            assert 0 < returned < 10**9
        crowd.join(1)  # a crowd may start anew
    assert xdma.ps()["unaccounted_bytes"] == 0


def test_stubs_that_are_let_go_say_goodbye(xdma: Stack) -> None:
    with Crowd(xdma.target) as crowd:
        crowd.join(3)
        numbers = set(crowd.leases.values())
    assert settle(lambda: unreleased(xdma, numbers), goal=0, timeout=10.0) == 0


def test_a_crowd_that_cannot_start_says_why_and_leaves_no_process(
    serve: Callable[..., Stack],
) -> None:
    stack = serve("emu:xdma?memory=1M", "--quota", "4K")
    with pytest.raises(HoldfastError, match="quota"), Crowd(stack.target) as crowd:
        crowd.join(3)
    assert crowd.leases == {}


def test_a_lease_that_is_not_released_is_no_figure(
    xdma: Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("holdfast.bench.death.RELEASED_WITHIN", 0.05)
    asker = xdma.ask()
    try:
        with Crowd(xdma.target) as crowd:
            crowd.join(1)
            (lease,) = crowd.leases.values()
            with pytest.raises(HoldfastError, match="alive, not released"):
                ended(asker, lease)
    finally:
        asker.close()


def test_too_low_a_limit_of_descriptors_is_said_beforehand(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(resource, "getrlimit", lambda _: (64, 1024))
    monkeypatch.setattr(resource, "setrlimit", lambda _, limits: asked.append(limits))
    require_room(100)
    assert asked == [(100 * stubs.DESCRIPTORS_EACH + stubs.SPARE, 1024)]
    with pytest.raises(SystemFailure, match="1000 leases need"):
        require_room(1000)


def test_the_kernel_says_what_a_process_has_resident_and_how_often_it_ran() -> None:
    own = procfs.resident(os.getpid())
    assert 0 < own["Pss"] <= own["Rss"]
    before = procfs.context_switches(os.getpid())
    os.sched_yield()
    reading, writing = os.pipe2(os.O_CLOEXEC)
    pid = os.fork()
    if not pid:
        os.write(writing, b"x")
        os._exit(0)
    os.read(reading, 1)
    os.waitpid(pid, 0)
    os.close(reading)
    os.close(writing)
    assert scheduled(before, procfs.context_switches(os.getpid())) > 0
    assert scheduled({1: 5, 2: 7}, {1: 6, 3: 2}) == 4  # thread 2 has ended
    assert procfs.waited_for_processor(os.getpid()) >= 0
    with pytest.raises(SystemFailure):
        procfs.waited_for_processor(pid)
    with pytest.raises(SystemFailure):
        procfs.resident(pid)
    with pytest.raises(SystemFailure):
        procfs.context_switches(pid)


def test_transfers_of_an_exclusive_lease_are_not_heard_of_and_trapped_stores_are() -> None:
    with Run(QUICK) as run:
        (result,) = keeper_messages(run)
    assert result.value == 0
    assert result.verified
    assert result.detail["control_messages"] == QUICK.transfers
    assert result.detail["control_keeper_scheduled"] >= QUICK.transfers
