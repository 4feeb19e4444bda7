# SPDX-License-Identifier: Apache-2.0
"""Memory-mapped transfers of the emulated XDMA core, register by register."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from holdfast.emu.port import Bytes
from holdfast.emu.xdma_local import DATA, LIST, LOG_ALL, XdmaBench, descriptors, straight
from holdfast.emu.xdma_plan import STEP_BYTES
from holdfast.regs import xdma as regs
from holdfast.regs.xdma import Control, Direction, Status
from holdfast.values import IrqIndex

H2C, C2H = Direction.H2C, Direction.C2H
RUN_ALL = LOG_ALL | Control.RUN


@pytest.fixture
def bench() -> Iterator[XdmaBench]:
    with XdmaBench() as made:
        yield made


def noise(count: int, seed: int = 1) -> Bytes:
    return np.random.default_rng(seed).integers(0, 256, count, dtype=np.uint8)


# -- identification and plain registers ------------------------------------------------------------


def test_the_card_identifies_itself(bench: XdmaBench) -> None:
    assert bench.config_read(0, 4) == bytes.fromhex("ee103890")
    for direction in Direction:
        words = [bench.read(regs.CHANNEL[direction].identifier, i) for i in range(4)]
        base = 0x1FC00006 | direction << 16
        assert words == [base, base | 0x100, 0, 0]
        assert bench.read(regs.CHANNEL[direction].alignments) == 0x00010140
    assert bench.read(regs.SG[H2C].identifier, 1) == 0x1FC40006
    assert bench.read(regs.IRQ_IDENTIFIER) == 0x1FC20006
    assert bench.read(regs.CONFIG_IDENTIFIER) == 0x1FC30006
    assert bench.read(regs.CONFIG_SYSTEM_ID) == 0xFF01
    assert bench.read(regs.CONFIG_MSI_ENABLE) == 2
    assert bench.read(regs.CONFIG_MAX_READ_REQUEST) == 2


def test_the_user_bar_does_not_look_like_the_configuration_bar(bench: XdmaBench) -> None:
    for offset in (0x2000, 0x3000):
        assert bench.registers(regs.USER_BAR).load(offset, 4) >> 16 not in (0x1FC2, 0x1FC3)


def test_reserved_bits_absent_channels_and_undefined_offsets_read_zero(bench: XdmaBench) -> None:
    control = regs.CHANNEL[H2C].control
    bench.write(control, 0xFFFFFFFE)
    assert bench.read(control) == regs.CONTROL_MASK & ~1
    bench.write(control, RUN_ALL, 3)
    assert bench.read(control, 3) == 0
    assert bench.registers_1.load(0x7000, 4) == 0
    assert bench.registers_1.load(0x0F00, 4) == 0


def test_set_and_clear_registers_change_control(bench: XdmaBench) -> None:
    rows = regs.CHANNEL[C2H]
    bench.write(rows.control, 0x06)
    bench.write(rows.control_w1s, 0x30)
    bench.write(rows.control_w1c, 0x12)
    assert bench.read(rows.control) == 0x24
    bench.write(rows.irq_enable, 0x06)
    bench.write(rows.irq_enable_w1s, 0x40)
    bench.write(rows.irq_enable_w1c, 0x04)
    assert bench.read(rows.irq_enable) == 0x42


def test_the_vendor_drivers_probe_sequence_works(bench: XdmaBench) -> None:
    bench.write(regs.IRQ_CHANNEL_ENABLE_W1C, 0xFFFFFFFF)
    bench.write(regs.IRQ_USER_ENABLE_W1C, 0xFFFFFFFF)
    assert bench.read(regs.IRQ_CHANNEL_ENABLE) == 0
    bench.write(regs.IRQ_CHANNEL_ENABLE_W1S, 0xFFFFFFFF)
    assert bench.read(regs.IRQ_CHANNEL_ENABLE) == 0xF  # two channels each way
    bench.write(regs.IRQ_USER_ENABLE_W1S, 0x1FFFF)
    assert bench.read(regs.IRQ_USER_ENABLE) == 0xFFFF
    bench.write(regs.IRQ_USER_VECTOR, 0xFFFFFFFF, 3)
    assert bench.read(regs.IRQ_USER_VECTOR, 3) == 0x1F1F1F1F


# -- runs ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("direction", list(Direction))
def test_a_list_moves_its_bytes_and_stops(bench: XdmaBench, direction: Direction) -> None:
    data = noise(10 * 256)
    if direction is C2H:
        bench.card_memory[: len(data)] = data
    else:
        bench.host(DATA, len(data))[:] = data
    bench.store(LIST, straight(10, direction=direction))
    bench.start(direction, 1, LIST)
    assert bench.status(direction, 1) & Status.BUSY
    bench.run()
    moved = bench.host(DATA, len(data)) if direction is C2H else bench.card_memory[: len(data)]
    assert np.array_equal(moved, data)
    assert bench.count(direction, 1) == 10
    assert bench.status(direction, 1) == Status.DESCRIPTOR_STOPPED | Status.DESCRIPTOR_COMPLETED
    assert bench.read(regs.CHANNEL[direction].control, 1) & Control.RUN
    assert bench.signals == [(IrqIndex.MSIX, 2 * direction + 1)]


def test_run_edges_start_and_only_edges(bench: XdmaBench) -> None:
    bench.store(LIST, straight(1))
    bench.start(C2H, 0, LIST)
    bench.run()
    bench.write(regs.CHANNEL[C2H].control, RUN_ALL)
    bench.run()
    assert bench.count(C2H, 0) == 1
    bench.stop(C2H, 0)
    assert bench.status(C2H, 0) & Status.IDLE_STOPPED
    bench.write(regs.CHANNEL[C2H].control, RUN_ALL)
    assert bench.status(C2H, 0) == Status.BUSY
    assert bench.count(C2H, 0) == 0
    bench.run()
    assert bench.count(C2H, 0) == 1


def test_status_clears_by_reading_and_by_writing_ones(bench: XdmaBench) -> None:
    rows = regs.CHANNEL[C2H]
    bench.store(LIST, straight(1))
    bench.start(C2H, 0, LIST)
    bench.run()
    bench.write(rows.status, Status.DESCRIPTOR_STOPPED)
    assert bench.read(rows.status_rc) == Status.DESCRIPTOR_COMPLETED
    assert bench.read(rows.status_rc) == 0


def test_events_are_logged_only_if_enabled(bench: XdmaBench) -> None:
    bench.store(LIST, straight(1))
    bench.start(C2H, 0, LIST, control=0)
    bench.run()
    assert bench.status(C2H, 0) == 0
    assert bench.count(C2H, 0) == 1
    assert bench.signals == []


def test_nothing_moves_without_bus_mastering(bench: XdmaBench) -> None:
    bench.bus_master(False)
    bench.store(LIST, straight(2))
    bench.start(C2H, 0, LIST)
    bench.run()
    assert bench.status(C2H, 0) == Status.BUSY
    assert bench.port.reads == 0
    bench.bus_master(True)
    assert bench.woken
    bench.run()
    assert bench.count(C2H, 0) == 2


def test_clearing_run_drops_what_was_not_begun(bench: XdmaBench) -> None:
    bench.store(LIST, straight(4))
    bench.start(C2H, 0, LIST)
    bench.stop(C2H, 0)
    assert bench.status(C2H, 0) == Status.IDLE_STOPPED
    bench.run()
    assert bench.count(C2H, 0) == 0
    assert bench.port.reads == 0


def test_a_stop_in_the_middle_finishes_the_current_descriptor() -> None:
    with XdmaBench(link_rate=1e6, link_chunk=1000) as bench:
        bench.card_memory[:] = noise(len(bench.card_memory))
        bench.store(LIST, straight(3, 4096))
        bench.start(C2H, 0, LIST)
        bench.run(seconds=0.0052)  # six chunks: 1904 bytes into the second
        assert bench.count(C2H, 0) == 1
        bench.stop(C2H, 0)
        assert bench.status(C2H, 0) & Status.BUSY
        bench.run()
        assert bench.count(C2H, 0) == 2
        assert bench.status(C2H, 0) & (Status.BUSY | Status.IDLE_STOPPED) == Status.IDLE_STOPPED
        assert np.array_equal(bench.host(DATA, 8192), bench.card_memory[:8192])
        assert not bench.host(DATA + 8192, 4096).any()


def test_run_set_again_while_stopping_starts_anew_afterwards() -> None:
    with XdmaBench(link_rate=1e6, link_chunk=1000) as bench:
        bench.store(LIST, straight(3, 4096))
        bench.start(C2H, 0, LIST)
        bench.run(seconds=0.001)
        bench.stop(C2H, 0)
        bench.write(regs.CHANNEL[C2H].control, RUN_ALL)
        assert bench.status(C2H, 0) == Status.BUSY
        bench.run()
        assert bench.count(C2H, 0) == 3
        assert bench.status(C2H, 0) & Status.DESCRIPTOR_STOPPED


def test_a_cyclic_list_runs_until_run_is_cleared(bench: XdmaBench) -> None:
    ring = straight(4, last=0)
    ring["next"][-1] = LIST
    bench.store(LIST, ring)
    bench.start(C2H, 0, LIST, adjacent=3)
    for _ in range(10):
        assert bench.function.work() == 0
    assert bench.count(C2H, 0) >= 40
    bench.stop(C2H, 0)
    bench.run()
    assert not bench.status(C2H, 0) & Status.BUSY


def test_large_descriptors_move_in_bounded_steps() -> None:
    size = 5 * STEP_BYTES // 2
    with XdmaBench(card_memory=1 << size.bit_length(), memory=1 << size.bit_length() + 1) as bench:
        bench.card_memory[: 1 << 20] = noise(1 << 20)
        bench.card_memory[size - (1 << 20) : size] = noise(1 << 20)[::-1]
        bench.store(LIST, straight(1, size))
        bench.start(C2H, 0, LIST)
        steps = 0
        while bench.function.work() is not None:
            steps += 1
        assert steps == 3
        assert np.array_equal(bench.host(DATA, size), bench.card_memory[:size])


def test_empty_descriptors_are_just_done(bench: XdmaBench) -> None:
    table = straight(3)
    table["length"] = 0
    table["destination"] = 0xDEAD_0000
    bench.store(LIST, table)
    bench.start(C2H, 0, LIST)
    bench.run()
    assert bench.count(C2H, 0) == 3
    assert bench.port.faults == 0


def test_a_fixed_card_address_takes_every_beat(bench: XdmaBench) -> None:
    data = noise(1000)
    bench.host(DATA, 1000)[:] = data
    bench.store(LIST, descriptors([DATA], [64], [1000], at=LIST))
    bench.start(H2C, 0, LIST, control=LOG_ALL | Control.NON_INCREMENTING)
    bench.run()
    assert np.array_equal(bench.card_memory[64:72], data[-8:])
    assert not bench.card_memory[72:].any()
    bench.store(LIST, descriptors([64], [DATA], [20], at=LIST))
    bench.start(C2H, 0, LIST, control=LOG_ALL | Control.NON_INCREMENTING)
    bench.run()
    assert np.array_equal(bench.host(DATA, 16), np.tile(data[-8:], 2))


def test_channels_take_turns() -> None:
    with XdmaBench(link_rate=1e6, link_chunk=4096) as bench:
        for channel in range(2):
            table = straight(8, 4096)
            table["next"] += channel * 0x1000
            bench.store(LIST + channel * 0x1000, table)
            bench.start(C2H, channel, LIST + channel * 0x1000)
        bench.run(seconds=0.03)
        counts = bench.count(C2H, 0), bench.count(C2H, 1)
        assert abs(counts[0] - counts[1]) <= 1
        assert 6 <= sum(counts) <= 9


def test_descriptor_fetch_latency_delays_a_starved_channel() -> None:
    with XdmaBench(link_latency=0.01) as bench:
        bench.store(LIST, straight(1))
        bench.start(C2H, 0, LIST)
        assert bench.function.work() == pytest.approx(0.01)
        bench.run()
        assert bench.count(C2H, 0) == 1
