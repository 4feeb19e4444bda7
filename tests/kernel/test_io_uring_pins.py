# SPDX-License-Identifier: Apache-2.0
"""Pins by registered buffers: they keep the frame, each can be dropped alone, limits are named."""

from __future__ import annotations

import errno
import os
import resource
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from holdfast.errors import (
    BadBuffer,
    Closed,
    HoldfastError,
    NoPermission,
    NotSupported,
    OutOfMemory,
    ResourceError,
    SystemFailure,
    UsageError,
)
from holdfast.kernel import io_uring, libc, limits, memfd, pagemap, procfs
from holdfast.kernel.io_uring import LARGEST_PIN, PinTable
from holdfast.kernel.mapping import Mapping
from holdfast.uapi import io_uring as u

PAGE = 4096
SIZE = 16 * PAGE


@pytest.fixture
def pins() -> Iterator[PinTable]:
    try:
        table = PinTable(4)
    except (NoPermission, NotSupported) as error:
        pytest.skip(f"no io_uring here: {error.what}")
    with closing(table):
        yield table


@pytest.fixture
def memory() -> Iterator[int]:
    """A file of ``SIZE`` bytes."""
    fd = memfd.create("pinned", SIZE)
    yield fd
    os.close(fd)


def frames(mapping: Mapping) -> list[int]:
    """Where the pages are; skips where the kernel does not say."""
    try:
        return [int(at) for at in pagemap.physical(mapping.address, mapping.size)]
    except NoPermission as error:
        pytest.skip(error.what)


def fill(mapping: Mapping, value: int) -> None:
    mapping.array[:] = value


def pinned_total() -> int:
    """Pages of this process that are pinned, as the kernel counts them (VmPin)."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(status.partition("VmPin:")[2].split()[0]) * 1024 // PAGE


def taken_by_others(pages: int) -> tuple[Mapping, set[int]]:
    """Fresh memory of somebody else, and where it is."""
    fd = memfd.create("other", pages * PAGE)
    mapping = Mapping(fd, pages * PAGE)
    os.close(fd)
    fill(mapping, 0xFF)
    return mapping, set(frames(mapping))


def test_a_pinned_frame_is_given_to_nobody_when_the_file_is_punched(
    pins: PinTable, memory: int
) -> None:
    mapping = Mapping(memory, SIZE)
    slot = pins.pin(mapping.address, SIZE)
    before = frames(mapping)
    memfd.punch(memory, 0, SIZE)
    fill(mapping, 1)  # the file gets fresh pages ...
    assert not set(before) & set(frames(mapping))
    other, where = taken_by_others(2048)
    assert not set(before) & where  # ... and nobody else gets the old ones
    pins.unpin(slot)
    other.close()
    mapping.close()


def test_without_a_pin_a_punch_gives_the_frames_back(memory: int) -> None:
    """The negative control. Which process is next is up to the kernel, so try more than once."""
    for _ in range(20):
        mapping = Mapping(memory, SIZE)
        fill(mapping, 1)
        before = frames(mapping)
        memfd.punch(memory, 0, SIZE)
        fill(mapping, 2)
        other, where = taken_by_others(4096)
        if set(before) & (where | set(frames(mapping))):
            return
        other.close()
        mapping.close()
    pytest.fail("no frame was ever seen again")


def test_pins_are_dropped_one_by_one_and_slots_used_again(pins: PinTable, memory: int) -> None:
    mapping = Mapping(memory, SIZE)
    idle = pinned_total()
    slots = [pins.pin(mapping.address + i * PAGE, PAGE) for i in range(4)]
    assert sorted(slots) == [0, 1, 2, 3]
    assert pinned_total() == idle + 4
    with pytest.raises(ResourceError, match="all 4 slots"):
        pins.pin(mapping.address, PAGE)
    pins.unpin(slots[2])
    assert pinned_total() == idle + 3
    with pytest.raises(UsageError, match="is empty"):
        pins.unpin(slots[2])
    assert pins.pin(mapping.address, 2 * PAGE) == slots[2]
    assert pinned_total() == idle + 5
    pins.close()
    assert pinned_total() == idle
    pins.close()
    with pytest.raises(Closed):
        pins.pin(mapping.address, PAGE)
    with pytest.raises(Closed):
        pins.unpin(0)


def test_what_cannot_be_pinned_is_refused_and_takes_no_slot(pins: PinTable, memory: int) -> None:
    with pytest.raises(BadBuffer):
        pins.pin(PAGE, PAGE)
    for size in (0, -1, LARGEST_PIN + 1):
        with pytest.raises(BadBuffer, match="one pin has"):
            pins.pin(PAGE, size)
    read_only = Mapping(memory, SIZE, writable=False)
    with pytest.raises(BadBuffer):
        pins.pin(read_only.address, PAGE)
    assert pins.pinned_bytes == 0
    mapping = Mapping(memory, SIZE)
    assert {pins.pin(mapping.address, PAGE) for _ in range(4)} == {0, 1, 2, 3}


def rings() -> list[int]:
    """Descriptors of this process that are io_urings."""
    links = procfs.open_descriptors(os.getpid())
    return [fd for fd, link in links.items() if link == "anon_inode:[io_uring]"]


def test_the_ring_is_close_on_exec_and_goes_with_the_table(pins: PinTable) -> None:
    (fd,) = rings()
    assert not os.get_inheritable(fd)
    pins.close()
    assert not rings()


@pytest.mark.parametrize("slots", [0, -1, u.MAX_REG_BUFFERS + 1])
def test_a_table_has_a_sensible_number_of_slots(slots: int) -> None:
    with pytest.raises(UsageError):
        PinTable(slots)


# -- refusals of the kernel ------------------------------------------------------------


def refuse(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def setup(entries: int, params: bytearray) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(libc, "io_uring_setup", setup)


@pytest.mark.parametrize(("value", "hint"), [("2", "kernel.io_uring_disabled=0"), ("0", "seccomp")])
def test_a_machine_without_io_uring_says_which_switch(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, value: str, hint: str
) -> None:
    switch = tmp_path / "io_uring_disabled"
    switch.write_text(value)
    monkeypatch.setattr(io_uring, "_SWITCH", switch)
    refuse(monkeypatch, errno.EPERM)
    with pytest.raises(NoPermission) as caught:
        PinTable()
    assert hint in caught.value.hint


def test_a_kernel_without_io_uring_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    refuse(monkeypatch, errno.ENOSYS)
    with pytest.raises(NotSupported, match="CONFIG_IO_URING"):
        PinTable()


@pytest.mark.parametrize(
    ("number", "kind"),
    [(errno.EINVAL, NotSupported), (errno.ENOMEM, OutOfMemory), (errno.EIO, SystemFailure)],
)
def test_a_table_that_is_refused_leaves_no_descriptor(
    monkeypatch: pytest.MonkeyPatch, number: int, kind: type[HoldfastError]
) -> None:
    opened = []

    def setup(entries: int, params: bytearray) -> int:
        opened.append(os.open("/dev/null", os.O_RDONLY))
        return opened[0]

    def register(fd: int, operation: int, argument: bytearray | None, count: int) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(libc, "io_uring_setup", setup)
    monkeypatch.setattr(libc, "io_uring_register", register)
    with pytest.raises(kind):
        PinTable()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(opened[0])


def test_an_update_that_does_nothing_is_a_failure(
    monkeypatch: pytest.MonkeyPatch, pins: PinTable
) -> None:
    real = libc.io_uring_register

    def register(fd: int, operation: int, argument: bytearray | None, count: int) -> int:
        if operation == u.REGISTER_BUFFERS_UPDATE:
            return 0
        return real(fd, operation, argument, count)

    with monkeypatch.context() as patch:
        patch.setattr(libc, "io_uring_register", register)
        with pytest.raises(SystemFailure, match="0 of 1"):
            pins.pin(PAGE, PAGE)
    assert pins.pinned_bytes == 0


def test_the_memlock_limit_is_named_before_the_kernel_is_asked(
    monkeypatch: pytest.MonkeyPatch, pins: PinTable
) -> None:
    """What root may is another matter: see ``kernel.limits``."""

    def limit(kind: int) -> tuple[int, int]:
        assert kind == resource.RLIMIT_MEMLOCK
        return PAGE, PAGE

    monkeypatch.setattr(resource, "getrlimit", limit)
    monkeypatch.setattr("holdfast.kernel.limits.exempt", lambda: False)
    limits._exempt_as.cache_clear()
    try:
        with pytest.raises(OutOfMemory, match="RLIMIT_MEMLOCK is 4096"):
            pins.pin(PAGE, 2 * PAGE)
    finally:
        limits._exempt_as.cache_clear()
