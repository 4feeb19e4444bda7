# SPDX-License-Identifier: Apache-2.0
"""Every payload of the protocol as a frozen dataclass with ``encode`` and ``decode``.

``decode`` never trusts a length or a count: it checks it against the bytes that are really there
before it makes anything of that size, and raises :class:`MalformedError` otherwise. Fields whose
value depends on the device (does region 5 exist?) are the server's to check.

Where request and reply have the same layout one class serves both. ``argsz`` is, in a request, the
largest reply payload that its sender takes, in a reply the size that a complete reply needs.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from dataclasses import dataclass

from holdfast.uapi import vfio_user as u
from holdfast.values import Area
from holdfast.wire.vfio_user.frame import MalformedError, Part, Parts

MAX_AREAS = 1024
MAX_IO_FDS = 1024
MAX_MULTI_WRITES = 4096


def _fixed(layout: struct.Struct, payload: Part, name: str) -> tuple[int, ...]:
    if len(payload) < layout.size:
        raise MalformedError(f"{name} needs {layout.size} bytes, got {len(payload)}")
    return layout.unpack_from(payload)


def _argsz(argsz: int, least: int, name: str) -> None:
    if argsz < least:
        raise MalformedError(f"{name}: argsz {argsz} is below {least}")


@dataclass(frozen=True, slots=True)
class DmaMap:
    """DMA_MAP request. ``flags`` are seen from the function: bit 0 it may read, bit 1 write."""

    flags: int
    offset: int
    address: int
    size: int
    argsz: int = u.DMA_MAP.size

    def encode(self) -> bytes:
        return u.DMA_MAP.pack(self.argsz, self.flags, self.offset, self.address, self.size)

    @classmethod
    def decode(cls, payload: Part) -> DmaMap:
        argsz, flags, offset, address, size = _fixed(u.DMA_MAP, payload, "DMA_MAP")
        _argsz(argsz, u.DMA_MAP.size, "DMA_MAP")
        if flags & ~u.DMA_MAP_FLAGS:
            raise MalformedError(f"DMA_MAP: unknown flags {flags:#x}")
        if size == 0 or address + size > 1 << 64 or offset + size > 1 << 63:
            raise MalformedError(f"DMA_MAP: {size:#x} bytes at {address:#x} do not fit")
        return cls(flags, offset, address, size, argsz)


@dataclass(frozen=True, slots=True)
class DmaUnmap:
    """DMA_UNMAP request and reply (the reply repeats the request)."""

    flags: int
    address: int
    size: int
    argsz: int = u.DMA_UNMAP.size

    def encode(self) -> bytes:
        return u.DMA_UNMAP.pack(self.argsz, self.flags, self.address, self.size)

    @classmethod
    def decode(cls, payload: Part) -> DmaUnmap:
        argsz, flags, address, size = _fixed(u.DMA_UNMAP, payload, "DMA_UNMAP")
        _argsz(argsz, u.DMA_UNMAP.size, "DMA_UNMAP")
        # Dirty bitmaps went out of the specification; Holdfast's functions cannot be migrated.
        if flags & ~u.UNMAP_ALL:
            raise MalformedError(f"DMA_UNMAP: unsupported flags {flags:#x}")
        if flags & u.UNMAP_ALL and (address or size):
            raise MalformedError("DMA_UNMAP: UNMAP_ALL takes no address and no size")
        return cls(flags, address, size, argsz)

    @classmethod
    def decode_reply(cls, payload: Part) -> DmaUnmap:
        argsz, flags, address, size = _fixed(u.DMA_UNMAP, payload, "DMA_UNMAP reply")
        return cls(flags, address, size, argsz)


@dataclass(frozen=True, slots=True)
class DeviceInfo:
    """DEVICE_GET_INFO request and reply."""

    flags: int = 0
    num_regions: int = 0
    num_irqs: int = 0
    argsz: int = u.DEVICE_INFO.size

    def encode(self) -> bytes:
        return u.DEVICE_INFO.pack(self.argsz, self.flags, self.num_regions, self.num_irqs)

    @classmethod
    def decode(cls, payload: Part) -> DeviceInfo:
        argsz, flags, regions, irqs = _fixed(u.DEVICE_INFO, payload, "DEVICE_GET_INFO")
        _argsz(argsz, u.DEVICE_INFO.size, "DEVICE_GET_INFO")
        return cls(flags, regions, irqs, argsz)


@dataclass(frozen=True, slots=True)
class RegionInfo:
    """DEVICE_GET_REGION_INFO request and reply.

    ``areas`` None means that no sparse-mmap capability is present (linux/vfio.h,
    VFIO_REGION_INFO_CAP_SPARSE_MMAP).
    """

    index: int
    flags: int = 0
    size: int = 0
    offset: int = 0
    areas: tuple[Area, ...] | None = None
    argsz: int = u.REGION_INFO.size

    def encode(self) -> bytes:
        """The fixed part as it stands; :meth:`reply` adds the capabilities."""
        return u.REGION_INFO.pack(self.argsz, self.flags, self.index, 0, self.size, self.offset)

    def reply(self, room: int) -> tuple[bytes, bool]:
        """The reply payload for a request with argsz ``room``, and whether it is complete.

        If the capabilities do not fit, only the fixed part is sent, CAPS is left out and argsz
        tells what to ask for.
        """
        fixed = u.REGION_INFO
        if self.areas is None:
            return self.encode(), True
        cap = u.REGION_CAP.pack(u.REGION_CAP_SPARSE_MMAP, 1, 0)
        body = u.SPARSE_HEAD.pack(len(self.areas), 0)
        body += b"".join(u.SPARSE_AREA.pack(area.offset, area.size) for area in self.areas)
        need = fixed.size + len(cap) + len(body)
        if room < need:
            return fixed.pack(need, self.flags, self.index, 0, self.size, self.offset), False
        flags = self.flags | u.REGION_FLAG_CAPS
        head = fixed.pack(need, flags, self.index, fixed.size, self.size, self.offset)
        return head + cap + body, True

    @classmethod
    def decode(cls, payload: Part) -> RegionInfo:
        argsz, flags, index, cap, size, offset = _fixed(
            u.REGION_INFO, payload, "DEVICE_GET_REGION_INFO"
        )
        _argsz(argsz, u.REGION_INFO.size, "DEVICE_GET_REGION_INFO")
        areas = _sparse_areas(payload, cap) if flags & u.REGION_FLAG_CAPS else None
        return cls(index, flags, size, offset, areas, argsz)


def _sparse_areas(payload: Part, at: int) -> tuple[Area, ...] | None:
    """Walk the capability chain. Offsets must rise, so a chain cannot go round for ever."""
    last = u.REGION_INFO.size - 1
    while at:
        if at <= last or at + u.REGION_CAP.size > len(payload):
            raise MalformedError(f"region capability at {at} is outside the payload or goes back")
        ident, _version, following = u.REGION_CAP.unpack_from(payload, at)
        if ident == u.REGION_CAP_SPARSE_MMAP:
            return _areas_at(payload, at + u.REGION_CAP.size)
        last, at = at, following
    return None


def _areas_at(payload: Part, at: int) -> tuple[Area, ...]:
    if at + u.SPARSE_HEAD.size > len(payload):
        raise MalformedError("sparse-mmap capability is cut short")
    count, _reserved = u.SPARSE_HEAD.unpack_from(payload, at)
    at += u.SPARSE_HEAD.size
    if count > MAX_AREAS or at + count * u.SPARSE_AREA.size > len(payload):
        raise MalformedError(f"sparse-mmap capability names {count} areas")
    pieces = (u.SPARSE_AREA.unpack_from(payload, at + 16 * i) for i in range(count))
    return tuple(Area(offset, size) for offset, size in pieces)


@dataclass(frozen=True, slots=True)
class IoFd:
    """One entry of GET_REGION_IO_FDS. Only ``type`` 0, ioeventfd, is of use to Holdfast."""

    offset: int
    size: int
    fd_index: int
    type: int = u.IO_FD_IOEVENTFD
    flags: int = 0
    datamatch: int = 0

    def encode(self) -> bytes:
        return u.IO_FD_ENTRY.pack(
            self.offset, self.size, self.fd_index, self.type, self.flags, 0, self.datamatch
        )


@dataclass(frozen=True, slots=True)
class RegionIoFds:
    """GET_REGION_IO_FDS request (no entries) and reply. ``count`` may exceed the entries if the
    reply was cut to its fixed part because the requester's argsz was too small."""

    index: int
    entries: tuple[IoFd, ...] = ()
    argsz: int = u.IO_FDS.size
    flags: int = 0
    count: int = 0

    def encode(self) -> bytes:
        head = u.IO_FDS.pack(self.argsz, self.flags, self.index, self.count)
        return head + b"".join(entry.encode() for entry in self.entries)

    @classmethod
    def answer(cls, index: int, entries: tuple[IoFd, ...], room: int) -> RegionIoFds:
        """The reply for a requester that takes ``room`` bytes of payload."""
        need = u.IO_FDS.size + u.IO_FD_ENTRY.size * len(entries)
        return cls(index, entries if need <= room else (), need, 0, len(entries))

    @classmethod
    def decode_request(cls, payload: Part) -> RegionIoFds:
        argsz, flags, index, count = _fixed(u.IO_FDS, payload, "GET_REGION_IO_FDS")
        _argsz(argsz, u.IO_FDS.size, "GET_REGION_IO_FDS")
        if flags or count:
            raise MalformedError("GET_REGION_IO_FDS: flags and count must be 0")
        return cls(index, (), argsz)

    @classmethod
    def decode_reply(cls, payload: Part) -> RegionIoFds:
        """Entries of any stride: the specification says not to rely on 40 bytes."""
        argsz, flags, index, count = _fixed(u.IO_FDS, payload, "GET_REGION_IO_FDS reply")
        _argsz(argsz, u.IO_FDS.size, "GET_REGION_IO_FDS reply")
        if count > MAX_IO_FDS:
            raise MalformedError(f"GET_REGION_IO_FDS reply names {count} entries")
        if count == 0 or len(payload) == u.IO_FDS.size:
            return cls(index, (), argsz, flags, count)
        stride, rest = divmod(argsz - u.IO_FDS.size, count)
        if rest or stride < u.IO_FD_ENTRY.size or len(payload) < argsz:
            raise MalformedError("GET_REGION_IO_FDS reply: entries do not fill the payload")
        entries = tuple(_io_fd(payload, u.IO_FDS.size + i * stride, stride) for i in range(count))
        return cls(index, entries, argsz, flags, count)


def _io_fd(payload: Part, at: int, stride: int) -> IoFd:
    offset, size, fd_index, kind, flags, _pad, match = u.IO_FD_ENTRY.unpack_from(payload, at)
    if stride >= u.IO_FD_ENTRY.size + 8:  # a server in the field: shadow offset before datamatch
        (match,) = struct.unpack_from("<Q", payload, at + u.IO_FD_ENTRY.size)
    return IoFd(offset, size, fd_index, kind, flags, match)


@dataclass(frozen=True, slots=True)
class IrqInfo:
    """DEVICE_GET_IRQ_INFO request and reply; ``count`` vectors."""

    index: int
    flags: int = 0
    count: int = 0
    argsz: int = u.IRQ_INFO.size

    def encode(self) -> bytes:
        return u.IRQ_INFO.pack(self.argsz, self.flags, self.index, self.count)

    @classmethod
    def decode(cls, payload: Part) -> IrqInfo:
        argsz, flags, index, count = _fixed(u.IRQ_INFO, payload, "DEVICE_GET_IRQ_INFO")
        _argsz(argsz, u.IRQ_INFO.size, "DEVICE_GET_IRQ_INFO")
        return cls(index, flags, count, argsz)


@dataclass(frozen=True, slots=True)
class IrqSet:
    """DEVICE_SET_IRQS request. Exactly one data kind and one action (checked here)."""

    flags: int
    index: int
    start: int
    count: int
    data: bytes = b""

    @property
    def data_kind(self) -> int:
        return self.flags & u.IRQ_DATA_MASK

    @property
    def action(self) -> int:
        return self.flags & u.IRQ_ACTION_BITS

    def encode(self) -> bytes:
        argsz = u.IRQ_SET.size + len(self.data)
        return u.IRQ_SET.pack(argsz, self.flags, self.index, self.start, self.count) + self.data

    @classmethod
    def decode(cls, payload: Part) -> IrqSet:
        argsz, flags, index, start, count = _fixed(u.IRQ_SET, payload, "DEVICE_SET_IRQS")
        _argsz(argsz, u.IRQ_SET.size, "DEVICE_SET_IRQS")
        kinds = (u.IRQ_DATA_NONE, u.IRQ_DATA_BOOL, u.IRQ_DATA_EVENTFD)
        actions = (u.IRQ_ACTION_MASK, u.IRQ_ACTION_UNMASK, u.IRQ_ACTION_TRIGGER)
        kind, action = flags & u.IRQ_DATA_MASK, flags & u.IRQ_ACTION_BITS
        if kind not in kinds or action not in actions or flags != kind | action:
            raise MalformedError(f"DEVICE_SET_IRQS: flags {flags:#x}")
        off = kind == u.IRQ_DATA_NONE and action == u.IRQ_ACTION_TRIGGER and start == 0
        if count == 0 and not off:
            raise MalformedError("DEVICE_SET_IRQS: count 0 only disables a whole index")
        data = payload[u.IRQ_SET.size :]
        if len(data) != (count if kind == u.IRQ_DATA_BOOL else 0):
            raise MalformedError(f"DEVICE_SET_IRQS: {len(data)} bytes of data for {count} vectors")
        return cls(flags, index, start, count, bytes(data))


@dataclass(frozen=True, slots=True)
class RegionAccess:
    """REGION_READ and REGION_WRITE, request and reply. ``data`` where the direction has it."""

    offset: int
    region: int
    count: int
    data: Part = b""

    def encode(self) -> Parts:
        head: Parts = [u.REGION_ACCESS.pack(self.offset, self.region, self.count)]
        return [*head, self.data] if len(self.data) else head

    @classmethod
    def decode(cls, payload: Part, *, data: bool) -> RegionAccess:
        """``data`` tells whether this direction carries the bytes (write request, read reply)."""
        offset, region, count = _fixed(u.REGION_ACCESS, payload, "region access")
        body = payload[u.REGION_ACCESS.size :]
        if len(body) != (count if data else 0):
            raise MalformedError(f"region access of {count} bytes carries {len(body)}")
        return cls(offset, region, count, body)


@dataclass(frozen=True, slots=True)
class WriteMulti:
    """REGION_WRITE_MULTI request: small writes, applied in order."""

    writes: tuple[RegionAccess, ...]

    def encode(self) -> bytes:
        entry = u.WRITE_MULTI_ENTRY
        body = (entry.pack(w.offset, w.region, w.count, bytes(w.data)) for w in self.writes)
        return u.WRITE_MULTI.pack(len(self.writes)) + b"".join(body)

    @classmethod
    def decode(cls, payload: Part) -> WriteMulti:
        (count,) = _fixed(u.WRITE_MULTI, payload, "REGION_WRITE_MULTI")
        entry, head = u.WRITE_MULTI_ENTRY, u.WRITE_MULTI.size
        if count > MAX_MULTI_WRITES or head + count * entry.size > len(payload):
            raise MalformedError(f"REGION_WRITE_MULTI of {count} writes in {len(payload)} bytes")
        rows = (entry.unpack_from(payload, head + i * entry.size) for i in range(count))
        return cls(tuple(cls._checked(rows)))

    @staticmethod
    def _checked(rows: Iterable[tuple[int, int, int, bytes]]) -> Iterable[RegionAccess]:
        for offset, region, count, data in rows:
            if count > len(data):
                raise MalformedError(f"REGION_WRITE_MULTI: a write of {count} bytes")
            yield RegionAccess(offset, region, count, data[:count])


@dataclass(frozen=True, slots=True)
class DmaAccess:
    """DMA_READ and DMA_WRITE, request and reply. Address and count are both 64 bits wide."""

    address: int
    count: int
    data: Part = b""

    def encode(self) -> Parts:
        head: Parts = [u.DMA_ACCESS.pack(self.address, self.count)]
        return [*head, self.data] if len(self.data) else head

    @classmethod
    def decode(cls, payload: Part, *, data: bool) -> DmaAccess:
        address, count = _fixed(u.DMA_ACCESS, payload, "DMA access")
        body = payload[u.DMA_ACCESS.size :]
        if len(body) != (count if data else 0):
            raise MalformedError(f"DMA access of {count} bytes carries {len(body)}")
        return cls(address, count, body)
