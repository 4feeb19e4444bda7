# SPDX-License-Identifier: Apache-2.0
"""Lease messages: what goes in comes out, and nothing else comes in."""

from __future__ import annotations

from typing import Any, get_args

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast.errors import ProtocolError
from holdfast.values import Access
from holdfast.wire import lease as wire

U63 = st.integers(0, (1 << 63) - 1)
SEQ = st.integers(0, (1 << 32) - 1)
NAME = st.text(max_size=128)
PLAIN: st.SearchStrategy[Any] = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(1 << 63), (1 << 64) - 1)
    | st.floats(allow_nan=False)
    | st.text(max_size=20)
    | st.binary(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=8,
)
BLOCK = st.binary(min_size=1, max_size=wire.MAX_REGISTER_BLOCK)

REQUESTS: st.SearchStrategy[wire.Message] = st.one_of(
    st.builds(wire.Hello, seq=SEQ, version=st.integers(0, 0xFFFF), client=NAME),
    st.builds(
        wire.Open,
        seq=SEQ,
        access=st.none() | st.sampled_from(Access),
        channels=st.none() | st.integers(0, 64),
    ),
    st.builds(wire.TakeSlab, seq=SEQ, nbytes=U63),
    st.builds(wire.GiveSlab, seq=SEQ, slab=U63),
    st.builds(wire.Pin, seq=SEQ, address=U63, nbytes=U63, writable=st.booleans()),
    st.builds(wire.PinDone, seq=SEQ, pin=U63),
    st.builds(wire.Unpin, seq=SEQ, pin=U63),
    st.builds(
        wire.RegionRead,
        seq=SEQ,
        index=st.integers(0, 63),
        offset=U63,
        count=st.integers(1, wire.MAX_REGISTER_BLOCK),
    ),
    st.builds(wire.RegionWrite, seq=SEQ, index=st.integers(0, 63), offset=U63, data=BLOCK),
    st.builds(wire.Unmask, seq=SEQ),
    st.builds(wire.Command, seq=SEQ, name=NAME, args=st.dictionaries(NAME, PLAIN, max_size=3)),
    st.builds(wire.Regrant, seq=SEQ),
    st.builds(wire.Reset, seq=SEQ),
    st.builds(wire.Ps, seq=SEQ, after=U63),
    st.builds(wire.Retry, seq=SEQ, lease=U63, force=st.booleans()),
    st.builds(wire.Close, seq=SEQ),
)


def test_every_request_type_is_covered_here() -> None:
    named = {kind.__name__ for kind in get_args(wire.Request)}
    assert named == {
        "Hello", "Open", "TakeSlab", "GiveSlab", "Pin", "PinDone", "Unpin", "RegionRead",
        "RegionWrite", "Command", "Unmask", "Regrant", "Reset", "Ps", "Retry",
        "Close",
    }  # fmt: skip


@given(REQUESTS)
def test_requests_survive_the_wire(message: wire.Message) -> None:
    packet = wire.encode(message)
    assert len(packet) <= wire.MAX_PACKET
    assert wire.decode_request(packet) == message


@given(st.binary(max_size=512))
def test_garbage_is_a_protocol_error_and_nothing_else(packet: bytes) -> None:
    for decode in (wire.decode_request, wire.decode_reply):
        try:
            decode(packet)
        except ProtocolError:
            continue


@given(REQUESTS, st.data())
def test_a_damaged_message_is_refused_or_still_a_valid_one(
    message: wire.Message, data: st.DataObject
) -> None:
    packet = bytearray(wire.encode(message))
    at = data.draw(st.integers(0, len(packet) - 1))
    packet[at] ^= data.draw(st.integers(1, 255))
    try:
        told = wire.decode_request(bytes(packet))
    except ProtocolError:
        return
    assert isinstance(told, get_args(wire.Request))


@given(REQUESTS, st.data())
def test_a_truncated_message_is_refused(message: wire.Message, data: st.DataObject) -> None:
    packet = wire.encode(message)
    with pytest.raises(ProtocolError):
        wire.decode_request(packet[: data.draw(st.integers(0, len(packet) - 1))])


BAD: dict[str, dict[str, Any]] = {
    "unknown tag": {"type": "Surprise"},
    "no tag": {"version": 1},
    "surplus field": {"type": "Reset", "force": True},
    "missing field": {"type": "TakeSlab"},
    "negative size": {"type": "TakeSlab", "nbytes": -1},
    "size of 64 bits": {"type": "TakeSlab", "nbytes": 1 << 63},
    "size as text": {"type": "TakeSlab", "nbytes": "4096"},
    "size as float": {"type": "TakeSlab", "nbytes": 4096.5},
    "size as bool": {"type": "TakeSlab", "nbytes": True},
    "long block": {"type": "RegionRead", "index": 0, "offset": 0, "count": 4097},
    "empty block": {"type": "RegionRead", "index": 0, "offset": 0, "count": 0},
    "empty write": {"type": "RegionWrite", "index": 0, "offset": 0, "data": b""},
    "long write": {"type": "RegionWrite", "index": 0, "offset": 0, "data": bytes(4097)},
    "negative region": {"type": "RegionRead", "index": -1, "offset": 0, "count": 4},
    "region 64": {"type": "RegionRead", "index": 64, "offset": 0, "count": 4},
    "many channels": {"type": "Open", "channels": 65},
    "negative channels": {"type": "Open", "channels": -1},
    "unknown access": {"type": "Open", "access": "mine"},
    "long name": {"type": "Command", "name": "x" * 129},
    "arguments by number": {"type": "Command", "name": "x", "args": {1: 2}},
    "arguments as list": {"type": "Command", "name": "x", "args": [1]},
    "sequence of 33 bits": {"type": "Reset", "seq": 1 << 32},
    "negative sequence": {"type": "Reset", "seq": -1},
    "reply as request": {"type": "Done"},
    "version of 17 bits": {"type": "Hello", "version": 1 << 16},
}


@pytest.mark.parametrize("fields", BAD.values(), ids=BAD.keys())
def test_ill_formed_requests_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ProtocolError):
        wire.decode_request(msgspec.msgpack.encode(fields))


def test_deep_nesting_is_refused_not_a_crash() -> None:
    # An array of one array of one array ... as the value of a command's argument.
    deep = b"\x91" * 50_000 + b"\xc0"
    packet = b"\x83\xa4type\xa7Command\xa4name\xa1x\xa4args\x81\xa1a" + deep
    with pytest.raises(ProtocolError):
        wire.decode_request(packet)


def test_a_claimed_length_allocates_nothing() -> None:
    for head in (b"\xdd\xff\xff\xff\xff", b"\xc6\xff\xff\xff\xff", b"\xdf\xff\xff\xff\xff"):
        with pytest.raises(ProtocolError):
            wire.decode_request(b"\x82\xa4type\xa7Command\xa4name" + head)


def test_a_message_over_the_packet_limit_is_not_sent() -> None:
    with pytest.raises(ProtocolError, match="over"):
        wire.encode(wire.Result(value=bytes(wire.MAX_PACKET)))


def test_the_hello_of_any_version_can_be_read() -> None:
    for version in (0, wire.VERSION, wire.VERSION + 1, 0xFFFF):
        told = wire.decode_request(wire.encode(wire.Hello(version=version)))
        assert isinstance(told, wire.Hello)
        assert told.version == version


@given(st.lists(st.integers(0, 40_000), max_size=30))
def test_a_page_of_leases_always_fits_one_answer(sizes: list[int]) -> None:
    told = [{"lease": number, "log": "x" * size} for number, size in enumerate(sizes)]
    page = wire.page_of(told)
    assert page == told[: len(page)]
    assert bool(page) is bool(told)
    assert len(page) <= wire.PS_PAGE
    assert len(wire.encode(wire.Result(value={"leases": page, "more": True}))) <= wire.MAX_PACKET
    if len(page) < min(len(told), wire.PS_PAGE):
        assert sum(sizes[: len(page) + 1]) > wire.PS_BYTES - 64 * wire.PS_PAGE
