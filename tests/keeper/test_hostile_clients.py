# SPDX-License-Identifier: Apache-2.0
"""Clients that break the protocol, never read, or hang up and go on: the keeper goes on serving."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress

import msgspec
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import holdfast
from holdfast.errors import (
    BadAccess,
    BadBuffer,
    HoldfastError,
    KeeperGone,
    ProtocolError,
    QuotaExceeded,
    UsageError,
    VersionMismatch,
)
from holdfast.keeper import embedded
from holdfast.keeper.client import LeaseClient
from holdfast.kernel import events, packets, procfs
from holdfast.torture.outside import settle
from holdfast.torture.stack import Stack
from holdfast.values import Target
from holdfast.wire import lease as wire

pytestmark = pytest.mark.usefixtures("clean")
LONG = 10.0
ANY_TIME = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


class Raw:
    """A connection to the keeper without any manners."""

    def __init__(self, target: str) -> None:
        self.sock = packets.connect(str(embedded.socket_path(Target.parse(target))), LONG)
        self.sock.settimeout(LONG)

    def send(self, message: wire.Message | bytes, fds: Sequence[int] = ()) -> None:
        packet = message if isinstance(message, bytes) else wire.encode(message)
        packets.send(self.sock, packet, fds)

    def receive(self) -> tuple[wire.Reply | None, list[int]]:
        """The next reply with its descriptors; None at hang-up."""
        try:
            packet, fds = packets.receive(self.sock, wire.MAX_PACKET, wire.MAX_FDS)
        except ConnectionError:
            return None, []
        return (wire.decode_reply(packet), fds) if packet else (None, [])

    def ask(self, message: wire.Message | bytes, fds: Sequence[int] = ()) -> wire.Reply | None:
        self.send(message, fds)
        reply, received = self.receive()
        for fd in received:
            os.close(fd)
        return reply

    def hello(self) -> None:
        assert isinstance(self.ask(wire.Hello(version=wire.VERSION)), wire.Welcome)

    def open(self, **wanted: int) -> wire.Opened:
        self.hello()
        opened = self.ask(wire.Open(**wanted))  # type: ignore[arg-type]
        assert isinstance(opened, wire.Opened), opened
        return opened

    def hung_up(self) -> bool:
        while True:
            reply, fds = self.receive()
            for fd in fds:
                os.close(fd)
            if reply is None:
                return True


@contextmanager
def raw(stack: Stack) -> Iterator[Raw]:
    client = Raw(stack.target)
    with client.sock:
        yield client


def still_serves(stack: Stack) -> None:
    """The keeper gives a lease to the next one, and a transfer works."""
    with holdfast.open(stack.target, timeout=LONG) as card:
        source, back = card.alloc(256), card.alloc(256)
        source.array[:] = np.arange(256)
        card.dma.to_card(source).wait(LONG)
        card.dma.from_card(back).wait(LONG)
        assert np.array_equal(source.array, back.array)


def descriptors(stack: Stack) -> int:
    return len(procfs.open_descriptors(stack.keeper_pid))


def unreleased(stack: Stack) -> int:
    return sum(lease["state"] != "released" for lease in stack.ps()["leases"])


# -- nonsense -------------------------------------------------------------------------------------


@ANY_TIME
@given(st.lists(st.binary(min_size=1, max_size=300), min_size=1, max_size=4), st.booleans())
def test_garbage_ends_that_connection_only(xdma: Stack, noise: list[bytes], polite: bool) -> None:
    with raw(xdma) as client:
        if polite:
            client.open(channels=0)
        for packet in noise:
            with suppress(OSError):
                client.send(packet)
        client.sock.shutdown(socket.SHUT_WR)
        assert client.hung_up()


MESSAGES = st.one_of(
    st.builds(wire.Hello, version=st.just(wire.VERSION)),
    st.builds(wire.Open, channels=st.sampled_from([None, 0, 1, 64])),
    st.builds(wire.PinDone, pin=st.integers(0, 4)),
    st.builds(wire.TakeSlab, nbytes=st.sampled_from([0, 1, 4097, 1 << 40, (1 << 63) - 1])),
    st.builds(wire.GiveSlab, slab=st.integers(0, 5)),
    st.builds(
        wire.Pin,
        address=st.sampled_from([0, 1, 1 << 46, (1 << 63) - 1]),
        nbytes=st.sampled_from([0, 1, 4096, 1 << 45, (1 << 63) - 1]),
        writable=st.booleans(),
    ),
    st.builds(wire.Unpin, pin=st.integers(0, 5)),
    st.builds(
        wire.RegionRead,
        index=st.sampled_from([0, 1, 5, 7, 8, 9, 63]),
        offset=st.sampled_from([0, 3, 0x10000, (1 << 63) - 1]),
        count=st.sampled_from([1, 3, 4, 4096]),
    ),
    st.builds(
        wire.RegionWrite, index=st.sampled_from([0, 8, 63]), offset=st.just(0x1000),
        data=st.binary(min_size=1, max_size=8),
    ),
    st.builds(
        wire.Command,
        name=st.sampled_from(["channel_status", "nothing"]),
        args=st.dictionaries(st.text(max_size=4), st.integers(0, 9) | st.text(), max_size=2),
    ),
    st.builds(wire.Regrant),
    st.builds(wire.Ps, after=st.integers(0, (1 << 63) - 1)),
    st.builds(wire.Close),
)  # fmt: skip


@ANY_TIME
@given(st.lists(MESSAGES, max_size=10))
def test_valid_messages_in_any_order_are_answered_or_end_the_connection(
    xdma: Stack, messages: list[wire.Message]
) -> None:
    with raw(xdma) as client:
        for number, message in enumerate(messages, 1):
            try:
                reply = client.ask(msgspec.structs.replace(message, seq=number))
            except OSError:
                break
            if reply is None:
                break
            assert reply.seq in (number, 0)
            if isinstance(reply, wire.Failed) and reply.seq == 0:
                assert client.hung_up()
                break


def test_after_all_the_nonsense_nothing_is_left_and_the_keeper_serves(xdma: Stack) -> None:
    still_serves(xdma)
    assert settle(lambda: unreleased(xdma), goal=0, timeout=LONG) == 0
    before = descriptors(xdma)
    for packet in [b"\x00", b"\xff" * 65536, wire.encode(wire.Close()), b"x"] * 10:
        with raw(xdma) as client:
            reading, writing = os.pipe()
            client.send(packet, [reading, writing])
            os.close(reading)
            os.close(writing)
            assert client.hung_up()
    still_serves(xdma)
    assert settle(lambda: descriptors(xdma), goal=before, timeout=LONG) <= before


def test_packets_and_descriptors_over_the_limit_end_the_connection(xdma: Stack) -> None:
    before = descriptors(xdma)
    with raw(xdma) as client:
        client.open(channels=0)
        client.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
        client.send(b"x" * (wire.MAX_PACKET + 1))
        assert client.hung_up()
    with raw(xdma) as client:
        client.open(channels=0)
        client.send(wire.encode(wire.Ps()), [0] * (wire.MAX_FDS + 1))
        assert client.hung_up()
    assert settle(lambda: descriptors(xdma), goal=before, timeout=LONG) <= before


def test_another_version_is_refused_by_name(xdma: Stack) -> None:
    for version in (0, wire.VERSION + 1, 0xFFFF):
        with raw(xdma) as client:
            reply = client.ask(wire.Hello(version=version))
            assert isinstance(reply, wire.Failed)
            assert reply.error["kind"] == VersionMismatch.__name__
            assert client.hung_up()


def test_the_first_message_must_be_a_hello(xdma: Stack) -> None:
    with raw(xdma) as client:
        reply = client.ask(wire.Ps())
        assert isinstance(reply, wire.Failed)
        assert reply.error["kind"] == ProtocolError.__name__


def test_requests_before_opening_are_refused_and_harmless(xdma: Stack) -> None:
    with raw(xdma) as client:
        client.hello()
        for message in (wire.TakeSlab(nbytes=1), wire.Reset(), wire.Regrant(), wire.Unpin(pin=1)):
            reply = client.ask(message)
            assert isinstance(reply, wire.Failed)
            assert reply.error["kind"] == UsageError.__name__
        assert isinstance(client.ask(wire.Open(channels=0)), wire.Opened)


def test_a_second_lease_on_one_connection_is_refused(xdma: Stack) -> None:
    with raw(xdma) as client:
        client.open(channels=0)
        assert isinstance(client.ask(wire.Open()), wire.Failed)
        assert isinstance(client.ask(wire.TakeSlab(nbytes=1)), wire.SlabTaken)


# -- requests that are refused one by one ---------------------------------------------------------


def refusal(client: Raw, message: wire.Message, fds: Sequence[int] = ()) -> str:
    reply = client.ask(message, fds)
    assert isinstance(reply, wire.Failed), reply
    return str(reply.error["kind"])


def test_memory_requests_beyond_reason_change_nothing(serve: Callable[..., Stack]) -> None:
    stack = serve("emu:xdma", "--quota", "4M")
    with raw(stack) as client:
        client.open(channels=1)
        held = stack.ps()["leases"][-1]["bytes"]
        assert refusal(client, wire.TakeSlab(nbytes=0)) == BadBuffer.__name__
        assert refusal(client, wire.TakeSlab(nbytes=8 << 20)) == QuotaExceeded.__name__
        assert refusal(client, wire.TakeSlab(nbytes=(1 << 63) - 1)) == QuotaExceeded.__name__
        assert refusal(client, wire.GiveSlab(slab=99)) == UsageError.__name__
        assert refusal(client, wire.Unpin(pin=99)) == UsageError.__name__
        assert stack.ps()["leases"][-1]["bytes"] == held
    still_serves(stack)


def test_somebody_elses_memory_cannot_be_pinned(xdma: Stack) -> None:
    with raw(xdma) as client:
        client.open(channels=0)
        pin = wire.Pin(address=4096, nbytes=4096, writable=True)
        assert refusal(client, pin) == BadBuffer.__name__
        for path in (f"/proc/{xdma.keeper_pid}/mem", "/proc/self/maps", "/dev/zero"):
            fd = os.open(path, os.O_RDONLY)
            try:
                assert refusal(client, pin, [fd]) == BadBuffer.__name__
            finally:
                os.close(fd)


def test_confirming_a_pin_that_was_never_reserved_ends_the_connection(xdma: Stack) -> None:
    with raw(xdma) as client:
        client.open(channels=0)
        client.send(wire.PinDone(pin=77))
        assert client.hung_up()
    still_serves(xdma)


def test_register_blocks_outside_of_their_region_are_refused(xdma: Stack) -> None:
    with raw(xdma) as client:
        client.open(channels=1)
        for index, offset, count in [
            (0, 0x10000, 1), (0, 0xFFFF, 2), (8, 0, 1), (63, 0, 1), (7, 4096, 1),
            (0, (1 << 63) - 1, 1),
        ]:  # fmt: skip
            read = wire.RegionRead(index=index, offset=offset, count=count)
            assert refusal(client, read) == BadAccess.__name__
            write = wire.RegionWrite(index=index, offset=offset, data=bytes(count))
            assert refusal(client, write) == BadAccess.__name__


# -- clients that do not read, hang up, or lie ----------------------------------------------------


def test_a_client_that_never_reads_is_hung_up_on(xdma: Stack) -> None:
    with raw(xdma) as client:
        client.hello()
        client.sock.setblocking(False)
        packet = wire.encode(wire.Ps())
        with pytest.raises((BrokenPipeError, ConnectionResetError)):  # noqa: PT012 - when is not ours to say
            for _ in range(2_000_000):
                with suppress(BlockingIOError):
                    client.send(packet)
    still_serves(xdma)


def test_a_client_that_never_reads_notices_does_not_hold_its_lease(
    serve: Callable[..., Stack],
) -> None:
    stack = serve("emu:xdma")
    with raw(stack) as deaf:
        deaf.open(channels=0)
        with holdfast.open(stack.target) as card:
            for _ in range(2000):
                card.lease.reset()
                if unreleased(stack) == 1:
                    break
            else:
                pytest.fail("the keeper queues notices without bound")
    assert settle(lambda: unreleased(stack), goal=0, timeout=LONG) == 0


def opened_with_bells(client: Raw) -> tuple[wire.Opened, list[int]]:
    client.hello()
    client.send(wire.Open(channels=1))
    opened, fds = client.receive()
    assert isinstance(opened, wire.Opened)
    return opened, fds


@pytest.mark.parametrize("goodbye", [False, True], ids=["hung up", "said goodbye"])
@pytest.mark.parametrize("arena", [(), ("--arena", "16M")], ids=["own files", "arena"])
def test_after_release_a_kept_doorbell_moves_nothing(
    serve: Callable[..., Stack], arena: tuple[str, ...], goodbye: bool
) -> None:
    stack = serve("emu:xdma?channels=1", *arena)
    with raw(stack) as client:
        opened, fds = opened_with_bells(client)
        assert opened.control is not None
        if goodbye:
            assert isinstance(client.ask(wire.Close()), wire.Done)
    # The process lives on, and so do its descriptors.
    assert settle(lambda: unreleased(stack), goal=0, timeout=LONG) == 0
    try:
        with holdfast.open(stack.target, channels=0) as innocent:
            memory = innocent.alloc(8 << 20)
            memory.array[:] = 0x55
            for _ in range(3):
                for bell in opened.bells:
                    events.ring(fds[bell.fd], 100)
            with holdfast.open(stack.target, timeout=LONG) as card:
                # Every register access delivers what was rung before it.
                told = card.command("channel_status")
                assert [row["credits"] for row in told] == [0, 0]
                assert [row["completed"] for row in told] == [0, 0]
            assert (memory.array == 0x55).all()
    finally:
        for fd in fds:
            os.close(fd)
    still_serves(stack)


def test_punching_or_resizing_a_slab_hurts_only_its_owner(serve: Callable[..., Stack]) -> None:
    stack = serve("emu:xdma")
    with raw(stack) as client:
        client.open(channels=1)
        client.send(wire.TakeSlab(nbytes=1 << 20))
        reply, fds = client.receive()
        assert isinstance(reply, wire.SlabTaken)
        fd = fds[reply.info.fd]
        attempts: list[Callable[[], None]] = [
            lambda: os.ftruncate(fd, 0),
            lambda: os.ftruncate(fd, 2 << 20),
            lambda: os.posix_fallocate(fd, 1 << 20, 4096),
        ]
        for attempt in attempts:
            with pytest.raises(OSError, match="not permitted"):
                attempt()
        from holdfast.kernel import memfd

        memfd.punch(fd, 0, 1 << 20)
        for each in fds:
            os.close(each)
    assert settle(lambda: unreleased(stack), goal=0, timeout=LONG) == 0
    assert stack.ps()["unaccounted_bytes"] == 0
    still_serves(stack)


def test_a_client_learns_that_its_keeper_speaks_nonsense() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    client = LeaseClient(ours, Target.parse("emu:xdma"))
    with theirs:
        theirs.send(b"\xc1 nonsense")
        with pytest.raises(ProtocolError):
            client.greet()
        theirs.close()
        with pytest.raises(HoldfastError):
            client.ps()
    client.close()


def test_a_reply_of_the_wrong_kind_is_a_protocol_error() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    client = LeaseClient(ours, Target.parse("emu:xdma"))
    with theirs:
        theirs.send(wire.encode(wire.Done(seq=1)))
        with pytest.raises(ProtocolError):
            client.greet()
    with pytest.raises(KeeperGone):
        client.ps()
    client.close()
