# SPDX-License-Identifier: Apache-2.0
"""Faults that begin, end, and take the function away."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from holdfast.emu.edu import WILD_BYTE, Edu
from holdfast.emu.faults import FaultPlan
from holdfast.emu.local import LocalHost, ManualClock
from holdfast.emu.xdma_local import BASE, DATA, LIST, XdmaBench, straight
from holdfast.regs import edu as regs
from holdfast.regs.edu import DmaCommand
from holdfast.regs.xdma import Direction, Status

C2H = Direction.C2H
RAM = 1 << 16


class Pulled(Exception):
    """Stands for the end of the function's process."""


def pull() -> None:
    raise Pulled


def written(bench: XdmaBench) -> int:
    return int(np.count_nonzero(bench.ram[DATA - BASE :]))


@pytest.fixture
def edu() -> Iterator[LocalHost]:
    clock = ManualClock()
    with LocalHost(Edu(clock=clock), memory=RAM, clock=clock) as host:
        host.map(0, RAM)
        host.bus_master(True)
        yield host


def to_ram(host: LocalHost, destination: int, count: int = 64) -> None:
    """Have the device write ``count`` bytes of its buffer to host memory."""
    bar = host.registers(0)
    bar.write(regs.DMA_SOURCE, regs.BUFFER_START)
    bar.write(regs.DMA_DESTINATION, destination)
    bar.write(regs.DMA_COUNT, count)
    bar.write(regs.DMA_COMMAND, int(DmaCommand.START | DmaCommand.TO_RAM))


def busy(host: LocalHost) -> bool:
    return bool(host.registers(0).read(regs.DMA_COMMAND) & DmaCommand.START)


def test_a_transfer_that_hung_and_was_reset_away_is_past() -> None:
    with XdmaBench(faults="hang@2-2") as bench:
        bench.card_memory[:] = 7
        for expected in (256, 0, 512):
            bench.host(DATA, 4096)[:] = 0
            bench.store(LIST, straight(expected // 256 or 1))
            bench.start(C2H, 0, LIST)
            bench.run()
            assert written(bench) == expected
            assert bool(bench.status(C2H, 0) & Status.BUSY) is (expected == 0)
            bench.function.reset()
            bench.bus_master(True)


def test_a_hang_that_begins_in_a_list_lets_through_what_comes_before() -> None:
    with XdmaBench(faults="hang@3-3") as bench:
        bench.card_memory[:] = 7
        bench.store(LIST, straight(4))
        bench.start(C2H, 0, LIST)
        bench.run()
        assert written(bench) == 512


def test_refused_resets_count_until_the_function_gives_in() -> None:
    with XdmaBench(faults="refuse_reset@1-3") as bench:
        bench.function.reset()  # no transfer yet
        bench.bus_master(True)
        bench.store(LIST, straight(1))
        bench.start(C2H, 0, LIST)
        bench.run()
        for _ in range(3):
            with pytest.raises(OSError, match="refuses"):
                bench.function.reset()
        bench.function.reset()


@pytest.mark.parametrize("faults", ["unplug@2", "unplug@2-2"])
def test_a_card_that_is_pulled_out_has_written_half(
    faults: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with XdmaBench(faults=faults) as bench:
        monkeypatch.setattr(bench.card, "unplug", pull)
        bench.card_memory[:] = 7
        bench.store(LIST, straight(2))
        bench.start(C2H, 0, LIST)
        with pytest.raises(Pulled):
            bench.run()
        assert written(bench) == 256


def test_an_edu_device_that_is_pulled_out_has_written_half(
    edu: LocalHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(edu.function, "unplug", pull)
    edu.function.faults = FaultPlan.parse("unplug@1")
    edu.ram[:] = 0x55
    to_ram(edu, 0x1000)
    with pytest.raises(Pulled):
        edu.run()
    assert int((edu.ram != 0x55).sum()) == 32


def test_an_edu_device_gone_wild_writes_on_and_stays_busy_until_bus_mastering_is_off(
    edu: LocalHost,
) -> None:
    edu.function.faults = FaultPlan.parse("wild")
    to_ram(edu, 0x1000)
    edu.run(seconds=0.2)
    assert busy(edu)
    assert (edu.ram[0x1000:0x1040] == WILD_BYTE).all()
    edu.ram[:] = 0
    edu.run(seconds=0.01)
    assert (edu.ram[0x1000:0x1040] == WILD_BYTE).all()
    edu.bus_master(False)
    edu.ram[:] = 0
    edu.run(seconds=0.01)
    assert not edu.ram.any()
    assert busy(edu)


def test_an_edu_device_that_lies_says_idle_before_it_has_written(edu: LocalHost) -> None:
    edu.function.faults = FaultPlan.parse("lie_idle")
    edu.ram[:] = 0x55
    to_ram(edu, 0x1000)
    assert not busy(edu)
    assert (edu.ram == 0x55).all()
    edu.run()
    assert not edu.ram[0x1000:0x1040].any()


def test_the_control_an_honest_edu_device_is_busy_until_it_has_written(edu: LocalHost) -> None:
    edu.ram[:] = 0x55
    to_ram(edu, 0x1000)
    assert busy(edu)
    edu.run()
    assert not busy(edu)
    assert int((edu.ram != 0x55).sum()) == 64
