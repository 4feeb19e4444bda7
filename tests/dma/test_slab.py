# SPDX-License-Identifier: Apache-2.0
"""Memory reaches the next lease only through the kernel, as zeroes."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import pytest

from holdfast.dma.slab import Arena, OwnFiles, SlabMemory, SlabSource
from holdfast.errors import BadBuffer, Closed, OutOfMemory, UsageError
from holdfast.kernel import memfd
from holdfast.kernel.mapping import Mapping

F = 4096
SIZE = 16 * F


@pytest.fixture(autouse=True)
def no_leaks() -> Iterator[None]:
    before = len(os.listdir("/proc/self/fd"))
    yield
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.fixture(params=[OwnFiles, lambda: Arena(SIZE)], ids=["files", "arena"])
def source(request: pytest.FixtureRequest) -> Iterator[SlabSource]:
    make: Callable[[], SlabSource] = request.param
    made = make()
    yield made
    made.close()


def fill(memory: SlabMemory) -> None:
    for offset, size in memory.extents:
        os.pwrite(memory.fd, b"\xaa" * size, offset)


def contents(memory: SlabMemory) -> bytes:
    return b"".join(os.pread(memory.fd, size, offset) for offset, size in memory.extents)


def test_memory_is_zero_and_counted(source: SlabSource) -> None:
    memory = source.take(3 * F)
    assert contents(memory) == bytes(3 * F)
    assert source.held_bytes == memory.size == 3 * F
    memfd.require_sealed(memory.fd, 3 * F)


def test_punching_frees_the_pages_and_keeps_the_slab(source: SlabSource) -> None:
    memory = source.take(3 * F)
    fill(memory)
    assert memfd.allocated(memory.fd) == 3 * F
    source.punch(memory)
    assert memfd.allocated(memory.fd) == 0
    assert source.held_bytes == 3 * F
    source.recycle(memory)
    assert source.held_bytes == 0


def test_recycling_punches_what_was_not_punched(source: SlabSource) -> None:
    memory = source.take(3 * F)
    fill(memory)
    window = Mapping.extents(memory.fd, memory.extents)  # as a client that will not let go
    source.recycle(memory)
    assert not window.array.any()


def test_nothing_is_taken_back_twice(source: SlabSource) -> None:
    memory = source.take(F)
    source.recycle(memory)
    with pytest.raises(UsageError):
        source.recycle(memory)
    with pytest.raises(UsageError):
        source.punch(memory)
    with pytest.raises(UsageError):
        source.recycle(SlabMemory(memory.fd, memory.extents, punched=True))


def test_a_closed_source_gives_nothing(source: SlabSource) -> None:
    source.take(F)
    source.close()
    source.close()
    assert source.held_bytes == 0
    with pytest.raises(Closed):
        source.take(F)


def test_every_slab_of_its_own_is_another_file() -> None:
    source = OwnFiles()
    one, other = source.take(F), source.take(F)
    assert not os.path.samestat(os.fstat(one.fd), os.fstat(other.fd))
    source.close()


def test_the_arena_hands_the_same_frames_to_the_next_lease_without_the_old_data() -> None:
    arena = Arena(SIZE)
    memory = arena.take(5 * F)
    fill(memory)
    arena.recycle(memory)
    again = arena.take(5 * F)
    assert again.extents == memory.extents
    assert contents(again) == bytes(5 * F)
    arena.close()


def test_the_arena_ends_where_it_ends() -> None:
    arena = Arena(SIZE)
    memory = arena.take(SIZE - F)
    with pytest.raises(OutOfMemory):
        arena.take(2 * F)
    assert arena.free_bytes == F
    arena.recycle(memory)
    assert arena.free_bytes == SIZE
    arena.close()


@pytest.mark.parametrize("size", [0, -F, 100, F + 1])
def test_an_arena_is_made_of_whole_frames(size: int) -> None:
    with pytest.raises(BadBuffer):
        Arena(size)
