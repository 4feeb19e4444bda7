# SPDX-License-Identifier: Apache-2.0
"""Where built things are kept: each under a key of what it was made from, whole or not at all.

Facts: two commands may want the same root file system at once; a build takes from seconds to
minutes and may be interrupted anywhere. Consequence: an entry that exists must be complete, and
must not be built twice at the same time. Choice: a build works in a directory of its own beside
the entries, and one ``rename`` puts it in place; an advisory lock per entry (which the kernel
drops with its holder, however that dies) keeps the second builder waiting, who then finds it
built. Cost: what an interrupted build leaves is removed only by the next build of that kind.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

VARIABLE: Final = "HOLDFAST_LAB_CACHE"
_BUILDING: Final = ".building-"
_LOCK: Final = ".lock"
_POLL: Final = 0.25


def directory() -> Path:
    """The cache's directory: $HOLDFAST_LAB_CACHE, or holdfast/lab in the user's cache."""
    if named := os.environ.get(VARIABLE):
        return Path(named)
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "holdfast" / "lab"


def key(*parts: str) -> str:
    """A short name for what something is made from."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part.encode()).to_bytes(8, "little") + part.encode())
    return digest.hexdigest()[:16]


def find(kind: str, made_from: str) -> Path | None:
    """The complete entry, or None. Never waits."""
    entry = directory() / f"{kind}-{made_from}"
    return entry if entry.is_dir() else None


def get(kind: str, made_from: str, build: Callable[[Path], None]) -> Path:
    """The entry's directory; ``build(directory)`` fills it if it does not exist.

    Safe between threads and processes. If ``build`` raises, nothing is kept.
    """
    if (found := find(kind, made_from)) is not None:
        return found
    root = directory()
    root.mkdir(parents=True, exist_ok=True)
    with lock(f"{kind}-{made_from}"):
        if (found := find(kind, made_from)) is not None:
            return found
        for left in root.glob(f"{_BUILDING}{kind}-{made_from}-*"):
            shutil.rmtree(left)
        place = Path(tempfile.mkdtemp(prefix=f"{_BUILDING}{kind}-{made_from}-", dir=root))
        try:
            build(place)
            place.chmod(0o755)
            entry = root / f"{kind}-{made_from}"
            place.rename(entry)
        except BaseException:
            shutil.rmtree(place, ignore_errors=True)
            raise
    return entry


@contextmanager
def lock(name: str) -> Iterator[None]:
    """Hold the advisory lock of this name, waiting for it."""
    with _lock_file(name) as fd:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield


@contextmanager
def one_of(name: str, count: int, waiting: Callable[[], None]) -> Iterator[int]:
    """Hold one of ``count`` places; ``waiting`` is called once if all are taken at first."""
    told = False
    while True:
        for place in range(count):
            with _lock_file(f"{name}-{place}") as fd:
                try:
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    continue
                yield place
                return
        if not told:
            waiting()
            told = True
        # flock(2) cannot wait for the first of several files.
        time.sleep(_POLL)


@contextmanager
def scratch(name: str) -> Iterator[Path]:
    """A directory on the cache's file system (memory file systems are small), removed after.

    It is locked while it is used, so that those of killed processes are known and removed.
    """
    root = directory()
    with lock("scratch"):
        for left in root.glob(f".{name}-*"):
            with _directory_lock(left) as free:
                if free:
                    shutil.rmtree(left)
        place = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=root))
        held = os.open(place, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        fcntl.flock(held, fcntl.LOCK_EX)
    try:
        yield place
    finally:
        shutil.rmtree(place)
        os.close(held)


def clean() -> int:
    """Remove everything; returns the bytes given back. A build under way will fail."""
    root = directory()
    if not root.is_dir():
        return 0
    size = 0
    for base, _, files in os.walk(root):
        size += sum(os.lstat(os.path.join(base, name)).st_blocks * 512 for name in files)
    shutil.rmtree(root)
    return size


@contextmanager
def _directory_lock(place: Path) -> Iterator[bool]:
    """Whether nobody uses a scratch directory; then it stays so for the caller."""
    try:
        fd = os.open(place, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except FileNotFoundError:
        yield False  # its user has just removed it
        return
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        free = True
    except BlockingIOError:
        free = False
    try:
        yield free
    finally:
        os.close(fd)


@contextmanager
def _lock_file(name: str) -> Iterator[int]:
    root = directory()
    root.mkdir(parents=True, exist_ok=True)
    fd = os.open(root / f"{name}{_LOCK}", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        yield fd
    finally:
        os.close(fd)
