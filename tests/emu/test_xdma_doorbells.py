# SPDX-License-Identifier: Apache-2.0
"""Credit mode, doorbells and interrupts of the emulated XDMA core."""

from __future__ import annotations

import os
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from holdfast.emu.xdma_local import DATA, LIST, LOG_ALL, XdmaBench, straight
from holdfast.kernel import events
from holdfast.regs import xdma as regs
from holdfast.regs.xdma import Control, Desc, Direction, Status
from holdfast.values import IrqIndex

C2H = Direction.C2H
RING = 16
CREDITS = regs.SG[C2H].descriptor_credits
STATUS = regs.CHANNEL[C2H].status
BAR = regs.CONFIG_BAR


def ring_of(count: int, length: int = 256) -> XdmaBench:
    """A bench with a running cyclic ring in credit mode on C2H 0; every descriptor completes."""
    bench = XdmaBench()
    bench.card_memory[:] = np.arange(len(bench.card_memory)) % 253
    table = straight(count, length, last=0, each=Desc.COMPLETED)
    table["next"][-1] = LIST
    bench.store(LIST, table)
    bench.write(regs.SG_CREDIT_MODE_W1S, regs.sg_bit(C2H, 0))
    bench.start(C2H, 0, LIST)
    return bench


@pytest.fixture
def ring() -> Iterator[XdmaBench]:
    with ring_of(RING) as bench:
        yield bench


def doorbell(bench: XdmaBench, *, acknowledge: bool = False, channel: int = 0) -> int:
    return bench.doorbell(BAR, (STATUS if acknowledge else CREDITS).at(channel))


def test_the_engine_fetches_only_as_far_as_credits_go(ring: XdmaBench) -> None:
    ring.run()
    assert ring.count(C2H, 0) == 0
    ring.write(CREDITS, 3)
    assert ring.read(CREDITS) == 3
    ring.run()
    assert (ring.count(C2H, 0), ring.read(CREDITS)) == (3, 0)
    assert np.array_equal(ring.host(DATA, 768), ring.card_memory[:768])
    assert not ring.host(DATA + 768, 256).any()
    ring.write(CREDITS, RING)
    ring.run()
    assert ring.count(C2H, 0) == 3 + RING


def test_busy_is_exact_in_credit_mode(ring: XdmaBench) -> None:
    assert not ring.status(C2H, 0) & Status.BUSY
    ring.write(CREDITS, 1)
    assert ring.status(C2H, 0) & Status.BUSY
    ring.run()
    assert not ring.status(C2H, 0) & Status.BUSY
    events.ring(doorbell(ring), 2)
    assert ring.status(C2H, 0) & Status.BUSY  # the read brings the doorbell's writes along
    ring.run()
    assert not ring.status(C2H, 0) & Status.BUSY


def test_credits_add_up_and_saturate_at_ten_bits(ring: XdmaBench) -> None:
    ring.bus_master(False)
    ring.write(CREDITS, 1000)
    ring.write(CREDITS, 1000)
    assert ring.read(CREDITS) == 1023


def test_credits_count_only_in_credit_mode_and_end_with_it(ring: XdmaBench) -> None:
    ring.bus_master(False)
    ring.write(CREDITS, 5)
    ring.write(regs.SG_CREDIT_MODE_W1C, regs.sg_bit(C2H, 0))
    assert ring.read(CREDITS) == 0
    ring.write(CREDITS, 5)
    assert ring.read(CREDITS) == 0


def test_a_stop_takes_the_remaining_credits(ring: XdmaBench) -> None:
    ring.bus_master(False)
    ring.write(CREDITS, 5)
    ring.stop(C2H, 0)
    assert ring.read(CREDITS) == 0


def test_credits_may_be_written_before_run() -> None:
    with XdmaBench() as bench:
        bench.store(LIST, straight(3))
        bench.write(regs.SG_CREDIT_MODE, regs.sg_bit(C2H, 0))
        bench.write(CREDITS, 3)
        bench.start(C2H, 0, LIST)
        bench.run()
        assert bench.count(C2H, 0) == 3


def test_a_ring_is_fetched_in_few_reads_once_it_is_known() -> None:
    with ring_of(1000, 64) as bench:
        bench.write(CREDITS, 1000)
        bench.run()
        bench.port.reads = 0
        bench.write(CREDITS, 500)
        bench.run()
        bench.write(CREDITS, 900)
        bench.run()
        assert bench.count(C2H, 0) == 2400
        assert bench.port.reads <= 4
        assert bench.port.faults == 0


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 300), st.lists(st.integers(1, 400), min_size=1, max_size=8))
def test_any_sequence_of_credits_on_any_ring_moves_the_right_descriptors(
    size: int, posts: list[int]
) -> None:
    with ring_of(size, 8) as bench:
        expected = np.zeros(size * 8, np.uint8)
        total = 0
        for post in posts:
            # Only descriptors with credits may be looked at: the rest is marked broken.
            table = bench.host(LIST, 32 * size).view(regs.DESCRIPTOR)
            index = (total + np.arange(post)) % size
            table["control"] = 0
            table["control"][index] = regs.DESC_MAGIC | Desc.COMPLETED
            events.ring(doorbell(bench), post)
            bench.run()
            total += post
            expected.reshape(size, 8)[index] = bench.card_memory[: size * 8].reshape(size, 8)[index]
            assert bench.count(C2H, 0) == total
        assert np.array_equal(bench.host(DATA, size * 8), expected)
        assert not bench.status(C2H, 0) & regs.STATUS_ERRORS


# -- doorbells -------------------------------------------------------------------------------------


def test_each_count_of_the_doorbell_is_one_credit(ring: XdmaBench) -> None:
    events.ring(doorbell(ring), 2)
    events.ring(doorbell(ring))
    ring.run()
    assert ring.count(C2H, 0) == 3


def test_every_channel_offers_its_two_doorbells(ring: XdmaBench) -> None:
    bells = {(bell.info.offset, bell.info.value) for bell in ring.function.doorbells(BAR)}
    assert len(bells) == 8
    assert (0x508C, 1) in bells
    assert (0x0140, 0x00FFFFFE) in bells


def test_a_stop_makes_the_old_doorbells_void(ring: XdmaBench) -> None:
    stale = [os.dup(doorbell(ring)), os.dup(doorbell(ring, acknowledge=True))]
    other = doorbell(ring, channel=1)
    rewired = ring.rewired
    ring.stop(C2H, 0)
    assert ring.rewired > rewired
    assert doorbell(ring, channel=1) == other
    ring.start(C2H, 0, LIST)
    for fd in stale:
        events.ring(fd, 5)
    ring.run()
    assert ring.read(CREDITS) == 0
    assert ring.count(C2H, 0) == 0
    events.ring(doorbell(ring), 1)
    ring.run()
    assert ring.count(C2H, 0) == 1
    for fd in stale:
        os.close(fd)


def test_a_stop_takes_back_what_was_rung_and_not_delivered(ring: XdmaBench) -> None:
    fd = os.dup(doorbell(ring))
    events.ring(fd, 5)
    # Past the delivery that a register access forces: the stop overtakes the doorbell.
    ring.function.region_write(BAR, regs.CHANNEL[C2H].control_w1c.at(0), b"\x01\0\0\0")
    ring.run()
    assert ring.count(C2H, 0) == 0
    assert not ring.status(C2H, 0) & Status.BUSY
    os.close(fd)


def test_doorbells_do_nothing_unless_the_channel_runs(ring: XdmaBench) -> None:
    ring.stop(C2H, 0)
    events.ring(doorbell(ring), 5)
    ring.run()
    assert ring.read(CREDITS) == 0


@pytest.mark.parametrize("how", ["detach", "reset"])
def test_detaching_and_resetting_renew_every_doorbell(ring: XdmaBench, how: str) -> None:
    before = [os.dup(bell.fd) for bell in ring.function.doorbells(BAR)]
    ring.function.detach() if how == "detach" else ring.function.reset()
    for fd in before:
        events.ring(fd)
    assert all(events.drain(bell.fd) == 0 for bell in ring.function.doorbells(BAR))
    for fd in before:
        os.close(fd)


# -- acknowledging ---------------------------------------------------------------------------------


def test_without_an_acknowledge_there_is_one_interrupt(ring: XdmaBench) -> None:
    for _ in range(3):
        events.ring(doorbell(ring))
        ring.run()
    assert ring.signals == [(IrqIndex.MSIX, 2)]


def test_the_acknowledge_doorbell_clears_status(ring: XdmaBench) -> None:
    events.ring(doorbell(ring))
    ring.run()
    events.ring(doorbell(ring, acknowledge=True))
    assert ring.status(C2H, 0) == 0
    events.ring(doorbell(ring))
    ring.run()
    assert len(ring.signals) == 2


def test_an_acknowledge_before_the_next_completion_is_seen_by_the_engine(ring: XdmaBench) -> None:
    """The engine drains the acknowledge itself: no socket thread has to come first."""
    events.ring(doorbell(ring), 1)
    ring.run()
    ring.write(CREDITS, 1)
    events.ring(doorbell(ring, acknowledge=True))
    ring.function.work()  # not run(): nobody delivers doorbells
    assert len(ring.signals) == 2


def test_an_acknowledge_rung_at_the_write_back_is_taken_before_status_is_set(
    ring: XdmaBench,
) -> None:
    """A client that acknowledges at the write-back is still woken by the next completion."""
    at = DATA + 0x8000
    ring.write(regs.CHANNEL[C2H].writeback_lo, at)
    ring.write(regs.CHANNEL[C2H].control, LOG_ALL | Control.RUN | Control.POLL_WRITEBACK)

    def acknowledge(iova: int, _count: int) -> None:
        if iova == at:
            events.ring(doorbell(ring, acknowledge=True))

    ring.port.on_access = acknowledge
    for n in range(1, 4):
        ring.write(CREDITS, 1)
        ring.function.work()
        assert len(ring.signals) == n


# -- interrupt block -------------------------------------------------------------------------------


def test_enabling_a_pending_source_interrupts() -> None:
    with XdmaBench() as bench:
        bench.write(regs.IRQ_CHANNEL_ENABLE, 0)
        bench.store(LIST, straight(1))
        bench.start(C2H, 1, LIST)
        bench.run()
        assert bench.signals == []
        assert bench.read(regs.IRQ_CHANNEL_PENDING) == 1 << 3
        assert bench.read(regs.IRQ_CHANNEL_REQUEST) == 0
        bench.write(regs.IRQ_CHANNEL_ENABLE_W1S, 0xFF)
        assert bench.read(regs.IRQ_CHANNEL_REQUEST) == 1 << 3
        assert bench.signals == [(IrqIndex.MSIX, 3)]


def test_a_request_that_stays_up_is_not_sent_again() -> None:
    with XdmaBench() as bench:
        bench.store(LIST, straight(1))
        for channel in (0, 1):
            bench.start(C2H, channel, LIST)
            bench.run()
        assert bench.signals == [(IrqIndex.MSIX, 2), (IrqIndex.MSIX, 3)]


def test_c2h_sources_lie_directly_above_the_implemented_h2c_channels() -> None:
    with XdmaBench(channels=1) as bench:
        bench.store(LIST, straight(1))
        bench.start(C2H, 0, LIST)
        bench.run()
        assert bench.read(regs.IRQ_CHANNEL_PENDING) == 0b10


def test_the_next_run_edge_drops_the_request_too() -> None:
    with XdmaBench() as bench:
        bench.store(LIST, straight(1))
        for n in range(1, 4):
            bench.start(C2H, 0, LIST)
            bench.run()
            assert len(bench.signals) == n
            bench.write(regs.CHANNEL[C2H].control, LOG_ALL & ~Control.IE_IDLE_STOPPED)


def test_user_lines_are_levels_with_vectors_of_their_own() -> None:
    with XdmaBench() as bench:
        user = bench.registers(regs.USER_BAR)
        bench.write(regs.IRQ_USER_VECTOR, 9 << 8, 1)
        bench.write(regs.IRQ_USER_ENABLE_W1S, 0xFFFF)
        user.write(regs.USER_IRQ_LINES_W1S, 1 << 5)
        user.write(regs.USER_IRQ_LINES_W1S, 1 << 5)
        assert bench.signals == [(IrqIndex.MSIX, 9)]
        assert bench.read(regs.IRQ_USER_REQUEST) == 1 << 5
        user.write(regs.USER_IRQ_LINES_W1C, 1 << 5)
        assert bench.read(regs.IRQ_USER_PENDING) == 0
        user.write(regs.USER_IRQ_LINES, 1 << 5)
        assert len(bench.signals) == 2


def test_with_intx_the_line_follows_the_requests() -> None:
    with XdmaBench() as bench:
        bench.wire(IrqIndex.INTX)
        bench.store(LIST, straight(1))
        bench.start(C2H, 0, LIST)
        bench.run()
        assert bench.signals == [(IrqIndex.INTX, 0)]
        assert bench.function.intx_asserted()
        assert bench.read(regs.CONFIG_MSI_ENABLE) == 0
        bench.read(regs.CHANNEL[C2H].status_rc)
        assert not bench.function.intx_asserted()
