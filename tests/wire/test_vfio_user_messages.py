# SPDX-License-Identifier: Apache-2.0
"""vfio-user payloads: bytes as the specification has them, round trips, and nonsense."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast.errors import ProtocolError
from holdfast.uapi import vfio_user as u
from holdfast.uapi.vfio_user import Command
from holdfast.values import Area
from holdfast.wire.vfio_user import frame, messages
from holdfast.wire.vfio_user.capabilities import (
    CLIENT,
    MAX_JSON,
    SERVER,
    Capabilities,
    Version,
)
from holdfast.wire.vfio_user.frame import Header, MalformedError

U16 = st.integers(0, (1 << 16) - 1)
U32 = st.integers(0, (1 << 32) - 1)
U64 = st.integers(0, (1 << 64) - 1)


def hexa(text: str) -> bytes:
    return bytes.fromhex(text.replace("|", ""))


def whole(parts: list[bytes | memoryview]) -> bytes:
    return b"".join(parts)


# -- examples in bytes ---------------------------------------------------------------------------


def test_version_request_with_empty_json() -> None:
    raw = hexa("0100 0100 17000000 00000000 00000000 | 0000 0100 7b7d 00")
    assert Header.decode(raw) == Header(1, Command.VERSION, 23)
    assert Version.decode(raw[16:]) == Version(0, 1, Capabilities())


def test_get_info_request_and_reply() -> None:
    request = hexa("0400 0400 20000000 00000000 00000000 | 10000000 00000000 00000000 00000000")
    sent = frame.message(4, Command.DEVICE_GET_INFO, [messages.DeviceInfo().encode()])
    assert whole(sent) == request
    reply = hexa("0400 0400 20000000 01000000 00000000 | 10000000 03000000 09000000 05000000")
    info = messages.DeviceInfo(3, 9, 5)
    assert whole(frame.reply(Header.decode(request), [info.encode()])) == reply
    assert messages.DeviceInfo.decode(reply[16:]) == info


def test_error_reply() -> None:
    header = Header(9, Command.REGION_READ, 32)
    assert whole(frame.error_reply(header, errno.EINVAL)) == hexa(
        "0900 0900 10000000 21000000 16000000"
    )


def test_region_read_request() -> None:
    raw = hexa("2000 0900 20000000 00000000 00000000 | 1000000000000000 00000000 04000000")
    body = messages.RegionAccess(0x10, 0, 4)
    assert whole(frame.message(0x20, Command.REGION_READ, body.encode())) == raw
    assert messages.RegionAccess.decode(raw[16:], data=False) == body


def test_set_irqs_connect_and_disable_intx() -> None:
    connect = messages.IrqSet(u.IRQ_DATA_EVENTFD | u.IRQ_ACTION_TRIGGER, 0, 0, 1)
    assert connect.encode() == hexa("14000000 24000000 00000000 00000000 01000000")
    disable = messages.IrqSet(u.IRQ_DATA_NONE | u.IRQ_ACTION_TRIGGER, 0, 0, 0)
    assert disable.encode() == hexa("14000000 21000000 00000000 00000000 00000000")


def test_dma_map_of_low_memory() -> None:
    body = messages.DmaMap(3, 0, 0, 0xA0000)
    assert body.encode() == hexa(
        "20000000 03000000 0000000000000000 0000000000000000 00000a0000000000"
    )


def test_region_info_with_two_mappable_areas() -> None:
    info = messages.RegionInfo(1, 0x7, 0x4000, 0, (Area(0, 0x1000), Area(0x2000, 0x1000)))
    payload, complete = info.reply(80)
    assert complete
    assert payload == hexa(
        "50000000 0f000000 01000000 20000000 0040000000000000 0000000000000000"
        "| 0100 0100 00000000 02000000 00000000"
        "| 0000000000000000 0010000000000000 | 0020000000000000 0010000000000000"
    )
    short, complete = info.reply(32)
    assert not complete
    assert short == hexa("50000000 07000000 01000000 00000000 0040000000000000 0000000000000000")


# -- round trips ---------------------------------------------------------------------------------


@given(U16, U16, st.integers(16, frame.MAX_MESSAGE), st.sampled_from([0, 1, 0x10, 0x21]), U32)
def test_headers_round_trip(ident: int, command: int, size: int, flags: int, error: int) -> None:
    header = Header(ident, command, size, flags, error)
    assert Header.decode(header.encode()) == header


SIZES = st.integers(1, 1 << 48)
AREAS = st.lists(st.builds(Area, U64, U64), max_size=8).map(tuple)
KINDS = st.sampled_from([u.IRQ_DATA_NONE, u.IRQ_DATA_EVENTFD])
ACTIONS = st.sampled_from([u.IRQ_ACTION_MASK, u.IRQ_ACTION_UNMASK, u.IRQ_ACTION_TRIGGER])


@given(st.integers(0, 15), st.integers(0, 1 << 40), st.integers(0, 1 << 63), SIZES)
def test_dma_maps_round_trip(flags: int, offset: int, address: int, size: int) -> None:
    body = messages.DmaMap(flags, offset, address, size)
    assert messages.DmaMap.decode(body.encode()) == body


@given(U64, U64)
def test_dma_unmaps_round_trip(address: int, size: int) -> None:
    body = messages.DmaUnmap(0, address, size)
    assert messages.DmaUnmap.decode(body.encode()) == body
    assert messages.DmaUnmap.decode_reply(body.encode()) == body


@given(U32, U32, U32)
def test_device_and_irq_info_round_trip(a: int, b: int, c: int) -> None:
    device = messages.DeviceInfo(a, b, c)
    assert messages.DeviceInfo.decode(device.encode()) == device
    irq = messages.IrqInfo(a, b, c)
    assert messages.IrqInfo.decode(irq.encode()) == irq


@given(st.integers(0, 7), U32, U64, U64, st.none() | AREAS)
def test_complete_region_infos_round_trip(
    flags: int, index: int, size: int, offset: int, areas: tuple[Area, ...] | None
) -> None:
    payload, complete = messages.RegionInfo(index, flags, size, offset, areas).reply(1 << 16)
    found = messages.RegionInfo.decode(payload)
    assert complete
    assert found.argsz == len(payload)
    assert (found.index, found.size, found.offset, found.areas) == (index, size, offset, areas)


@given(st.lists(st.builds(messages.IoFd, U64, U64, U32, U32, U32, U64), max_size=8).map(tuple), U32)
def test_io_fds_round_trip(entries: tuple[messages.IoFd, ...], index: int) -> None:
    reply = messages.RegionIoFds.answer(index, entries, 1 << 16)
    assert messages.RegionIoFds.decode_reply(reply.encode()) == reply
    asked = messages.RegionIoFds(index, argsz=100)
    assert messages.RegionIoFds.decode_request(asked.encode()) == asked


def test_io_fd_entries_of_48_bytes_are_understood() -> None:
    entry = messages.IoFd(0x40, 4, 0, flags=1, datamatch=0)
    wide = entry.encode() + (7).to_bytes(8, "little")
    raw = u.IO_FDS.pack(16 + 2 * 48, 0, 2, 2) + wide + wide
    found = messages.RegionIoFds.decode_reply(raw)
    assert [e.datamatch for e in found.entries] == [7, 7]


@given(KINDS, ACTIONS, U32, U32, st.integers(1, 1 << 16))
def test_irq_sets_round_trip(kind: int, action: int, index: int, start: int, count: int) -> None:
    body = messages.IrqSet(kind | action, index, start, count)
    assert messages.IrqSet.decode(body.encode()) == body


@given(st.binary(min_size=1, max_size=64), ACTIONS)
def test_irq_sets_with_booleans_round_trip(data: bytes, action: int) -> None:
    body = messages.IrqSet(u.IRQ_DATA_BOOL | action, 2, 0, len(data), data)
    assert messages.IrqSet.decode(body.encode()) == body


@given(U64, U32, st.binary(max_size=64))
def test_accesses_round_trip(offset: int, region: int, data: bytes) -> None:
    access = messages.RegionAccess(offset, region, len(data), data)
    assert messages.RegionAccess.decode(whole(access.encode()), data=True) == access
    dma = messages.DmaAccess(offset, len(data), data)
    assert messages.DmaAccess.decode(whole(dma.encode()), data=True) == dma


@given(st.lists(st.tuples(U64, U32, st.binary(max_size=8)), max_size=20))
def test_multiple_writes_round_trip(writes: list[tuple[int, int, bytes]]) -> None:
    body = messages.WriteMulti(
        tuple(messages.RegionAccess(at, region, len(data), data) for at, region, data in writes)
    )
    assert messages.WriteMulti.decode(body.encode()) == body


@given(
    st.builds(
        Capabilities,
        st.integers(0, 253),
        st.integers(1, 1 << 30),
        st.integers(1, 65535),
        st.integers(1, 1 << 40),
        st.just(True),
        st.integers(0, 3),
        st.booleans(),
    )
)
def test_versions_round_trip(capabilities: Capabilities) -> None:
    version = Version(0, 1, capabilities)
    assert Version.decode(version.encode()) == version


# -- negotiation text ----------------------------------------------------------------------------


def test_what_a_monitor_offers_is_understood() -> None:
    text = json.dumps(
        {
            "capabilities": {
                "migration": {"pgsize": 4096, "max_bitmap_size": 1 << 28},
                "max_msg_fds": 16,
                "max_data_xfer_size": 1048576,
                "max_dma_maps": 65535,
                "pgsizes": 4096,
                "write_multiple": True,
                "something_new": [1, 2],
            }
        }
    )
    found = Version.decode(bytes(4) + text.encode() + b"\0")
    assert found.capabilities == Capabilities(16, 1 << 20, 65535, 4096, write_multiple=True)


def test_a_version_without_text_means_the_defaults() -> None:
    assert Version.decode(bytes(4)).capabilities == Capabilities()


def test_the_servers_answer_fits_into_what_the_pickiest_client_takes() -> None:
    assert len(Version(0, 1, SERVER).encode()) < 150
    assert SERVER.max_msg_fds <= 16
    assert b'"capabilities"' in Version(0, 1, Capabilities()).encode()
    assert CLIENT.max_data_xfer_size == frame.MAX_DATA


@pytest.mark.parametrize(
    "text",
    [
        b"{}",
        b"\0",
        b"{\0",
        b"[]\0",
        b"nonsense\0",
        b'{"capabilities": 3}\0',
        b'{"capabilities": {"max_msg_fds": "16"}}\0',
        b'{"capabilities": {"max_msg_fds": -1}}\0',
        b'{"capabilities": {"max_data_xfer_size": 0}}\0',
        b'{"capabilities": {"max_data_xfer_size": 1e300}}\0',
        b'{"capabilities": {"pgsizes": 99999999999999999999999999}}\0',
        b'{"capabilities": {"twin_socket": true}}\0',
        b'{"capabilities": {"twin_socket": {"supported": true, "fd_index": -1}}}\0',
        b'{"capabilities": {"write_multiple": 1}}\0',
        b'{"capabilities": {"migration": 1}}\0',
        b"\xff\xfe\0",
        b"{}" + b" " * MAX_JSON + b"\0",
        b"[" * 10000 + b"\0",
    ],
)
def test_bad_negotiation_text_is_malformed(text: bytes) -> None:
    with pytest.raises(MalformedError):
        Version.decode(bytes(4) + text)


# -- nonsense ------------------------------------------------------------------------------------

DECODERS: list[Callable[[bytes], object]] = [
    Version.decode,
    messages.DmaMap.decode,
    messages.DmaUnmap.decode,
    messages.DmaUnmap.decode_reply,
    messages.DeviceInfo.decode,
    messages.RegionInfo.decode,
    messages.RegionIoFds.decode_request,
    messages.RegionIoFds.decode_reply,
    messages.IrqInfo.decode,
    messages.IrqSet.decode,
    messages.WriteMulti.decode,
    lambda raw: messages.RegionAccess.decode(raw, data=True),
    lambda raw: messages.RegionAccess.decode(raw, data=False),
    lambda raw: messages.DmaAccess.decode(raw, data=True),
    lambda raw: messages.DmaAccess.decode(raw, data=False),
]


@given(st.binary(max_size=200), st.sampled_from(DECODERS))
def test_random_payloads_decode_or_are_malformed(
    raw: bytes, decode: Callable[[bytes], object]
) -> None:
    try:
        decode(raw)
    except MalformedError:
        pass


@pytest.mark.parametrize(
    ("decode", "raw"),
    [
        (messages.DmaMap.decode, u.DMA_MAP.pack(31, 3, 0, 0, 4096)),
        (messages.DmaMap.decode, u.DMA_MAP.pack(32, 3, 0, 0, 0)),
        (messages.DmaMap.decode, u.DMA_MAP.pack(32, 3, 0, (1 << 64) - 1, 2)),
        (messages.DmaMap.decode, u.DMA_MAP.pack(32, 3, (1 << 64) - 1, 0, 2)),
        (messages.DmaMap.decode, u.DMA_MAP.pack(32, 0x13, 0, 0, 4096)),
        (messages.DmaUnmap.decode, u.DMA_UNMAP.pack(23, 0, 0, 1)),
        (messages.DmaUnmap.decode, u.DMA_UNMAP.pack(24, 1, 0, 1)),
        (messages.DmaUnmap.decode, u.DMA_UNMAP.pack(24, 2, 0, 1)),
        (messages.DmaUnmap.decode, u.DMA_UNMAP.pack(24, 4, 0, 1)),
        (messages.DeviceInfo.decode, u.DEVICE_INFO.pack(15, 0, 0, 0)),
        (messages.RegionInfo.decode, u.REGION_INFO.pack(80, 8, 0, 32, 1, 0)),
        (messages.RegionInfo.decode, u.REGION_INFO.pack(80, 8, 0, 8, 1, 0)),
        (
            messages.RegionInfo.decode,  # a chain that bites its tail
            u.REGION_INFO.pack(80, 8, 0, 32, 1, 0) + u.REGION_CAP.pack(2, 1, 32) + bytes(16),
        ),
        (
            messages.RegionInfo.decode,  # more areas than there are bytes
            u.REGION_INFO.pack(80, 8, 0, 32, 1, 0)
            + u.REGION_CAP.pack(1, 1, 0)
            + u.SPARSE_HEAD.pack(1 << 30, 0),
        ),
        (messages.RegionIoFds.decode_request, u.IO_FDS.pack(16, 1, 0, 0)),
        (messages.RegionIoFds.decode_request, u.IO_FDS.pack(16, 0, 0, 1)),
        (messages.RegionIoFds.decode_reply, u.IO_FDS.pack(56, 0, 0, 1 << 31) + bytes(40)),
        (messages.RegionIoFds.decode_reply, u.IO_FDS.pack(96, 0, 0, 2) + bytes(40)),
        (messages.RegionIoFds.decode_reply, u.IO_FDS.pack(32, 0, 0, 1) + bytes(16)),
        (messages.IrqSet.decode, u.IRQ_SET.pack(20, 0x04, 0, 0, 1)),
        (messages.IrqSet.decode, u.IRQ_SET.pack(20, 0x20, 0, 0, 1)),
        (messages.IrqSet.decode, u.IRQ_SET.pack(20, 0x25, 0, 0, 1)),
        (messages.IrqSet.decode, u.IRQ_SET.pack(20, 0x38, 0, 0, 1)),
        (messages.IrqSet.decode, u.IRQ_SET.pack(20, 0x64, 0, 0, 1)),
        (messages.IrqSet.decode, u.IRQ_SET.pack(20, 0x24, 0, 0, 0)),
        (messages.IrqSet.decode, u.IRQ_SET.pack(20, 0x21, 0, 1, 0)),
        (messages.IrqSet.decode, u.IRQ_SET.pack(20, 0x22, 0, 0, 1 << 31)),
        (messages.IrqSet.decode, u.IRQ_SET.pack(20, 0x22, 0, 0, 2) + b"\1"),
        (messages.WriteMulti.decode, u.WRITE_MULTI.pack(1 << 60)),
        (messages.WriteMulti.decode, u.WRITE_MULTI.pack(2) + bytes(24)),
        (
            messages.WriteMulti.decode,
            u.WRITE_MULTI.pack(1) + u.WRITE_MULTI_ENTRY.pack(0, 0, 9, bytes(8)),
        ),
        (
            lambda raw: messages.RegionAccess.decode(raw, data=True),
            u.REGION_ACCESS.pack(0, 0, 1 << 31) + b"abc",
        ),
        (
            lambda raw: messages.DmaAccess.decode(raw, data=True),
            u.DMA_ACCESS.pack(0, 1 << 63) + b"abc",
        ),
    ],
)
def test_lengths_and_flags_that_lie_are_malformed(
    decode: Callable[[bytes], object], raw: bytes
) -> None:
    with pytest.raises(MalformedError):
        decode(raw)


@pytest.mark.parametrize(
    ("size", "flags"), [(15, 0), (0, 0), (frame.MAX_MESSAGE + 1, 0), (0xFFFFFFFF, 1), (16, 2)]
)
def test_headers_that_break_the_framing_are_protocol_errors(size: int, flags: int) -> None:
    with pytest.raises(ProtocolError):
        Header.decode(u.HEADER.pack(1, 1, size, flags, 0))
