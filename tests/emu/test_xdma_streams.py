# SPDX-License-Identifier: Apache-2.0
"""C2H stream channels of the emulated XDMA core."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast.emu.xdma_local import DATA, LIST, LOG_ALL, XdmaBench, straight
from holdfast.emu.xdma_stream import Source, cut
from holdfast.regs import xdma as regs
from holdfast.regs.spec import Register
from holdfast.regs.xdma import Control, Desc, Direction, SourceControl, Status

C2H = Direction.C2H
META = DATA + 0x20_0000
CREDITS = regs.SG[C2H].descriptor_credits


@pytest.fixture
def bench() -> Iterator[XdmaBench]:
    with XdmaBench() as made:
        yield made


def source(bench: XdmaBench, register: Register, value: int, channel: int = 0) -> None:
    bench.registers(regs.USER_BAR).write(register, value, channel)


def counter(bench: XdmaBench, name: str) -> int:
    low = getattr(regs, f"SOURCE_{name}_LO")
    high = getattr(regs, f"SOURCE_{name}_HI")
    user = bench.registers(regs.USER_BAR)
    return user.read(low) | user.read(high) << 32


def stream_list(count: int, length: int, *, cyclic: bool = False) -> npt.NDArray[Any]:
    table = straight(count, length, last=0 if cyclic else Desc.STOP, each=Desc.COMPLETED)
    table["source"] = META + 32 * np.arange(count)
    if cyclic:
        table["next"][-1] = LIST
    return table


def metadata(bench: XdmaBench, count: int) -> tuple[list[int], list[int]]:
    words = bench.host(META, 32 * count).view("<u4").reshape(count, 8)
    return words[:, 0].tolist(), words[:, 1].tolist()


def samples(bench: XdmaBench, nbytes: int) -> npt.NDArray[np.uint32]:
    return bench.host(DATA, nbytes).view("<u4")


def test_an_enabled_source_makes_the_channel_a_stream_channel(bench: XdmaBench) -> None:
    source(bench, regs.SOURCE_CONTROL, SourceControl.ENABLE, 1)
    assert bench.read(regs.CHANNEL[C2H].identifier, 1) == 0x1FC18106
    assert bench.read(regs.SG[C2H].identifier, 1) == 0x1FC58006
    assert bench.read(regs.CHANNEL[C2H].identifier, 0) == 0x1FC10006


def test_data_and_metadata_arrive_for_every_descriptor(bench: XdmaBench) -> None:
    source(bench, regs.SOURCE_CONTROL, SourceControl.ENABLE)
    bench.store(LIST, stream_list(8, 1024))
    bench.start(C2H, 0, LIST)
    bench.run()
    assert np.array_equal(samples(bench, 8192), np.arange(2048))
    assert metadata(bench, 8) == ([0x52B40000] * 8, [1024] * 8)
    assert bench.count(C2H, 0) == 8
    assert counter(bench, "PRODUCED") == 8192


def test_a_source_without_a_rate_gives_just_what_is_taken(bench: XdmaBench) -> None:
    source(bench, regs.SOURCE_CONTROL, SourceControl.ENABLE)
    bench.time.advance(1000)
    assert counter(bench, "PRODUCED") == counter(bench, "OVERRUN") == 0


def test_a_rated_source_fills_descriptors_at_its_rate_and_stays_busy(bench: XdmaBench) -> None:
    source(bench, regs.SOURCE_RATE, 1_000_000)
    source(bench, regs.SOURCE_CONTROL, SourceControl.ENABLE)
    bench.store(LIST, stream_list(10, 4000))
    bench.start(C2H, 0, LIST)
    begin = bench.time.now
    bench.run(seconds=0.0199)
    assert bench.count(C2H, 0) == 4
    assert bench.status(C2H, 0) & Status.BUSY
    bench.run()
    assert bench.time.now - begin == pytest.approx(0.04, abs=0.001)
    assert np.array_equal(samples(bench, 40000), np.arange(10000))
    assert counter(bench, "OVERRUN") == 0


def test_an_overrun_is_counted_and_leaves_a_gap_in_the_samples(bench: XdmaBench) -> None:
    source(bench, regs.SOURCE_RATE, 1_000_000)
    source(bench, regs.SOURCE_DEPTH, 4096)
    source(bench, regs.SOURCE_CONTROL, SourceControl.ENABLE)
    bench.time.advance(0.010001)  # 10000 bytes produced, 4096 kept
    assert counter(bench, "PRODUCED") == 10000
    assert counter(bench, "OVERRUN") == 10000 - 4096
    assert bench.registers(regs.USER_BAR).read(regs.SOURCE_LEVEL) == 4096
    bench.store(LIST, stream_list(2, 4096))
    bench.start(C2H, 0, LIST)
    bench.run()
    got = samples(bench, 8192)
    assert np.array_equal(got[:1024], np.arange(1024))
    assert np.array_equal(got[1024:], 2500 + np.arange(1024))
    assert counter(bench, "PRODUCED") - counter(bench, "OVERRUN") == 8192


def test_without_credits_the_fifo_fills_and_overruns(bench: XdmaBench) -> None:
    source(bench, regs.SOURCE_RATE, 1_000_000)
    source(bench, regs.SOURCE_DEPTH, 4096)
    source(bench, regs.SOURCE_CONTROL, SourceControl.ENABLE)
    bench.store(LIST, stream_list(4, 1000, cyclic=True))
    bench.write(regs.SG_CREDIT_MODE, regs.sg_bit(C2H, 0))
    bench.start(C2H, 0, LIST)
    bench.write(CREDITS, 2)
    bench.run(seconds=0.0021)
    assert bench.count(C2H, 0) == 2
    assert not bench.status(C2H, 0) & Status.BUSY
    bench.time.advance(0.01)
    assert counter(bench, "OVERRUN") > 0
    bench.write(CREDITS, 4)
    bench.run(seconds=0.001)
    assert bench.count(C2H, 0) == 6


def test_a_cyclic_ring_streams_on_without_credits(bench: XdmaBench) -> None:
    source(bench, regs.SOURCE_RATE, 1_000_000)
    source(bench, regs.SOURCE_CONTROL, SourceControl.ENABLE)
    bench.store(LIST, stream_list(4, 1000, cyclic=True))
    bench.start(C2H, 0, LIST)
    bench.run(seconds=0.05)
    assert bench.count(C2H, 0) == pytest.approx(50, abs=2)
    assert counter(bench, "OVERRUN") == 0
    last = bench.count(C2H, 0) - 1
    slot = bench.host(DATA + 1000 * (last % 4), 1000).view("<u4")
    assert np.array_equal(slot, last * 250 + np.arange(250))


def test_stopping_abandons_a_descriptor_that_waits_and_consumes_nothing(bench: XdmaBench) -> None:
    source(bench, regs.SOURCE_RATE, 1_000_000)
    source(bench, regs.SOURCE_CONTROL, SourceControl.ENABLE)
    bench.store(LIST, stream_list(4, 4000))
    bench.start(C2H, 0, LIST)
    bench.run(seconds=0.006)
    assert bench.count(C2H, 0) == 1
    bench.stop(C2H, 0)
    assert bench.status(C2H, 0) & (Status.BUSY | Status.IDLE_STOPPED) == Status.IDLE_STOPPED
    bench.start(C2H, 0, LIST)
    bench.run()
    assert np.array_equal(samples(bench, 4000), 1000 + np.arange(1000))


def test_a_partly_filled_descriptor_is_abandoned_too(bench: XdmaBench) -> None:
    source(bench, regs.SOURCE_RATE, 1_000_000)
    source(bench, regs.SOURCE_DEPTH, 2000)
    source(bench, regs.SOURCE_CONTROL, SourceControl.ENABLE)
    bench.store(LIST, stream_list(4, 8000))
    bench.start(C2H, 0, LIST)
    bench.run(seconds=0.003)
    assert samples(bench, 2000)[-1]
    bench.stop(C2H, 0)
    bench.run(seconds=0.001)
    assert not bench.status(C2H, 0) & Status.BUSY
    assert bench.count(C2H, 0) == 0


def test_packets_end_descriptors_with_eop(bench: XdmaBench) -> None:
    source(bench, regs.SOURCE_PACKET, 2400)
    source(bench, regs.SOURCE_CONTROL, SourceControl.ENABLE)
    bench.store(LIST, stream_list(6, 1000))
    bench.start(C2H, 0, LIST)
    bench.run()
    status, lengths = metadata(bench, 6)
    assert lengths == [1000, 1000, 400] * 2
    assert status == [0x52B40000, 0x52B40000, 0x52B40001] * 2
    got = np.concatenate([samples(bench, 6000)[i * 250 : i * 250 + n // 4]
                          for i, n in enumerate(lengths)])  # fmt: skip
    assert np.array_equal(got, np.arange(1200))


def test_a_packet_may_span_descriptors_across_steps() -> None:
    with XdmaBench(link_rate=1e6, link_chunk=333 * 8) as bench:
        source(bench, regs.SOURCE_PACKET, 5000)
        source(bench, regs.SOURCE_CONTROL, SourceControl.ENABLE)
        bench.store(LIST, stream_list(6, 2000))
        bench.start(C2H, 0, LIST)
        bench.run()
        status, lengths = metadata(bench, 6)
        assert lengths == [2000, 2000, 1000] * 2
        assert [word & 1 for word in status] == [0, 0, 1] * 2


def test_the_metadata_write_back_can_be_suppressed(bench: XdmaBench) -> None:
    source(bench, regs.SOURCE_CONTROL, SourceControl.ENABLE)
    bench.store(LIST, stream_list(2, 1024))
    bench.start(C2H, 0, LIST, control=LOG_ALL | Control.NO_STREAM_WRITEBACK)
    bench.run()
    assert metadata(bench, 2) == ([0, 0], [0, 0])


def test_metadata_that_cannot_be_written_is_lost(bench: XdmaBench) -> None:
    source(bench, regs.SOURCE_CONTROL, SourceControl.ENABLE)
    table = stream_list(3, 1024)
    table["source"][1] = 0x40_0000_0000
    bench.store(LIST, table)
    bench.start(C2H, 0, LIST)
    bench.run()
    assert metadata(bench, 3)[1] == [1024, 0, 1024]
    assert bench.count(C2H, 0) == 3


def test_a_length_off_the_data_path_width_is_invalid(bench: XdmaBench) -> None:
    source(bench, regs.SOURCE_CONTROL, SourceControl.ENABLE)
    table = stream_list(4, 1024)
    table["length"][2] = 1001
    bench.store(LIST, table)
    bench.start(C2H, 0, LIST)
    bench.run()
    assert bench.count(C2H, 0) == 2
    assert bench.status(C2H, 0) & regs.STATUS_ERRORS == Status.INVALID_LENGTH
    assert not bench.status(C2H, 0) & Status.BUSY


def test_the_sine_pattern_has_its_period(bench: XdmaBench) -> None:
    source(bench, regs.SOURCE_PERIOD, 100)
    source(bench, regs.SOURCE_CONTROL, SourceControl.ENABLE | SourceControl.SINE)
    bench.store(LIST, stream_list(1, 4000))
    bench.start(C2H, 0, LIST)
    bench.run()
    wave = bench.host(DATA, 4000).view("<i2")
    assert (wave.min(), wave.max(), wave[0]) == (-0x7FFF, 0x7FFF, 0)
    assert np.array_equal(wave[:100], wave[1500:1600])


def test_enabling_again_counts_from_zero(bench: XdmaBench) -> None:
    source(bench, regs.SOURCE_RATE, 1_000_000)
    source(bench, regs.SOURCE_CONTROL, SourceControl.ENABLE)
    bench.time.advance(1)
    source(bench, regs.SOURCE_CONTROL, 0)
    bench.time.advance(1)
    assert counter(bench, "PRODUCED") == 1_000_000
    source(bench, regs.SOURCE_CONTROL, SourceControl.ENABLE)
    assert counter(bench, "PRODUCED") == 0


# -- the pieces against plain models ---------------------------------------------------------------


@given(
    st.lists(st.integers(0, 50), min_size=1, max_size=30),
    st.integers(0, 400),
    st.integers(0, 60),
    st.integers(0, 59),
)
def test_any_cut_into_packets_is_the_plain_models(
    rooms: list[int], budget: int, packet: int, into: int
) -> None:
    into = into % packet if packet else 0
    got = cut(np.array(rooms, np.int64), budget, packet, into)
    delivered: list[int] = []
    eops: list[bool] = []
    position, laid, here = into, 0, 0
    while len(delivered) < len(rooms):
        if here == rooms[len(delivered)]:
            delivered.append(here)
            eops.append(False)
            here = 0
        elif laid == budget:
            break
        else:
            here, laid, position = here + 1, laid + 1, position + 1
            if packet and position % packet == 0:
                delivered.append(here)
                eops.append(True)
                here = 0
    assert got.delivered.tolist() == delivered
    assert got.partial == here
    assert int(got.eop.sum()) == sum(eops)
    assert [n for n, end in zip(got.delivered.tolist(), got.eop.tolist(), strict=True) if end] == [
        n for n, end in zip(delivered, eops, strict=True) if end
    ]


@given(
    st.integers(1, 200),
    st.integers(0, 30),
    st.lists(st.tuples(st.integers(0, 300), st.integers(0, 300)), max_size=12),
)
def test_any_pattern_of_taking_sees_the_bytes_the_fifo_kept(
    rate: int, depth: int, moves: list[tuple[int, int]]
) -> None:
    """Seconds pass and bytes are taken; against a FIFO of single beats."""
    made = Source()
    made.rate, made.depth = rate * 8, depth * 8
    made.enable(True, 0.0)
    now = 0.0
    fifo: list[int] = []
    produced = dropped = 0
    for seconds, wanted in moves:
        for _ in range(rate * seconds):
            if len(fifo) < depth:
                fifo.append(produced)
            else:
                dropped += 1
            produced += 1
        now += seconds
        made.sync(now)
        count = min(wanted, len(fifo))
        expected = [word for beat in fifo[:count] for word in (2 * beat, 2 * beat + 1)]
        del fifo[:count]
        assert made.take(count * 8).view("<u4").tolist() == expected
        assert (made.produced, made.overrun) == (produced * 8, dropped * 8)
        assert made.available == len(fifo) * 8
