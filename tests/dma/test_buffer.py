# SPDX-License-Identifier: Apache-2.0
"""Bytes go to the next buffer only when no view and no transfer can touch them."""

from __future__ import annotations

import gc
import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from holdfast.dma.buffer import Buffer, SlabView
from holdfast.dma.sg import SgList
from holdfast.errors import BadBuffer, Closed, ProtocolError
from holdfast.kernel import memfd
from holdfast.kernel.mapping import Mapping
from holdfast.values import Iova

F = 4096
SIZE = 16 * F
BASE = Iova(0x10_0000)


@pytest.fixture
def file() -> Iterator[int]:
    fd = memfd.create("test-slab-view", SIZE)
    yield fd
    os.close(fd)


def whole(fd: int) -> SlabView:
    return SlabView(7, Mapping(fd, SIZE), SgList.of([(BASE, SIZE)]))


@pytest.fixture
def slab(file: int) -> Iterator[SlabView]:
    view = whole(file)
    yield view
    view.close()


def alloc(slab: SlabView, nbytes: int = 1024, align: int = 64) -> Buffer:
    buffer = slab.alloc(nbytes, np.uint8, align=align)
    assert buffer is not None
    return buffer


def mapped(fd: int) -> bool:
    # With the device: a library on disk may well have the inode number of a memfd.
    file = os.fstat(fd)
    device = f"{os.major(file.st_dev):02x}:{os.minor(file.st_dev):02x}"
    return f" {device} {file.st_ino} " in Path("/proc/self/maps").read_text()


def test_a_buffer_has_the_shape_the_dtype_and_an_address(slab: SlabView) -> None:
    before = alloc(slab, 64)
    buffer = slab.alloc((3, 5), np.dtype("<c8"))
    assert buffer is not None
    assert buffer.array.shape == (3, 5)
    assert buffer.array.dtype == np.dtype("<c8")
    assert buffer.array.flags.c_contiguous
    assert not buffer.array.any()
    assert buffer.nbytes == 120
    assert len(buffer) == 3
    assert slab.free_bytes == SIZE - 64 - 128
    assert buffer.iova == before.iova + 64


def test_a_structured_dtype_works(slab: SlabView) -> None:
    buffer = slab.alloc(4, np.dtype([("low", "<u4"), ("high", "<u4", 3)]))
    assert buffer is not None
    buffer.array["high"][2] = 5
    assert buffer.array.tobytes().count(5) == 3


def test_numpy_takes_the_buffer_itself_without_a_copy(slab: SlabView) -> None:
    buffer = alloc(slab)
    np.asarray(buffer)[3] = 9
    assert buffer.array[3] == 9
    assert np.asarray(buffer, np.float32)[3] == 9.0
    copy = np.array(buffer)
    copy[3] = 1
    assert buffer.array[3] == 9
    assert int(np.sum(buffer)) == 9
    with pytest.raises(ValueError, match="uncopied"):
        buffer.__array__(np.dtype(np.float32), copy=False)


def test_the_function_sees_what_the_array_holds(file: int, slab: SlabView) -> None:
    before = alloc(slab, 100)
    buffer = alloc(slab, 100)
    buffer.array[:] = 5
    offset = buffer.iova - BASE
    assert offset == before.iova + 128 - BASE
    assert os.pread(file, 100, int(offset)) == b"\x05" * 100
    assert list(buffer.sg) == [(buffer.iova, 100)]


def test_a_fragmented_slab_is_one_array_and_several_pieces_on_the_bus(file: int) -> None:
    extents = [(8 * F, F), (2 * F, F), (3 * F, F)]
    where = SgList.of((0x9000 + offset, size) for offset, size in extents)
    slab = SlabView(1, Mapping.extents(file, extents), where.coalesce())
    buffer = alloc(slab, 3 * F)
    buffer.array[:] = np.repeat(np.arange(3, dtype=np.uint8), F)
    assert [os.pread(file, 1, offset)[0] for offset, _ in extents] == [0, 1, 2]
    assert list(buffer.sg) == [(0x9000 + 8 * F, F), (0x9000 + 2 * F, 2 * F)]
    assert buffer.iova == 0x9000 + 8 * F
    slab.close()


@pytest.mark.parametrize("align", [1, 64, 512, 4096])
def test_alignment_holds_on_both_sides(slab: SlabView, align: int) -> None:
    before = alloc(slab, 1)
    buffer = alloc(slab, 10, align)
    assert buffer.iova > before.iova
    assert int(buffer.iova) % align == 0
    assert buffer.array.ctypes.data % align == 0


@pytest.mark.parametrize("align", [0, -1, 3, 8192])
def test_an_impossible_alignment_is_refused(slab: SlabView, align: int) -> None:
    with pytest.raises(BadBuffer):
        slab.alloc(1, "u1", align=align)


@pytest.mark.parametrize(
    ("shape", "dtype"), [(0, "u1"), ((3, 0), "u1"), (-1, "u1"), ((-1, -1), "u1"), (3, "O")]
)
def test_a_shape_that_holds_nothing_or_objects_is_refused(
    slab: SlabView, shape: int | tuple[int, ...], dtype: str
) -> None:
    with pytest.raises(BadBuffer):
        slab.alloc(shape, dtype)


def test_a_full_slab_says_none(slab: SlabView) -> None:
    assert slab.alloc(SIZE + 1, "u1") is None
    whole = slab.alloc(SIZE, "u1")
    assert whole is not None
    assert slab.alloc(1, "u1") is None


def test_a_buffer_reads_as_zero_on_second_use_too(slab: SlabView) -> None:
    for nbytes in (300, 1000, SIZE, 64):
        buffer = alloc(slab, nbytes)
        assert not buffer.array.any()
        buffer.array[:] = 0xFF
        buffer.free()


def test_a_freed_buffer_is_closed_at_once(slab: SlabView) -> None:
    buffer = alloc(slab)
    buffer.free()
    buffer.free()
    assert buffer.closed
    for name in ("array", "iova", "sg"):
        with pytest.raises(Closed):
            getattr(buffer, name)
    for use in (buffer.require_open, buffer.hold, buffer.__array__, buffer.__len__):
        with pytest.raises(Closed):
            use()
    assert buffer.nbytes == 1024
    assert slab.unused
    assert "freed" in repr(buffer)


def test_leaving_the_block_frees(slab: SlabView) -> None:
    with alloc(slab) as buffer:
        assert "uint8" in repr(buffer)
        assert not slab.unused
    assert buffer.closed
    assert slab.unused


def test_a_dropped_buffer_comes_back(slab: SlabView) -> None:
    buffer = alloc(slab)
    del buffer
    assert slab.unused


def test_views_of_every_kind_keep_the_bytes(slab: SlabView) -> None:
    buffer = slab.alloc((8, 16), np.uint32)
    assert buffer is not None
    array = buffer.array
    views: list[object] = [
        array[2:4],
        array.T,
        array.reshape(4, 32),
        array.view(np.uint8)[1::3],
        array[0, 0:1].view(np.float32),
        array.data,
        memoryview(array.data).cast("B"),
        np.asarray(buffer)[::-1],
        np.frombuffer(array.data, np.uint16),
        np.lib.stride_tricks.sliding_window_view(array, (2, 2)),
        iter(array.flat),
        array.ctypes,
    ]
    del array
    buffer.free()
    del buffer
    while views:
        gc.collect()
        assert not slab.unused
        views.pop()
    gc.collect()
    assert slab.unused


def test_a_view_in_a_cycle_comes_back_with_the_collector(slab: SlabView) -> None:
    buffer = alloc(slab)
    cycle: list[object] = [buffer.array[:10]]
    cycle.append(cycle)
    buffer.free()
    del cycle
    gc.collect()
    assert slab.unused


def test_a_transfer_keeps_the_bytes_of_a_freed_buffer(slab: SlabView) -> None:
    buffer = alloc(slab)
    first, second = buffer.hold(), buffer.hold()
    buffer.free()
    assert not slab.unused
    with pytest.raises(Closed):
        buffer.hold()
    buffer.release()
    del first
    assert not slab.unused
    buffer.release()
    del second
    assert slab.unused


def test_a_finished_transfer_leaves_an_open_buffer_alone(slab: SlabView) -> None:
    buffer = alloc(slab)
    buffer.hold()
    buffer.release()
    assert not buffer.closed
    assert not slab.unused


def test_a_view_outlives_the_slab_and_the_mapping_goes_with_it(file: int) -> None:
    slab = whole(file)
    buffer = alloc(slab)
    view = buffer.array[5:]
    slab.close()
    slab.close()
    with pytest.raises(Closed):
        slab.alloc(1, "u1")
    del buffer, slab
    gc.collect()
    view[0] = 3
    assert mapped(file)
    del view
    gc.collect()
    assert not mapped(file)


def test_bytes_that_come_back_while_the_slab_is_busy_are_not_lost(slab: SlabView) -> None:
    buffer = alloc(slab)
    with slab._lock:  # as if the collector ran in the middle of an alloc
        buffer.free()
    assert slab.free_bytes == SIZE


def test_many_threads_share_a_slab_without_sharing_bytes(slab: SlabView) -> None:
    gate = threading.Barrier(4)

    def work(mark: int) -> int:
        gate.wait()
        wrong = 0
        for step in range(300):
            buffer = slab.alloc(64 + 64 * (step % 7), "u1")
            assert buffer is not None
            wrong += int(np.count_nonzero(buffer.array))
            buffer.array[:] = mark
            view = buffer.array[::2]
            kept = buffer.hold()
            buffer.free()
            wrong += int(np.count_nonzero(view != mark))
            del kept
            buffer.release()
        return wrong

    with ThreadPoolExecutor(4) as executor:
        assert list(executor.map(work, range(1, 5))) == [0] * 4
    gc.collect()
    assert slab.unused


def test_a_mapping_without_an_address_for_each_byte_is_refused(file: int) -> None:
    slab = whole(file)
    with pytest.raises(ProtocolError):
        SlabView(2, slab._mapping, slab.sg.slice(0, F))
    slab.close()
