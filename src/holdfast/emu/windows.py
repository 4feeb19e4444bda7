# SPDX-License-Identifier: Apache-2.0
"""DMA windows: what an emulated function may reach of its client's memory, and the port to it.

A window is reached in one of three ways, the first that is safe (vfio-user specification,
DMA_MAP; fcntl(2), "File Sealing"):

======== ========================================================================================
direct   the file is mapped; accesses are copies. Only if its size is sealed: a client that shrank
         the file under the mapping would kill this process with SIGBUS
file     ``pread``/``pwrite`` on the descriptor: for any other regular file
message  DMA_READ and DMA_WRITE over the socket: no descriptor, or none of the above works
======== ========================================================================================

Threads: one engine thread uses the port, one socket thread maps and unmaps. An access works on a
snapshot of the table taken when it began. A window that it uses stays in place until it ends, even
if it is unmapped meanwhile, and the unmap is not answered before (:meth:`Windows.settled`). An
access by message stops at its next message.
"""

from __future__ import annotations

import errno
import logging
import threading
from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Final, Protocol

import numpy as np

from holdfast.emu.port import Bytes, U64s
from holdfast.emu.windows_open import discard, open_memory
from holdfast.emu.windows_table import Entries, Flags, Places, Table, Window
from holdfast.errors import BadTransfer, DmaFault
from holdfast.values import Perm

_log = logging.getLogger("holdfast.emu")

MAX_WINDOWS: Final = 65535
_RECENT: Final = 32


class Messages(Protocol):
    """DMA by message. Both calls raise ``OSError`` if the client refuses or is gone."""

    @property
    def chunk(self) -> int:
        """Most bytes of one message."""
        ...

    def fetch(self, iova: int, into: memoryview) -> None:
        """Fill ``into`` (at most ``chunk`` bytes) from client memory."""
        ...

    def store(self, iova: int, data: memoryview) -> None:
        """Put ``data`` (at most ``chunk`` bytes) into client memory."""
        ...


@dataclass(frozen=True, slots=True)
class Fault:
    """A refused access, for whoever debugs a driver."""

    iova: int
    size: int
    write: bool
    why: str


class Windows:
    """The window table of one connection and the bus-master port over it (``port.DmaPort``)."""

    def __init__(
        self, messages: Messages | None = None, settled: Callable[[], None] = lambda: None
    ) -> None:
        """``settled`` is called on the engine thread when what somebody waits for has ended."""
        self._messages = messages
        self._on_settled = settled
        self._lock = threading.Lock()
        self._windows: list[Window] = []
        self._starts: list[int] = []
        self._table: Table | None = None  # made by the next access: maps come in bursts
        self._serial = 0
        self._inside = False
        self._copying = False
        self._using: frozenset[Window] | None = frozenset()
        self._leaving: list[Window] = []
        self._watched = False
        self._faults = 0
        self.recent: deque[Fault] = deque(maxlen=_RECENT)

    # -- the socket thread's side ----------------------------------------------------------------

    @property
    def windows(self) -> tuple[Window, ...]:
        """All windows in IOVA order."""
        with self._lock:
            return tuple(self._windows)

    def map(
        self,
        iova: int,
        size: int,
        perm: Perm,
        fd: int | None = None,
        offset: int = 0,
        *,
        file_io: bool = False,
    ) -> None:
        """Add a window. Takes ownership of ``fd`` in every case.

        Raises ``OSError``: EEXIST for an overlap, ENOSPC for too many windows, EINVAL if the file
        is too small, or what the kernel said. Nothing is mapped then.
        """
        try:
            place = self._place(iova, size)
        except OSError:
            if fd is not None:
                discard(fd)
            raise
        memory = None
        if fd is not None:
            memory = open_memory(fd, offset, size, perm, file_io=file_io)
        with self._lock:
            self._windows.insert(place, Window(iova, size, perm, memory))
            self._starts.insert(place, iova)
            self._table = None

    def _place(self, iova: int, size: int) -> int:
        if size < 1 or iova < 0 or iova + size > 1 << 64:
            raise OSError(errno.EINVAL, "the window does not fit into the address space")
        if len(self._windows) >= MAX_WINDOWS:
            raise OSError(errno.ENOSPC, f"{MAX_WINDOWS} windows are mapped")
        place = bisect_left(self._starts, iova + size)
        if place and self._windows[place - 1].end > iova:
            raise OSError(errno.EEXIST, "the window overlaps another one")
        return place

    def unmap(self, iova: int, size: int) -> None:
        """Remove the window that was mapped with exactly these values; else ENOENT."""
        place = bisect_right(self._starts, iova) - 1
        window = self._windows[place] if place >= 0 else None
        if window is None or window.iova != iova or window.size != size:
            raise OSError(errno.ENOENT, f"no window of {size:#x} bytes at {iova:#x}")
        self._drop(place, place + 1)

    def unmap_all(self) -> None:
        """Remove every window."""
        self._drop(0, len(self._windows))

    def _drop(self, start: int, stop: int) -> None:
        with self._lock:
            out = self._windows[start:stop]
            del self._windows[start:stop], self._starts[start:stop]
            self._table = None
            for window in out:
                window.gone = True
            # None: an access has begun and not said yet what it uses.
            used = [w for w in out if self._using is None or w in self._using]
            self._leaving += used
        for window in set(out).difference(used):
            window.close()

    def settled(self) -> bool:
        """True once no access uses an unmapped window any more; else the callback will come."""
        with self._lock:
            self._watched = self._watched or bool(self._leaving)
            return not self._leaving

    def fence(self, *, messages: bool) -> int | None:
        """The step in progress that has to end before an answer may go out, or None.

        Without ``messages`` only copies in memory count: what goes by message is in order with the
        answer on the same stream anyway. Ask :meth:`passed` after each callback.
        """
        with self._lock:
            if not self._inside or not (messages or self._copying):
                return None
            self._watched = True
            return self._serial

    def passed(self, serial: int) -> bool:
        """True once the step that :meth:`fence` named has ended."""
        with self._lock:
            over = not self._inside or self._serial != serial
            self._watched = self._watched or not over
            return over

    # -- the engine thread's side: DmaPort -------------------------------------------------------

    @property
    def faults(self) -> int:
        """DMA faults so far: accesses that were refused, never carried out."""
        return self._faults

    def read(self, iova: int, into: Bytes) -> None:
        """Copy client memory at ``iova`` into ``into``; :class:`DmaFault` unless all is there."""
        self._access(iova, _checked(into, write=True), Perm.READ)

    def write(self, iova: int, data: Bytes) -> None:
        """Copy ``data`` to client memory at ``iova``; :class:`DmaFault` unless all is there."""
        self._access(iova, _checked(data, write=False), Perm.WRITE)

    def read_many(self, iovas: U64s, local: Bytes, offsets: U64s, lengths: U64s) -> int:
        """Gather; see ``port.DmaPort``."""
        return self._many(iovas, _checked(local, write=True), offsets, lengths, Perm.READ)

    def write_many(self, iovas: U64s, local: Bytes, offsets: U64s, lengths: U64s) -> int:
        """Scatter; see ``port.DmaPort``."""
        return self._many(iovas, _checked(local, write=False), offsets, lengths, Perm.WRITE)

    def _access(self, iova: int, local: Bytes, need: Perm) -> None:
        if not local.size:
            return
        table = self._engage()
        try:
            window = table.mapped(iova, local.size, need)
            pieces = [(window, iova)] if window else self._pieces(table, iova, local.size, need)
            self._uses(
                frozenset([window for window, _ in pieces]),
                copying=pieces[0][0].memory is not None,
            )
            self._carry_out(pieces, iova, local, need)
        finally:
            self._release()

    def _pieces(self, table: Table, iova: int, size: int, need: Perm) -> list[tuple[Window, int]]:
        """Windows and start addresses of one access, which may run through adjacent windows."""
        pieces: list[tuple[Window, int]] = []
        at, end = iova, iova + size
        while at < end:
            window = table.find(at)
            if window is None:
                raise self._fault(iova, size, need, "not mapped")
            if not window.perm & need:
                raise self._fault(iova, size, need, "against the window's permission")
            pieces.append((window, at))
            at = window.end
        return pieces

    def _carry_out(
        self, pieces: list[tuple[Window, int]], iova: int, local: Bytes, need: Perm
    ) -> None:
        for window, at in pieces:
            part = local[at - iova : min(iova + local.size, window.end) - iova]
            memory = window.memory
            self._step(copying=memory is not None)
            try:
                if memory is None:
                    self._by_message(window, at, part, need)
                elif need is Perm.READ:
                    memory.read(at - window.iova, part)
                else:
                    memory.write(at - window.iova, part)
            except OSError as error:
                why = error.strerror or str(error)
                raise self._fault(at, part.size, need, why) from error

    def _by_message(self, window: Window, iova: int, part: Bytes, need: Perm) -> None:
        link = self._messages
        if link is None:
            raise OSError(errno.ENODEV, "no connection to ask over")
        for at in range(0, part.size, link.chunk):
            if window.gone:
                raise OSError(errno.ENXIO, "unmapped during the access")
            piece = part[at : at + link.chunk].data
            if need is Perm.READ:
                link.fetch(iova + at, piece)
            else:
                link.store(iova + at, piece)

    def _fault(self, iova: int, size: int, need: Perm, why: str) -> DmaFault:
        self._faults += 1
        if self._faults.bit_count() == 1:  # the 1st, 2nd, 4th, 8th, ...: a wild card must not flood
            _log.warning("DMA fault %d: %s %#x+%#x: %s", self._faults, need.name, iova, size, why)
        write = need is Perm.WRITE
        self.recent.append(Fault(iova, size, write, why))
        verb = "write" if write else "read"
        return DmaFault(f"{size} bytes at {iova:#x}: {why}", operation=f"dma {verb}")

    def _many(self, iovas: U64s, local: Bytes, offsets: U64s, lengths: U64s, need: Perm) -> int:
        iovas, offsets, lengths = (np.asarray(x, np.uint64) for x in (iovas, offsets, lengths))
        if not len(iovas) == len(offsets) == len(lengths):
            raise BadTransfer("the lists differ in length", operation="dma list")
        entries = Entries(iovas, local, offsets, lengths)
        if not entries.inside():
            raise BadTransfer("an entry lies outside the local memory", operation="dma list")
        if not len(entries):
            return 0
        table = self._engage()
        try:
            return self._list(table, entries, need)
        finally:
            self._release()

    def _list(self, table: Table, entries: Entries, need: Perm) -> int:
        joined = entries.joined()
        if joined is not None:
            iova, offset, size = joined
            window = table.mapped(iova, size, need)
            if window is not None:
                self._uses(frozenset((window,)), copying=True)
                self._carry_out([(window, iova)], iova, entries.local[offset : offset + size], need)
                return len(entries)
        elif (window := table.mapped_list(entries, need)) is not None:
            self._uses(frozenset((window,)), copying=True)
            table.copy_within(window, entries, need)
            return len(entries)
        places, plain = table.resolve(entries, need)
        self._uses(table.used(places[plain]), copying=bool(plain[0]))
        if not plain.all():
            return self._mixed(table, entries, places, plain, need)
        table.copy(entries, places, need)
        return len(entries)

    def _mixed(
        self, table: Table, entries: Entries, places: Places, plain: Flags, need: Perm
    ) -> int:
        """Runs of plain entries go together, the others one by one, all in order."""
        cuts = [0, *(np.flatnonzero(np.diff(plain)) + 1).tolist(), len(plain)]
        for start, stop in pairwise(cuts):
            if plain[start]:
                self._step(copying=True)
                table.copy(entries.run(start, stop), places[start:stop], need)
                continue
            for index in range(start, stop):
                if entries.lengths[index] and not self._single(table, entries, index, need):
                    return index
        return len(plain)

    def _single(self, table: Table, entries: Entries, index: int, need: Perm) -> bool:
        iova, offset = int(entries.iovas[index]), int(entries.offsets[index])
        local = entries.local[offset : offset + int(entries.lengths[index])]
        try:
            pieces = self._pieces(table, iova, local.size, need)
            if not self._also_uses(frozenset(window for window, _ in pieces)):
                raise self._fault(iova, local.size, need, "unmapped during the list")
            self._carry_out(pieces, iova, local, need)
        except DmaFault:
            return False
        return True

    # -- what an access holds on to ----------------------------------------------------------------

    def _engage(self) -> Table:
        """An access begins. What it uses is not known yet, so nothing may be closed."""
        with self._lock:
            if self._table is None:
                self._table = Table(list(self._windows), list(self._starts))
            self._serial += 1
            self._inside = True
            self._using = None
            return self._table

    def _release(self) -> None:
        """The access is over."""
        with self._lock:
            self._inside = self._copying = False
            self._using = frozenset()
            awaited = self._leaving or self._watched
        if awaited:
            self._let_go()

    def _uses(self, windows: frozenset[Window], *, copying: bool) -> None:
        """Say which windows this access touches; all others can be unmapped at once."""
        with self._lock:
            self._using = windows
            self._copying = copying
            awaited = self._leaving or self._watched
        if awaited:
            self._let_go()

    def _also_uses(self, windows: frozenset[Window]) -> bool:
        """Hold on to more windows; False if one was unmapped meanwhile."""
        with self._lock:
            assert self._using is not None
            if any(window.gone for window in windows - self._using):
                return False
            self._using |= windows
            return True

    def _step(self, *, copying: bool) -> None:
        """The access goes on with copies in memory, or with messages."""
        with self._lock:
            if copying == self._copying:
                return
            self._copying = copying
            self._serial += 1
        self._let_go()

    def _let_go(self) -> None:
        """Close unmapped windows that are not in use any more, and tell who waits."""
        with self._lock:
            using = self._using or frozenset()
            idle = [window for window in self._leaving if window not in using]
            self._leaving = [window for window in self._leaving if window in using]
            watched, self._watched = self._watched, False
        for window in idle:
            window.close()
        if watched:
            self._on_settled()


def _checked(local: Bytes, *, write: bool) -> Bytes:
    if local.dtype != np.uint8 or local.ndim != 1 or not local.flags.c_contiguous:
        raise BadTransfer("local memory must be contiguous bytes", operation="dma")
    if write and not local.flags.writeable:
        raise BadTransfer("local memory is read-only", operation="dma")
    return local
