# SPDX-License-Identifier: Apache-2.0
"""The edu device behaves as QEMU's documentation and source say."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast.emu.edu import Edu
from holdfast.emu.faults import FaultPlan
from holdfast.emu.local import LocalHost, ManualClock
from holdfast.regs import edu as regs
from holdfast.regs.edu import DmaCommand, Status
from holdfast.values import IrqIndex, Perm

START = regs.BUFFER_START
ONES = 0xFFFFFFFF


class Bench(LocalHost):
    def __init__(self) -> None:
        clock = ManualClock()
        self.time = clock
        super().__init__(Edu(clock=clock), memory=1 << 20, clock=clock)
        self.map(0, 1 << 20)
        self.bus_master(True)
        self.bar = self.registers(0)
        self.read = self.bar.load
        self.write = self.bar.store

    def transfer(self, source: int, destination: int, count: int, command: int) -> None:
        self.write(0x80, 8, source)
        self.write(0x88, 8, destination)
        self.write(0x90, 8, count)
        self.write(0x98, 8, command)


@pytest.fixture
def edu() -> Iterator[Bench]:
    with Bench() as bench:
        yield bench


def test_identification_and_liveness(edu: Bench) -> None:
    assert edu.read(0, 4) == 0x010000ED
    edu.write(4, 4, 0x12345678)
    assert edu.read(4, 4) == 0xEDCBA987


@pytest.mark.parametrize("offset", [0x0C, 0x60, 0x64, 0x84, 0x9C, 0x100, 0x40000, 0x40FFC])
def test_unknown_and_write_only_registers_read_all_ones(edu: Bench, offset: int) -> None:
    assert edu.read(offset, 4) == ONES


def test_access_widths_follow_the_device(edu: Bench) -> None:
    assert edu.read(0, 8) == ONES << 32 | ONES
    assert edu.read(0, 2) == 0
    assert edu.read(4, 1) == 0
    edu.write(0x80, 8, 0x1122334455667788)
    assert edu.read(0x80, 4) == 0x55667788
    edu.write(0x80, 4, 0x99)
    assert edu.read(0x80, 8) == 0x99
    edu.write(0, 8, 0x1)
    assert edu.read(0, 4) == 0x010000ED
    # A misaligned dword is cut into pieces the device refuses.
    assert int.from_bytes(edu.function.region_read(0, 2, 4), "little") == 0


@pytest.mark.parametrize(
    ("n", "result"),
    [(0, 1), (1, 1), (12, 0x1C8CFC00), (13, 0x7328CC00), (33, 0x80000000), (34, 0), (10**8, 0)],
)
def test_factorials_modulo_two_to_the_32(edu: Bench, n: int, result: int) -> None:
    edu.write(0x08, 4, n)
    assert edu.read(0x20, 4) == Status.COMPUTING
    edu.run()
    assert edu.read(0x08, 4) == result
    assert edu.read(0x20, 4) == 0


@given(st.integers(0, 40))
def test_any_factorial_is_right(n: int) -> None:
    with Bench() as edu:
        edu.write(0x08, 4, n)
        edu.run()
        assert edu.read(0x08, 4) == math.factorial(n) & ONES


def test_a_number_written_while_computing_is_ignored(edu: Bench) -> None:
    edu.write(0x08, 4, 10**9)
    edu.write(0x08, 4, 5)
    assert edu.read(0x08, 4) == 10**9
    edu.run()
    assert edu.read(0x08, 4) == 0


def test_the_factorial_interrupts_only_if_asked_before_its_end(edu: Bench) -> None:
    edu.write(0x20, 4, 0xFF)
    assert edu.read(0x20, 4) == Status.IRQ_FACTORIAL
    edu.write(0x08, 4, 5)
    edu.run()
    assert edu.read(0x24, 4) == 1
    assert edu.signals == [(IrqIndex.INTX, 0)]


def test_interrupts_are_levels_without_msi(edu: Bench) -> None:
    edu.write(0x60, 4, 0)
    assert edu.signals == []
    edu.write(0x60, 4, 0x0A)
    edu.write(0x60, 4, 0x02)
    edu.write(0x64, 4, 0x02)
    assert (edu.read(0x24, 4), edu.function.intx_asserted()) == (0x08, True)
    edu.write(0x64, 4, 0x08)
    assert not edu.function.intx_asserted()
    assert edu.signals == [(IrqIndex.INTX, 0)]


def test_with_msi_every_raise_sends_a_message(edu: Bench) -> None:
    edu.wire(IrqIndex.MSI)
    edu.write(0x60, 4, 1)
    edu.write(0x60, 4, 0)
    assert edu.signals == [(IrqIndex.MSI, 0)] * 2
    edu.bus_master(False)
    edu.write(0x60, 4, 4)
    assert len(edu.signals) == 2
    assert edu.read(0x24, 4) == 5


def test_enabling_msi_drops_the_line_until_the_next_raise(edu: Bench) -> None:
    edu.write(0x60, 4, 1)
    edu.config_write(0x42, b"\x81\x00")
    assert not edu.function.intx_asserted()
    edu.config_write(0x42, b"\x80\x00")
    assert not edu.function.intx_asserted()
    assert edu.read(0x24, 4) == 1
    edu.write(0x60, 4, 0)
    assert edu.function.intx_asserted()


def test_dma_moves_all_bytes_after_100_ms_and_not_before(edu: Bench) -> None:
    edu.ram[0x400:0x1400] = np.arange(4096) % 251
    edu.transfer(0x400, START, 4096, DmaCommand.START | DmaCommand.IRQ)
    wait = edu.function.work()
    assert wait == pytest.approx(0.1)
    edu.ram[0x400] = 77  # sampled at the end
    edu.time.advance(0.0999)
    assert edu.function.work() is not None
    assert edu.read(0x98, 4) == 5
    edu.time.advance(0.0002)
    assert edu.function.work() is None
    assert (edu.read(0x98, 4), edu.read(0x24, 4)) == (4, 0x100)
    edu.transfer(START, 0x8000, 4096, DmaCommand.START | DmaCommand.TO_RAM)
    edu.run()
    assert np.array_equal(edu.ram[0x8000:0x9000], edu.ram[0x400:0x1400])


def test_a_command_without_start_and_writes_while_busy_are_ignored(edu: Bench) -> None:
    edu.transfer(0x400, START, 16, DmaCommand.TO_RAM)
    assert edu.read(0x98, 4) == 0
    edu.transfer(0x400, START, 16, 0xF1)
    edu.transfer(0x111, 0x222, 3, 0x03)
    assert (edu.read(0x80, 8), edu.read(0x90, 8), edu.read(0x98, 8)) == (0x400, 16, 0xF1)
    edu.run()
    assert edu.read(0x98, 8) == 0xF0


@pytest.mark.parametrize(
    ("start", "count"),
    [
        (START - 1, 4),
        (START + 4095, 2),
        (START + 4097, 0),
        ((1 << 64) - 8, 16),
        (START, 1 << 63),
        (START | 1 << 40, 4),
    ],
)
def test_a_transfer_outside_the_buffer_moves_nothing_yet_completes(
    edu: Bench, start: int, count: int
) -> None:
    edu.ram[:] = 0x55
    edu.transfer(start, 0x1000, count, DmaCommand.START | DmaCommand.TO_RAM | DmaCommand.IRQ)
    edu.run()
    assert (edu.ram == 0x55).all()
    assert (edu.read(0x98, 4), edu.read(0x24, 4)) == (6, 0x100)


def test_the_address_mask_cuts_the_start_address_only(edu: Bench) -> None:
    edu.ram[0x400:0x410] = 9
    edu.transfer(0x1_8000_0400 & ~0x0800_0000, START, 16, DmaCommand.START)
    edu.run()
    assert edu.read(0x80, 8) == 0x1_8000_0400 & ~0x0800_0000
    edu.transfer(START, 0x800, 16, DmaCommand.START | DmaCommand.TO_RAM)
    edu.run()
    assert (edu.ram[0x800:0x810] == 9).all()


def test_without_bus_mastering_reads_are_zeros_and_writes_vanish(edu: Bench) -> None:
    edu.ram[0x400:0x410] = 9
    edu.transfer(0x400, START, 16, DmaCommand.START)
    edu.run()
    edu.bus_master(False)
    edu.transfer(START, 0x800, 16, DmaCommand.START | DmaCommand.TO_RAM)
    edu.run()
    assert not edu.ram[0x800:0x810].any()
    edu.transfer(0x400, START, 16, DmaCommand.START | DmaCommand.IRQ)
    edu.run()
    assert edu.read(0x24, 4) == 0x100
    edu.bus_master(True)
    edu.transfer(START, 0x400, 16, DmaCommand.START | DmaCommand.TO_RAM)
    edu.run()
    assert not edu.ram[0x400:0x410].any()


def test_unmapped_memory_reads_zeros_and_completes(edu: Bench) -> None:
    edu.transfer(0xF00_0000, START, 16, DmaCommand.START | DmaCommand.IRQ)
    edu.run()
    assert edu.read(0x24, 4) == 0x100
    assert edu.port.faults == 1
    edu.unmap(0)
    edu.map(0, 1 << 20, perm=Perm.READ)
    edu.transfer(START, 0x800, 16, DmaCommand.START | DmaCommand.TO_RAM)
    edu.run()
    assert edu.port.faults == 2


def test_a_reset_clears_the_pci_core_and_nothing_else(edu: Bench) -> None:
    edu.write(4, 4, 0x1111)
    edu.write(0x60, 4, 0xA)
    edu.write(0x20, 4, 0x80)
    edu.write(0x08, 4, 6)
    edu.ram[0x400:0x410] = 9
    edu.transfer(START, 0x400, 16, DmaCommand.START | DmaCommand.TO_RAM | DmaCommand.IRQ)
    edu.function.reset()
    assert not edu.function.bus_master
    assert not edu.function.intx_asserted()
    edu.run()
    assert (edu.read(4, 4), edu.read(8, 4)) == (0xFFFFEEEE, 720)
    assert (edu.read(0x24, 4), edu.read(0x98, 4)) == (0x10B, 6)
    assert edu.function.intx_asserted()
    assert (edu.ram[0x400:0x410] == 9).all()  # the write was lost: bus mastering was off


def test_bus_mastering_turned_on_again_lets_a_transfer_land_after_a_reset(edu: Bench) -> None:
    edu.ram[0x400:0x410] = 9
    edu.transfer(START, 0x400, 16, DmaCommand.START | DmaCommand.TO_RAM)
    edu.function.reset()
    edu.bus_master(True)
    edu.run()
    assert not edu.ram[0x400:0x410].any()


def test_a_hung_engine_stays_busy(edu: Bench) -> None:
    edu.function.faults = FaultPlan.parse("hang@2")
    edu.transfer(0, START, 16, DmaCommand.START)
    edu.run()
    assert edu.read(0x98, 4) == 0
    edu.transfer(0, START, 16, DmaCommand.START)
    edu.run()
    assert edu.read(0x98, 4) == 1
