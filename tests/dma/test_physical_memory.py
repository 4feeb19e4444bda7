# SPDX-License-Identifier: Apache-2.0
"""Memory at fixed physical addresses: pinned, named, found again. On tmpfs, in pages of 4 KiB.

tmpfs stands for hugetlbfs: its files are named, pinned and punched alike. What is special to huge
pages is tested in the lab.
"""

from __future__ import annotations

import gc
import mmap
import os
import signal
import struct
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast.dma.physical import PhysicalFiles
from holdfast.dma.physical_slab import coalesced
from holdfast.dma.slab import SlabMemory, SlabSource
from holdfast.errors import (
    BadBuffer,
    Closed,
    HoldfastError,
    NoPermission,
    NotSupported,
    OutOfMemory,
    UsageError,
)
from holdfast.kernel import memfd, pagemap
from holdfast.kernel.mapping import Mapping
from holdfast.values import Bdf

PAGE = 4096
BDF = Bdf.parse("0000:00:03.0")
OTHER = Bdf.parse("0000:00:04.0")

Make = Callable[..., PhysicalFiles]


@pytest.fixture
def directory() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="holdfast-", dir="/dev/shm") as name:
        yield Path(name)


@pytest.fixture
def make(directory: Path) -> Iterator[Make]:
    """``make(bdf)``: a source that is closed after the test. Skips where pins cannot be taken."""
    made: list[PhysicalFiles] = []

    def one(bdf: Bdf = BDF, *, dma_bits: int = 64, boot: str | None = None) -> PhysicalFiles:
        made.append(PhysicalFiles(directory, bdf, dma_bits=dma_bits, boot=boot))
        return made[-1]

    before = len(os.listdir("/proc/self/fd"))
    try:
        source = one(OTHER)
        source.recycle(source.take(1))
    except (NoPermission, NotSupported) as error:
        for source in made:
            source.close()
        pytest.skip(error.what)
    yield one
    for source in made:
        source.close()
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == before


def fill(memory: SlabMemory, value: int) -> None:
    with mmap.mmap(memory.fd, memory.size) as view:
        view[:] = bytes([value]) * memory.size


def content(fd: int, size: int) -> set[int]:
    with mmap.mmap(fd, size) as view:
        return set(view[:])


def frames(memory: SlabMemory) -> set[int]:
    assert memory.addresses is not None
    return {
        address + step
        for address, (_, size) in zip(memory.addresses, memory.extents, strict=True)
        for step in range(0, size, PAGE)
    }


def test_memory_is_whole_pages_at_the_addresses_that_the_kernel_shows(make: Make) -> None:
    source: SlabSource = make()
    memory = source.take(5 * PAGE + 1)
    assert memory.size == source.held_bytes == 6 * PAGE
    assert memory.extents[0][0] == 0
    mapping = Mapping(memory.fd, memory.size)
    assert not mapping.array.any()
    mapping.array[:] = 1
    assert set(pagemap.physical(mapping.address, memory.size).tolist()) == frames(memory)
    mapping.close()
    source.recycle(memory)
    assert source.held_bytes == 0


@given(st.lists(st.integers(0, 30), min_size=1, max_size=60))
def test_neighbours_in_file_and_memory_share_an_extent(numbers: list[int]) -> None:
    where = np.array(numbers, np.uint64) * np.uint64(PAGE)
    extents, addresses = coalesced(where, PAGE)
    assert len(extents) == len(addresses)
    pages = [
        (offset + step, address + step)
        for (offset, size), address in zip(extents, addresses, strict=True)
        for step in range(0, size, PAGE)
    ]
    assert pages == [(i * PAGE, n * PAGE) for i, n in enumerate(numbers)]
    joints = [a + s for (_, s), a in zip(extents, addresses, strict=True)]
    assert all(end != start for end, start in zip(joints, addresses[1:], strict=False))


def test_punch_and_truncate_by_a_holder_leave_the_frames_and_this_process_alone(
    make: Make,
) -> None:
    source = make()
    memory = source.take(16 * PAGE)
    held = frames(memory)
    fill(memory, 0x5A)
    memfd.punch(memory.fd, 0, 8 * PAGE)
    os.ftruncate(memory.fd, 0)
    os.ftruncate(memory.fd, 64 * PAGE)
    assert source.pinned_bytes == 16 * PAGE
    others = [source.take(256 * PAGE) for _ in range(4)]
    assert not held & set().union(*map(frames, others))
    source.recycle(memory)
    for other in others:
        source.recycle(other)
    assert source.pinned_bytes == 0


def test_punched_memory_is_unpinned_empty_and_still_taken(make: Make, directory: Path) -> None:
    source = make()
    memory = source.take(4 * PAGE)
    fill(memory, 7)
    source.punch(memory)
    assert memory.punched
    assert source.pinned_bytes == 0
    assert source.held_bytes == 4 * PAGE
    assert memfd.allocated(memory.fd) == 0
    assert len(os.listdir(directory)) == 1
    source.recycle(memory)
    assert not os.listdir(directory)
    with pytest.raises(UsageError):
        source.recycle(memory)
    with pytest.raises(UsageError):
        source.punch(memory)


def test_memory_out_of_reach_is_refused_and_nothing_is_left(make: Make, directory: Path) -> None:
    source = make(dma_bits=16)
    with pytest.raises(OutOfMemory, match=r"dma_bits=16.*dma_mask"):
        source.take(PAGE)
    assert source.held_bytes == source.pinned_bytes == 0
    assert not os.listdir(directory)
    source.dma_bits = 52
    source.recycle(source.take(PAGE))


@pytest.mark.parametrize("size", [0, -1, 1 << 60])
def test_a_size_that_nothing_has_is_refused(make: Make, directory: Path, size: int) -> None:
    with pytest.raises(BadBuffer):
        make().take(size)
    assert not os.listdir(directory)


def test_names_tell_boot_function_and_number(make: Make, directory: Path) -> None:
    source = make(boot="a" * 32)
    taken = [source.take(PAGE) for _ in range(2)]
    assert sorted(os.listdir(directory)) == [f"holdfast-{'a' * 32}-{BDF}-{i}" for i in (1, 2)]
    for memory in taken:
        source.recycle(memory)


def test_what_a_closed_source_had_given_out_keeps_its_file(make: Make, directory: Path) -> None:
    source = make()
    memory, gone = source.take(3 * PAGE), source.take(PAGE)
    fill(memory, 9)
    source.recycle(gone)
    source.close()
    source.close()
    for call in (lambda: source.take(PAGE), source.leftovers):
        with pytest.raises(Closed):
            call()
    for late in (source.punch, source.recycle):
        with pytest.raises(UsageError):
            late(memory)
    successor = make()
    (left,) = successor.leftovers()
    assert content(left.fd, 3 * PAGE) == {9}
    assert successor.held_bytes == successor.pinned_bytes == 3 * PAGE
    assert successor.leftovers() == [left]
    fresh = successor.take(PAGE)
    assert len(os.listdir(directory)) == 2
    successor.recycle(left)
    assert successor.leftovers() == []
    successor.recycle(fresh)
    assert not os.listdir(directory)


def test_a_killed_keepers_memory_is_found_at_the_same_addresses(
    make: Make, directory: Path
) -> None:
    readable, writable = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            memory = PhysicalFiles(directory, BDF).take(8 * PAGE)
            fill(memory, 3)
            os.write(writable, struct.pack("<8Q", *sorted(frames(memory))))
            signal.pause()
        finally:
            os._exit(1)
    os.close(writable)
    told = os.read(readable, 64)
    os.close(readable)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    source = make()
    (left,) = source.leftovers()
    assert sorted(frames(left)) == list(struct.unpack("<8Q", told))
    assert content(left.fd, 8 * PAGE) == {3}
    source.recycle(left)


def test_only_this_functions_files_of_this_boot_are_taken(make: Make, directory: Path) -> None:
    other = make(OTHER)
    theirs = other.take(PAGE)
    strangers = ["holdfast", "note.txt", f"holdfast-{'0' * 31}-{BDF}-1", f"holdfast-{'0' * 32}-x-1"]
    for name in strangers:
        (directory / name).write_text("x")
    (directory / f"holdfast-{'0' * 32}-{BDF}-5").write_text("of another boot")
    assert make().leftovers() == []
    assert sorted(os.listdir(directory)) == sorted(
        [*strangers, *(name for name in os.listdir(directory) if str(OTHER) in name)]
    )
    other.recycle(theirs)


def test_leftovers_that_were_cut_or_punched_are_held_as_they_are(
    make: Make, directory: Path
) -> None:
    source = make()
    for memory in [source.take(4 * PAGE) for _ in range(3)]:
        fill(memory, 1)
    source.close()
    punched, cut, grown = sorted(directory.iterdir())
    with punched.open("r+b") as file:
        memfd.punch(file.fileno(), PAGE, PAGE)
    os.truncate(cut, 0)
    os.truncate(grown, 1 << 40)
    successor = make()
    left = successor.leftovers()
    assert [memory.size for memory in left] == [3 * PAGE, 4 * PAGE]
    assert [memory.addresses for memory in left] == [None, None]
    assert not cut.exists()
    assert memfd.allocated(left[0].fd) == 3 * PAGE, "looking at it allocated nothing"
    for memory in left:
        successor.recycle(memory)
    assert not os.listdir(directory)


def test_a_name_that_leads_elsewhere_is_not_followed(make: Make, directory: Path) -> None:
    source = make(boot="b" * 32)
    (directory / "target").write_text("x" * PAGE)
    (directory / f"holdfast-{'b' * 32}-{BDF}-1").symlink_to(directory / "target")
    with pytest.raises(HoldfastError):
        source.leftovers()
    assert (directory / "target").read_text() == "x" * PAGE


def test_a_pin_that_fails_leaves_nothing_behind(
    make: Make, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = make()

    def no_address(address: int, nbytes: int, page: int) -> None:
        raise NoPermission("hidden")

    with monkeypatch.context() as patch:
        patch.setattr(pagemap, "physical", no_address)
        with pytest.raises(NoPermission):
            source.take(PAGE)
    assert source.held_bytes == source.pinned_bytes == 0
    assert not os.listdir(directory)
    with closing(make(boot="c" * 32)) as other:
        other.take(PAGE)
    with monkeypatch.context() as patch:
        patch.setattr(pagemap, "physical", no_address)
        successor = make(boot="c" * 32)
        with pytest.raises(NoPermission):
            successor.leftovers()
        assert successor.held_bytes == successor.pinned_bytes == 0
    assert len(os.listdir(directory)) == 1, "what cannot be pinned keeps its name"
    (left,) = successor.leftovers()
    successor.recycle(left)


def test_a_source_that_is_closed_under_a_request_leaves_nothing(
    make: Make, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = make()
    real = pagemap.physical

    def slow(address: int, nbytes: int, page: int) -> object:
        found = real(address, nbytes, page)
        source.close()
        return found

    with monkeypatch.context() as patch:
        patch.setattr(pagemap, "physical", slow)
        with pytest.raises(Closed):
            source.take(2 * PAGE)
    assert not os.listdir(directory)
