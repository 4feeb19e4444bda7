# SPDX-License-Identifier: Apache-2.0
"""Clients that forge, replay, flood, fall silent or hang on to things: others are served on."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import msgspec
import pytest

import holdfast
from holdfast.errors import HoldfastError, ProtocolError, ResourceError, UsageError
from holdfast.keeper import embedded
from holdfast.keeper.gate import KEPT
from holdfast.kernel import packets, procfs
from holdfast.torture import actors
from holdfast.torture.outside import settle
from holdfast.torture.rude import Rude
from holdfast.torture.stack import SERVE, Stack
from holdfast.values import Target
from holdfast.wire import lease as wire

pytestmark = [
    pytest.mark.usefixtures("clean"),
    pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning"),
]
LONG = 20.0


def descriptors(stack: Stack) -> int:
    return len(procfs.open_descriptors(stack.keeper_pid))


# -- other people's things ------------------------------------------------------------------------


def test_numbers_of_others_slabs_and_pins_are_nothing_to_a_client(innocent: Any) -> None:
    card = innocent.card
    with card.pin(bytearray(4096)), Rude(innocent.stack.target) as client:
        client.open(0)
        held = next(lease for lease in innocent.stack.ps()["leases"]
                    if lease["lease"] == card.lease.number)  # fmt: skip
        for number in range(64):  # every number that was given out is among these
            assert client.refusal(wire.GiveSlab(slab=number)) == UsageError.__name__
            assert client.refusal(wire.Unpin(pin=number)) == UsageError.__name__
        after = next(lease for lease in innocent.stack.ps()["leases"]
                     if lease["lease"] == card.lease.number)  # fmt: skip
        assert (held["bytes"], held["pins"]) == (after["bytes"], after["pins"])
        innocent.goes_on()
        client.send(wire.PinDone(pin=1))
        assert client.hung_up()


def test_a_memory_lease_reaches_no_register_and_no_reset(innocent: Any) -> None:
    with Rude(innocent.stack.target) as client:
        client.open(0)
        for message in (
            wire.RegionRead(index=0, offset=0, count=4),
            wire.RegionWrite(index=0, offset=0, data=b"\0\0\0\0"),
            wire.RegionWrite(index=7, offset=4, data=b"\0\0"),
            wire.Reset(),
        ):
            assert client.refusal(message) == "NotSupported"
        innocent.goes_on()
        assert not any(
            lease["state"] != "alive" for lease in innocent.stack.ps()["leases"]
            if lease["lease"] == innocent.card.lease.number
        )  # fmt: skip


def test_replayed_messages_change_nothing_that_is_not_accounted_for(innocent: Any) -> None:
    before = descriptors(innocent.stack)
    with Rude(innocent.stack.target) as client:
        hello = wire.encode(wire.Hello(seq=1, version=wire.VERSION))
        opening = wire.encode(wire.Open(seq=2, channels=0))
        taking = wire.encode(wire.TakeSlab(seq=3, nbytes=1 << 16))
        for packet in (hello, opening, *[taking] * 20, opening, opening):
            client.ask(packet)
        mine = innocent.stack.ps()
        held = sum(lease["bytes"] for lease in mine["leases"])
        assert mine["unaccounted_bytes"] == 0
        assert held < innocent.kept.nbytes + (64 << 20)
        client.send(hello)  # out of place
        assert client.hung_up()
    innocent.goes_on()
    innocent.is_alone()
    assert settle(lambda: descriptors(innocent.stack), goal=before, timeout=LONG) <= before


def test_a_lie_about_the_process_is_not_believed(innocent: Any) -> None:
    """The kernel says who connected, whatever pidfd comes with the first message."""
    with Rude(innocent.stack.target) as client:
        stranger = os.pidfd_open(os.getppid())
        try:
            client.ask(wire.Hello(version=wire.VERSION, client="pid 1"), [stranger])
        finally:
            os.close(stranger)
        opened = client.ask(wire.Open(channels=0))[0]
        assert isinstance(opened, wire.Opened)
        told = next(lease for lease in innocent.stack.ps()["leases"]
                    if lease["lease"] == opened.lease)  # fmt: skip
        assert told["pid"] == os.getpid()
        assert not told["process_dead"]


def test_a_lease_whose_socket_was_passed_on_ends_with_the_process_that_opened_it(
    innocent: Any,
) -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)

    def body(reading: int, _: int) -> None:
        client = Rude(innocent.stack.target)
        client.open(1)
        client.take_slab(1 << 20)
        packets.send(theirs, b"socket", [client.sock.fileno()])
        os.read(reading, 1)

    child = actors.spawn(body)
    with ours, theirs:
        _, (fd,) = packets.receive(ours, 16, 1)
        with socket.socket(fileno=fd) as passed:
            packets.send(passed, wire.encode(wire.TakeSlab(nbytes=1 << 20, seq=7)))
            child.kill()
            child.reap()
            # The stop of its channel is final, so the socket that is left holds nothing up.
            innocent.is_alone()
            with contextlib.suppress(OSError):
                packets.send(passed, wire.encode(wire.TakeSlab(nbytes=1 << 20, seq=8)))
            innocent.goes_on()
            innocent.is_alone()


# -- too much -------------------------------------------------------------------------------------


def flood(target: str, packet: bytes) -> Callable[[int, int], None]:
    """A client that sends without end, and reads what it is answered, as fast as it can."""

    def body(_: int, writing: int) -> None:
        client = Rude(target)
        client.open(0)

        def take() -> None:
            with contextlib.suppress(OSError):
                while client.sock.recv(1 << 16):
                    pass

        threading.Thread(target=take, daemon=True).start()
        os.write(writing, b"r")
        with contextlib.suppress(OSError):
            while True:
                client.sock.send(packet)

    return body


@pytest.mark.parametrize(
    "message",
    [
        wire.Ps(seq=9),
        wire.Unpin(seq=9, pin=77),
        wire.TakeSlab(seq=9, nbytes=0),
        wire.Regrant(seq=9),
    ],
    ids=["ps", "unpin", "bad slab", "regrant"],
)
def test_who_floods_the_keeper_has_its_turn_and_no_more(
    innocent: Any, message: wire.Message
) -> None:
    child = actors.spawn(flood(innocent.stack.target, wire.encode(message)))
    try:
        assert child.read(1) == b"r"
        for _ in range(20):
            innocent.goes_on()
    finally:
        child.kill()
        child.reap()


def test_who_takes_slabs_and_reads_nothing_is_hung_up_on(innocent: Any) -> None:
    with Rude(innocent.stack.target) as client:
        client.open(0)
        packet = wire.encode(wire.TakeSlab(seq=9, nbytes=4096))
        with pytest.raises((BrokenPipeError, ConnectionResetError, TimeoutError)):  # noqa: PT012
            for _ in range(100_000):
                client.sock.send(packet)
        innocent.goes_on()
        innocent.is_alone()


def test_silent_and_half_open_connections_hold_nothing(innocent: Any) -> None:
    before = descriptors(innocent.stack)
    path = str(embedded.socket_path(Target.parse(innocent.stack.target)))
    with ExitStack() as stack:
        silent = [stack.enter_context(packets.connect(path, LONG)) for _ in range(100)]
        for sock in silent[:50]:
            sock.shutdown(socket.SHUT_WR)
        halves = [stack.enter_context(Rude(innocent.stack.target)) for _ in range(3)]
        for client, how in zip(halves, (socket.SHUT_WR, socket.SHUT_RD, socket.SHUT_RDWR),
                               strict=True):  # fmt: skip
            client.open(0)
            os.close(client.take_slab(1 << 20)[1])
            client.half_close(how)
        innocent.goes_on()
        with contextlib.suppress(OSError):
            halves[1].send(wire.Ps(seq=5))
    innocent.is_alone()
    assert settle(lambda: descriptors(innocent.stack), goal=before, timeout=LONG) <= before


def test_a_bomb_of_connections_leaves_the_keeper_alive_and_idle() -> None:
    """Up to the limit of descriptors: existing leases go on, newcomers are told, no spinning."""
    limited = ("sh", "-c", 'ulimit -n 500; exec "$0" "$@"')
    with Stack("emu:xdma?channels=2", serve=(*limited, *SERVE)) as stack, ExitStack() as sockets:
        card = sockets.enter_context(holdfast.open(stack.target, channels=1))
        source = card.alloc(4096)
        got_in = 0

        def crowd() -> None:
            nonlocal got_in
            while True:
                client = sockets.enter_context(Rude(stack.target))
                reply, _ = client.ask(wire.Hello(version=wire.VERSION))
                if not isinstance(reply, wire.Welcome):
                    raise ResourceError(f"{reply}")
                got_in += 1

        with pytest.raises((HoldfastError, OSError)):
            crowd()
        assert 50 < got_in < 500 - KEPT
        for _ in range(5):
            card.dma.to_card(source).wait(LONG)
            card.command("channel_status")
        # It waits for what comes next instead of trying again and again.
        assert processor_seconds(stack.keeper_pid, 0.5) < 0.25
        sockets.close()
        with holdfast.open(stack.target, channels=1, timeout=LONG) as again:
            again.alloc(4096)


def processor_seconds(pid: int, during: float) -> float:
    def used() -> int:
        with open(f"/proc/{pid}/stat") as file:
            fields = file.read().rpartition(")")[2].split()
        return int(fields[11]) + int(fields[12])

    before = used()
    time.sleep(during)
    return (used() - before) / os.sysconf("SC_CLK_TCK")


def test_a_client_that_stops_itself_stops_nobody_else(innocent: Any) -> None:
    target = innocent.stack.target

    def body(_: int, writing: int) -> None:
        card = holdfast.open(target, access="shared", channels=1, timeout=LONG)
        card.dma.from_card(card.alloc(1 << 20), 0)
        card.pin(bytearray(1 << 16))
        os.write(writing, b"r")
        os.kill(os.getpid(), signal.SIGSTOP)

    child = actors.spawn(body)
    try:
        assert child.read(1) == b"r"
        for _ in range(200):  # notices that it does not read pile up
            innocent.card.command("channel_status")
        innocent.card.reset()
        innocent.goes_on()
    finally:
        child.kill()
        child.reap()


# -- nonsense in proper form ----------------------------------------------------------------------


def test_arguments_of_commands_may_be_anything(innocent: Any) -> None:
    deep: Any = 1
    for _ in range(200):
        deep = [deep]
    with Rude(innocent.stack.target) as client:
        client.open(1)
        for value in (deep, "x" * 60_000, b"\0" * 60_000, [1] * 60_000, {"a": {"b": [None]}},
                      -(1 << 63), (1 << 64) - 1, 1.5, None, True):  # fmt: skip
            packet = msgspec.msgpack.encode(
                {"type": "Command", "seq": 4, "name": "channel_status", "args": {"x": value}}
            )
            if len(packet) <= wire.MAX_PACKET:
                assert isinstance(client.ask(packet)[0], wire.Failed)
        too_deep = msgspec.msgpack.encode({"type": "Command", "seq": 4, "name": "x"})[:-1]
        client.send(b"\x84" + too_deep[1:] + b"x\xa4args\x81\xa1a" + b"\x91" * 60_000)
        reply, _ = client.receive()
        assert isinstance(reply, wire.Failed)
        assert reply.error["kind"] == ProtocolError.__name__
        assert client.hung_up()
    innocent.goes_on()
