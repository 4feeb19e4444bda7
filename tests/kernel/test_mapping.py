# SPDX-License-Identifier: Apache-2.0
"""Mappings live as long as anybody looks, and registers are accessed once."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from holdfast.errors import BadAccess, BadBuffer, Closed
from holdfast.kernel import memfd
from holdfast.kernel.mapping import Mapping, Window

PAGE = 4096
SIZE = 16 * PAGE


@pytest.fixture
def file() -> Iterator[int]:
    fd = memfd.create("test-mapping", SIZE)
    yield fd
    os.close(fd)


def mapped(fd: int) -> int:
    """How many areas of this process map the file."""
    file = os.fstat(fd)  # with the device: a library on disk may have the inode number of a memfd
    inode = f" {os.major(file.st_dev):02x}:{os.minor(file.st_dev):02x} {file.st_ino} "
    return sum(inode in line for line in Path("/proc/self/maps").read_text().splitlines())


def test_the_array_is_the_file(file: int) -> None:
    mapping = Mapping(file, SIZE)
    mapping.array[5] = 9
    assert os.pread(file, 1, 5) == b"\x09"
    os.pwrite(file, b"\x07", SIZE - 1)
    assert mapping.array[-1] == 7
    assert mapping.size == len(mapping.array) == SIZE
    assert mapping.array.ctypes.data == mapping.address


def test_an_offset_maps_a_part(file: int) -> None:
    os.pwrite(file, b"\x55", 2 * PAGE)
    mapping = Mapping(file, PAGE, offset=2 * PAGE)
    assert mapping.array[0] == 0x55
    assert mapping.size == PAGE


def test_extents_lie_behind_each_other_in_the_order_given(file: int) -> None:
    for page in range(16):
        os.pwrite(file, bytes([page]) * PAGE, page * PAGE)
    mapping = Mapping.extents(file, [(8 * PAGE, 2 * PAGE), (0, PAGE), (3 * PAGE, PAGE)])
    assert mapping.array[::PAGE].tolist() == [8, 9, 0, 3]
    mapping.array[2 * PAGE] = 0xFF
    assert os.pread(file, 1, 0) == b"\xff"


@pytest.mark.parametrize(
    "extents",
    [
        [],
        [(1, PAGE)],
        [(0, 100), (PAGE, PAGE)],
        [(0, 0)],
        [(-PAGE, PAGE)],
        [(0, SIZE + 1)],
        [(SIZE, PAGE)],
        [(0, 1 << 62), (0, 1 << 62)],
    ],
)
def test_extents_that_would_fault_are_refused(file: int, extents: list[tuple[int, int]]) -> None:
    with pytest.raises(BadBuffer):
        Mapping.extents(file, extents)
    assert not mapped(file)


@pytest.mark.parametrize(("width", "kind"), [(1, "u1"), (2, "<u2"), (4, "<u4"), (8, "<u8")])
def test_loads_and_stores_move_one_word(file: int, width: int, kind: str) -> None:
    mapping = Mapping(file, SIZE)
    words = mapping.array.view(kind)
    value = 0x8877665544332211 & ((1 << (8 * width)) - 1)
    mapping.store(3 * width, width, value)
    assert words[3] == value
    assert not words[2]
    assert not words[4]
    assert mapping.load(3 * width, width) == value
    mapping.store(SIZE - width, width, value)
    assert mapping.load(SIZE - width, width) == value


@pytest.mark.parametrize(
    ("offset", "width"), [(1, 2), (2, 4), (4, 8), (SIZE, 1), (SIZE, 8), (-4, 4), (0, 3), (0, 16)]
)
def test_an_access_that_is_misaligned_or_outside_is_refused(
    file: int, offset: int, width: int
) -> None:
    mapping = Mapping(file, SIZE)
    with pytest.raises(BadAccess):
        mapping.load(offset, width)
    with pytest.raises(BadAccess):
        mapping.store(offset, width, 0)


@pytest.mark.parametrize("value", [1 << 32, -1])
def test_a_value_that_does_not_fit_is_refused(file: int, value: int) -> None:
    mapping = Mapping(file, SIZE)
    with pytest.raises(BadAccess):
        mapping.store(0, 4, value)
    assert mapping.load(0, 4) == 0


def test_a_read_only_mapping_cannot_be_written(file: int) -> None:
    mapping = Mapping(file, SIZE, writable=False)
    assert not mapping.array.flags.writeable
    with pytest.raises(BadAccess):
        mapping.store(0, 4, 1)
    assert mapping.load(0, 4) == 0


def test_words_at_the_end_of_an_odd_size_are_refused_and_bytes_are_not() -> None:
    fd = memfd.create("odd", 13)
    mapping = Mapping(fd, 13)
    os.close(fd)
    mapping.store(12, 1, 7)
    assert mapping.load(12, 1) == 7
    mapping.load(8, 4)
    with pytest.raises(BadAccess):
        mapping.load(12, 4)


def test_the_descriptor_is_not_needed_once_mapped(file: int) -> None:
    fd = os.dup(file)
    mapping = Mapping(fd, SIZE)
    os.close(fd)
    mapping.array[0] = 1
    assert os.pread(file, 1, 0) == b"\x01"


def test_memory_stays_mapped_until_the_last_view_is_gone(file: int) -> None:
    mapping = Mapping.extents(file, [(PAGE, PAGE), (0, PAGE)])
    view = np.reshape(mapping.array[100:200], (10, 10)).T.data
    mapping.close()
    with pytest.raises(Closed):
        _ = mapping.array
    del mapping
    gc.collect()
    assert mapped(file) == 2
    assert view[0, 0] == 0
    view.release()
    del view
    gc.collect()
    assert not mapped(file)


def test_closing_without_views_unmaps_at_once_and_may_be_repeated(file: int) -> None:
    mapping = Mapping(file, SIZE)
    assert mapped(file) == 1
    mapping.close()
    mapping.close()
    assert not mapped(file)
    with pytest.raises(Closed):
        mapping.load(0, 4)
    with pytest.raises(Closed):
        mapping.store(0, 4, 0)


def test_a_mapping_that_is_not_forked_is_absent_in_the_child_and_leaves_its_heap_alone() -> None:
    script = """
import ctypes, mmap, os
from holdfast.kernel import libc, memfd
from holdfast.kernel.mapping import Mapping, Window
fd = memfd.create("unforked", 1 << 20)
file = os.fstat(fd)
inode = f" {os.major(file.st_dev):02x}:{os.minor(file.st_dev):02x} {file.st_ino} "
mapping = Mapping(fd, 1 << 20, dont_fork=True)
kept = Mapping(fd, 1 << 20)
assert open("/proc/self/maps").read().count(inode) == 2
child = os.fork()
if not child:
    status = 1
    try:
        assert open("/proc/self/maps").read().count(inode) == 1
        flags = libc.MAP_PRIVATE | libc.MAP_ANONYMOUS | libc.MAP_FIXED
        heap = libc.mmap(mapping.address, 1 << 20, 3, flags, -1, 0)
        mapping.close()
        ctypes.memset(heap, 1, 1 << 20)  # a fault, if close had unmapped it
        kept.array[0] = 7
        status = 0
    finally:
        os._exit(status)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
assert kept.array[0] == mapping.array[0] == 7
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=30)


def test_a_detached_mapping_keeps_its_contents_and_loses_its_file() -> None:
    fd = memfd.create("detach", 3 * PAGE)
    try:
        mapping = Mapping.extents(fd, [(PAGE, PAGE), (0, PAGE)])
        view = mapping.array[10 : PAGE + 20]
        mapping.array[:] = 7
        mapping.detach()
        memfd.punch(fd, 0, 3 * PAGE)
        assert (view == 7).all()
        view[:] = 9
        assert memfd.allocated(fd) == 0, "a detached view still writes into the file"
    finally:
        os.close(fd)


def test_a_mapping_of_many_pieces_is_detached_in_full(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("holdfast.kernel.mapping._DETACH", 2 * PAGE)
    fd = memfd.create("detach", 5 * PAGE)
    try:
        mapping = Mapping(fd, 5 * PAGE)
        mapping.array[:] = np.arange(5 * PAGE, dtype=np.uint64).astype(np.uint8)
        before = mapping.array.copy()
        mapping.detach()
        memfd.punch(fd, 0, 5 * PAGE)
        assert np.array_equal(mapping.array, before)
    finally:
        os.close(fd)


# -- windows --------------------------------------------------------------------------------------


def test_a_window_shows_a_part_of_the_file_and_is_unmapped_with_its_last_view(file: int) -> None:
    window = Window(file, PAGE, offset=2 * PAGE)
    window.array[1] = 0x55
    assert os.pread(file, 2, 2 * PAGE) == b"\0\x55"
    view = window.array[1:3]
    del window
    gc.collect()
    assert mapped(file) == 1
    assert view.tolist() == [0x55, 0]
    del view
    gc.collect()
    assert mapped(file) == 0


def test_a_read_only_window_cannot_be_written(file: int) -> None:
    window = Window(file, PAGE, writable=False)
    with pytest.raises(ValueError, match="read-only"):
        window.array[0] = 1


@pytest.mark.parametrize(("size", "offset"), [(0, 0), (SIZE + 1, 0), (PAGE, SIZE), (PAGE, 1)])
def test_a_window_that_does_not_fit_maps_nothing(file: int, size: int, offset: int) -> None:
    with pytest.raises(BadBuffer):
        Window(file, size, offset=offset)
    assert mapped(file) == 0
