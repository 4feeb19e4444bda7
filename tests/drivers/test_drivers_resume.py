# SPDX-License-Identifier: Apache-2.0
"""A second driver object on a function at work: reads, sees what is in flight, can stop it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest

from holdfast.dma.sg import SgList
from holdfast.driver import ControlMemory, Driver
from holdfast.drivers.edu import EduDriver
from holdfast.drivers.xdma import XdmaDriver
from holdfast.drivers.xdma_ring import CONTROL_BYTES, Layout
from holdfast.emu.edu import Edu
from holdfast.emu.local import LocalHost, ManualClock
from holdfast.emu.xdma_local import BASE, XdmaBench
from holdfast.errors import DeviceError
from holdfast.regs import edu as edu_regs
from holdfast.regs import xdma as regs
from holdfast.regs.view import RegisterView
from holdfast.regs.xdma import SG, Direction
from holdfast.values import CONFIG_REGION, IrqIndex

LENGTH = 65536
COUNT = 8
DATA = BASE + 2 * CONTROL_BYTES


class Access:
    """``driver.FunctionAccess`` over a function in this process."""

    def __init__(self, host: LocalHost) -> None:
        self.host = host

    def bar(self, index: int) -> RegisterView:
        return self.host.registers(index)

    def config(self) -> RegisterView:
        return self.host.registers(CONFIG_REGION)

    def bar_size(self, index: int) -> int:
        return self.host.function.regions()[index].region.size

    def vector_count(self, preferred: IrqIndex) -> int:
        return 8


@contextmanager
def read_only(host: LocalHost, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing may be written to the function meanwhile."""

    def refuse(*what: object) -> None:
        raise AssertionError(f"written: {what}")

    with monkeypatch.context() as patch:
        patch.setattr(host.function, "region_write", refuse)
        yield


@pytest.fixture
def bench() -> Iterator[XdmaBench]:
    with XdmaBench(channels=2, link_rate=1e6, link_chunk=4096) as bench:
        yield bench


def control_of(bench: XdmaBench) -> ControlMemory:
    data = bench.host(BASE, 2 * CONTROL_BYTES).data
    return ControlMemory(data, SgList.of([(BASE, 2 * CONTROL_BYTES)]))


def at_work(bench: XdmaBench) -> XdmaDriver:
    """A driver that was probed, and both channels granted, channel 1 with transfers to the host."""
    driver = XdmaDriver(Access(bench))
    driver.probe()
    control = control_of(bench)
    driver.grant((0, 1), control)
    layout = Layout(1, Direction.C2H)
    ring = np.frombuffer(control.data, regs.DESCRIPTOR, regs.DESC_SIZE * COUNT, layout.ring)
    slots = ring[:COUNT]
    slots["length"] = LENGTH
    slots["source"] = 0
    slots["destination"] = [DATA + number * LENGTH for number in range(COUNT)]
    bench.write(SG[Direction.C2H].descriptor_credits, COUNT, 1)
    bench.card.work()
    return driver


def test_a_resumed_driver_knows_what_a_probed_one_does_and_writes_nothing(
    bench: XdmaBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = at_work(bench)
    before = first.in_flight((0, 1))
    assert before
    with read_only(bench, monkeypatch):
        second = XdmaDriver(Access(bench))
        second.resume()
        assert second.channels() == first.channels() == 2
        assert second.in_flight((0,)) == 0
        assert second.in_flight((1,)) == second.in_flight((0, 1)) == before
        assert not second.failed((0, 1))
    for direction in (Direction.H2C, Direction.C2H):
        assert [second.vector(direction, n) for n in range(2)] == [
            first.vector(direction, n) for n in range(2)
        ]


def test_a_resumed_driver_sees_the_transfers_end(bench: XdmaBench) -> None:
    at_work(bench)
    driver = XdmaDriver(Access(bench))
    driver.resume()
    driver.drain((1,))
    assert driver.in_flight((1,))
    bench.run()
    assert driver.in_flight((1,)) == 0
    assert bench.count(Direction.C2H, 1) == COUNT


def test_a_resumed_driver_stops_what_another_one_started(bench: XdmaBench) -> None:
    at_work(bench)
    driver = XdmaDriver(Access(bench))
    driver.resume()
    assert driver.stop((0,))
    assert driver.in_flight((1,)), "the other channel goes on"
    bench.stop(Direction.C2H, 1)
    bench.run()
    assert driver.stop((1,))
    assert driver.in_flight((0, 1)) == 0
    assert bench.count(Direction.C2H, 1) < COUNT
    driver.grant((1,), control_of(bench))
    assert driver.in_flight((1,)) == 0


def test_edu_is_resumed_while_it_transfers(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = ManualClock()
    with LocalHost(Edu(clock=clock), clock=clock) as host:
        host.map(0x10000, 4096)
        host.bus_master(True)
        bar = host.registers(edu_regs.BAR)
        bar.write(edu_regs.DMA_SOURCE, edu_regs.BUFFER_START)
        bar.write(edu_regs.DMA_DESTINATION, 0x10000)
        bar.write(edu_regs.DMA_COUNT, 64)
        bar.write(edu_regs.DMA_COMMAND, edu_regs.DmaCommand.START | edu_regs.DmaCommand.TO_RAM)
        with read_only(host, monkeypatch):
            driver = EduDriver(Access(host))
            driver.resume()
            assert driver.in_flight(())
            assert not driver.stop(())
        host.run()
        assert driver.in_flight(()) == 0
        assert driver.stop(())


def test_a_driver_is_not_resumed_on_another_function() -> None:
    with LocalHost(Edu()) as host, pytest.raises(DeviceError):
        XdmaDriver(Access(host)).resume()


def test_without_a_driver_there_is_nothing_to_resume() -> None:
    with LocalHost(Edu()) as host:
        Driver(Access(host)).resume()
