# SPDX-License-Identifier: Apache-2.0
"""Clients that send descriptors nobody asked for: they are closed, and nobody waits for that."""

from __future__ import annotations

import os
import select
import signal
import socket
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from holdfast.errors import BadBuffer
from holdfast.kernel import disposal, events, packets, procfs
from holdfast.torture import actors
from holdfast.torture.outside import settle
from holdfast.torture.rude import Rude
from holdfast.torture.stack import Stack
from holdfast.wire import lease as wire

pytestmark = [
    pytest.mark.usefixtures("clean"),
    pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning"),
]
LONG = 20.0


def descriptors(stack: Stack) -> int:
    return len(procfs.open_descriptors(stack.keeper_pid))


@contextmanager
def zoo(stack: Stack, client: Rude) -> Iterator[list[int]]:
    """One descriptor of each kind there is to be had."""
    with ExitStack() as things:
        fds = [
            os.open("/dev/null", os.O_RDWR),
            os.open("/proc/self/mem", os.O_RDONLY),
            os.open("/", os.O_PATH),
            os.open("/proc", os.O_RDONLY | os.O_DIRECTORY),
            os.memfd_create("zoo"),
            os.pidfd_open(os.getpid()),
            os.pidfd_open(stack.keeper_pid),
            events.make(),
            *os.pipe(),
            os.dup(client.sock.fileno()),
        ]
        for fd in fds:
            things.callback(os.close, fd)
        poll = things.enter_context(select.epoll())
        poll.register(fds[-2])
        listener = things.enter_context(socket.socket(socket.AF_INET))
        listener.listen()
        yield [*fds, poll.fileno(), listener.fileno()]


MESSAGES = [
    wire.Ps(seq=1),
    wire.TakeSlab(seq=1, nbytes=0),
    wire.Pin(seq=1, address=4096, nbytes=4096, writable=True),
    wire.Unpin(seq=1, pin=99),
    wire.RegionRead(seq=1, index=0, offset=0, count=4),
    wire.Regrant(seq=1),
]


def test_descriptors_with_every_message_are_closed(innocent: Any) -> None:
    stack = innocent.stack
    before = descriptors(stack)
    for message in MESSAGES:
        with Rude(stack.target) as client:
            client.open(0)
            with zoo(stack, client) as fds:
                client.ask(message, fds)
                client.ask(message, fds * (wire.MAX_FDS // len(fds)))
                innocent.goes_on()
    innocent.is_alone()
    assert settle(lambda: descriptors(stack), goal=before, timeout=LONG) <= before


@pytest.mark.parametrize("count", [wire.MAX_FDS + 1, packets.SCM_MAX_FD])
@pytest.mark.parametrize("greeted", [False, True], ids=["first message", "later"])
def test_more_descriptors_than_allowed_end_the_connection(
    innocent: Any, count: int, greeted: bool
) -> None:
    stack = innocent.stack
    before = descriptors(stack)
    with Rude(stack.target) as client:
        if greeted:
            client.open(0)
        client.send(wire.Hello(version=wire.VERSION), [0] * count)
        assert client.hung_up()
    innocent.goes_on()
    innocent.is_alone()
    assert settle(lambda: descriptors(stack), goal=before, timeout=LONG) <= before


def test_memory_files_of_others_are_not_this_clients_memory(innocent: Any) -> None:
    def wait(reading: int, _: int) -> None:
        os.read(reading, 1)

    child = actors.spawn(wait)
    try:
        with Rude(innocent.stack.target) as client:
            client.open(0)
            pin = wire.Pin(address=4096, nbytes=4096, writable=True)
            for path in (f"/proc/{child.pid}/mem", f"/proc/{os.getppid()}/mem",
                         "/proc/self/task/self/../mem", "/proc/self/maps",
                         f"/proc/self/task/{os.getpid()}/mem"):  # fmt: skip
                try:
                    fd = os.open(path, os.O_RDONLY)
                except OSError:
                    continue
                assert client.refusal(pin, [fd]) == BadBuffer.__name__, path
                os.close(fd)
    finally:
        child.kill()
        child.reap()


# -- descriptors whose close waits ----------------------------------------------------------------


@contextmanager
def lingering() -> Iterator[socket.socket]:
    """A TCP socket whose close waits a minute for a peer that takes nothing (socket(7))."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        sock = socket.create_connection(listener.getsockname())
        peer, _ = listener.accept()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("=ii", 1, 60))
        sock.setblocking(False)
        try:
            while True:
                sock.send(bytes(1 << 16))
        except BlockingIOError:
            pass
        try:
            yield sock
        finally:
            # Its unread data make this a reset, which ends every wait.
            peer.close()
            sock.close()


@contextmanager
def held_up(stack: Stack) -> Iterator[None]:
    """The keeper does nothing for a moment."""
    keeper = stack.ps()["keeper"]
    os.kill(keeper, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(keeper, signal.SIGCONT)


def test_such_a_close_does_wait() -> None:
    with lingering() as sock:
        fd = sock.detach()
        closing = threading.Thread(target=os.close, args=(fd,))
        closing.start()
        closing.join(0.3)
        assert closing.is_alive(), "the negative control: nothing to be afraid of here"
    closing.join(LONG)
    assert not closing.is_alive()


@pytest.mark.parametrize("how", ["taken", "too many", "unread", "greeting"])
def test_nobody_waits_for_a_close_that_does(innocent: Any, how: str) -> None:
    stack = innocent.stack
    before = descriptors(stack)
    with lingering() as sock, Rude(stack.target) as client:
        packet, count = wire.encode(wire.Ps(seq=4)), 1
        if how == "greeting":
            packet, count = wire.encode(wire.Hello(version=wire.VERSION)), 3
        else:
            client.open(0)
        if how == "too many":
            count = wire.MAX_FDS + 1
        with held_up(stack):  # so that all of it is in the queue by the time it is looked at
            if how == "unread":
                client.send(b"\xc1")  # ends the connection
            for _ in range(3):
                client.send(packet, [sock.fileno()] * count)
        began = time.monotonic()
        os.close(sock.detach())  # the keeper has the last one
        for _ in range(3):
            innocent.goes_on()
        assert time.monotonic() - began < LONG, "it waited for the close"
    innocent.is_alone()
    assert settle(lambda: descriptors(stack), goal=before, timeout=LONG) <= before


@pytest.mark.parametrize("how", ["as memory", "beside"])
def test_a_file_system_that_never_answers_is_not_waited_for(
    innocent: Any, stubborn_files: Any, tmp_path: Path, how: str
) -> None:
    """Neither by a look at what the descriptor is, nor by its close."""
    stack = innocent.stack

    def body(reading: int, writing: int) -> None:
        files = stubborn_files(str(tmp_path), tells_size=False)
        os.write(writing, struct.pack("=I", files.server))
        client = Rude(stack.target)
        client.open(0)
        message: wire.Message = wire.Ps(seq=3)
        if how == "as memory":
            message = wire.Pin(seq=3, address=4096, nbytes=4096, writable=True)
        reply, _ = client.ask(message, [files.open()])
        os.write(writing, b"F" if isinstance(reply, wire.Failed) else b"R")
        os.read(reading, 1)

    before = descriptors(stack)
    child = actors.spawn(body)
    (server,) = struct.unpack("=I", child.read(4))
    try:
        assert child.read(1) == (b"F" if how == "as memory" else b"R")
        for _ in range(3):
            innocent.goes_on()
        tasks = Path(f"/proc/{stack.keeper_pid}/task").iterdir()
        waits = [(task / "wchan").read_text() for task in tasks]
        assert "request_wait_answer" in waits, "its close came back: no control"
    finally:
        os.kill(server, signal.SIGKILL)
        child.kill()
        child.reap()
    innocent.is_alone()
    assert settle(lambda: descriptors(stack), goal=before, timeout=LONG) <= before


def test_many_closes_that_wait_hold_up_only_each_other() -> None:
    """Threads that wait are left alone, and others close what comes next."""
    with ExitStack() as things:
        # Inside of a socket's queue lingering cannot be switched off beforehand.
        for _ in range(disposal.MOST // 2):
            sock = things.enter_context(lingering())
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            packets.send(ours, b"x", [sock.fileno()])
            ours.close()
            os.close(sock.detach())
            disposal.discard([theirs.detach()])
        reading, writing = os.pipe()
        disposal.discard([writing])
        assert select.select([reading], [], [], LONG)[0]
        assert os.read(reading, 1) == b"", "it was closed meanwhile"
        os.close(reading)
