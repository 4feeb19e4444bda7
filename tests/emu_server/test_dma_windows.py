# SPDX-License-Identifier: Apache-2.0
"""DMA windows: what may be reached, how, and that the fast ways do what the slow one does."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from holdfast.emu.port import Bytes, U64s
from holdfast.emu.windows import Windows
from holdfast.emu.windows_open import Direct, File
from holdfast.errors import BadTransfer, DmaFault
from holdfast.kernel import memfd
from holdfast.values import Perm

PAGE = 4096
BASE = 0x10_0000


class FakeClient:
    """Client memory by message; can hold an answer back."""

    def __init__(self, size: int, chunk: int = 1000) -> None:
        self.memory = bytearray(size)
        self.chunk = chunk
        self.sizes: list[int] = []
        self.hold: Callable[[], None] = lambda: None
        self.refuse = 0

    def fetch(self, iova: int, into: memoryview) -> None:
        self._seen(len(into))
        into[:] = self.memory[iova - BASE : iova - BASE + len(into)]

    def store(self, iova: int, data: memoryview) -> None:
        self._seen(len(data))
        self.memory[iova - BASE : iova - BASE + len(data)] = data

    def _seen(self, count: int) -> None:
        assert count <= self.chunk
        self.sizes.append(count)
        self.hold()
        if self.refuse:
            raise OSError(self.refuse, "refused")


@pytest.fixture
def sealed(clean: None) -> Iterator[int]:
    fd = memfd.create("windows", 64 * PAGE)
    yield fd
    os.close(fd)


@pytest.fixture
def windows(clean: None) -> Iterator[Windows]:
    windows = Windows()
    yield windows
    windows.unmap_all()


def ramp(count: int, seed: int = 0) -> Bytes:
    return ((np.arange(count) * 7 + seed) % 251).astype(np.uint8)


def u64(*values: int) -> U64s:
    return np.array(values, np.uint64)


def contents(fd: int, offset: int, size: int) -> bytes:
    return os.pread(fd, size, offset)


# -- ways to the memory --------------------------------------------------------------------------


def test_a_sealed_file_is_mapped_and_its_descriptor_not_kept(windows: Windows, sealed: int) -> None:
    before = len(os.listdir("/proc/self/fd"))
    windows.map(BASE, PAGE, Perm.RW, os.dup(sealed), PAGE)
    assert len(os.listdir("/proc/self/fd")) == before
    assert isinstance(windows.windows[0].memory, Direct)
    windows.write(BASE + 5, ramp(100))
    assert contents(sealed, PAGE + 5, 100) == ramp(100).tobytes()
    back = np.zeros(100, np.uint8)
    windows.read(BASE + 5, back)
    assert np.array_equal(back, ramp(100))


@pytest.mark.parametrize("offset", [1, 100, PAGE + 1, 3 * PAGE - 1])
def test_file_offsets_need_not_be_aligned(windows: Windows, sealed: int, offset: int) -> None:
    windows.map(BASE, 5000, Perm.RW, os.dup(sealed), offset)
    windows.write(BASE, ramp(5000))
    assert contents(sealed, offset, 5000) == ramp(5000).tobytes()


def test_a_file_that_could_shrink_is_not_mapped(windows: Windows, tmp_path: Path) -> None:
    path = tmp_path / "plain"
    path.write_bytes(bytes(2 * PAGE))
    fd = os.open(path, os.O_RDWR)
    windows.map(BASE, 2 * PAGE, Perm.RW, os.dup(fd), 0)
    assert isinstance(windows.windows[0].memory, File)
    windows.write(BASE + 10, ramp(20))
    assert path.read_bytes()[10:30] == ramp(20).tobytes()
    os.truncate(path, 0)  # would be SIGBUS through a mapping
    with pytest.raises(DmaFault, match="cut short"):
        windows.read(BASE, np.zeros(8, np.uint8))
    os.close(fd)


def test_file_access_can_be_asked_for(windows: Windows, sealed: int) -> None:
    windows.map(BASE, PAGE, Perm.RW, os.dup(sealed), 0, file_io=True)
    assert isinstance(windows.windows[0].memory, File)


def test_what_is_no_file_is_reached_by_message(clean: None) -> None:
    client = FakeClient(PAGE)
    windows = Windows(client)
    reading, writing = os.pipe()
    windows.map(BASE, PAGE, Perm.RW, reading, 0)
    os.close(writing)
    windows.write(BASE, ramp(10))
    assert client.memory[:10] == ramp(10).tobytes()
    windows.unmap_all()


def test_refused_maps_close_their_descriptor_and_change_nothing(
    windows: Windows, sealed: int, tmp_path: Path
) -> None:
    read_only = tmp_path / "read-only"
    read_only.write_bytes(bytes(PAGE))
    windows.map(BASE, PAGE, Perm.RW, os.dup(sealed), 0)
    before = len(os.listdir("/proc/self/fd"))

    def refused(expected: int, fd: int, iova: int, size: int, offset: int = 0) -> None:
        with pytest.raises(OSError, match=r".") as caught:
            windows.map(iova, size, Perm.RW, fd, offset)
        assert caught.value.errno == expected

    refused(errno.EEXIST, os.dup(sealed), BASE, PAGE)
    refused(errno.EEXIST, os.dup(sealed), BASE + PAGE - 1, PAGE)
    refused(errno.EEXIST, os.dup(sealed), BASE - PAGE + 1, PAGE)
    refused(errno.EINVAL, os.dup(sealed), 0, 0)
    refused(errno.EINVAL, os.dup(sealed), (1 << 64) - PAGE, 2 * PAGE)
    refused(errno.EINVAL, os.dup(sealed), 0, PAGE, 64 * PAGE)
    refused(errno.EINVAL, os.dup(sealed), 0, 65 * PAGE)
    refused(errno.EACCES, os.open(read_only, os.O_RDONLY), 0, PAGE)
    assert len(os.listdir("/proc/self/fd")) == before
    assert len(windows.windows) == 1


def test_a_window_may_end_at_the_last_address(windows: Windows, sealed: int) -> None:
    top = (1 << 64) - PAGE
    windows.map(top, PAGE, Perm.RW, os.dup(sealed), 0)
    windows.write(top + PAGE - 4, ramp(4))
    assert contents(sealed, PAGE - 4, 4) == ramp(4).tobytes()
    with pytest.raises(DmaFault):
        windows.write(top + PAGE - 4, ramp(5))


# -- permission and range ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("iova", "size"),
    [
        (BASE - 1, 2),
        (BASE + PAGE - 1, 2),
        (BASE - PAGE, PAGE + 1),
        (0, 1),
        (-1, 1),
        ((1 << 64) - 1, 2),
        (1 << 64, 1),
    ],
)
def test_an_access_outside_all_windows_faults_and_moves_nothing(
    windows: Windows, sealed: int, iova: int, size: int
) -> None:
    windows.map(BASE, PAGE, Perm.RW, os.dup(sealed), 0)
    with pytest.raises(DmaFault):
        windows.write(iova, ramp(size) + np.uint8(1))
    local = np.full(size, 9, np.uint8)
    with pytest.raises(DmaFault):
        windows.read(iova, local)
    assert (local == 9).all()
    assert contents(sealed, 0, PAGE) == bytes(PAGE)
    assert windows.faults == 2
    assert [fault.write for fault in windows.recent] == [True, False]


def test_an_access_against_the_permission_faults(windows: Windows, sealed: int) -> None:
    windows.map(BASE, PAGE, Perm.READ, os.dup(sealed), 0)
    windows.map(BASE + PAGE, PAGE, Perm.WRITE, os.dup(sealed), PAGE)
    with pytest.raises(DmaFault, match="permission"):
        windows.write(BASE, ramp(1))
    with pytest.raises(DmaFault, match="permission"):
        windows.read(BASE + PAGE, np.zeros(1, np.uint8))
    one = u64(BASE)
    assert windows.write_many(one, ramp(8), u64(0), u64(8)) == 0
    assert windows.faults == 3


def test_an_access_runs_through_adjacent_windows_or_not_at_all(
    windows: Windows, sealed: int
) -> None:
    windows.map(BASE, PAGE, Perm.RW, os.dup(sealed), 8 * PAGE)
    windows.map(BASE + PAGE, PAGE, Perm.RW, os.dup(sealed), 0)
    windows.write(BASE + PAGE - 10, ramp(20))
    assert contents(sealed, 9 * PAGE - 10, 10) == ramp(20)[:10].tobytes()
    assert contents(sealed, 0, 10) == ramp(20)[10:].tobytes()
    with pytest.raises(DmaFault):
        windows.write(BASE, np.ones(2 * PAGE + 1, np.uint8))
    assert contents(sealed, 8 * PAGE, 8) == bytes(8)
    assert windows.read_many(u64(BASE + PAGE - 4), np.zeros(8, np.uint8), u64(0), u64(8)) == 1


def test_only_the_exact_window_is_unmapped(windows: Windows, sealed: int) -> None:
    windows.map(BASE, 2 * PAGE, Perm.RW, os.dup(sealed), 0)
    for iova, size in ((BASE, PAGE), (BASE + PAGE, PAGE), (0, PAGE), (BASE, 3 * PAGE)):
        with pytest.raises(OSError, match="no window") as caught:
            windows.unmap(iova, size)
        assert caught.value.errno == errno.ENOENT
    windows.unmap(BASE, 2 * PAGE)
    assert windows.settled()
    with pytest.raises(DmaFault):
        windows.write(BASE, ramp(1))


def test_local_memory_must_be_plain_bytes_of_the_right_kind(windows: Windows, sealed: int) -> None:
    windows.map(BASE, PAGE, Perm.RW, os.dup(sealed), 0)
    fixed = ramp(8)
    fixed.flags.writeable = False
    windows.write(BASE, fixed)
    with pytest.raises(BadTransfer):
        windows.read(BASE, fixed)
    with pytest.raises(BadTransfer):
        windows.read(BASE, ramp(16)[::2])
    for offset, length in ((9, 1), (0, 9), (8, 1), ((1 << 64) - 1, 2), (1, (1 << 64) - 1)):
        with pytest.raises(BadTransfer):
            windows.write_many(u64(BASE), fixed, u64(offset), u64(length))
    with pytest.raises(BadTransfer):
        windows.write_many(u64(BASE, BASE), fixed, u64(0), u64(1))
    assert windows.write_many(u64(), fixed, u64(), u64()) == 0


# -- messages ------------------------------------------------------------------------------------


def test_message_accesses_are_split_to_the_clients_limit(clean: None) -> None:
    client = FakeClient(8 * PAGE)
    windows = Windows(client)
    windows.map(BASE, 8 * PAGE, Perm.RW)
    windows.write(BASE, ramp(2500))
    assert client.sizes == [1000, 1000, 500]
    back = np.zeros(2500, np.uint8)
    windows.read(BASE, back)
    assert np.array_equal(back, ramp(2500))


def test_a_refused_message_is_a_fault(clean: None) -> None:
    client = FakeClient(PAGE)
    client.refuse = errno.EPERM
    windows = Windows(client)
    windows.map(BASE, PAGE, Perm.RW)
    with pytest.raises(DmaFault, match="refused"):
        windows.write(BASE, ramp(1))
    assert windows.read_many(u64(BASE), ramp(8), u64(0), u64(8)) == 0
    assert windows.faults == 2


def test_a_list_may_mix_every_kind_of_window(sealed: int, tmp_path: Path) -> None:
    client = FakeClient(4 * PAGE, chunk=600)
    windows = Windows(client)
    plain = tmp_path / "plain"
    plain.write_bytes(bytes(PAGE))
    windows.map(BASE, PAGE, Perm.RW)
    windows.map(BASE + PAGE, 4 * PAGE, Perm.RW, os.dup(sealed), 0)
    windows.map(BASE + 5 * PAGE, PAGE, Perm.RW, os.open(plain, os.O_RDWR), 0)
    local = ramp(8000)
    iovas = u64(BASE + 100, BASE + PAGE, BASE + 2 * PAGE, BASE + 5 * PAGE - 50, BASE, 0, BASE)
    lengths = u64(1000, 500, 0, 100, 1, 5, 5)
    offsets = u64(0, 1000, 8000, 2000, 7999, 0, 0)
    assert windows.write_many(iovas, local, offsets, lengths) == 5
    assert windows.faults == 1
    back = np.zeros(8000, np.uint8)
    assert windows.read_many(iovas[:5], back, offsets[:5], lengths[:5]) == 5
    for start, stop in ((0, 1500), (2000, 2100), (7999, 8000)):
        assert np.array_equal(back[start:stop], local[start:stop])
    assert back[1500:2000].sum() == 0
    windows.unmap_all()


# -- unmapping under an access -------------------------------------------------------------------


class Held:
    """A message access that waits in a thread of its own until it is let go."""

    def __init__(self, client: FakeClient, access: Callable[[], None]) -> None:
        self.entered = threading.Event()
        self.go_on = threading.Event()
        self.error: BaseException | None = None
        client.hold = self._hold
        self._access = access
        self._thread = threading.Thread(target=self._run)
        self._thread.start()
        assert self.entered.wait(5)

    def _hold(self) -> None:
        self.entered.set()
        assert self.go_on.wait(5)

    def _run(self) -> None:
        try:
            self._access()
        except DmaFault as error:
            self.error = error

    def let_go(self) -> None:
        self.go_on.set()
        self._thread.join()


def test_an_unmap_waits_for_the_access_that_uses_the_window(sealed: int) -> None:
    client = FakeClient(4 * PAGE)
    told = threading.Event()
    windows = Windows(client, told.set)
    windows.map(BASE, 4 * PAGE, Perm.RW)
    windows.map(BASE + 8 * PAGE, PAGE, Perm.RW, os.dup(sealed), 0)
    held = Held(client, lambda: windows.write(BASE, ramp(3000)))
    windows.unmap(BASE + 8 * PAGE, PAGE)
    assert windows.settled(), "another window is not held up"
    windows.unmap(BASE, 4 * PAGE)
    assert not windows.settled()
    assert not told.is_set()
    held.let_go()
    assert told.wait(5)
    assert windows.settled()
    assert isinstance(held.error, DmaFault), "the next message must not be sent"
    assert client.sizes == [1000]


def test_a_fence_ends_with_the_access_in_progress(clean: None) -> None:
    client = FakeClient(4 * PAGE)
    told = threading.Event()
    windows = Windows(client, told.set)
    windows.map(BASE, PAGE, Perm.RW)
    assert windows.fence(messages=True) is None
    held = Held(client, lambda: windows.write(BASE, ramp(10)))
    assert windows.fence(messages=False) is None
    serial = windows.fence(messages=True)
    assert serial is not None
    assert not windows.passed(serial)
    held.let_go()
    assert told.wait(5)
    assert windows.passed(serial)
    assert held.error is None


def test_direct_lists_survive_a_storm_of_unmaps(sealed: int) -> None:
    """No access may reach an address that was unmapped under it: that would end the process."""
    windows = Windows()
    stop = threading.Event()
    count = 64
    iovas = np.arange(count, dtype=np.uint64) * np.uint64(PAGE) + np.uint64(BASE)
    local = ramp(count * PAGE)
    offsets = np.arange(count, dtype=np.uint64) * np.uint64(PAGE)
    lengths = np.full(count, PAGE - 3, np.uint64)

    def work() -> None:
        while not stop.is_set():
            windows.write_many(iovas, local, offsets, lengths)
            windows.read_many(iovas[::-1], local, offsets, lengths)

    thread = threading.Thread(target=work)
    thread.start()
    for round_ in range(60):
        for page in range(0, count, 8):
            windows.map(BASE + page * PAGE, 8 * PAGE, Perm.RW, os.dup(sealed), page * PAGE)
        if round_ % 2:
            windows.unmap_all()
        else:
            for page in range(0, count, 8):
                windows.unmap(BASE + page * PAGE, 8 * PAGE)
    stop.set()
    thread.join()
    assert windows.settled()


# -- lists against the plain loop ----------------------------------------------------------------


@st.composite
def lists(draw: st.DrawFn) -> tuple[list[int], list[int], list[int]]:
    """Local offsets, remote offsets, lengths inside 64 pages."""
    room = 64 * PAGE
    count = draw(st.integers(1, 200))
    seed = draw(st.integers(0, 1 << 30))
    top = draw(st.sampled_from([1, 8, 100, 5000, 20_000]))
    regular = draw(st.booleans())
    overlap = draw(st.booleans())
    random = np.random.default_rng(seed)
    if regular:
        width = int(random.integers(1, min(top, room // count) + 1))
        lengths = np.full(count, width)
    else:
        lengths = random.integers(0, top + 1, count)
    if overlap:
        remote = random.integers(0, room - lengths)
    else:
        lengths = np.minimum(lengths, room // count)
        remote = random.permutation(count) * (room // count)
    local = np.concatenate(([0], np.cumsum(lengths)[:-1]))
    if local[-1] + lengths[-1] > room:
        local = random.integers(0, room - lengths)
    return local.tolist(), remote.tolist(), lengths.tolist()


@settings(max_examples=150, deadline=None)
@given(lists())
def test_lists_end_as_if_done_one_by_one(
    entries: tuple[list[int], list[int], list[int]],
) -> None:
    local_at, remote_at, lengths = entries
    room = 64 * PAGE
    fd = memfd.create("list", room)
    windows = Windows()
    try:
        windows.map(BASE, room, Perm.RW, fd, 0)
        memory = windows.windows[0].memory
        assert isinstance(memory, Direct)
        memory.bytes[:] = ramp(room, 3)
        local = ramp(room, 90)
        expected_remote, expected_local = memory.bytes.copy(), local.copy()
        for near, far, count in zip(local_at, remote_at, lengths, strict=True):
            expected_remote[far : far + count] = local[near : near + count]
        iovas = np.array(remote_at, np.uint64) + np.uint64(BASE)
        arguments = np.array(local_at, np.uint64), np.array(lengths, np.uint64)
        assert windows.write_many(iovas, local, *arguments) == len(lengths)
        assert np.array_equal(memory.bytes, expected_remote)
        for near, far, count in zip(local_at, remote_at, lengths, strict=True):
            expected_local[near : near + count] = expected_remote[far : far + count]
        assert windows.read_many(iovas, local, *arguments) == len(lengths)
        assert np.array_equal(local, expected_local)
        del memory
    finally:
        windows.unmap_all()


def test_one_byte_behind_two_addresses_is_written_in_order(windows: Windows, sealed: int) -> None:
    windows.map(BASE, 64 * PAGE, Perm.RW, os.dup(sealed), 0)
    windows.map(BASE * 4, 64 * PAGE, Perm.RW, os.dup(sealed), 0)
    count = 100
    iovas = np.full(count, BASE, np.uint64)
    iovas[1::2] = BASE * 4
    lengths = np.arange(count, 0, -1).astype(np.uint64) * np.uint64(16)
    local = np.repeat(np.arange(count).astype(np.uint8), 1600)
    offsets = np.arange(count).astype(np.uint64) * np.uint64(1600)
    assert windows.write_many(iovas, local, offsets, lengths) == count
    assert contents(sealed, 0, 16) == bytes([99]) * 16
    assert contents(sealed, 16, 16) == bytes([98]) * 16
