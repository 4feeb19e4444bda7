# SPDX-License-Identifier: Apache-2.0
"""What a post leaves in the ring, descriptor by descriptor, wherever in the ring it begins."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from hypothesis import given, settings
from hypothesis import strategies as st

from holdfast.dma.sg import SgList
from holdfast.driver import ControlMemory
from holdfast.drivers.xdma_ring import (
    CONTROL,
    CONTROL_BYTES,
    RING,
    Batch,
    Layout,
    Ring,
    prepare_ring,
)
from holdfast.regs.xdma import DESCRIPTOR, Desc, Direction

PIECE = 4096


def a_ring(direction: Direction) -> tuple[Ring, npt.NDArray[np.void]]:
    """A prepared ring in memory that the function sees page by page, backwards."""
    data = memoryview(bytearray(CONTROL_BYTES))
    pages = CONTROL_BYTES // PIECE
    iovas = (np.arange(pages)[::-1].astype(np.uint64) + np.uint64(7)) * np.uint64(PIECE)
    control = ControlMemory(data, SgList(iovas, np.full(pages, PIECE, np.uint64)))
    layout = Layout(0, direction)
    prepare_ring(control, layout)
    table = np.frombuffer(data, DESCRIPTOR, RING, layout.ring)
    return Ring(control, layout), table


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(Direction),
    st.integers(0, 5 * RING),
    st.lists(st.integers(1, RING - 1), min_size=1, max_size=4),
)
def test_a_written_batch_is_its_descriptors_in_order_and_the_links_stay(
    direction: Direction, begin: int, counts: list[int]
) -> None:
    ring, table = a_ring(direction)
    links = table["next"].copy()
    ring.posted = ring.done = begin
    random = np.random.default_rng(begin)
    for count in counts:
        lengths = random.integers(1, 1 << 28, count, np.uint64)
        host = random.integers(0, 1 << 64, count, np.uint64)
        card = random.integers(0, 1 << 64, count, np.uint64)
        slots = np.arange(ring.posted, ring.posted + count) % RING
        ring.done = ring.posted
        ring.write(Batch.of(direction, lengths, host, card))
        found = table[slots]
        ends = (host, card) if direction is Direction.H2C else (card, host)
        assert (found["length"] == lengths).all()
        assert (found["source"] == ends[0]).all()
        assert (found["destination"] == ends[1]).all()
        marks = np.zeros(count, np.uint32)
        marks[-1] = Desc.COMPLETED | Desc.EOP
        assert (found["control"] == CONTROL[slots] | marks).all()
        assert (table["next"] == links).all()


def test_a_batch_counts_its_descriptors_and_its_bytes() -> None:
    batch = Batch.build(Direction.C2H, SgList([4096, 1 << 40], [100, 28]), 1 << 33)
    assert len(batch) == 2
    assert batch.nbytes == 128
    rows = batch.rows.view(DESCRIPTOR)[:, 0]
    assert rows["source"].tolist() == [1 << 33, (1 << 33) + 100]
    assert rows["destination"].tolist() == [4096, 1 << 40]
    assert rows["control"].tolist() == [0, int(Desc.COMPLETED | Desc.EOP)]
    assert not rows["next"].any()
