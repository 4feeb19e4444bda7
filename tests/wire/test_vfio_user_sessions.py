# SPDX-License-Identifier: Apache-2.0
"""Sessions without a socket: states, ids, limits."""

from __future__ import annotations

import errno

import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast.errors import ProtocolError, RingFull
from holdfast.uapi import vfio_user as u
from holdfast.uapi.vfio_user import Command
from holdfast.values import Area
from holdfast.wire.vfio_user import client, frame, messages, server
from holdfast.wire.vfio_user.capabilities import CLIENT, SERVER, Capabilities, Version
from holdfast.wire.vfio_user.client import ClientSession
from holdfast.wire.vfio_user.frame import MAX_DATA, Header
from holdfast.wire.vfio_user.ids import Outstanding
from holdfast.wire.vfio_user.server import ServerSession

Parts = list[bytes | memoryview]


def flat(parts: Parts) -> bytes:
    return b"".join(parts)


def raw(command: int, payload: bytes = b"", flags: int = 0, ident: int = 7) -> bytes:
    return flat(frame.message(ident, command, [payload], flags))


def ready(own: Capabilities = SERVER, peer: Capabilities = CLIENT) -> ServerSession:
    session = ServerSession(own)
    event = session.receive(raw(Command.VERSION, Version(0, 1, peer).encode()))
    assert isinstance(event, server.Negotiated)
    return session


# -- server --------------------------------------------------------------------------------------


def test_both_sessions_agree_on_the_twin_socket_when_both_offer_it() -> None:
    mine = Capabilities(max_msg_fds=4, twin_socket=True)
    asks = ClientSession(mine)
    answers = ServerSession(mine)
    ident, sent = asks.command(Command.VERSION, [asks.hello()])
    event = answers.receive(flat(sent))
    assert isinstance(event, server.Negotiated)
    assert event.twin
    reply = asks.receive(flat(event.reply))
    assert isinstance(reply, client.Reply)
    assert reply.msg_id == ident
    assert asks.accept(reply.payload, 1) == 0


@pytest.mark.parametrize(
    "peer",
    [
        Capabilities(max_msg_fds=8),
        Capabilities(max_msg_fds=0, twin_socket=True),
    ],
)
def test_the_server_enables_no_twin_that_the_client_cannot_have(peer: Capabilities) -> None:
    session = ServerSession(Capabilities(twin_socket=True))
    event = session.receive(raw(Command.VERSION, Version(0, 0, peer).encode()))
    assert isinstance(event, server.Negotiated)
    assert not event.twin
    assert b"twin" not in flat(event.reply)


def test_the_reply_has_the_lower_minor_and_write_multiple_only_if_asked() -> None:
    for minor, asked in ((0, False), (2, True)):
        session = ServerSession()
        hello = Version(0, minor, Capabilities(write_multiple=asked)).encode()
        event = session.receive(raw(Command.VERSION, hello))
        assert isinstance(event, server.Negotiated)
        answer = Version.decode(flat(event.reply)[16:])
        assert answer.minor == min(minor, u.MINOR)
        assert answer.capabilities.write_multiple == asked


@pytest.mark.parametrize(
    ("message", "fds"),
    [
        (raw(Command.DEVICE_GET_INFO, bytes(16)), 0),
        (raw(Command.VERSION, b"\0\0"), 0),
        (raw(Command.VERSION, u.VERSION.pack(1, 0)), 0),
        (raw(Command.VERSION, u.VERSION.pack(0, 0)), 1),
        (raw(Command.VERSION, u.VERSION.pack(0, 0), u.NO_REPLY), 0),
        (raw(Command.VERSION, u.VERSION.pack(0, 0) + b"{}"), 0),
    ],
)
def test_a_failed_negotiation_is_fatal(message: bytes, fds: int) -> None:
    event = ServerSession().receive(message, fds)
    assert isinstance(event, server.Refused)
    assert event.fatal


@pytest.mark.parametrize(
    ("message", "fds"),
    [
        (raw(Command.VERSION, u.VERSION.pack(0, 0)), 0),
        (raw(Command.DIRTY_PAGES, bytes(16)), 0),
        (raw(Command.DEVICE_FEATURE, bytes(8)), 0),
        (raw(Command.MIG_DATA_READ, bytes(8)), 0),
        (raw(Command.DMA_READ, bytes(16)), 0),
        (raw(0, bytes(16)), 0),
        (raw(9999), 0),
        (raw(Command.DEVICE_GET_INFO, bytes(3)), 0),
        (raw(Command.DEVICE_GET_INFO, u.DEVICE_INFO.pack(16, 0, 0, 0)), 1),
        (raw(Command.DMA_MAP, u.DMA_MAP.pack(32, 3, 0, 0, 4096)), 2),
        (raw(Command.DMA_MAP, u.DMA_MAP.pack(32, 3 | u.DMA_MMAP, 0, 0, 4096)), 0),
        (raw(Command.DEVICE_SET_IRQS, u.IRQ_SET.pack(20, 0x24, 2, 0, 3)), 2),
        (raw(Command.DEVICE_SET_IRQS, u.IRQ_SET.pack(20, 0x21, 2, 0, 1)), 1),
        (raw(Command.DEVICE_SET_IRQS, u.IRQ_SET.pack(20, 0x24, 2, 0, 99)), 99),
        (raw(Command.REGION_READ, u.REGION_ACCESS.pack(0, 0, MAX_DATA + 1)), 0),
        (raw(Command.REGION_READ, u.REGION_ACCESS.pack(0, 0, 4) + b"data"), 0),
    ],
)
def test_a_bad_command_gets_an_error_reply_and_the_connection_lives(
    message: bytes, fds: int
) -> None:
    session = ready()
    event = session.receive(message, fds)
    assert isinstance(event, server.Refused)
    assert not event.fatal
    assert event.reply is not None
    header = Header.decode(flat(event.reply))
    assert (header.msg_id, header.size, header.flags) == (7, 16, 0x21)
    assert header.failure == errno.EINVAL
    assert isinstance(session.receive(raw(Command.DEVICE_RESET)), server.Request)


def test_no_reply_is_kept_also_for_errors() -> None:
    event = ready().receive(raw(9999, b"", u.NO_REPLY))
    assert isinstance(event, server.Refused)
    assert event.reply is None


def test_the_twin_socket_carries_no_commands_of_the_client() -> None:
    event = ready().receive(raw(Command.DEVICE_RESET), twin=True)
    assert isinstance(event, server.Refused)


@pytest.mark.parametrize("length", [0, 12, 16])
def test_write_replies_of_older_clients_are_accepted(length: int) -> None:
    session = ready()
    ticket, sent = session.dma_write(0x1000, b"data")
    assert len(flat(sent)) == 36
    echo = u.DMA_ACCESS.pack(0x1000, 4)[:length]
    done = session.receive(raw(Command.DMA_WRITE, echo, u.TYPE_REPLY, ticket))
    assert done == server.DmaDone(ticket, None, b"")


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        u.DMA_ACCESS.pack(0x1000, 4),
        u.DMA_ACCESS.pack(0x1000, 4) + b"toolong",
        u.DMA_ACCESS.pack(0x2000, 4) + b"data",
        u.DMA_ACCESS.pack(0x1000, 3) + b"dat",
    ],
)
def test_a_read_reply_that_does_not_match_fails_the_read(payload: bytes) -> None:
    session = ready()
    ticket, _ = session.dma_read(0x1000, 4)
    done = session.receive(raw(Command.DMA_READ, payload, u.TYPE_REPLY, ticket))
    assert isinstance(done, server.DmaDone)
    assert done.error == errno.EPROTO


def test_late_and_foreign_replies_are_dropped() -> None:
    session = ready()
    ticket, _ = session.dma_read(0, 4)
    reply = raw(Command.DMA_READ, u.DMA_ACCESS.pack(0, 4) + b"data", u.TYPE_REPLY, ticket)
    wrong = raw(Command.DMA_WRITE, b"", u.TYPE_REPLY, ticket)
    assert isinstance(session.receive(wrong), server.Dropped)
    session.forget(ticket)
    assert isinstance(session.receive(reply), server.Dropped)


def test_an_error_reply_without_a_code_is_einval() -> None:
    session = ready()
    ticket, _ = session.dma_read(0, 4)
    reply = Header(ticket, Command.DMA_READ, 16, u.TYPE_REPLY | u.ERROR, 0).encode()
    assert session.receive(reply) == server.DmaDone(ticket, errno.EINVAL)


def test_dma_is_cut_to_the_smaller_limit() -> None:
    assert ready(peer=Capabilities(max_data_xfer_size=1024)).dma_chunk == 1024
    assert ready(peer=Capabilities(max_data_xfer_size=1 << 30)).dma_chunk == MAX_DATA


@given(st.binary(min_size=16, max_size=120), st.integers(0, 3), st.booleans())
def test_random_messages_never_upset_the_server_session(data: bytes, fds: int, twin: bool) -> None:
    session = ready()
    header = data[:4] + len(data).to_bytes(4, "little") + data[8:16]
    try:
        session.receive(header + data[16:], fds, twin=twin)
    except ProtocolError:
        pass


# -- client --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("payload", "fds"),
    [
        (Version(1, 0, Capabilities()).encode(), 0),
        (Version(0, 9, Capabilities()).encode(), 0),
        (b"\0", 0),
        (Version(0, 1, Capabilities(twin_socket=True)).encode(), 0),
        (Version(0, 1, Capabilities(twin_socket=True, twin_fd_index=1)).encode(), 1),
    ],
)
def test_an_answer_that_contradicts_the_offer_ends_the_connection(payload: bytes, fds: int) -> None:
    with pytest.raises(ProtocolError):
        ClientSession(Capabilities(twin_socket=True)).accept(payload, fds)


def test_a_twin_that_was_not_offered_ends_the_connection() -> None:
    answer = Version(0, 1, Capabilities(twin_socket=True, twin_fd_index=0)).encode()
    with pytest.raises(ProtocolError):
        ClientSession().accept(answer, 1)


def test_ids_of_both_directions_are_unrelated() -> None:
    session = ClientSession()
    ident, _ = session.command(Command.DEVICE_GET_INFO, [bytes(16)])
    event = session.receive(raw(Command.DMA_READ, u.DMA_ACCESS.pack(0, 4), ident=ident))
    assert isinstance(event, client.DmaRequest)
    reply = raw(Command.DEVICE_GET_INFO, bytes(16), u.TYPE_REPLY, ident)
    assert isinstance(session.receive(reply), client.Reply)
    assert isinstance(session.receive(reply), client.Dropped)


def test_dma_requests_are_answered_with_the_echo_and_the_data() -> None:
    session = ClientSession()
    event = session.receive(raw(Command.DMA_READ, u.DMA_ACCESS.pack(0x1000, 4)))
    assert isinstance(event, client.DmaRequest)
    done = session.done(event, b"data")
    assert done is not None
    assert flat(done)[16:] == u.DMA_ACCESS.pack(0x1000, 4) + b"data"
    failed = session.failed(event, errno.EFAULT)
    assert failed is not None
    assert Header.decode(flat(failed)).failure == errno.EFAULT


def test_posted_dma_writes_are_not_answered() -> None:
    session = ClientSession()
    payload = u.DMA_ACCESS.pack(0, 4) + b"data"
    event = session.receive(raw(Command.DMA_WRITE, payload, u.NO_REPLY))
    assert isinstance(event, client.DmaRequest)
    assert session.done(event) is None
    assert session.failed(event, errno.EFAULT) is None


@pytest.mark.parametrize(
    "message",
    [
        raw(Command.DEVICE_RESET),
        raw(Command.DMA_READ, bytes(3)),
        raw(Command.DMA_READ, u.DMA_ACCESS.pack(0, MAX_DATA + 1)),
        raw(Command.DMA_READ, u.DMA_ACCESS.pack((1 << 64) - 1, 2)),
        raw(Command.DMA_WRITE, u.DMA_ACCESS.pack(0, 1 << 40) + b"data"),
    ],
)
def test_bad_commands_of_a_server_are_refused(message: bytes) -> None:
    event = ClientSession().receive(message)
    assert isinstance(event, client.Refused)
    assert event.reply is not None


@given(st.binary(min_size=16, max_size=120), st.booleans())
def test_random_messages_never_upset_the_client_session(data: bytes, twin: bool) -> None:
    session = ClientSession()
    session.command(Command.REGION_READ, [bytes(16)])
    header = data[:4] + len(data).to_bytes(4, "little") + data[8:16]
    try:
        session.receive(header + data[16:], twin=twin)
    except ProtocolError:
        pass


# -- ids -----------------------------------------------------------------------------------------


def test_ids_go_round_and_skip_those_that_wait() -> None:
    ids: Outstanding[str] = Outstanding(0xFFFF)
    assert ids.add("a") == 0xFFFF
    assert ids.add("b") == 0
    ids._next = 0xFFFF
    assert ids.fresh() == 1
    assert ids.take(0xFFFF) == "a"
    assert ids.take(0xFFFF) is None
    assert ids.clear() == [0]


def test_there_is_a_bound_on_unanswered_commands() -> None:
    ids: Outstanding[int] = Outstanding(limit=2)
    ids.add(1)
    ids.add(2)
    with pytest.raises(RingFull):
        ids.add(3)


def test_a_short_region_info_names_the_room_it_needs() -> None:
    info = messages.RegionInfo(0, 7, 0x2000, 0, (Area(0, 0x1000),))
    payload, complete = info.reply(32)
    assert not complete
    short = messages.RegionInfo.decode(payload)
    assert short.argsz == 64
    assert short.areas is None
