# SPDX-License-Identifier: Apache-2.0
"""Packets arrive whole, with their descriptors, or not at all; listeners do not fight."""

from __future__ import annotations

import os
import socket
import stat
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from holdfast.errors import Busy, HoldfastError, ProtocolError, UsageError
from holdfast.kernel import packets
from holdfast.torture.outside import settle

Pair = tuple[socket.socket, socket.socket]


@pytest.fixture
def pair() -> Iterator[Pair]:
    left, right = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with left, right:
        yield left, right


@pytest.fixture
def spare() -> Iterator[int]:
    fd = os.eventfd(0)
    yield fd
    os.close(fd)


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def fill(sock: socket.socket) -> None:
    while True:
        packets.send(sock, b"x" * 1000)


def accept_and_hang_up(server: socket.socket) -> None:
    server.accept()[0].close()


def test_a_packet_arrives_with_its_descriptors(pair: Pair, spare: int) -> None:
    packets.send(pair[0], b"one", [spare, spare])
    packets.send(pair[0], b"two")
    data, fds = packets.receive(pair[1], 100, 4)
    assert data == b"one"
    assert [os.fstat(fd).st_ino for fd in fds] == [os.fstat(spare).st_ino] * 2
    assert not any(os.get_inheritable(fd) for fd in fds)
    for fd in fds:
        os.close(fd)
    assert packets.receive(pair[1], 100, 4) == (b"two", [])


def test_the_largest_number_of_descriptors_arrives(pair: Pair, spare: int) -> None:
    packets.send(pair[0], b"all", [spare] * packets.SCM_MAX_FD)
    _, fds = packets.receive(pair[1], 100, packets.SCM_MAX_FD)
    assert len(fds) == packets.SCM_MAX_FD
    for fd in fds:
        os.close(fd)
    with pytest.raises(UsageError):
        packets.send(pair[0], b"more", [spare] * (packets.SCM_MAX_FD + 1))


@pytest.mark.parametrize("allowed", [0, 1, 2, 3])
def test_one_descriptor_too_many_is_an_error_and_none_stays_open(
    pair: Pair, spare: int, allowed: int
) -> None:
    before = descriptors()
    packets.send(pair[0], b"x", [spare] * (allowed + 1))
    with pytest.raises(ProtocolError, match="descriptors"):
        packets.receive(pair[1], 100, allowed)
    assert settle(descriptors, goal=before, timeout=5) == before


def test_a_packet_that_is_too_long_is_an_error_and_its_descriptors_are_closed(
    pair: Pair, spare: int
) -> None:
    before = descriptors()
    packets.send(pair[0], b"x" * 101, [spare])
    with pytest.raises(ProtocolError, match="more than 100 bytes"):
        packets.receive(pair[1], 100, 4)
    assert settle(descriptors, goal=before, timeout=5) == before


def test_descriptors_without_data_are_an_error_and_closed(pair: Pair, spare: int) -> None:
    before = descriptors()
    socket.send_fds(pair[0], [b""], [spare])
    with pytest.raises(ProtocolError):
        packets.receive(pair[1], 100, 4)
    assert settle(descriptors, goal=before, timeout=5) == before


def test_hang_up_reads_as_empty_and_sending_then_raises(pair: Pair) -> None:
    pair[0].close()
    assert packets.receive(pair[1], 100, 1) == (b"", [])
    with pytest.raises(BrokenPipeError):
        packets.send(pair[1], b"x")


def test_an_empty_packet_cannot_be_sent(pair: Pair) -> None:
    with pytest.raises(UsageError):
        packets.send(pair[0], b"")


def test_a_full_or_empty_socket_that_does_not_block_says_so(pair: Pair) -> None:
    for sock in pair:
        sock.setblocking(False)
    with pytest.raises(BlockingIOError):
        packets.receive(pair[1], 100, 1)
    with pytest.raises(BlockingIOError):
        fill(pair[0])


def test_a_listener_is_private_and_reachable(tmp_path: Path) -> None:
    path = tmp_path / "s"
    before = os.umask(0)
    try:
        server = packets.listen(path, 4)
    finally:
        os.umask(before)
    with server, packets.connect(path, 1) as client:
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert not os.get_inheritable(server.fileno())
        accepted, _ = server.accept()
        with accepted:
            packets.send(client, b"hello")
            assert packets.receive(accepted, 10, 0)[0] == b"hello"


def test_a_dead_servers_socket_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "s"
    packets.listen(path, 1).close()
    assert path.is_socket()
    with packets.listen(path, 1), packets.connect(path, 1):
        pass


def test_a_living_servers_socket_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with packets.listen(path, 0):
        with pytest.raises(Busy, match="already answers"):
            packets.listen(path, 1)
        # The probe above filled the backlog of 0: still somebody's.
        with pytest.raises(Busy, match="already answers"):
            packets.listen(path, 1)


def test_a_server_of_another_socket_type_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as server:
        server.bind(str(path))
        server.listen(1)
        with pytest.raises(Busy):
            packets.listen(path, 1)


def test_something_else_than_a_socket_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "s"
    path.write_text("precious")
    with pytest.raises(Busy, match="else than a socket"):
        packets.listen(path, 1)
    assert path.read_text() == "precious"


def test_of_many_servers_that_start_at_once_exactly_one_wins(tmp_path: Path) -> None:
    path = tmp_path / "s"
    packets.listen(path, 1).close()
    gate = threading.Barrier(8)
    won: list[socket.socket] = []
    lost: list[HoldfastError] = []

    def start() -> None:
        gate.wait()
        try:
            won.append(packets.listen(path, 64))
        except HoldfastError as error:
            lost.append(error)

    threads = [threading.Thread(target=start) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1
    assert all(isinstance(error, Busy) for error in lost)
    with won[0] as server, packets.connect(path, 1):
        # The probes of the losers wait in the backlog, too; the last one is ours.
        server.accept()[0].close()


def test_connecting_to_nobody_says_which_kind_of_nobody(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        packets.connect(tmp_path / "none", 1)
    packets.listen(tmp_path / "s", 1).close()
    with pytest.raises(ConnectionRefusedError):
        packets.connect(tmp_path / "s", 1)


def test_connecting_to_a_full_server_times_out(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with packets.listen(path, 0), packets.connect(path, 1):
        with pytest.raises(TimeoutError):
            packets.connect(path, 0.02)


def test_connecting_waits_for_a_busy_server(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with packets.listen(path, 0) as server, packets.connect(path, 1):
        accepter = threading.Timer(0.02, accept_and_hang_up, (server,))
        accepter.start()
        packets.connect(path, 10).close()
        accepter.join()


def test_a_path_that_does_not_fit_is_refused_with_its_length(tmp_path: Path) -> None:
    path = tmp_path / ("x" * 200)
    with pytest.raises(UsageError, match="107 fit"):
        packets.listen(path, 1)
    with pytest.raises(UsageError, match="107 fit"):
        packets.connect(path, 1)


def test_a_directory_that_is_not_there_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(HoldfastError) as caught:
        packets.listen(tmp_path / "none" / "s", 1)
    assert caught.value.errno
