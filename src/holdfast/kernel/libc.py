# SPDX-License-Identifier: Apache-2.0
"""libc calls that Python lacks, each with its errno checked.

Every function raises ``OSError`` with the errno of the call, and lets other threads run while the
kernel works (``ctypes.CDLL`` drops the interpreter lock).
"""

from __future__ import annotations

import ctypes
import os
import struct
from typing import Final

from holdfast.uapi import io_uring

_libc = ctypes.CDLL(None, use_errno=True)

_c_off_t = ctypes.c_int64
assert ctypes.sizeof(ctypes.c_long) == 8  # off_t and the statfs layout below are the 64-bit ones

PROT_NONE: Final = 0
PROT_READ: Final = 1
PROT_WRITE: Final = 2
MAP_SHARED: Final = 0x01
MAP_PRIVATE: Final = 0x02
MAP_FIXED: Final = 0x10
MAP_ANONYMOUS: Final = 0x20
MAP_NORESERVE: Final = 0x4000
MREMAP_MAYMOVE: Final = 1
MREMAP_FIXED: Final = 2
"""linux/mman.h"""
MADV_DONTFORK: Final = 10
"""asm-generic/mman-common.h; the MAP_ values are those of x86-64 and arm64."""

PR_SET_CHILD_SUBREAPER: Final = 36
"""linux/prctl.h"""

FALLOC_FL_KEEP_SIZE: Final = 0x01
FALLOC_FL_PUNCH_HOLE: Final = 0x02
"""linux/falloc.h"""

_MAP_FAILED: Final = ctypes.c_void_p(-1).value

_mmap = _libc.mmap
_mmap.restype = ctypes.c_void_p
_mmap.argtypes = (
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    _c_off_t,
)
_munmap = _libc.munmap
_munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_mremap = _libc.mremap
_mremap.restype = ctypes.c_void_p
_mremap.argtypes = (
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_void_p,
)
_madvise = _libc.madvise
_madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_fallocate = _libc.fallocate
_fallocate.argtypes = (ctypes.c_int, ctypes.c_int, _c_off_t, _c_off_t)


_prctl = _libc.prctl
_prctl.argtypes = (ctypes.c_int, *[ctypes.c_ulong] * 4)


class _Statfs(ctypes.Structure):
    """``struct statfs`` (asm-generic/statfs.h, 64-bit). Only the type is read."""

    _fields_ = (("f_type", ctypes.c_long), ("rest", ctypes.c_long * 14))


assert ctypes.sizeof(_Statfs) == 120

_fstatfs = _libc.fstatfs
_fstatfs.argtypes = (ctypes.c_int, ctypes.POINTER(_Statfs))

_SYS_PIDFD_GETFD: Final = 438
"""arch/x86/entry/syscalls/syscall_64.tbl"""
_AT_EMPTY_PATH: Final = 0x1000
_AT_STATX_DONT_SYNC: Final = 0x4000
_STATX_INO: Final = 0x100
"""linux/fcntl.h, linux/stat.h. In ``struct statx`` (256 bytes), stx_ino is at 32 and stx_dev_major
at 136."""

_statx = _libc.statx
_statx.argtypes = (
    ctypes.c_int,
    ctypes.c_char_p,
    ctypes.c_int,
    ctypes.c_uint,
    ctypes.c_char_p,
)

_getsockopt = _libc.getsockopt
_getsockopt.argtypes = (
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_char_p,
    ctypes.POINTER(ctypes.c_uint),
)

_prctl = _libc.prctl
_prctl.argtypes = (
    ctypes.c_int,
    ctypes.c_ulong,
    ctypes.c_ulong,
    ctypes.c_ulong,
    ctypes.c_ulong,
)

_syscall = _libc.syscall
_syscall.restype = ctypes.c_long


def _raise(call: str) -> None:
    number = ctypes.get_errno()
    raise OSError(number, f"{call}: {os.strerror(number)}")


def mmap(address: int | None, size: int, protection: int, flags: int, fd: int, offset: int) -> int:
    """mmap(2). Returns the address; the caller owns the mapping."""
    found: int | None = _mmap(address, size, protection, flags, fd, offset)
    if found is None or found == _MAP_FAILED:
        _raise("mmap")
    assert found is not None
    return found


def munmap(address: int, size: int) -> None:
    """munmap(2)."""
    if _munmap(address, size):
        _raise("munmap")


def move(address: int, size: int, onto: int) -> None:
    """mremap(2): put the mapping at ``address`` in the place of what is mapped at ``onto``."""
    flags = MREMAP_MAYMOVE | MREMAP_FIXED
    found: int | None = _mremap(address, size, size, flags, onto)
    if found is None or found == _MAP_FAILED:
        _raise("mremap")


def madvise(address: int, size: int, advice: int) -> None:
    """madvise(2)."""
    if _madvise(address, size, advice):
        _raise("madvise")


def fallocate(fd: int, mode: int, offset: int, size: int) -> None:
    """fallocate(2)."""
    if _fallocate(fd, mode, offset, size):
        _raise("fallocate")


def set_child_subreaper() -> None:
    """prctl(2): orphaned descendants become children of this process."""
    if _prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0):
        _raise("prctl")


def filesystem_magic(fd: int) -> int:
    """The magic number of the file system ``fd`` lies on (fstatfs(2), linux/magic.h)."""
    found = _Statfs()
    if _fstatfs(fd, ctypes.byref(found)):
        _raise("fstatfs")
    return int(found.f_type)


def getsockopt(fd: int, level: int, option: int, size: int) -> bytes:
    """getsockopt(2) with room for ``size`` bytes; what the kernel put there."""
    room = ctypes.create_string_buffer(size)
    length = ctypes.c_uint(size)
    if _getsockopt(fd, level, option, room, ctypes.byref(length)):
        _raise("getsockopt")
    return room.raw[: length.value]


def prctl(option: int, value: int = 0) -> int:
    """prctl(2) with one argument."""
    found: int = _prctl(option, value, 0, 0, 0)
    if found < 0:
        _raise("prctl")
    return found


def identity(fd: int) -> tuple[int, int]:
    """Device and inode of an open file, without asking whoever serves its file system.

    fstat(2) waits for the daemon of a FUSE file system, and for the server of a network one; statx
    with ``AT_STATX_DONT_SYNC`` takes what the kernel has (statx(2), fs/fuse/dir.c).
    """
    found = ctypes.create_string_buffer(256)
    if _statx(fd, b"", _AT_EMPTY_PATH | _AT_STATX_DONT_SYNC, _STATX_INO, found):
        _raise("statx")
    (inode,) = struct.unpack_from("=Q", found, 32)
    major, minor = struct.unpack_from("=II", found, 136)
    return os.makedev(major, minor), inode


def address_of(buffer: bytearray) -> int:
    """Where the bytes of ``buffer`` are, until it is resized or collected."""
    return ctypes.addressof((ctypes.c_char * len(buffer)).from_buffer(buffer))


def io_uring_setup(entries: int, params: bytearray) -> int:
    """io_uring_setup(2). Returns the ring's descriptor, close-on-exec; the caller owns it."""
    found: int = _syscall(
        ctypes.c_long(io_uring.SYS_SETUP),
        ctypes.c_uint(entries),
        ctypes.c_void_p(address_of(params)),
    )
    if found < 0:
        _raise("io_uring_setup")
    return found


def io_uring_register(fd: int, operation: int, argument: bytearray | None, count: int) -> int:
    """io_uring_register(2). What is returned depends on ``operation``."""
    found: int = _syscall(
        ctypes.c_long(io_uring.SYS_REGISTER),
        ctypes.c_uint(fd),
        ctypes.c_uint(operation),
        ctypes.c_void_p(None if argument is None else address_of(argument)),
        ctypes.c_uint(count),
    )
    if found < 0:
        _raise("io_uring_register")
    return found


def pidfd_getfd(pidfd: int, number: int) -> int:
    """pidfd_getfd(2). A copy of another process's descriptor, close-on-exec; the caller owns it."""
    found: int = _syscall(
        ctypes.c_long(_SYS_PIDFD_GETFD),
        ctypes.c_int(pidfd),
        ctypes.c_int(number),
        ctypes.c_uint(0),
    )
    if found < 0:
        _raise("pidfd_getfd")
    return found
