# SPDX-License-Identifier: Apache-2.0
"""Named files of huge pages: memory that a killed process leaves behind, to be found again.

A file on hugetlbfs keeps its pages until it is unlinked and nobody has it open or mapped; its pages
are neither swapped nor handed to anyone else, they are 2 MiB of contiguous physical memory each,
and zeroed when they are first touched (Documentation/admin-guide/mm/hugetlbpage.rst). It does not
outlive the system. Holes can be punched into it and it can be truncated by whoever holds it open,
and it takes no seals (fs/hugetlbfs/inode.c: ``F_SEAL_SEAL`` from the start): see ``io_uring``.
"""

from __future__ import annotations

import errno
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from holdfast.errors import BadBuffer, HoldfastError, NotSupported, OutOfMemory, SystemFailure
from holdfast.kernel import libc
from holdfast.kernel.failure import failure

HUGE_PAGE: Final = 2 << 20
"""Bytes in the huge pages used here: the smaller ones of x86-64."""

_UNITS: Final = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


@dataclass(frozen=True, slots=True)
class Pool:
    """The kernel's huge pages of one size, counted in pages.

    ``reserved`` ones are free but promised to mappings that have not touched them yet.
    """

    total: int
    free: int
    reserved: int

    @property
    def available(self) -> int:
        """Pages that a new mapping can still have."""
        return max(self.free - self.reserved, 0)


def pool(page: int = HUGE_PAGE, sysfs: Path = Path("/sys")) -> Pool:
    """What the kernel has of huge pages of ``page`` bytes. NotSupported if it knows none."""
    directory = sysfs / f"kernel/mm/hugepages/hugepages-{page >> 10}kB"
    try:
        counts = [
            int((directory / name).read_text(encoding="ascii"))
            for name in ("nr_hugepages", "free_hugepages", "resv_hugepages")
        ]
    except FileNotFoundError as error:
        raise NotSupported(
            f"this kernel has no huge pages of {page >> 10} KiB",
            operation="count huge pages",
            target=str(directory),
            errno=error.errno,
        ) from error
    except OSError as error:
        raise failure(error, "count huge pages", str(directory)) from error
    return Pool(*counts)


def mount_point(page: int = HUGE_PAGE, mounts: Path = Path("/proc/self/mounts")) -> Path:
    """The first place where huge pages of ``page`` bytes are mounted as files.

    Raises NotSupported with the command that mounts them.
    """
    try:
        lines = mounts.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError as error:
        raise failure(error, "find hugetlbfs", str(mounts)) from error
    for line in lines:
        fields = line.split()
        if len(fields) >= 4 and fields[2] == "hugetlbfs" and _page_of(fields[3]) == page:
            # Blanks and backslashes in a path are octal there (getmntent(3)).
            plain = re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), fields[1])
            return Path(plain)
    raise NotSupported(
        f"no hugetlbfs with pages of {page >> 20} MiB is mounted",
        operation="find hugetlbfs",
        target=str(mounts),
        hint=f"mkdir -p /dev/hugepages && mount -t hugetlbfs -o pagesize={page >> 20}M none"
        " /dev/hugepages",
    )


def _page_of(options: str) -> int | None:
    """Bytes in a page, from mount options (fs/hugetlbfs/inode.c, ``hugetlbfs_show_options``)."""
    found = re.search(r"(?:^|,)pagesize=(\d{1,12})([KMG]?)(?:,|$)", options)
    return int(found[1]) * _UNITS[found[2]] if found else None


def page_size(directory: Path) -> int:
    """Bytes in the pages that files in ``directory`` are made of."""
    try:
        return os.statvfs(directory).f_bsize
    except OSError as error:
        raise failure(error, "find page size", str(directory)) from error


def boot_id(path: Path = Path("/proc/sys/kernel/random/boot_id")) -> str:
    """Which boot of the machine this is: 32 hexadecimal digits (random(4))."""
    try:
        found = path.read_text(encoding="ascii").strip().replace("-", "")
    except OSError as error:
        raise failure(error, "read boot id", str(path)) from error
    if not re.fullmatch("[0-9a-f]{32}", found):
        raise SystemFailure(f"{found[:80]!r} is no boot id", operation="read boot id")
    return found


def create(directory: Path, name: str, size: int) -> int:
    """A new file of ``size`` bytes, mode 0600, that keeps its name. The caller owns the descriptor.

    ``size`` is a multiple of the page. Pages are taken by :func:`map_whole`. On error there is no
    file.
    """
    path = directory / name
    flags = os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW
    if size < 1 or size % page_size(directory):
        raise BadBuffer(f"{size} bytes are no whole pages", operation="create", target=str(path))
    try:
        fd = os.open(path, flags, 0o600)
        try:
            os.ftruncate(fd, size)
        except BaseException:
            os.close(fd)
            path.unlink()
            raise
    except OSError as error:
        raise failure(error, "create", str(path)) from error
    return fd


def map_whole(fd: int, size: int) -> int:
    """Map ``size`` bytes of a file; returns the address, for :func:`unmap`. Not in forked children.

    The kernel sets the pages aside now, so that touching them later cannot fail for lack of pages
    (``hugetlbfs_file_mmap``). OutOfMemory names the command that provides them.

    A holder of the file can truncate it; touching the mapping would then be a SIGBUS. It is for
    pins and for asking where pages are.
    """
    protection = libc.PROT_READ | libc.PROT_WRITE
    try:
        address = libc.mmap(None, size, protection, libc.MAP_SHARED, fd, 0)
        try:
            libc.madvise(address, size, libc.MADV_DONTFORK)
        except BaseException:
            libc.munmap(address, size)
            raise
    except OSError as error:
        if error.errno == errno.ENOMEM:
            raise too_few(size) from error
        raise failure(error, "map", f"descriptor {fd}") from error
    return address


def unmap(address: int, size: int) -> None:
    """Undo :func:`map_whole`."""
    try:
        libc.munmap(address, size)
    except OSError as error:
        raise failure(error, "unmap", f"{size} bytes at {address:#x}") from error


def too_few(size: int, page: int = HUGE_PAGE, sysfs: Path = Path("/sys")) -> HoldfastError:
    """The error for ``size`` bytes that the pool cannot give, with the command that enlarges it."""
    now = pool(page, sysfs)
    missing = max(-(-size // page) - now.available, 1)
    return OutOfMemory(
        f"{size} bytes asked for; of {now.total} huge pages of {page >> 20} MiB"
        f" {now.available} are free",
        operation="take huge pages",
        errno=errno.ENOMEM,
        hint=f"as root: echo {now.total + missing} > /proc/sys/vm/nr_hugepages",
    )
