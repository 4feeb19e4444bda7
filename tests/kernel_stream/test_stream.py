# SPDX-License-Identifier: Apache-2.0
"""Messages over a stream: whole or not at all, whatever the peer does."""

from __future__ import annotations

import array
import os
import resource
import select
import socket
import struct
import threading
import time
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from holdfast.errors import Closed, ProtocolError, WaitTimeout
from holdfast.kernel.stream import SCM_MAX_FD, STALL, Descriptors, Message, Stream

LIMIT = 16 + 16 + (128 << 10)


def size_of(head: bytes) -> int:
    size = int(struct.unpack_from("<I", head, 4)[0])
    if not 16 <= size <= LIMIT:
        raise ProtocolError(f"{size} bytes")
    return size


def sized(length: int, seed: int = 7) -> bytes:
    """A message of this many bytes, header included."""
    body = bytes((seed + i) % 251 for i in range(256)) * (length // 256 + 1)
    return struct.pack("<IIII", seed, length, 0, 0) + body[: length - 16]


class Pair:
    """A stream and the raw socket at its other end."""

    def __init__(self) -> None:
        ours, self.raw = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        self.stream = Stream(ours, size_of)

    def send_fds(self, data: bytes, fds: list[int]) -> None:
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))]
        self.raw.sendmsg([data], rights)

    def close(self) -> None:
        self.stream.close()
        self.raw.close()


@pytest.fixture
def pair(clean: None) -> Iterator[Pair]:
    pair = Pair()
    yield pair
    pair.close()


def take(stream: Stream, timeout: float = 5.0) -> bytes:
    got = stream.receive(timeout)
    got.fds.close()
    return got.data


@pytest.mark.parametrize("length", [16, 17, 2048, 2049, 40_000, LIMIT])
def test_messages_of_every_size_arrive_whole_and_in_order(pair: Pair, length: int) -> None:
    other = Stream(pair.raw.dup(), size_of)
    for _ in range(3):
        other.send([sized(length)[:16], sized(length)[16:]])
        assert take(pair.stream) == sized(length)
    other.close()


def test_nothing_is_taken_before_a_message_is_complete(pair: Pair) -> None:
    """The successor of a process that is killed here finds the stream in step."""
    whole = sized(5000)
    for cut in (3, 16, 2000, 4999):
        pair.raw.send(whole[:cut])
        assert pair.stream.poll_message() is None
        successor = Stream(pair.stream.socket.dup(), size_of)
        assert successor.poll_message() is None
        pair.raw.send(whole[cut:])
        assert take(successor) == whole
        successor.close()


def test_waiting_for_the_second_half_does_not_spin(pair: Pair) -> None:
    pair.raw.send(sized(100)[:50])
    assert pair.stream.poll_message() is None
    assert not select.select([pair.stream.wait_fd], [], [], 0)[0]
    pair.raw.send(sized(100)[50:60])
    assert select.select([pair.stream.wait_fd], [], [], 1)[0]
    assert pair.stream.poll_message() is None
    assert not select.select([pair.stream.wait_fd], [], [], 0)[0]
    pair.raw.send(sized(100)[60:])
    assert take(pair.stream) == sized(100)


def test_messages_queued_behind_each_other_are_cut_apart(pair: Pair) -> None:
    pair.raw.send(sized(20) + sized(16) + sized(300) + sized(64)[:10])
    assert [take(pair.stream) for _ in range(3)] == [sized(20), sized(16), sized(300)]
    assert pair.stream.poll_message() is None


def test_a_message_that_cannot_be_queued_is_read_in_pieces(pair: Pair) -> None:
    """One byte for each write fills the sender's buffer long before the message is complete."""
    pair.raw.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4608)
    whole = sized(3000)

    def trickle() -> None:
        for byte in whole:
            pair.raw.send(bytes([byte]))

    thread = threading.Thread(target=trickle)
    thread.start()
    started = time.monotonic()
    assert take(pair.stream) == whole
    assert time.monotonic() - started >= STALL * 0.9
    thread.join()
    pair.raw.send(sized(16))
    assert take(pair.stream) == sized(16)


def test_descriptors_come_with_their_message_and_close_on_exec(pair: Pair) -> None:
    reading, writing = os.pipe()
    pair.raw.send(sized(16))
    pair.send_fds(sized(40), [writing, reading])
    assert len(pair.stream.receive(1).fds) == 0
    with pair.stream.receive(1).fds as fds:
        assert len(fds) == 2
        assert not os.get_inheritable(fds[0])
        os.write(fds[0], b"x")
        assert os.read(reading, 1) == b"x"
    os.close(reading)
    os.close(writing)


def test_descriptors_that_nobody_takes_are_closed(pair: Pair) -> None:
    before = len(os.listdir("/proc/self/fd"))
    reading, writing = os.pipe()
    for _ in range(10):
        pair.send_fds(sized(16), [reading, writing])
        got = pair.stream.receive(1)
        taken = got.fds.take()
        assert len(got.fds) == 0
        Descriptors(taken).close()
    os.close(reading)
    os.close(writing)
    assert len(os.listdir("/proc/self/fd")) == before


def test_header_and_payload_in_two_writes_with_descriptors_are_one_message(pair: Pair) -> None:
    with Descriptors(list(os.pipe())) as pipe:
        pair.send_fds(sized(64)[:16], [pipe[0]])
        pair.raw.send(sized(64)[16:])
        got = pair.stream.receive(2)
    assert got.data == sized(64)
    assert len(got.fds) == 1
    got.fds.close()


def test_descriptors_in_the_middle_of_a_header_are_kept_or_closed(pair: Pair) -> None:
    with Descriptors(list(os.pipe())) as pipe:
        for byte in sized(16):
            pair.send_fds(bytes([byte]), [pipe[0]])
        got = pair.stream.receive(5)
        assert got.data == sized(16)
        assert len(got.fds) == 16
        got.fds.close()


def test_more_descriptors_than_one_message_can_have_end_the_connection(pair: Pair) -> None:
    with Descriptors(list(os.pipe())) as pipe:
        for part in (sized(64)[:20], sized(64)[20:]):
            pair.send_fds(part, [pipe[0]] * SCM_MAX_FD)
    with pytest.raises(ProtocolError):
        pair.stream.receive(5)


def test_lost_descriptors_end_the_connection(pair: Pair) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with Descriptors(list(os.pipe())) as pipe:
        pair.send_fds(sized(16), [pipe[0]] * 100)
        with Descriptors([os.dup(pipe[0])]) as lowest_free:
            room = lowest_free[0] + 20
        resource.setrlimit(resource.RLIMIT_NOFILE, (room, hard))
        try:
            with pytest.raises(ProtocolError, match="lost"):
                pair.stream.receive(1)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize("sent", [b"", sized(100)[:10], sized(100)[:60]])
def test_a_peer_that_leaves_is_noticed_at_any_byte(pair: Pair, sent: bytes) -> None:
    pair.raw.send(sent)
    assert pair.stream.poll_message() is None
    pair.raw.close()
    with pytest.raises(ConnectionError):
        pair.stream.receive(5)


def test_a_whole_message_before_the_hang_up_still_arrives(pair: Pair) -> None:
    pair.raw.send(sized(100))
    pair.raw.close()
    assert take(pair.stream) == sized(100)
    with pytest.raises(ConnectionError):
        pair.stream.receive(1)


def test_a_size_that_is_not_allowed_is_refused_before_anything_is_allocated(pair: Pair) -> None:
    pair.raw.send(struct.pack("<IIII", 0, 0xFFFFFFFF, 0, 0))
    with pytest.raises(ProtocolError):
        pair.stream.receive(1)


def test_receiving_ends_in_time(pair: Pair) -> None:
    with pytest.raises(WaitTimeout):
        pair.stream.receive(0.01)
    pair.raw.send(b"half")
    with pytest.raises(WaitTimeout):
        pair.stream.receive(0.01)


def test_a_wait_can_be_interrupted_from_another_thread(pair: Pair) -> None:
    pair.raw.send(sized(100)[:50])
    timer = threading.Timer(0.05, pair.stream.interrupt)
    timer.start()
    with pytest.raises(Closed):
        pair.stream.receive()
    with pytest.raises(Closed):
        pair.stream.receive()
    timer.join()


def test_a_peer_that_does_not_read_blocks_only_until_interrupted(pair: Pair) -> None:
    whole = sized(LIMIT)

    def fill() -> None:
        while True:
            pair.stream.send([whole], timeout=0.01)

    with pytest.raises(WaitTimeout):
        fill()
    timer = threading.Timer(0.05, pair.stream.interrupt)
    timer.start()
    with pytest.raises(Closed):
        pair.stream.send([whole])
    timer.join()


def test_messages_of_several_senders_do_not_mix(pair: Pair) -> None:
    other = Stream(pair.raw.dup(), size_of)
    count = 40

    def feed(seed: int) -> None:
        for _ in range(count):
            other.send([sized(48_000, seed)])

    threads = [threading.Thread(target=feed, args=(seed,)) for seed in (1, 2, 3)]
    for thread in threads:
        thread.start()
    for _ in range(3 * count):
        got = take(pair.stream)
        assert got == sized(48_000, got[0])
    for thread in threads:
        thread.join()
    other.close()


def test_closing_twice_is_harmless(pair: Pair) -> None:
    pair.stream.close()
    pair.stream.close()
    pair.stream.interrupt()


@settings(max_examples=60, deadline=None)
@given(st.lists(st.binary(min_size=1, max_size=60), max_size=12), st.booleans())
def test_random_bytes_never_crash_hang_or_leak(chunks: list[bytes], leave: bool) -> None:
    before = len(os.listdir("/proc/self/fd"))
    pair = Pair()
    pipe = os.pipe()
    try:
        for index, chunk in enumerate(chunks):
            if index % 3 == 0:
                pair.send_fds(chunk, [pipe[0], pipe[1]])
            else:
                pair.raw.send(chunk)
        if leave:
            pair.raw.shutdown(socket.SHUT_WR)
        for _ in range(20):
            got: Message | None = pair.stream.poll_message()
            if got is not None:
                got.fds.close()
    except (ProtocolError, ConnectionError):
        pass
    finally:
        pair.close()
        for fd in pipe:
            os.close(fd)
    assert len(os.listdir("/proc/self/fd")) == before
