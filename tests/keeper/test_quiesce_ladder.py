# SPDX-License-Identifier: Apache-2.0
"""The death protocol carried out against a function that misbehaves in every way there is."""

from __future__ import annotations

import asyncio
import subprocess
import threading
from collections.abc import Callable
from typing import Any

import pytest

from holdfast.errors import DeviceError, DeviceGone, RemoteError
from holdfast.keeper import function
from holdfast.keeper.held import FunctionProcess
from holdfast.keeper.proving import Proving
from holdfast.keeper.state import RELEASE_GATE, Fact, Gate, State
from holdfast.values import Policy

SIZE = 64 << 10
BASE = 1 << 32
"""Of the bench's slabs, and of its I/O addresses: see conftest.py."""

MakeBench = Callable[..., Any]


def test_a_transfer_that_finishes_is_drained_and_everything_goes_back(bench: MakeBench) -> None:
    it = bench()
    it.driver.finishes_on_drain = True
    it.both_signals()
    it.die()
    assert it.states == [State.FROZEN, State.DRAINING, State.QUIET, State.RELEASED]
    assert (it.lease.in_flight_at_death, it.lease.completed_after_death) == (1, True)
    assert it.function.mapped == {}
    assert it.host.free_channels == {0, 1}
    assert it.announced == []


def test_a_drain_that_takes_too_long_becomes_a_stop(bench: MakeBench) -> None:
    it = bench()
    it.driver.stops = True
    it.both_signals()
    it.die()
    assert State.STOPPING in it.states
    assert not it.lease.completed_after_death
    assert Fact.STOP_ACKNOWLEDGED in it.lease.machine.facts


def test_revoke_stops_without_waiting(bench: MakeBench) -> None:
    it = bench(policy=Policy.REVOKE)
    it.driver.stops = True
    it.both_signals()
    it.die()
    assert it.states == [State.FROZEN, State.STOPPING, State.QUIET, State.RELEASED]
    assert "drain" not in it.driver.calls


def test_a_trusted_reset_quiets_what_cannot_be_stopped(bench: MakeBench) -> None:
    it = bench("trusted")
    it.both_signals()
    it.die()
    assert it.states[-4:] == [State.ISOLATING, State.RESETTING, State.QUIET, State.RELEASED]
    assert it.function.resets == 1
    assert it.announced == ["isolated"]
    assert it.function.command & 4  # a bus master again
    assert it.host.usable.is_set()


@pytest.mark.parametrize("reason", ["no reset", "refused", "not trusted"])
def test_without_a_reset_that_counts_strict_unmapping_retires_the_iovas(
    bench: MakeBench, reason: str
) -> None:
    it = bench()
    it.function.has_reset = reason != "no reset"
    it.function.reset_error = RemoteError("refused", errno=1) if reason == "refused" else None
    it.both_signals()
    seen: list[int] = []

    async def then() -> None:
        await it.reached(State.RELEASED)
        seen.append(it.host.space.retired)

    it.die(then)
    assert it.states[-2:] == [State.UNMAPPED, State.RELEASED]
    assert seen == [SIZE]
    assert it.host.free_channels == {1}, "the channel was not proven quiet"
    assert it.function.mapped == {}


def test_channels_and_iovas_return_once_an_unmapped_lease_is_proven_quiet(
    bench: MakeBench,
) -> None:
    it = bench()
    it.function.has_reset = False
    it.both_signals()

    async def then() -> None:
        await it.reached(State.RELEASED)
        it.driver.busy = 0
        it.driver.stops = True
        async with asyncio.timeout(5):
            while it.host.space.retired or it.host.free_channels != {0, 1}:  # noqa: ASYNC110
                await asyncio.sleep(0.001)

    it.die(then)


def test_what_was_withheld_stays_so_while_somebody_may_still_post(bench: MakeBench) -> None:
    it = bench("plain")
    it.function.has_reset = False
    it.lease.signal(hung_up=True)

    async def then() -> None:
        await it.reached(State.RELEASED)  # unmapped under a strict translation: that is enough
        it.driver.busy = 0
        it.driver.stops = True
        calls = len(it.driver.calls)
        async with asyncio.timeout(5):
            while len(it.driver.calls) < calls + 3:  # noqa: ASYNC110 - it was looked at meanwhile
                await asyncio.sleep(0.001)
        assert it.host.space.retired == SIZE
        assert it.host.free_channels == {1}
        it.lease.signal(process_dead=True)
        async with asyncio.timeout(5):
            while it.host.space.retired or it.host.free_channels != {0, 1}:  # noqa: ASYNC110
                await asyncio.sleep(0.001)

    it.die(then)


def _posts_behind_the_look(it: Any) -> None:
    """Its client has hung up. It posts right after the second look, and dies before the keeper
    hears what that look saw."""
    it.driver.busy = 0
    it.lease.signal(hung_up=True)
    looks = [0]
    loop: list[asyncio.AbstractEventLoop] = []
    look = it.driver.in_flight

    def in_flight(channels: Any) -> int:
        looks[0] += 1
        found = int(look(channels))
        if looks[0] == 3:  # the first is of what was in flight at its death
            it.driver.busy = 1
            loop[0].call_soon_threadsafe(it.lease.signal)
            loop[0].call_soon_threadsafe(it.both_signals)
        return found

    it.driver.in_flight = in_flight
    it.start = lambda: loop.append(asyncio.get_running_loop())


def test_what_is_posted_between_the_last_look_and_the_death_is_seen(bench: MakeBench) -> None:
    it = bench("plain", arena=True)
    _posts_behind_the_look(it)

    async def then() -> None:
        it.start()
        await it.reached(State.QUARANTINE)
        assert it.host.source.held_bytes == SIZE
        it.driver.busy = 0

    it.die(then)
    assert it.states[:4] == [State.FROZEN, State.DRAINING, State.QUIET, State.QUARANTINE]


def test_without_the_second_look_memory_would_go_under_a_running_engine(
    bench: MakeBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The negative control: an answer that is taken for the last one whenever it was given."""
    it = bench("plain", arena=True)
    _posts_behind_the_look(it)
    monkeypatch.setattr(Proving, "final", property(lambda _: True, lambda _, __: None))

    async def then() -> None:
        it.start()

    it.die(then)
    assert it.driver.busy == 1
    assert it.states == [State.FROZEN, State.DRAINING, State.QUIET, State.RELEASED]


@pytest.mark.parametrize("arena", [True, False])
def test_where_nothing_can_be_proven_everything_is_kept(bench: MakeBench, arena: bool) -> None:
    it = bench(arena=arena)
    it.function.strict = arena  # in an arena a strict translation is of no help
    it.function.reset_error = RemoteError("refused", errno=1)
    it.both_signals()

    async def then() -> None:
        await it.reached(State.QUARANTINE)
        assert it.lease.nbytes == SIZE
        assert it.host.source.held_bytes == SIZE
        it.driver.busy = 0  # at rest at last

    it.die(then)
    assert it.states[-3:] == [State.QUARANTINE, State.QUIET, State.RELEASED]


@pytest.mark.parametrize("error", [ValueError("bug"), KeyError(3), DeviceError("unwell")])
def test_a_driver_that_raises_has_proven_nothing(bench: MakeBench, error: Exception) -> None:
    it = bench("trusted")
    it.driver.error = error
    it.both_signals()
    it.die()
    assert State.RESETTING in it.states
    assert Fact.IDLE_CONFIRMED not in it.lease.machine.facts


def test_a_driver_that_hangs_is_left_behind(bench: MakeBench) -> None:
    it = bench("trusted")
    it.driver.stuck = threading.Event()
    it.both_signals()
    it.die()
    assert Fact.RESET_TRUSTED in it.lease.machine.facts


@pytest.mark.parametrize("how", ["too little", "an error"])
def test_an_unmap_that_went_wrong_keeps_the_memory(bench: MakeBench, how: str) -> None:
    it = bench()
    it.driver.busy = 0
    it.function.unmap_short = how == "too little"
    it.function.unmap_error = RemoteError("no", errno=5) if how == "an error" else None
    it.both_signals()

    async def then() -> None:
        await it.reached(State.QUARANTINE)
        assert it.host.source.held_bytes == SIZE
        it.function.unmap_short, it.function.unmap_error = False, None

    it.die(then)


def test_what_was_unmapped_before_one_unmap_failed_is_not_unmapped_again(
    bench: MakeBench,
) -> None:
    it = bench()
    it.driver.busy = 0
    it.function.unmap_error = RemoteError("no", errno=5)
    it.function.unmap_error_but = BASE
    it.both_signals()

    async def then() -> None:
        await it.reached(State.QUARANTINE)
        assert [entry.iova > BASE for entry in it.journal.entries(it.lease.number)] == [True]
        assert it.host.source.held_bytes == 2 * SIZE
        it.function.unmap_error = None

    it.die(then, slabs=2)


@pytest.mark.parametrize("first", ["hung_up", "process_dead"])
def test_idle_is_not_quiet_while_someone_can_still_post(bench: MakeBench, first: str) -> None:
    it = bench("plain")  # whose stop could be undone
    it.driver.busy = 0
    it.driver.stops = True
    it.lease.signal(**{first: True})

    async def then() -> None:
        await it.reached(State.QUIET)
        while not any("other" in step.why for step in it.lease.log):  # noqa: ASYNC110
            await asyncio.sleep(0.001)
        assert it.lease.nbytes == SIZE
        it.both_signals()

    it.die(then)


def test_a_final_stop_makes_one_death_signal_enough(bench: MakeBench) -> None:
    it = bench("final")
    it.driver.busy = 0
    it.driver.stops = True
    it.lease.signal(hung_up=True)
    it.die()


@pytest.mark.parametrize("sign", ["both signals", "goodbye"])
def test_the_engine_is_stopped_before_memory_goes_even_if_everyone_seems_gone(
    bench: MakeBench, sign: str
) -> None:
    # A duplicate of a doorbell may live on in another process, whatever the client said.
    it = bench("final")
    it.driver.busy = 0
    it.driver.stops = True
    it.lease.signal(goodbye=True) if sign == "goodbye" else it.both_signals()
    it.die()
    assert it.driver.calls[-1] == "stop"


def test_a_lease_of_memory_only_needs_no_stop_and_no_second_signal(bench: MakeBench) -> None:
    it = bench(claimed=False)
    it.lease.signal(hung_up=True)
    it.die()
    assert "stop" not in it.driver.calls


def test_a_reaped_function_writes_no_more(bench: MakeBench) -> None:
    it = bench(arena=True)
    it.function.reset_error = DeviceGone("gone")
    it.driver.error = DeviceGone("gone")
    child = subprocess.Popen(["true"])
    it.host.child = FunctionProcess.of(child.pid)
    child.wait()
    it.lease.signal(hung_up=True)
    it.die()
    assert Fact.FUNCTION_GONE in it.lease.machine.facts


def test_a_function_that_hung_up_and_is_not_reaped_proves_nothing(bench: MakeBench) -> None:
    it = bench(arena=True)
    it.driver.error = DeviceGone("gone")
    it.function.reset_error = DeviceGone("gone")
    it.both_signals()

    async def then() -> None:
        await it.reached(State.QUARANTINE)
        assert it.lease.nbytes == SIZE
        it.driver.error = None
        it.driver.busy = 0

    it.die(then)


def lose_the_flush(it: Any) -> None:
    """Take FLUSHED, and nothing else, out of the lease's gate."""
    ways = RELEASE_GATE[it.lease.machine.policy].ways
    it.lease.machine.gate = Gate(tuple(way - {Fact.FLUSHED} for way in ways))


@pytest.mark.parametrize("lost", [False, True])
def test_what_was_posted_arrives_before_anything_is_unmapped(bench: MakeBench, lost: bool) -> None:
    it = bench()
    it.driver.stops = True
    it.driver.busy = 0
    it.function.posted = True
    it.both_signals()
    if lost:
        lose_the_flush(it)
    it.die()
    assert it.function.unmapped_too_soon is lost
    assert (Fact.FLUSHED in it.lease.machine.facts) is not lost


def test_what_was_posted_while_someone_still_could_arrives_too(bench: MakeBench) -> None:
    it = bench("plain")
    it.driver.busy = 0
    it.driver.stops = True
    it.lease.signal(hung_up=True)

    async def then() -> None:
        while not any("other" in step.why for step in it.lease.log):  # noqa: ASYNC110
            await asyncio.sleep(0.001)
        assert it.function.reads == 0, "it would come before the last look at the engine"
        it.function.posted = True
        it.both_signals()

    it.die(then)
    assert not it.function.unmapped_too_soon


UNREAD: dict[str, Callable[[Any], None]] = {
    "refused": lambda it: setattr(it.function, "read_error", RemoteError("no", errno=5)),
    "gone, not reaped": lambda it: setattr(it.function, "read_error", DeviceGone("gone")),
    "all ones": lambda it: setattr(it.function, "command", 0xFFFF),
    "all ones, as VFIO has them": lambda it: setattr(it.function, "command", 0xFBFF),
    "no answer": lambda it: setattr(it.function, "stuck", threading.Event()),
}


@pytest.mark.parametrize("how", UNREAD)
def test_a_read_that_does_not_come_back_keeps_the_memory(
    bench: MakeBench, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    monkeypatch.setattr(function, "CALL_DEADLINE", 0.1)
    it = bench()
    it.driver.busy = 0
    it.driver.stops = True
    UNREAD[how](it)
    it.both_signals()

    async def then() -> None:
        await it.reached(State.QUARANTINE)
        assert "no read comes back" in it.lease.quarantined.why
        assert Fact.FLUSHED not in it.lease.machine.facts
        assert it.host.source.held_bytes == SIZE
        assert it.function.mapped == {BASE: SIZE}
        if it.function.stuck is not None:
            it.function.stuck.set()
        it.function.read_error, it.function.command = None, 4

    it.die(then)
    assert Fact.FLUSHED in it.lease.machine.facts


def test_without_the_flush_in_its_gate_that_lease_would_be_released(bench: MakeBench) -> None:
    it = bench()
    it.driver.busy = 0
    it.driver.stops = True
    UNREAD["refused"](it)
    it.both_signals()
    lose_the_flush(it)
    it.die()
    assert State.QUARANTINE not in it.states


def test_a_function_that_turns_out_reaped_need_not_be_read(bench: MakeBench) -> None:
    it = bench()
    it.driver.busy = 0
    it.driver.stops = True
    it.function.read_error = DeviceGone("gone")
    child = subprocess.Popen(["true"])
    it.host.child = FunctionProcess.of(child.pid)
    child.wait()
    it.both_signals()
    it.die()
    assert State.QUARANTINE not in it.states
    assert Fact.FUNCTION_GONE in it.lease.machine.facts
    assert Fact.FLUSHED not in it.lease.machine.facts


def test_a_lease_that_is_strictly_unmapped_is_not_read_for(bench: MakeBench) -> None:
    it = bench()
    it.function.has_reset = False
    it.function.read_error = RemoteError("no", errno=5)
    it.both_signals()
    it.die()
    assert it.states[-2:] == [State.UNMAPPED, State.RELEASED]
    assert Fact.FLUSHED not in it.lease.machine.facts


def test_the_negative_control_gives_memory_back_under_a_running_transfer(
    bench: MakeBench,
) -> None:
    it = bench(policy=Policy.RELEASE, arena=True)
    it.both_signals()
    it.die()
    assert it.states == [State.FROZEN, State.QUIET, State.RELEASED]
    assert it.driver.busy == 1
    assert "stop" not in it.driver.calls
    assert it.function.reads == 0
