# SPDX-License-Identifier: Apache-2.0
"""Scatter-gather lists: every short way ends as a plain loop does, and refuses what it would."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from holdfast.emu.port import Bytes, U64s
from holdfast.emu.windows import Windows
from holdfast.emu.windows_copy import copy_large, copy_list, overlapping
from holdfast.emu.xdma_fetch import Fetcher
from holdfast.emu.xdma_local import BASE as LIST
from holdfast.emu.xdma_local import straight
from holdfast.kernel import memfd
from holdfast.regs import xdma as regs
from holdfast.values import Perm

PAGE = 4096
BASE = 0x10_0000
TOP = (1 << 64) - 4 * PAGE


def ramp(count: int, seed: int = 0) -> Bytes:
    return ((np.arange(count) * 7 + seed) % 251).astype(np.uint8)


def u64(*values: int) -> U64s:
    return np.array(values, np.uint64)


@pytest.fixture
def windows() -> Iterator[Windows]:
    windows = Windows()
    yield windows
    windows.unmap_all()


def mapped(windows: Windows, *places: int, perm: Perm = Perm.RW) -> None:
    """Four pages at each place, each a file of its own."""
    for place in places:
        windows.map(place, 4 * PAGE, perm, memfd.create("lists", 4 * PAGE), 0)


# -- one list in one window ----------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(
    st.integers(0, 1 << 32),
    st.integers(1, 120),
    st.sampled_from([(1, 64), (64, 64), (500, 512), (4096, 4096), (1, 9000), (200_000, 300_000)]),
    st.sampled_from(["anywhere", "in a row", "in slots"]),
    st.sampled_from(["anywhere", "in a row", "in slots"]),
    st.booleans(),
)
def test_any_list_ends_as_a_plain_loop_does(
    seed: int, count: int, sizes: tuple[int, int], to_how: str, from_how: str, odd_end: bool
) -> None:
    random = np.random.default_rng(seed)
    room = 1 << 20
    lengths = random.integers(sizes[0], sizes[1] + 1, min(count, room // sizes[1]))
    if odd_end:
        lengths[-1] = 1 + lengths[-1] // 2
    slot = room // len(lengths)

    def places(how: str) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
        if how == "anywhere":
            return random.integers(0, room - lengths + 1)
        if how == "in a row":
            return np.cumsum(lengths) - lengths
        return random.permutation(len(lengths)) * slot

    to, source = places(to_how), places(from_how)
    data, found, expected = ramp(room, 1), ramp(room, 100), ramp(room, 100)
    for a, b, n in zip(to.tolist(), source.tolist(), lengths.tolist(), strict=True):
        expected[a : a + n] = data[b : b + n]
    copy_list(found, to, data, source, lengths)
    assert np.array_equal(found, expected)


@pytest.mark.parametrize("size", [0, 1, PAGE, 512 * 1024, 512 * 1024 + 1, 3 << 20])
def test_large_pieces_are_copied_whole(size: int) -> None:
    data = ramp(size, 5)
    found = np.zeros(size, np.uint8)
    copy_large(found, data)
    assert np.array_equal(found, data)


@given(st.lists(st.tuples(st.integers(0, 300), st.integers(1, 40)), min_size=1, max_size=12))
def test_overlaps_are_found(spans: list[tuple[int, int]]) -> None:
    seen: set[int] = set()
    expected = False
    for start, length in spans:
        expected |= not seen.isdisjoint(range(start, start + length))
        seen.update(range(start, start + length))
    to = np.array([start for start, _ in spans], np.int64)
    lengths = np.array([length for _, length in spans], np.int64)
    assert overlapping(to, lengths) == expected


def test_pages_between_one_buffer_and_scattered_places_take_the_short_way() -> None:
    """Whole pages: one side regular, so no temporary, in both directions."""
    there = np.zeros(256 * PAGE, np.uint8)
    here = ramp(128 * PAGE)
    far = np.random.default_rng(5).permutation(256)[:128].astype(np.int64) * PAGE
    near = np.arange(128, dtype=np.int64) * PAGE
    lengths = np.full(128, PAGE, np.int64)
    copy_list(there, far, here, near, lengths)
    assert np.array_equal(there.reshape(256, PAGE)[far // PAGE].ravel(), ramp(128 * PAGE))
    here[:] = 0
    copy_list(here, near, there, far, lengths)
    assert np.array_equal(here, ramp(128 * PAGE))


# -- what the short ways must not let through ------------------------------------------------------


def test_neighbours_are_one_access_as_far_as_their_window_goes(windows: Windows) -> None:
    mapped(windows, BASE)
    local = ramp(6 * PAGE)
    pages = np.arange(6, dtype=np.uint64) * np.uint64(PAGE)
    lengths = np.full(6, PAGE, np.uint64)
    assert windows.write_many(pages[:4] + np.uint64(BASE), local, pages[:4], lengths[:4]) == 4
    back = np.zeros(4 * PAGE, np.uint8)
    windows.read(BASE, back)
    assert np.array_equal(back, local[: 4 * PAGE])
    assert windows.faults == 0
    assert windows.write_many(pages + np.uint64(BASE), local, pages, lengths) == 4
    assert windows.faults == 1


def test_neighbours_may_run_through_two_windows(windows: Windows) -> None:
    mapped(windows, BASE, BASE + 4 * PAGE)
    local = ramp(8 * PAGE)
    halves = u64(0, 5 * PAGE)
    lengths = u64(5 * PAGE, 3 * PAGE)
    assert windows.write_many(halves + np.uint64(BASE), local, halves, lengths) == 2
    back = np.zeros(8 * PAGE, np.uint8)
    windows.read(BASE, back)
    assert np.array_equal(back, local)


def test_nothing_wraps_around_the_end_of_the_address_space(windows: Windows) -> None:
    mapped(windows, TOP, 0)
    local = ramp(8 * PAGE)
    iovas, offsets = u64(TOP + 2 * PAGE, 0), u64(0, 2 * PAGE)
    lengths = u64(2 * PAGE, 2 * PAGE)
    assert windows.write_many(iovas, local, offsets, lengths) == 2  # side by side only modulo 2**64
    over = u64(TOP, TOP + 3 * PAGE)
    assert windows.write_many(over, local, u64(0, PAGE), u64(1, 2 * PAGE)) == 1
    assert windows.write_many(over[1:], local, u64(0), u64(2 * PAGE)) == 0
    back = np.zeros(2 * PAGE, np.uint8)
    windows.read(0, back)
    assert np.array_equal(back, local[2 * PAGE : 4 * PAGE])


@pytest.mark.parametrize(
    ("second", "length"),
    [
        (BASE - 1, 1),
        (BASE + 4 * PAGE, 1),
        (BASE + 4 * PAGE - 1, 2),
        (BASE + 8, 5 * PAGE),
        (0, 1),
        ((1 << 64) - 1, 1),
    ],
)
def test_an_entry_outside_the_window_ends_the_list_before_it(
    windows: Windows, second: int, length: int
) -> None:
    mapped(windows, BASE)
    local = ramp(6 * PAGE)
    lengths, offsets = u64(8, length, 8), u64(0, 16, 0)
    before = np.zeros(4 * PAGE, np.uint8)
    before[:8] = local[:8]
    assert windows.write_many(u64(BASE, second, BASE + 64), local, offsets, lengths) == 1
    back = np.zeros(4 * PAGE, np.uint8)
    windows.read(BASE, back)
    assert np.array_equal(back, before)
    assert windows.faults == 1


@pytest.mark.parametrize("count", [1, 2, 3])
def test_lists_keep_to_the_permission_of_the_window(windows: Windows, count: int) -> None:
    mapped(windows, BASE, perm=Perm.READ)
    local = ramp(PAGE)
    iovas = u64(BASE, BASE + 8, BASE + 100)[:count]
    offsets = u64(0, 8, 16)[:count]
    lengths = u64(8, 8, 8)[:count]
    assert windows.write_many(iovas, local, offsets, lengths) == 0
    assert windows.read_many(iovas, local, offsets, lengths) == count
    assert not local[:16][: 8 * min(count, 2)].any()


def test_empty_entries_need_no_window(windows: Windows) -> None:
    mapped(windows, BASE)
    local = ramp(PAGE)
    assert windows.write_many(u64(5), local, u64(PAGE), u64(0)) == 1
    assert windows.write_many(u64(BASE, 5, BASE), local, u64(0, 8, 8), u64(8, 0, 1)) == 3
    assert windows.faults == 0


# -- descriptors one at a time ---------------------------------------------------------------------


class Ram:
    """Host memory at LIST."""

    def __init__(self, data: Bytes) -> None:
        self.data = data
        self.faults = 0

    def read(self, iova: int, into: Bytes) -> None:
        into[:] = self.data[iova - LIST : iova - LIST + len(into)]

    def write(self, iova: int, data: Bytes) -> None:
        raise NotImplementedError

    def read_many(self, iovas: U64s, local: Bytes, offsets: U64s, lengths: U64s) -> int:
        raise NotImplementedError

    def write_many(self, iovas: U64s, local: Bytes, offsets: U64s, lengths: U64s) -> int:
        raise NotImplementedError


@given(st.lists(st.integers(0, 5), min_size=1, max_size=30), st.integers(0, 5), st.booleans())
def test_fetching_one_by_one_follows_the_same_chain(
    adjacent: list[int], first: int, scramble: bool
) -> None:
    table = straight(128)
    table["control"][: len(adjacent)] |= np.array(adjacent, np.uint32) << regs.DESC_ADJACENT.lo
    if scramble:  # inner descriptors of a block may hold anything; ends jump to where it says
        table["next"][:50:3] = LIST + 64 * regs.DESC_SIZE
    ram = Ram(table.view(np.uint8))
    at_once, single = Fetcher(), Fetcher()
    at_once.start(LIST, first)
    single.start(LIST, first)
    many = at_once.fetch(ram, 60)
    ones = [single.fetch(ram, 1) for _ in range(len(many))]
    assert np.array_equal(np.concatenate(ones), many)
    assert (single.address, single.left, single.ended) == (
        at_once.address,
        at_once.left,
        at_once.ended,
    )
