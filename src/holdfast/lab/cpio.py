# SPDX-License-Identifier: Apache-2.0
"""A writer of ``newc`` cpio archives, the format of the kernel's initial file system.

Source: Documentation/driver-api/early-userspace/buffer-format.rst of the Linux tree. The kernel
takes several archives one after another, later ones on top of earlier ones; so a large one is
made once, and a small one per run is put behind it. Everything belongs to root; times are zero
(the kernel keeps them only with INITRAMFS_PRESERVE_MTIME), so equal trees give equal archives.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Final, Self

_TRAILER: Final = "TRAILER!!!"
_BLOCK: Final = 512
_PIECE: Final = 1 << 20
_LARGEST: Final = (1 << 32) - 1
"""A file's size is eight hexadecimal digits."""


class Writer:
    """Writes one archive to ``out``, which stays open. Not thread-safe.

    A context manager: leaving it without an error writes the trailer.
    """

    def __init__(self, out: BinaryIO) -> None:
        self._out = out
        self._written = 0
        self._inode = 0

    def directory(self, name: str, mode: int = 0o755) -> None:
        """A directory; its parent must have come before."""
        self._header(name, stat.S_IFDIR | mode, 0)

    def symlink(self, name: str, target: str) -> None:
        """A symbolic link to ``target``."""
        self._member(name, stat.S_IFLNK | 0o777, os.fsencode(target))

    def file(self, name: str, data: bytes, mode: int = 0o644) -> None:
        """A regular file with these contents."""
        self._member(name, stat.S_IFREG | mode, data)

    def file_from(self, name: str, path: Path, mode: int | None = None) -> None:
        """A regular file, copied; its own permission bits unless ``mode`` is given."""
        with path.open("rb") as source:
            status = os.fstat(source.fileno())
            kept = stat.S_IMODE(status.st_mode) & 0o777 if mode is None else mode
            self._header(name, stat.S_IFREG | kept, status.st_size)
            left = status.st_size
            while left and (piece := source.read(min(left, _PIECE))):
                self._write(piece)
                left -= len(piece)
            if left:
                raise OSError(f"{path} became shorter while it was read")
        self._pad(4)

    def tree(self, prefix: str, root: Path, *, skip: Iterable[str] = ()) -> None:
        """Everything below ``root``; ``skip`` are paths relative to it. Special files are not."""
        for relative in walk(root, frozenset(skip)):
            path = root / relative
            name = f"{prefix}/{relative}" if prefix else relative
            mode = path.lstat().st_mode
            if stat.S_ISLNK(mode):
                self.symlink(name, os.readlink(path))
            elif stat.S_ISDIR(mode):
                self.directory(name)
            elif stat.S_ISREG(mode):
                self.file_from(name, path)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            self._header(_TRAILER, 0, 0)
            self._pad(_BLOCK)

    def _member(self, name: str, mode: int, data: bytes) -> None:
        self._header(name, mode, len(data))
        self._write(data)
        self._pad(4)

    def _header(self, name: str, mode: int, size: int) -> None:
        if size > _LARGEST:
            raise ValueError(f"{name}: {size} bytes do not fit a newc archive")
        self._inode += 1
        raw = os.fsencode(name.strip("/")) + b"\0"
        links = 2 if stat.S_ISDIR(mode) else 1
        # magic, ino, mode, uid, gid, nlink, mtime, filesize, maj, min, rmaj, rmin, namesize, chksum
        numbers = (self._inode, mode, 0, 0, links, 0, size, 0, 0, 0, 0, len(raw), 0)
        self._write(b"070701" + b"".join(b"%08x" % number for number in numbers) + raw)
        self._pad(4)

    def _write(self, data: bytes) -> None:
        self._out.write(data)
        self._written += len(data)

    def _pad(self, multiple: int) -> None:
        self._write(bytes(-self._written % multiple))


def walk(root: Path, skip: frozenset[str]) -> Iterator[str]:
    """Paths below ``root``, relative to it, parents first, in a fixed order."""
    for base, directories, files in os.walk(root):
        relative = os.path.relpath(base, root)
        prefix = "" if relative == "." else f"{relative}/"
        directories[:] = sorted(name for name in directories if prefix + name not in skip)
        for name in sorted([*directories, *files]):
            if prefix + name not in skip:
                yield prefix + name
