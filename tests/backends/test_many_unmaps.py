# SPDX-License-Identifier: Apache-2.0
"""Many windows taken from a vfio-user server at once: an outcome for each, whatever happens."""

from __future__ import annotations

import errno
import os
import socket
import threading
from collections.abc import Iterator

import pytest

from holdfast.backends.unmapping import one_by_one
from holdfast.backends.vfio_user import VfioUserBackend
from holdfast.emu.function import BarSpec, Function, Identity
from holdfast.emu.server import Server
from holdfast.errors import Closed, DeviceGone, HoldfastError, RemoteError
from holdfast.kernel import memfd, procfs
from holdfast.values import Iova, Perm

PAGE = 4096
BASE = Iova(1 << 32)
pytestmark = pytest.mark.usefixtures("clean")


class Idle(Function):
    """A function that does nothing."""

    identity = Identity(vendor=0x1234, device=0x0003)
    bars = (BarSpec(0, PAGE),)


class Rig:
    """A server in a thread, its windows, and a backend."""

    def __init__(self) -> None:
        self.function = Idle()
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        self.server = Server(self.function)
        self.thread = threading.Thread(target=self.server.serve_socket, args=(theirs,))
        self.thread.start()
        self.backend = VfioUserBackend(ours)
        self.fd = memfd.create("holdfast-test", PAGE)

    def map(self, count: int) -> list[tuple[Iova, int]]:
        ranges = [(Iova(BASE + 2 * PAGE * number), PAGE) for number in range(count)]
        for iova, size in ranges:
            self.backend.dma_map(iova, size, Perm.RW, self.fd, 0)
        return ranges

    @property
    def mapped(self) -> int:
        connection = self.server._connection
        assert connection is not None
        return len(connection.windows.windows)

    def end(self) -> None:
        self.server.stop()
        self.thread.join(10)
        assert not self.thread.is_alive()

    def close(self) -> None:
        self.backend.close()
        self.end()
        self.function.close()
        os.close(self.fd)


@pytest.fixture
def rig() -> Iterator[Rig]:
    rig = Rig()
    yield rig
    rig.close()


def test_more_than_fit_on_their_way_at_once_all_go(rig: Rig) -> None:
    ranges = rig.map(300)
    keep = ranges.pop(150)
    assert rig.backend.dma_unmap_many(ranges) == [PAGE] * 299
    assert rig.mapped == 1
    assert rig.backend.dma_unmap(*keep) == PAGE


def test_one_that_is_not_there_does_not_keep_the_others(rig: Rig) -> None:
    ranges = rig.map(3)
    outcomes = rig.backend.dma_unmap_many([ranges[0], (ranges[1][0], 2 * PAGE), *ranges[1:]])
    assert outcomes[0] == outcomes[2] == outcomes[3] == PAGE
    assert isinstance(outcomes[1], RemoteError)
    assert outcomes[1].errno == errno.ENOENT
    assert rig.mapped == 0


def test_a_server_that_is_gone_is_an_outcome_for_each_and_not_an_error(rig: Rig) -> None:
    ranges = rig.map(5)
    rig.end()
    outcomes = rig.backend.dma_unmap_many(ranges)
    assert [type(outcome) for outcome in outcomes] == [DeviceGone] * 5
    rig.backend.close()
    outcomes = rig.backend.dma_unmap_many(ranges)
    assert [type(outcome) for outcome in outcomes] == [Closed] * 5


def test_a_window_costs_the_client_no_descriptor_and_is_unmapped_with_it(rig: Rig) -> None:
    before = procfs.open_descriptors(os.getpid())
    ranges = rig.map(20)
    assert _mappings() >= 2 * 20  # the server's and the client's own
    assert procfs.open_descriptors(os.getpid()) == before
    rig.backend.dma_unmap_many(ranges)
    assert _mappings() == 0


def _mappings() -> int:
    with open("/proc/self/maps", encoding="utf-8") as lines:
        return sum("/memfd:holdfast-test" in line for line in lines)


def test_one_by_one_goes_on_after_an_error() -> None:
    refused = HoldfastError("no", operation="test")

    def unmap(iova: Iova, size: int) -> int:
        if iova == BASE:
            raise refused
        return size

    assert one_by_one(unmap, [(BASE, 1), (Iova(BASE + 1), 2)]) == [refused, 2]


def test_one_by_one_loses_no_outcome_to_a_fault_of_the_backend() -> None:
    def unmap(iova: Iova, size: int) -> int:
        if iova != BASE:
            raise ZeroDivisionError("a fault")
        return size

    first, second = one_by_one(unmap, [(BASE, 1), (Iova(BASE + 1), 2)])
    assert first == 1
    assert isinstance(second, HoldfastError)
    assert "ZeroDivisionError: a fault" in second.what
