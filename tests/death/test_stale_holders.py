# SPDX-License-Identifier: Apache-2.0
"""Who still holds something of a dead lease: a child, a stranger, or the client that hung up."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import holdfast
from holdfast.kernel import events, packets
from holdfast.torture import actors
from holdfast.torture.outside import settle
from holdfast.wire import lease as wire

pytestmark = [
    pytest.mark.usefixtures("clean"),
    pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning"),
]
LONG = 15.0
CARD = Path(__file__).with_name("mailbox_card.py")
MAILBOX = f"emu:{CARD}:Mailbox"
XDMA = "emu:xdma?memory=1M"
SIZE = 64 << 10
ARENA = ("--arena", "4M")


@pytest.mark.parametrize("arena", [(), ARENA], ids=["own files", "arena"])
def test_a_child_that_still_has_the_engines_bar_reaches_nobody(
    scene: Callable[..., Any], orphaned: Callable[[str], Any], arena: tuple[str, ...]
) -> None:
    stage = scene(MAILBOX, *arena)
    with stage.innocent() as innocent:
        child = orphaned(MAILBOX)
        told = stage.reached(child.pid, "released")
        assert told["process_dead"]
        assert told["hung_up"] is not bool(arena), "in an arena nothing but the socket was left"
        innocent.take()
        child.tell(b"g")
        assert child.read(1) == b"y"
        assert innocent.foreign() == 0
        child.tell(b"e")
        child.reap()
    with holdfast.open(MAILBOX, timeout=LONG) as again:
        assert bool(again.bars[0].areas) is not bool(arena)


def test_a_client_that_hangs_up_and_lives_keeps_its_memory_from_everybody(
    scene: Callable[..., Any], rude: Callable[[str], Any]
) -> None:
    def body(reading: int, writing: int) -> None:
        client = rude(MAILBOX)
        client.sock.close()
        os.write(writing, b"x")
        os.read(reading, 1)
        client.order()
        os.write(writing, b"y")
        time.sleep(60)

    stage = scene(MAILBOX)
    child = actors.spawn(body)
    assert child.read(1) == b"x"
    stage.reached(child.pid, "quiet")
    assert settle(
        lambda: "other death signal" not in stage.lease(child.pid)["log"][-1][2],
        goal=0, timeout=LONG,
    ) == 0  # fmt: skip
    told = stage.lease(child.pid)
    assert told["hung_up"]
    assert not told["process_dead"]
    assert told["bytes"] >= SIZE
    assert len(told["withheld"]) == 3  # the other sign, the flushing read, and the unmap
    child.tell(b"g")
    assert child.read(1) == b"y"  # it can, and it writes into nothing but its own memory
    assert stage.lease(child.pid)["bytes"] >= SIZE
    child.kill()
    stage.reached(child.pid, "released")
    child.reap()


@pytest.mark.parametrize("arena", [(), ARENA], ids=["own files", "arena"])
def test_a_stranger_with_the_descriptors_of_a_dead_client_reaches_nobody(
    scene: Callable[..., Any], rude: Callable[[str], Any], arena: tuple[str, ...]
) -> None:
    """Lease socket, doorbells and memory were passed on (SCM_RIGHTS) before the client died."""
    stage = scene(XDMA, *arena)
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)

    def body(_: int, __: int) -> None:
        client = rude(XDMA)
        packets.send(theirs, b"x", [client.sock.fileno(), client.slab, *client.bells])
        time.sleep(60)

    with ours, theirs, stage.innocent() as innocent:
        child = actors.spawn(body)
        ours.settimeout(LONG)
        _, (passed, slab, *bells) = packets.receive(ours, 16, wire.MAX_FDS)
        child.kill()
        child.reap()
        told = stage.reached(child.pid, "released")
        assert not told["hung_up"], "we hold its socket"
        innocent.take()
        for bell in bells:
            events.ring(bell, 5)
        with socket.socket(fileno=passed) as sock:
            for message in (
                wire.TakeSlab(nbytes=SIZE),
                wire.RegionWrite(index=1, offset=0, data=b"\1" * 4),
                wire.Command(name="channel_status"),
            ):
                packets.send(sock, wire.encode(message), ())
            sock.settimeout(0.1)
            with pytest.raises(TimeoutError):  # a frozen lease is told nothing
                packets.receive(sock, wire.MAX_PACKET, wire.MAX_FDS)
        if not arena:
            assert not any(os.pread(slab, SIZE, 0)), "its memory was punched"
        for fd in (slab, *bells):
            os.close(fd)
        with holdfast.open(XDMA, timeout=LONG) as card:
            rows = card.command("channel_status")
            assert [row["completed"] for row in rows] == [0] * len(rows)
        assert innocent.foreign() == 0
    stage.all_released()
