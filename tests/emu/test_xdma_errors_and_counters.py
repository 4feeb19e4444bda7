# SPDX-License-Identifier: Apache-2.0
"""Errors, poll mode, counters and halt of the emulated XDMA core."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from holdfast.emu.xdma_local import BASE, DATA, LIST, LOG_ALL, XdmaBench, straight
from holdfast.regs import xdma as regs
from holdfast.regs.xdma import Control, Desc, Direction, Status
from holdfast.values import IrqIndex, Perm

H2C, C2H = Direction.H2C, Direction.C2H


@pytest.fixture
def bench() -> Iterator[XdmaBench]:
    with XdmaBench() as made:
        yield made


# -- errors ----------------------------------------------------------------------------------------


def test_a_wrong_magic_stops_the_engine_after_what_came_before(bench: XdmaBench) -> None:
    table = straight(5)
    table["control"][3] = 0xDEAD0000
    bench.store(LIST, table)
    bench.start(C2H, 0, LIST)
    bench.run()
    assert bench.count(C2H, 0) == 3
    assert bench.status(C2H, 0) == Status.MAGIC_STOPPED
    assert bench.signals == [(IrqIndex.MSIX, 2)]


def test_a_wrong_magic_behind_a_jump_does_not_matter(bench: XdmaBench) -> None:
    table = straight(6)
    table["control"][2] = 0
    table["next"][1] = LIST + 3 * 32
    bench.store(LIST, table)
    bench.start(C2H, 0, LIST)
    bench.run()
    assert bench.count(C2H, 0) == 5
    assert not bench.status(C2H, 0) & regs.STATUS_ERRORS


@pytest.mark.parametrize("address", [0x40_0000_0000, LIST + 8])
def test_an_unreachable_or_misaligned_descriptor_is_a_fetch_error(
    bench: XdmaBench, address: int
) -> None:
    table = straight(2)
    table["next"][0] = address
    bench.store(LIST, table)
    bench.start(C2H, 0, LIST)
    bench.run()
    assert bench.count(C2H, 0) == 1
    assert bench.status(C2H, 0) == Status.DESC_UNSUPPORTED_REQUEST
    assert bench.read(regs.CHANNEL[C2H].control) & Control.RUN


def test_a_refused_host_read_stops_h2c(bench: XdmaBench) -> None:
    table = straight(4, direction=H2C)
    table["source"][2] = 0x40_0000_0000
    bench.store(LIST, table)
    bench.start(H2C, 0, LIST)
    bench.run()
    assert bench.count(H2C, 0) == 2
    assert bench.status(H2C, 0) == Status.READ_UNSUPPORTED_REQUEST


def test_errors_that_are_not_enabled_do_not_stop_the_engine(bench: XdmaBench) -> None:
    table = straight(4, direction=H2C)
    table["source"][2] = 0x40_0000_0000
    bench.store(LIST, table)
    bench.start(H2C, 0, LIST, control=Control.IE_DESCRIPTOR_COMPLETED)
    bench.run()
    assert bench.count(H2C, 0) == 4
    assert bench.status(H2C, 0) == Status.DESCRIPTOR_COMPLETED


@pytest.mark.parametrize(
    ("direction", "status"),
    [(H2C, Status.WRITE_DECODE_ERROR), (C2H, Status.READ_DECODE_ERROR)],
)
@pytest.mark.parametrize("card", [(1 << 20) - 255, 1 << 63, (1 << 64) - 1])
def test_a_card_address_outside_its_memory_is_a_decode_error(
    bench: XdmaBench, direction: Direction, status: Status, card: int
) -> None:
    table = straight(3, direction=direction)
    table["destination" if direction is H2C else "source"][1] = card
    bench.store(LIST, table)
    bench.start(direction, 0, LIST)
    bench.run()
    assert bench.count(direction, 0) == 1
    assert bench.status(direction, 0) == status


def test_posted_writes_that_hit_nothing_are_lost_without_a_trace(bench: XdmaBench) -> None:
    bench.card_memory[:1024] = 7
    table = straight(4)
    table["destination"][1] = 0x40_0000_0000
    bench.store(LIST, table)
    bench.start(C2H, 0, LIST)
    bench.run()
    assert bench.count(C2H, 0) == 4
    assert not bench.status(C2H, 0) & regs.STATUS_ERRORS
    assert bench.port.faults == 1
    assert (bench.host(DATA + 512, 512) == 7).all()
    assert not bench.host(DATA + 256, 256).any()


def test_no_read_ahead_reaches_beyond_a_window_that_ends_with_the_list() -> None:
    with XdmaBench() as bench:
        bench.unmap(BASE)
        bench.map(BASE, 4096)
        bench.map(DATA, 1 << 20, DATA - BASE)
        at = LIST + 4096 - 2 * 32
        table = straight(2)
        table["next"][0] = at + 32
        bench.store(at, table)
        bench.start(C2H, 0, at)
        bench.run()
        assert bench.count(C2H, 0) == 2
        assert bench.port.faults == 0


def test_perm_is_respected_for_descriptor_reads() -> None:
    with XdmaBench() as bench:
        bench.unmap(BASE)
        bench.map(BASE, 1 << 20, perm=Perm.WRITE)
        bench.store(LIST, straight(1))
        bench.start(C2H, 0, LIST)
        bench.run()
        assert bench.status(C2H, 0) == Status.DESC_UNSUPPORTED_REQUEST


# -- poll mode, counters, halt ---------------------------------------------------------------------


def poll_mode(bench: XdmaBench, address: int) -> None:
    rows = regs.CHANNEL[C2H]
    bench.write(rows.writeback_lo, address & 0xFFFFFFFF)
    bench.write(rows.writeback_hi, address >> 32)


def writeback(bench: XdmaBench, address: int) -> int:
    return int(bench.host(address, 4).view("<u4")[0])


def test_poll_mode_writes_back_the_count_at_the_last_completed_descriptor(
    bench: XdmaBench,
) -> None:
    at = DATA + 0x10000
    poll_mode(bench, at)
    table = straight(5, last=Desc.STOP)
    table["control"][2] |= Desc.COMPLETED
    bench.store(LIST, table)
    bench.start(C2H, 0, LIST, control=Control.POLL_WRITEBACK | Control.IE_MAGIC_STOPPED)
    bench.run()
    assert writeback(bench, at) == 3
    assert bench.count(C2H, 0) == 5


def test_poll_mode_writes_back_errors(bench: XdmaBench) -> None:
    at = DATA + 0x10000
    poll_mode(bench, at)
    table = straight(3)
    table["control"][1] = 0
    bench.store(LIST, table)
    bench.start(C2H, 0, LIST, control=Control.POLL_WRITEBACK | Control.IE_MAGIC_STOPPED)
    bench.run()
    assert writeback(bench, at) == 1 << 31 | 1


class Witness(XdmaBench):
    """Notes busy, count and write-back at the moment an interrupt is raised."""

    def signal(self, index: IrqIndex, vector: int) -> None:
        status = self.status(C2H, 0)
        self.seen = status & Status.BUSY, self.count(C2H, 0), writeback(self, DATA + 0x10000)
        super().signal(index, vector)


def test_the_interrupt_comes_after_data_count_and_write_back() -> None:
    with Witness() as bench:
        poll_mode(bench, DATA + 0x10000)
        bench.store(LIST, straight(1))
        bench.start(C2H, 0, LIST, control=LOG_ALL | Control.POLL_WRITEBACK)
        bench.run()
        assert bench.seen == (0, 1, 1)
        assert len(bench.signals) == 1


def test_performance_counters_count_clocks_and_beats() -> None:
    with XdmaBench(link_rate=8e6, link_chunk=4096) as bench:
        rows = regs.CHANNEL[C2H]
        bench.write(rows.perf_control, 2)
        bench.write(rows.perf_control, 5)
        bench.store(LIST, straight(4, 4096))
        bench.start(C2H, 0, LIST)
        bench.run()
        bench.time.advance(5)  # the engine is idle: with Auto nothing is counted
        assert bench.read(rows.perf_data_lo) == 4 * 4096 // 8
        cycles = bench.read(rows.perf_cycles_lo) | bench.read(rows.perf_cycles_hi) << 32
        assert cycles == pytest.approx(250e6 * 3 * 4096 / 8e6, rel=0.01)


def test_halt_stops_fetching_and_is_idle(bench: XdmaBench) -> None:
    bench.write(regs.SG_HALT_W1S, regs.sg_bit(C2H, 0))
    bench.store(LIST, straight(2))
    bench.start(C2H, 0, LIST)
    bench.run()
    assert bench.port.reads == 0
    assert not bench.status(C2H, 0) & Status.BUSY
    bench.write(regs.SG_HALT_W1C, regs.sg_bit(C2H, 0))
    assert bench.status(C2H, 0) & Status.BUSY
    bench.run()
    assert bench.count(C2H, 0) == 2
