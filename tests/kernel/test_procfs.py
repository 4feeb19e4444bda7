# SPDX-License-Identifier: Apache-2.0
"""What /proc says about this process is what this process did."""

from __future__ import annotations

import ctypes
import os
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from holdfast.errors import SystemFailure
from holdfast.kernel import memfd, procfs


def reaped() -> int:
    """The pid of a process that is no more."""
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait(10)
    return child.pid


def test_meminfo_is_in_bytes() -> None:
    info = procfs.meminfo()
    assert info["MemTotal"] > 1 << 26
    assert info["MemTotal"] % 1024 == 0
    assert {"Shmem", "HugePages_Total", "HugePages_Free"} <= info.keys()


def test_open_descriptors_are_listed_with_what_they_point_at() -> None:
    fd = memfd.create("procfs-listed", 4096)
    try:
        assert procfs.open_descriptors(os.getpid())[fd].startswith("/memfd:procfs-listed")
    finally:
        os.close(fd)


def test_a_dead_process_holds_nothing() -> None:
    pid = reaped()
    assert procfs.open_descriptors(pid) == {}
    assert procfs.memfd_blocks(pid) == 0


def test_memfd_bytes_are_counted_once_for_each_file() -> None:
    script = """
import os
fd = os.memfd_create("counted"); os.truncate(fd, 1 << 20); os.pwrite(fd, bytes(8192), 0); os.dup(fd)
print(flush=True); input()
"""
    child = subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert child.stdout is not None
    child.stdout.readline()
    assert procfs.memfd_blocks(child.pid) == 8192
    child.communicate(b"\n", timeout=10)


def test_the_holders_of_a_socket_are_found() -> None:
    left, right = socket.socketpair()
    with left:
        inode = procfs.socket_inode(right)
        assert procfs.socket_holders(inode) == [os.getpid()]
        child = subprocess.Popen(
            [sys.executable, "-c", "input()"], stdin=subprocess.PIPE, pass_fds=[right.fileno()]
        )
        # The child has the descriptor from its exec on, which Popen waits for.
        right.close()
        assert procfs.socket_holders(inode) == [child.pid]
        child.communicate(b"\n", timeout=10)
        assert procfs.socket_holders(inode) == []


def test_own_memory_reads_and_writes_by_address() -> None:
    memory = procfs.open_own_memory()
    try:
        data = ctypes.create_string_buffer(b"before", 16)
        assert os.pread(memory, 6, ctypes.addressof(data)) == b"before"
        os.pwrite(memory, b"after\0", ctypes.addressof(data))
        assert data.value == b"after"
        assert not os.get_inheritable(memory)
        assert procfs.is_memory_of(memory, os.getpid())
    finally:
        os.close(memory)


@pytest.mark.parametrize("path", ["/proc/self/maps", "/proc/self/task/{tid}/mem", "/dev/zero"])
def test_another_file_is_not_the_memory_of_a_process(path: str) -> None:
    fd = os.open(path.format(tid=threading.get_native_id()), os.O_RDONLY)
    try:
        assert not procfs.is_memory_of(fd, os.getpid())
    finally:
        os.close(fd)


def test_a_file_of_the_same_name_elsewhere_is_not_memory(tmp_path: Path) -> None:
    fd = os.open(tmp_path / "mem", os.O_RDWR | os.O_CREAT)
    try:
        assert not procfs.is_memory_of(fd, os.getpid())
    finally:
        os.close(fd)
    assert not procfs.is_memory_of(fd, os.getpid())


def test_the_memory_of_another_process_is_not_taken_for_ours_nor_a_dead_ones_for_its() -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    fd = os.open(f"/proc/{child.pid}/mem", os.O_RDONLY)
    try:
        assert procfs.is_memory_of(fd, child.pid)
        assert not procfs.is_memory_of(fd, os.getpid())
        child.communicate(b"\n", timeout=10)
        assert not procfs.is_memory_of(fd, child.pid)
    finally:
        os.close(fd)


def test_start_time_tells_processes_apart_and_stays() -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    assert procfs.start_time(child.pid) >= procfs.start_time(os.getpid())
    assert procfs.start_time(os.getpid()) == procfs.start_time(os.getpid())
    child.communicate(b"\n", timeout=10)
    with pytest.raises(SystemFailure):
        procfs.start_time(child.pid)
