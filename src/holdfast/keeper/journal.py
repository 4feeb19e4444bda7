# SPDX-License-Identifier: Apache-2.0
"""What a successor must know, written down before it is true: fixed records in a memfd.

Facts. A keeper can be killed at any instruction. A ``pwrite`` within one page of a memfd is carried
out whole or not at all, because nothing interrupts the copy (mm/shmem.c, generic_perform_write).

Choice. Records of 128 bytes, each with a checksum of its own and written with one ``pwrite``; a
record is overwritten in place, and a free one is all zeroes. The file is a memfd that the anchor
holds, too: no disk, and nothing stale after a boot. The order of every mapping is that of
:mod:`holdfast.keeper.map_state`; whatever is not written down was never done.

Cost. About two microseconds a record. A record whose checksum is wrong means that this order
cannot be relied on any more: then nothing in the journal counts (:class:`Corrupt`), and the
successor turns bus mastering off, unmaps everything and proves quiet from the beginning.

Used by the keeper's loop only.
"""

from __future__ import annotations

import enum
import errno
import os
import struct
import zlib
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Final

from holdfast.errors import HoldfastError, OutOfMemory
from holdfast.keeper.map_state import MapEvent, MapState, Unmapped, advance
from holdfast.kernel import memfd
from holdfast.values import Iova, LeaseId

RECORD: Final = 128
CAPACITY: Final = 1 << 17
"""Records: 65,535 maps, the most that VFIO allows, and as many leases and slabs."""
_LAYOUT: Final = struct.Struct("<IBBHII14Q")
assert _LAYOUT.size == RECORD
_MAGIC: Final = 0x4A44_4C48  # "HLDJ"
_VERSION: Final = 1
_ZEROES: Final = bytes(RECORD)
_PAGE: Final = 4096
_TOUCHED: Final = 16 * _PAGE


class Corrupt(HoldfastError):
    """The journal cannot be relied on."""


class Kind(enum.IntEnum):
    """What a record describes."""

    FREE = 0
    HOST = 1
    LEASE = 2
    MAPPING = 3
    MEMORY = 4


class What(enum.IntEnum):
    """What a mapping or a piece of memory is to its lease."""

    SLAB = 0
    CONTROL = 1
    RELAYED = 2
    IN_PLACE = 3


@dataclass(frozen=True, slots=True)
class Entry:
    """One mapping: ``size`` bytes at ``iova`` for a lease.

    ``held`` is the number of the slab or pin, ``address`` the client's own (pins), ``seq`` the
    request that asked for it.
    """

    number: int
    lease: LeaseId
    iova: Iova
    size: int
    what: What = What.SLAB
    held: int = 0
    address: int = 0
    writable: bool = True
    seq: int = 0
    state: MapState = MapState.HELD

    def anchored(self) -> Entry:
        """To be called where the anchor's acknowledgement of what keeps the pages has come."""
        return replace(self, state=advance(self.state, MapEvent.ACKNOWLEDGED))

    @property
    def confirmed(self) -> bool:
        return self.state is MapState.MAPPED

    def unmapped_in_full(self, unmapped: int) -> bool:
        """Whether an unmap that took away ``unmapped`` bytes leaves nothing of this entry."""
        return Unmapped(self.state, self.size, unmapped).in_full


@dataclass(frozen=True, slots=True)
class Memory:
    """Memory of a lease that has no mapping of its own: a piece of an arena, or fixed addresses."""

    number: int
    lease: LeaseId
    size: int
    what: What
    seq: int = 0


class Stage(enum.IntEnum):
    """How far a lease is."""

    ALIVE = 1
    ENDING = 2
    WITHHELD = 3  # its memory is back, its channels and IOVAs are not


class Mark(enum.IntFlag):
    """Yes-or-no facts of a lease."""

    CLAIMED = 1
    MAPS_REGISTERS = 2
    GOODBYE = 4
    GRANTED = 8
    ANNOUNCED = 16


@dataclass(frozen=True, slots=True)
class LeaseRecord:
    """What a successor must know of a lease besides its descriptors, mappings and memory."""

    number: LeaseId
    stage: Stage
    marks: Mark
    access: int
    policy: int
    pid: int
    uid: int
    gid: int
    channels: int
    """Bit mask."""
    vectors: int
    """Bit mask."""
    lifeline: int
    noticed_ns: int = 0
    run: int = 0


@dataclass(frozen=True, slots=True)
class HostRecord:
    """Counters that must never go back."""

    last_lease: int = 0
    successions: int = 0


@dataclass(slots=True)
class Contents:
    """Everything a journal says, by number."""

    host: HostRecord
    leases: dict[LeaseId, LeaseRecord]
    entries: dict[int, Entry]
    memory: dict[int, Memory]


class Journal:
    """Records in a file. Each call is durable when it returns, against any end of this process."""

    def __init__(self, fd: int) -> None:
        """Take ownership of a new, empty file of :data:`CAPACITY` records; see :meth:`create`."""
        self.fd = fd
        self._free: list[int] = []
        self._untouched = 1
        self._places: dict[tuple[Kind, int], int] = {}
        self._entries: dict[LeaseId, dict[int, Entry]] = {}
        self._retired: dict[int, Entry] = {}
        self._next = 1

    @classmethod
    def create(cls) -> Journal:
        self = cls(memfd.create("holdfast-journal", CAPACITY * RECORD))
        os.pwrite(self.fd, bytes(_TOUCHED), 0)  # so that ordinary use does not look like growth
        self.host(HostRecord())
        return self

    @classmethod
    def open(cls, fd: int) -> tuple[Journal, Contents]:
        """Go on with a predecessor's journal. Takes ownership of ``fd``; raises Corrupt."""
        self = cls(fd)
        contents = Contents(HostRecord(), {}, {}, {})
        try:
            used = self._read_all(contents)
        except BaseException:
            os.close(fd)
            raise
        self._untouched = max(used) + 1
        self._free = [place for place in range(self._untouched) if place not in used]
        return self, contents

    def close_file(self) -> None:
        """Let go of the file."""
        os.close(self.fd)

    # -- mappings ------------------------------------------------------------

    def reserve(self, entry: Entry) -> Entry:
        """Record an intention to map what the anchor holds; from here on a death undoes it.

        IllegalMapping with nothing written for what is not :meth:`Entry.anchored`.
        """
        state = advance(entry.state, MapEvent.RESERVE)
        entry = replace(entry, number=self._next, state=state)
        self._next += 1
        self._put_entry(entry)
        return entry

    def confirm(self, entry: Entry) -> Entry:
        """Record that the map call succeeded."""
        return self._advance(entry, MapEvent.CONFIRM)

    def unmapping(self, entry: Entry) -> Entry:
        """Record that an unmap is about to be tried."""
        return self._advance(entry, MapEvent.UNMAP)

    def still_mapped(self, entry: Entry) -> Entry:
        """Record that an unmap took less than was mapped."""
        return self._advance(entry, MapEvent.FAILED)

    def retire(self, entry: Entry) -> Entry:
        """Record that the mapping is gone, and that its IOVAs stay out of use."""
        return self._advance(entry, MapEvent.DONE_UNPROVEN)

    def close(self, entry: Entry) -> None:
        """Record that the mapping is gone."""
        advance(entry.state, MapEvent.DONE)
        self._forget_entry(entry)
        self._erase(Kind.MAPPING, entry.number)

    def reinstate(self, iova: int) -> None:
        """Record that the retired range that begins in this page is usable again."""
        entry = self._retired.pop(_page(iova), None)
        if entry is not None:
            advance(entry.state, MapEvent.REINSTATE)
            self._erase(Kind.MAPPING, entry.number)

    def entries(self, lease: LeaseId) -> tuple[Entry, ...]:
        """Everything that may still be mapped for a lease."""
        return tuple(self._entries.get(lease, {}).values())

    def _advance(self, entry: Entry, event: MapEvent) -> Entry:
        moved = replace(entry, state=advance(entry.state, event))
        self._put_entry(moved)
        return moved

    def _put_entry(self, entry: Entry) -> None:
        fields = (entry.number, entry.lease, entry.iova, entry.size, entry.held, entry.address)
        flags = int(entry.what) | entry.writable << 4
        self._put(Kind.MAPPING, entry.number, entry.state, flags, entry.seq, fields)
        if entry.state is MapState.RETIRED:
            self._forget_entry(entry)
            self._retired[_page(entry.iova)] = entry
        else:
            self._entries.setdefault(entry.lease, {})[entry.number] = entry

    def _forget_entry(self, entry: Entry) -> None:
        mine = self._entries[entry.lease]
        del mine[entry.number]
        if not mine:
            del self._entries[entry.lease]

    # -- memory, leases, counters ------------------------------------------------------------

    def hold(self, memory: Memory) -> None:
        """Record memory without a mapping of its own."""
        fields = (memory.number, memory.lease, memory.size)
        self._put(Kind.MEMORY, memory.number, 0, memory.what, memory.seq, fields)

    def let_go(self, number: int) -> None:
        """Record that memory without a mapping is nobody's; before it is handed out again."""
        self._erase(Kind.MEMORY, number)

    def lease(self, record: LeaseRecord) -> None:
        """Record a lease, anew or as it is now."""
        fields = (
            record.number,
            record.pid,
            record.uid | record.gid << 32,
            record.channels,
            record.vectors,
            record.lifeline,
            record.noticed_ns,
            record.run,
        )
        flags = int(record.marks) | record.access << 8 | record.policy << 12
        self._put(Kind.LEASE, record.number, record.stage, flags, 0, fields)

    def end_lease(self, number: LeaseId) -> None:
        """Record that nothing of a lease is left."""
        self._erase(Kind.LEASE, number)

    def host(self, record: HostRecord) -> None:
        """Record the counters."""
        fields = (_MAGIC, _VERSION, record.last_lease, record.successions)
        self._write(0, Kind.HOST, 0, 0, 0, fields)

    # -- the file ------------------------------------------------------------

    def _put(
        self, kind: Kind, number: int, state: int, flags: int, seq: int, fields: Iterable[int]
    ) -> None:
        place = self._places.get((kind, number))
        if place is None:
            place = self._places[kind, number] = self._take_place()
        self._write(place, kind, state, flags, seq, fields)

    def _take_place(self) -> int:
        if self._free:
            return self._free.pop()
        if self._untouched == CAPACITY:
            raise OutOfMemory(
                f"the journal is full ({CAPACITY} records)",
                operation="write journal",
                hint="free buffers and pins, or use fewer and larger ones",
            )
        self._untouched += 1
        return self._untouched - 1

    def _erase(self, kind: Kind, number: int) -> None:
        place = self._places.pop((kind, number), None)
        if place is not None:
            self._pwrite(place, _ZEROES)
            self._free.append(place)

    def _write(
        self, place: int, kind: Kind, state: int, flags: int, seq: int, fields: Iterable[int]
    ) -> None:
        values = tuple(int(value) for value in fields)
        blank = (0,) * (14 - len(values))
        record = bytearray(_LAYOUT.pack(0, kind, state, flags, seq, place, *values, *blank))
        record[:4] = zlib.crc32(record[4:]).to_bytes(4, "little")
        self._pwrite(place, record)

    def _pwrite(self, place: int, record: bytes | bytearray) -> None:
        if os.pwrite(self.fd, record, place * RECORD) != RECORD:
            raise Corrupt("a record was written in part", operation="write journal")

    def _read_all(self, contents: Contents) -> set[int]:
        """Parse every record; returns the places in use."""
        used: set[int] = set()
        if os.fstat(self.fd).st_size != CAPACITY * RECORD:
            raise Corrupt("the file has another size", operation="read journal")
        at = 0
        while (at := self._next_data(at)) < CAPACITY * RECORD:
            block = os.pread(self.fd, _PAGE, at)
            if len(block) != _PAGE:
                raise Corrupt("the file ends early", operation="read journal")
            for offset in range(0, _PAGE, RECORD):
                record = block[offset : offset + RECORD]
                if record != _ZEROES:
                    place = (at + offset) // RECORD
                    self._read(place, record, contents)
                    used.add(place)
            at += _PAGE
        if 0 not in used:
            raise Corrupt("it has no first record", operation="read journal")
        return used

    def _next_data(self, at: int) -> int:
        """Where the next page with contents begins: most of the file is a hole (lseek(2))."""
        try:
            return os.lseek(self.fd, at, os.SEEK_DATA)
        except OSError as error:
            if error.errno != errno.ENXIO:
                raise
            return CAPACITY * RECORD

    def _read(self, place: int, record: bytes, contents: Contents) -> None:
        checksum, kind, state, flags, seq, own_place, *f = _LAYOUT.unpack(record)
        if checksum != zlib.crc32(record[4:]) or own_place != place:
            raise Corrupt(f"record {place} is damaged", operation="read journal")
        try:
            self._take_in(Kind(kind), state, flags, seq, f, contents)
        except (ValueError, KeyError) as error:
            raise Corrupt(f"record {place}: {error}", operation="read journal") from error
        if kind != Kind.HOST:
            if (Kind(kind), f[0]) in self._places:
                raise Corrupt(f"record {place} is there twice", operation="read journal")
            self._places[Kind(kind), f[0]] = place

    def _take_in(
        self, kind: Kind, state: int, flags: int, seq: int, f: list[int], contents: Contents
    ) -> None:
        if kind is Kind.HOST:
            if f[:2] != [_MAGIC, _VERSION]:
                raise ValueError("another version")
            contents.host = HostRecord(f[2], f[3])
        elif kind is Kind.LEASE:
            lease = LeaseRecord(
                LeaseId(f[0]),
                Stage(state),
                Mark(flags & 0xFF),
                flags >> 8 & 0xF,
                flags >> 12,
                f[1],
                f[2] & 0xFFFF_FFFF,
                f[2] >> 32,
                *f[3:8],
            )
            contents.leases[lease.number] = lease
        elif kind is Kind.MAPPING:
            entry = Entry(
                f[0],
                LeaseId(f[1]),
                Iova(f[2]),
                f[3],
                What(flags & 0xF),
                f[4],
                f[5],
                bool(flags >> 4),
                seq,
                MapState(state),
            )
            contents.entries[entry.number] = entry
            self._next = max(self._next, entry.number + 1)
            if entry.state is MapState.RETIRED:
                self._retired[_page(entry.iova)] = entry
            else:
                self._entries.setdefault(entry.lease, {})[entry.number] = entry
        elif kind is Kind.MEMORY:
            memory = Memory(f[0], LeaseId(f[1]), f[2], What(flags), seq)
            contents.memory[memory.number] = memory
        else:
            raise ValueError("a free record that is not empty")


def _page(iova: int) -> int:
    return int(iova) & -_PAGE
