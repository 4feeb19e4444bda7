# SPDX-License-Identifier: Apache-2.0
"""Resets, broken promises, and an engine on a thread of its own."""

from __future__ import annotations

import errno
import threading
from collections.abc import Iterator

import numpy as np
import pytest

from holdfast.emu.faults import FaultPlan
from holdfast.emu.xdma_engine import LATE_SECONDS, WILD_BYTE
from holdfast.emu.xdma_local import BASE, DATA, LIST, LOG_ALL, XdmaBench, straight
from holdfast.regs import xdma as regs
from holdfast.regs.xdma import Control, Desc, Direction, SourceControl, Status

C2H, H2C = Direction.C2H, Direction.H2C


@pytest.fixture
def bench() -> Iterator[XdmaBench]:
    with XdmaBench() as made:
        made.card_memory[:] = 7
        yield made


def limited(faults: str = "") -> XdmaBench:
    """A megabyte per second in chunks of 1000 bytes: transfers can be caught in the middle."""
    bench = XdmaBench(faults=faults, link_rate=1e6, link_chunk=1000)
    bench.card_memory[:] = 7
    return bench


def busy(bench: XdmaBench, channel: int = 0, direction: Direction = C2H) -> bool:
    return bool(bench.status(direction, channel) & Status.BUSY)


def written(bench: XdmaBench) -> int:
    """Bytes from DATA on that are not zero."""
    return int(np.count_nonzero(bench.ram[DATA - BASE :]))


# -- reset -----------------------------------------------------------------------------------------


def test_a_reset_stops_dma_and_clears_every_register() -> None:
    with limited() as bench:
        bench.registers(regs.USER_BAR).write(regs.SOURCE_CONTROL, SourceControl.ENABLE, 1)
        bench.write(regs.SG_CREDIT_MODE, regs.sg_bit(C2H, 1))
        bench.store(LIST, straight(4, 4096))
        bench.start(C2H, 0, LIST)
        bench.run(seconds=0.002)
        before = written(bench)
        assert 0 < before < 4096
        bench.function.reset()
        bench.bus_master(True)
        bench.run()
        assert written(bench) == before
        assert bench.status(C2H, 0) == 0
        assert bench.read(regs.SG[C2H].descriptor_lo) == 0
        assert bench.read(regs.CHANNEL[C2H].control) == 0
        assert bench.read(regs.IRQ_CHANNEL_ENABLE) == 0
        assert bench.read(regs.SG_CREDIT_MODE) == 0
        assert bench.read(regs.CHANNEL[C2H].identifier, 1) == 0x1FC10106
        assert bench.read(regs.CONFIG_PCIE_CONTROL) == 1
        assert (bench.card_memory == 7).all()


def test_the_card_works_again_after_a_reset(bench: XdmaBench) -> None:
    bench.function.reset()
    bench.bus_master(True)
    bench.store(LIST, straight(4))
    bench.start(C2H, 0, LIST)
    bench.run()
    assert bench.count(C2H, 0) == 4
    assert written(bench) == 1024


def test_bus_mastering_off_freezes_a_transfer_and_busy_says_so() -> None:
    with limited() as bench:
        bench.store(LIST, straight(2, 4096))
        bench.start(C2H, 0, LIST)
        bench.run(seconds=0.002)
        bench.bus_master(False)
        before = written(bench)
        bench.stop(C2H, 0)
        bench.run()
        assert written(bench) == before
        assert busy(bench)
        bench.bus_master(True)
        bench.run()
        assert (written(bench), busy(bench)) == (4096, False)


# -- faults ----------------------------------------------------------------------------------------


def test_hang_stops_moving_silently_and_only_a_reset_helps() -> None:
    with XdmaBench(faults="hang@3") as bench:
        bench.card_memory[:] = 7
        bench.store(LIST, straight(5))
        bench.start(C2H, 0, LIST)
        bench.run()
        assert (bench.count(C2H, 0), written(bench)) == (2, 512)
        assert bench.signals == []
        bench.stop(C2H, 0)
        bench.run()
        assert busy(bench)
        bench.card.faults = FaultPlan()
        bench.function.reset()
        assert not busy(bench)


def test_wild_keeps_writing_to_the_last_destination_after_a_stop() -> None:
    with XdmaBench(faults="wild") as bench:
        bench.card_memory[:] = 7
        bench.store(LIST, straight(2))
        bench.start(C2H, 0, LIST)
        bench.run()
        bench.stop(C2H, 0)
        for _ in range(3):
            bench.host(DATA, 512)[:] = 0
            bench.run(seconds=0.003)
            assert (bench.host(DATA + 256, 256) == WILD_BYTE).all()
            assert not bench.host(DATA, 256).any()
        assert busy(bench)
        bench.bus_master(False)
        bench.host(DATA, 512)[:] = 0
        bench.run(seconds=0.01)
        assert written(bench) == 0
        bench.function.reset()
        bench.bus_master(True)
        bench.run()
        assert (written(bench), busy(bench)) == (0, False)


def test_wild_leaves_a_channel_that_never_wrote_alone() -> None:
    with XdmaBench(faults="wild") as bench:
        bench.store(LIST, straight(2, direction=H2C))
        bench.start(H2C, 0, LIST)
        bench.run()
        bench.stop(H2C, 0)
        bench.start(C2H, 0, LIST)
        bench.stop(C2H, 0)
        bench.run()
        assert not busy(bench)
        assert not busy(bench, direction=H2C)


@pytest.mark.parametrize("direction", list(Direction))
def test_early_completion_signals_before_the_last_piece_lands(direction: Direction) -> None:
    with XdmaBench(faults="early_completion") as bench:
        bench.card_memory[:] = 7
        bench.host(DATA, 1024)[:] = 0 if direction is C2H else 9
        bench.store(LIST, straight(4, direction=direction))
        bench.start(direction, 0, LIST)
        bench.run(seconds=LATE_SECONDS / 2)
        moved = bench.host(DATA, 1024) if direction is C2H else bench.card_memory[:1024]
        value = 7 if direction is C2H else 9
        assert bench.count(direction, 0) == 4
        assert len(bench.signals) == 1
        assert (moved == value).sum() == 768
        assert busy(bench, direction=direction)
        bench.run()
        assert (moved == value).all()
        assert not busy(bench, direction=direction)


def test_early_completion_samples_the_card_when_it_signals() -> None:
    with XdmaBench(faults="early_completion") as bench:
        bench.card_memory[:] = 7
        bench.store(LIST, straight(1))
        bench.start(C2H, 0, LIST)
        bench.run(seconds=LATE_SECONDS / 2)
        bench.card_memory[:] = 8
        bench.run()
        assert (bench.host(DATA, 256) == 7).all()


def test_a_reset_calls_back_what_has_not_landed() -> None:
    with XdmaBench(faults="early_completion") as bench:
        bench.card_memory[:] = 7
        bench.store(LIST, straight(1))
        bench.start(C2H, 0, LIST)
        bench.run(seconds=LATE_SECONDS / 2)
        bench.function.reset()
        bench.bus_master(True)
        bench.run()
        assert written(bench) == 0


def test_refuse_reset_fails_and_dma_goes_on() -> None:
    with limited("refuse_reset") as bench:
        bench.store(LIST, straight(1, 4096))
        bench.start(C2H, 0, LIST)
        bench.run(seconds=0.001)
        with pytest.raises(OSError, match="refuses"):
            bench.function.reset()
        bench.run()
        assert written(bench) == 4096


def test_reset_keeps_dma_acknowledges_and_lets_the_rest_land() -> None:
    with limited("reset_keeps_dma") as bench:
        bench.store(LIST, straight(2, 4096))
        bench.start(C2H, 0, LIST)
        bench.run(seconds=0.001)
        bench.bus_master(False)
        bench.function.reset()
        assert bench.function.bus_master  # it came back on by itself
        assert bench.read(regs.CHANNEL[C2H].control) == 0
        assert busy(bench)
        bench.run()
        assert (written(bench), busy(bench)) == (8192, False)


def test_reset_keeps_dma_of_an_idle_card_is_an_ordinary_reset(bench: XdmaBench) -> None:
    bench.card.faults = FaultPlan.parse("reset_keeps_dma")
    bench.function.reset()
    assert not bench.function.bus_master


def test_lie_idle_says_idle_while_moving() -> None:
    with limited("lie_idle") as bench:
        bench.store(LIST, straight(2, 4096))
        bench.start(C2H, 0, LIST)
        bench.run(seconds=0.002)
        assert not busy(bench)
        before = written(bench)
        bench.run()
        assert written(bench) > before


def test_without_a_plan_no_fault_shows(bench: XdmaBench) -> None:
    """The control for all of the above."""
    bench.store(LIST, straight(4))
    bench.start(C2H, 0, LIST)
    assert busy(bench)
    bench.run()
    assert not busy(bench)
    bench.stop(C2H, 0)
    bench.host(DATA, 4096)[:] = 0
    bench.run()
    assert (written(bench), busy(bench)) == (0, False)


# -- an engine thread ------------------------------------------------------------------------------


class Gate:
    """Holds the engine thread inside a DMA access until it is opened."""

    def __init__(self, bench: XdmaBench, iova: int) -> None:
        self.inside = threading.Event()
        self.open = threading.Event()
        self._iova = iova
        bench.port.on_access = self._access

    def _access(self, iova: int, _count: int) -> None:
        if iova == self._iova:
            self.inside.set()
            assert self.open.wait(10)


@pytest.fixture
def caught(bench: XdmaBench) -> Iterator[tuple[XdmaBench, Gate]]:
    """A transfer of four descriptors, held in the middle of its only step."""
    gate = Gate(bench, DATA + 512)
    bench.store(LIST, straight(4))
    bench.start(C2H, 0, LIST)
    thread = threading.Thread(target=bench.function.work)
    thread.start()
    assert gate.inside.wait(10)
    yield bench, gate
    gate.open.set()
    thread.join(10)
    assert not thread.is_alive()


def test_registers_answer_while_a_copy_is_held_up(caught: tuple[XdmaBench, Gate]) -> None:
    bench, _gate = caught
    assert busy(bench)
    assert bench.count(C2H, 0) == 0


def test_a_stop_during_a_step_is_busy_until_the_step_has_ended(
    caught: tuple[XdmaBench, Gate],
) -> None:
    bench, gate = caught
    bench.stop(C2H, 0)
    assert busy(bench)
    gate.open.set()
    with bench.function.lock:
        assert bench.card.engine.settle(10)
    assert not busy(bench)
    assert bench.status(C2H, 0) & Status.DESCRIPTOR_STOPPED


def test_a_reset_waits_for_the_step_and_voids_it(caught: tuple[XdmaBench, Gate]) -> None:
    bench, gate = caught
    done = threading.Event()

    def reset() -> None:
        bench.function.reset()
        done.set()

    resetting = threading.Thread(target=reset)
    resetting.start()
    assert not done.wait(0.05)
    gate.open.set()
    resetting.join(10)
    assert done.is_set()
    assert written(bench) == 1024  # landed before the reset was acknowledged
    assert (bench.count(C2H, 0), bench.status(C2H, 0)) == (0, 0)


def test_a_reset_that_cannot_wait_longer_is_refused(
    caught: tuple[XdmaBench, Gate], monkeypatch: pytest.MonkeyPatch
) -> None:
    bench, _gate = caught
    monkeypatch.setattr("holdfast.emu.xdma.RESET_SECONDS", 0.01)
    with pytest.raises(OSError, match="under way") as refused:
        bench.function.reset()
    assert refused.value.errno == errno.ETIMEDOUT
    assert busy(bench)


def test_clearing_bus_master_waits_for_the_step(caught: tuple[XdmaBench, Gate]) -> None:
    bench, gate = caught
    opener = threading.Timer(0.02, gate.open.set)
    opener.start()
    bench.bus_master(False)
    assert gate.open.is_set()
    assert written(bench) == 1024
    opener.join()


def test_starting_again_while_the_old_step_is_under_way_runs_the_new_list(
    caught: tuple[XdmaBench, Gate],
) -> None:
    bench, gate = caught
    bench.stop(C2H, 0)
    bench.store(LIST + 0x1000, straight(1, last=Desc.STOP))
    bench.start(C2H, 0, LIST + 0x1000, control=LOG_ALL & ~int(Control.IE_IDLE_STOPPED))
    gate.open.set()
    with bench.function.lock:
        assert bench.card.engine.settle(10)
    bench.port.on_access = None
    bench.run()
    assert bench.count(C2H, 0) == 1
    assert bench.status(C2H, 0) == Status.DESCRIPTOR_STOPPED


def held(bench: XdmaBench, iova: int) -> tuple[Gate, threading.Thread]:
    """Start the list on C2H 0 and hold its first step at an access to ``iova``."""
    gate = Gate(bench, iova)
    bench.start(C2H, 0, LIST)
    thread = threading.Thread(target=bench.function.work)
    thread.start()
    assert gate.inside.wait(10)
    return gate, thread


def test_a_stop_during_a_fetch_moves_nothing(bench: XdmaBench) -> None:
    bench.store(LIST, straight(4))
    gate, thread = held(bench, LIST)
    bench.stop(C2H, 0)
    assert busy(bench)
    gate.open.set()
    thread.join(10)
    bench.run()
    assert (written(bench), bench.count(C2H, 0), busy(bench)) == (0, 0, False)
    assert bench.status(C2H, 0) == Status.IDLE_STOPPED


def test_a_reset_during_a_step_forgets_what_would_have_landed_late(bench: XdmaBench) -> None:
    bench.card.faults = FaultPlan.parse("early_completion")
    bench.store(LIST, straight(4))
    gate, thread = held(bench, DATA)
    opener = threading.Timer(0.02, gate.open.set)
    opener.start()
    bench.function.reset()
    opener.join()
    thread.join(10)
    bench.bus_master(True)
    bench.run()
    assert (written(bench), busy(bench)) == (768, False)
