# SPDX-License-Identifier: Apache-2.0
"""A peer is who the kernel says, and every descriptor is closed on every path."""

from __future__ import annotations

import os
import select
import socket
import subprocess
import sys
from collections.abc import Iterator

import pytest

from holdfast.errors import NoPermission, ProtocolError
from holdfast.kernel import pidfd
from holdfast.torture.outside import settle

Pair = tuple[socket.socket, socket.socket]


@pytest.fixture
def pair() -> Iterator[Pair]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        yield ours, theirs


@pytest.fixture(autouse=True)
def no_leaks() -> Iterator[None]:
    before = set(os.listdir("/proc/self/fd"))
    yield
    assert settle(lambda: len(os.listdir("/proc/self/fd")), goal=len(before), timeout=5) == len(
        before
    )


@pytest.fixture
def old_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel without SO_PEERPIDFD: an option number that no kernel has."""
    monkeypatch.setattr(pidfd, "SO_PEERPIDFD", 0x7FFF)


def sleeper() -> subprocess.Popen[bytes]:
    """A process that lives until its standard input is closed."""
    return subprocess.Popen(
        [sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE
    )


def end(child: subprocess.Popen[bytes]) -> None:
    child.communicate(timeout=10)


def test_the_kernel_names_the_peer(pair: Pair) -> None:
    peer = pidfd.identify(pair[0], None)
    try:
        assert (peer.pid, peer.uid, peer.gid) == (os.getpid(), os.geteuid(), os.getegid())
        assert pidfd.pid_of(peer.pidfd) == os.getpid()
        assert not os.get_inheritable(peer.pidfd)
    finally:
        os.close(peer.pidfd)


def test_what_the_peer_offers_is_consumed_even_if_not_needed(pair: Pair) -> None:
    peer = pidfd.identify(pair[0], pidfd.open_self())
    os.close(peer.pidfd)


@pytest.mark.usefixtures("old_kernel")
class TestWithoutPeerPidfd:
    def test_the_kernel_cannot_tell(self, pair: Pair) -> None:
        assert pidfd.peer_pidfd(pair[0]) is None

    def test_an_offered_pidfd_of_the_peer_itself_will_do(self, pair: Pair) -> None:
        peer = pidfd.identify(pair[0], pidfd.open_self())
        assert pidfd.pid_of(peer.pidfd) == os.getpid()
        assert not os.get_inheritable(peer.pidfd)
        os.close(peer.pidfd)

    def test_without_an_offer_the_peer_is_refused(self, pair: Pair) -> None:
        with pytest.raises(ProtocolError, match="sent no pidfd"):
            pidfd.identify(pair[0], None)

    def test_somebody_elses_pidfd_is_refused(self, pair: Pair) -> None:
        child = sleeper()
        try:
            with pytest.raises(NoPermission, match=f"names process {child.pid}"):
                pidfd.identify(pair[0], os.pidfd_open(child.pid))
        finally:
            end(child)

    def test_a_descriptor_that_is_no_pidfd_is_refused(self, pair: Pair) -> None:
        with pytest.raises(ProtocolError, match="not a pidfd"):
            pidfd.identify(pair[0], os.eventfd(0))

    def test_a_pidfd_of_a_reaped_process_is_refused(self, pair: Pair) -> None:
        child = sleeper()
        offered = os.pidfd_open(child.pid)
        end(child)
        with pytest.raises(ProtocolError, match="already gone"):
            pidfd.identify(pair[0], offered)


def test_a_connecting_process_that_was_reaped_is_refused() -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as server:
        server.bind(name := f"\0holdfast-test-{os.getpid()}")
        server.listen(1)
        script = (
            "import socket,sys; s=socket.socket(1,5); s.connect(sys.argv[1].replace('@','\\0'))"
        )
        subprocess.run([sys.executable, "-c", script, name.replace("\0", "@")], check=True)
        accepted, _ = server.accept()
        with accepted, pytest.raises(ProtocolError, match="already gone"):
            pidfd.identify(accepted, None)


def test_death_shows_in_the_pidfd() -> None:
    child = sleeper()
    fd = os.pidfd_open(child.pid)
    try:
        assert not pidfd.is_dead(fd)
        assert pidfd.pid_of(fd) == child.pid
        child.kill()
        select.select([fd], [], [], 10)
        assert pidfd.is_dead(fd)
        end(child)
        assert pidfd.pid_of(fd) == -1
        assert pidfd.is_dead(fd)
    finally:
        os.close(fd)
