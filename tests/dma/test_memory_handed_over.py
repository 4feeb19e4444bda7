# SPDX-License-Identifier: Apache-2.0
"""Memory that a predecessor gave out is the successor's to take back, and nobody's to give out."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator

import pytest

from holdfast.dma.slab import Arena, OwnFiles, SlabMemory, SlabSource
from holdfast.errors import BadBuffer, HoldfastError, OutOfMemory, ProtocolError, UsageError
from holdfast.kernel import memfd
from holdfast.values import Handover

F = 4096
SIZE = 16 * F


@pytest.fixture(autouse=True)
def no_leaks() -> Iterator[None]:
    before = len(os.listdir("/proc/self/fd"))
    yield
    assert len(os.listdir("/proc/self/fd")) == before


def handed(handover: Handover) -> Handover:
    """What an anchor would give a successor: duplicates, and notes that went through JSON."""
    fds = {name: os.dup(fd) for name, fd in handover.fds.items()}
    return Handover(fds, json.loads(json.dumps(dict(handover.notes))))


def write(memory: SlabMemory, value: int) -> None:
    for offset, size in memory.extents:
        os.pwrite(memory.fd, bytes([value]) * size, offset)


def content(memory: SlabMemory) -> set[int]:
    return set(b"".join(os.pread(memory.fd, size, offset) for offset, size in memory.extents))


@pytest.fixture(params=["files", "arena"])
def pair(request: pytest.FixtureRequest) -> Iterator[tuple[SlabSource, SlabSource]]:
    before: SlabSource
    after: SlabSource
    if request.param == "files":
        before, after = OwnFiles(), OwnFiles()
    else:
        before = Arena(SIZE)
        after = Arena.resume(os.dup(before.fd), SIZE)
    yield before, after
    before.close()
    after.close()


def test_adopted_memory_has_its_contents_and_counts_as_given_out(
    pair: tuple[SlabSource, SlabSource],
) -> None:
    before, after = pair
    before.take(F)
    old = before.take(3 * F)
    write(old, 7)
    new = after.adopt(handed(before.describe(old)))
    assert (new.extents, new.size, new.addresses) == (old.extents, 3 * F, None)
    assert content(new) == {7}
    assert after.held_bytes == 3 * F
    assert after.leftovers() == []
    after.punch(new)
    assert content(old) == {0}
    after.recycle(new)
    assert after.held_bytes == 0
    with pytest.raises(UsageError):
        after.recycle(new)


def test_only_what_is_given_out_can_be_described(pair: tuple[SlabSource, SlabSource]) -> None:
    before, after = pair
    old = before.take(F)
    with pytest.raises(UsageError):
        after.describe(old)
    before.recycle(old)
    with pytest.raises(UsageError):
        before.describe(old)


def test_what_was_adopted_can_be_described_for_the_next_one(
    pair: tuple[SlabSource, SlabSource],
) -> None:
    before, after = pair
    first = before.describe(before.take(2 * F))
    second = after.describe(after.adopt(handed(first)))
    assert second.notes == first.notes
    assert second.fds.keys() == first.fds.keys()


@pytest.mark.parametrize(
    "notes",
    [
        {},
        {"memory": "physical"},
        {"memory": "file"},
        {"memory": "file", "size": "many"},
        {"memory": "file", "size": -1},
        {"memory": "file", "size": 2 * F},
    ],
)
def test_what_is_no_file_of_this_size_is_refused_and_closed(notes: dict[str, object]) -> None:
    source = OwnFiles()
    fd = memfd.create("slab", F)
    with pytest.raises(HoldfastError):
        source.adopt(Handover({"slab": fd, "more": os.dup(fd)}, notes))
    with pytest.raises(ProtocolError):
        source.adopt(Handover({}, {"memory": "file", "size": F}))
    assert source.held_bytes == 0
    source.close()


def test_a_file_that_could_shrink_is_not_adopted() -> None:
    source = OwnFiles()
    fd = os.memfd_create("slab", os.MFD_CLOEXEC)
    os.ftruncate(fd, F)
    with pytest.raises(BadBuffer):
        source.adopt(Handover({"slab": fd}, {"memory": "file", "size": F}))
    source.close()


@pytest.mark.parametrize(
    "extents", [[], [0], [F, F], [0, F, 0, F], [0, SIZE + F], [1, F], [0, 17], "all", [0, None]]
)
def test_frames_are_adopted_once_and_only_if_they_are_there(extents: object) -> None:
    arena = Arena(SIZE)
    arena.adopt(Handover({}, {"memory": "arena", "extents": [F, 2 * F]}))
    with pytest.raises((UsageError, ProtocolError)):
        arena.adopt(Handover({}, {"memory": "arena", "extents": extents}))
    assert (arena.held_bytes, arena.free_bytes) == (2 * F, SIZE - 2 * F)
    arena.close()


def test_frames_that_nobody_adopts_are_free_and_no_others() -> None:
    before = Arena(SIZE)
    slabs = [before.take(2 * F) for _ in range(7)]
    before.recycle(slabs[2])
    after = Arena.resume(os.dup(before.fd), SIZE)
    kept = [after.adopt(handed(before.describe(slabs[number]))) for number in (6, 0, 3)]
    assert after.free_bytes == SIZE - 6 * F
    free = after.take(SIZE - 6 * F)
    held = {
        at
        for one in [*kept, free]
        for start, size in one.extents
        for at in range(start, start + size, F)
    }
    assert held == set(range(0, SIZE, F))
    with pytest.raises(OutOfMemory):
        after.take(1)
    with pytest.raises(UsageError):
        after.adopt(handed(before.describe(slabs[1])))
    after.recycle(kept[1])
    assert after.take(2 * F).extents == slabs[0].extents
    before.close()
    after.close()


def test_an_arena_is_resumed_only_with_a_file_of_its_size() -> None:
    for size, fd in ((2 * SIZE, memfd.create("arena", SIZE)), (F + 1, memfd.create("arena", SIZE))):
        with pytest.raises(BadBuffer):
            Arena.resume(fd, size)
