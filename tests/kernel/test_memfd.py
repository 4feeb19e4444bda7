# SPDX-License-Identifier: Apache-2.0
"""Memory files keep their size, and give their pages back when told to."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import resource
from collections.abc import Iterator
from pathlib import Path

import pytest

from holdfast.errors import BadBuffer, SystemFailure
from holdfast.kernel import memfd

SIZE = 64 * 1024


@pytest.fixture
def file() -> Iterator[int]:
    fd = memfd.create("test-memfd", SIZE)
    yield fd
    os.close(fd)


def test_a_new_file_has_its_size_and_no_pages(file: int) -> None:
    assert os.fstat(file).st_size == SIZE
    assert memfd.allocated(file) == 0
    assert not os.get_inheritable(file)


@pytest.mark.parametrize("size", [SIZE - 4096, SIZE + 4096])
def test_the_size_cannot_be_changed(file: int, size: int) -> None:
    with pytest.raises(PermissionError):
        os.ftruncate(file, size)


def test_no_seal_can_be_added_that_would_stop_writing(file: int) -> None:
    with pytest.raises(PermissionError):
        fcntl.fcntl(file, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)


def test_a_hole_gives_the_pages_back_and_reads_as_zero(file: int) -> None:
    os.pwrite(file, b"\xaa" * SIZE, 0)
    assert memfd.allocated(file) == SIZE
    with mmap.mmap(file, SIZE) as window:
        memfd.punch(file, 4096, 8192)
        assert memfd.allocated(file) == SIZE - 8192
        assert window[4096:12288] == bytes(8192)
        assert window[4095] == window[12288] == 0xAA
    assert os.fstat(file).st_size == SIZE


def test_a_hole_in_something_else_than_a_file_says_which_errno() -> None:
    reader, writer = os.pipe()
    try:
        with pytest.raises(SystemFailure) as caught:
            memfd.punch(writer, 0, 4096)
        assert caught.value.errno
        assert caught.value.operation == "punch"
    finally:
        os.close(reader)
        os.close(writer)


def test_allocated_takes_a_path_too(file: int) -> None:
    os.pwrite(file, b"x", 0)
    assert memfd.allocated(f"/proc/self/fd/{file}") == 4096
    with pytest.raises(SystemFailure):
        memfd.allocated("/proc/self/fd/none")


def test_only_files_that_cannot_shrink_are_accepted(file: int, tmp_path: Path) -> None:
    memfd.require_sealed(file, SIZE)
    with pytest.raises(BadBuffer, match="65536 bytes, 65537 are needed"):
        memfd.require_sealed(file, SIZE + 1)
    unsealed = os.memfd_create("unsealed", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    plain = os.open(tmp_path / "plain", os.O_RDWR | os.O_CREAT)
    try:
        os.ftruncate(unsealed, SIZE)
        os.ftruncate(plain, SIZE)
        with pytest.raises(BadBuffer):
            memfd.require_sealed(unsealed, SIZE)
        with pytest.raises(BadBuffer):
            memfd.require_sealed(plain, SIZE)
    finally:
        os.close(unsealed)
        os.close(plain)


@pytest.mark.parametrize("size", [0, -1, 1 << 63])
def test_an_impossible_file_is_refused(size: int) -> None:
    with pytest.raises(BadBuffer):
        memfd.create("nothing", size)


def test_a_size_the_kernel_refuses_leaves_no_descriptor() -> None:
    before = len(os.listdir("/proc/self/fd"))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (SIZE, limits[1]))
    try:
        with pytest.raises(SystemFailure) as caught:
            memfd.create("large", SIZE + 1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert caught.value.errno == errno.EFBIG
    assert len(os.listdir("/proc/self/fd")) == before
