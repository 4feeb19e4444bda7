# SPDX-License-Identifier: Apache-2.0
"""Random descriptor lists: the batched engine against a plain model of the guide's rules."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import numpy.typing as npt
from hypothesis import given, settings
from hypothesis import strategies as st

from holdfast.emu.port import Bytes
from holdfast.emu.xdma_fetch import Descriptors
from holdfast.emu.xdma_local import DATA, LIST, XdmaBench
from holdfast.regs import xdma as regs
from holdfast.regs.xdma import Desc, Direction, Status

C2H = Direction.C2H


def noise(count: int, seed: int = 1) -> Bytes:
    return np.random.default_rng(seed).integers(0, 256, count, dtype=np.uint8)


def model(
    list_memory: npt.NDArray[np.void], first: int, adjacent: int, host: Bytes, card: Bytes
) -> int:
    """C2H, one descriptor at a time, just as the guide says; the number done."""
    at, left, done = first, adjacent + 1, 0
    while True:
        row = list_memory[(at - LIST) // 32]
        length, source, target = int(row["length"]), int(row["source"]), int(row["destination"])
        host[target - DATA : target - DATA + length] = card[source : source + length]
        done += 1
        if row["control"] & Desc.STOP:
            return done
        left -= 1
        if left:
            at += 32
        else:
            at, left = int(row["next"]), 1 + (int(row["control"]) >> 8 & 0x3F)


@st.composite
def block_lists(draw: st.DrawFn) -> tuple[Descriptors, int, int]:
    """Blocks scattered over a table, inner ``next`` fields unset or set; one list through them."""
    sizes = draw(st.lists(st.integers(1, 40), min_size=1, max_size=12))
    order = draw(st.permutations(range(len(sizes))))
    tidy = draw(st.booleans())
    count = sum(sizes)
    seed = draw(st.integers(0, 2**32 - 1))
    random = np.random.default_rng(seed)
    table = np.zeros(count, regs.DESCRIPTOR)
    table["control"] = regs.DESC_MAGIC
    table["length"] = random.integers(0, 300, count)
    table["source"] = random.integers(0, 4096, count)
    table["destination"] = DATA + random.integers(0, 8192, count)
    table["next"] = random.integers(0, 1 << 63, count)
    starts = np.concatenate(([0], np.cumsum(sizes)))
    if tidy:
        table["next"] = LIST + 32 * np.arange(1, count + 1)
    for here, there in pairwise(order):
        end = starts[here + 1] - 1
        table["next"][end] = LIST + 32 * starts[there]
        table["control"][end] |= sizes[there] - 1 << 8
    table["control"][starts[order[-1] + 1] - 1] |= Desc.STOP | Desc.COMPLETED
    return table, LIST + 32 * int(starts[order[0]]), sizes[order[0]] - 1


@settings(max_examples=80, deadline=None)
@given(block_lists(), st.booleans())
def test_any_list_of_blocks_does_what_the_plain_model_does(
    lists: tuple[Descriptors, int, int], limited: bool
) -> None:
    table, first, adjacent = lists
    with XdmaBench(
        card_memory=8192, memory=2 << 20, link_rate=1e6 if limited else None, link_chunk=777
    ) as bench:
        bench.card_memory[:] = noise(8192)
        expected = np.zeros(16384, np.uint8)
        done = model(table, first, adjacent, expected, bench.card_memory)
        bench.store(LIST, table)
        bench.start(C2H, 0, first, adjacent=adjacent)
        bench.run()
        assert bench.count(C2H, 0) == done
        assert np.array_equal(bench.host(DATA, 16384), expected)
        assert bench.status(C2H, 0) == Status.DESCRIPTOR_STOPPED | Status.DESCRIPTOR_COMPLETED
