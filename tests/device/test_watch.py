# SPDX-License-Identifier: Apache-2.0
"""The thread that lets go of a device: the system wants it back, or the keeper is gone."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from typing import cast

import pytest

from holdfast.device import Device
from holdfast.errors import DeviceGone, HoldfastError, KeeperGone
from holdfast.keeper.client import LeaseClient
from holdfast.keeper.watch import Watch
from holdfast.kernel import events

PATIENCE = 10.0


class FakeDevice:
    """Remembers why it was let go of."""

    def __init__(self) -> None:
        self.why: HoldfastError | None = None
        self.evicted = threading.Event()

    def evict(self, why: HoldfastError) -> None:
        self.why = why
        self.evicted.set()


class FakeLease:
    """The client's end of a lease whose keeper is the other end of a socket pair."""

    def __init__(self) -> None:
        self.ours, self.keeper = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.news = events.make()
        self.leave: HoldfastError | None = None
        self.pumped = threading.Event()

    def fileno(self) -> int:
        return self.ours.fileno()

    def pump(self) -> None:
        self.ours.setblocking(False)
        try:
            if not self.ours.recv(64):
                raise KeeperGone("it hung up", operation="test")
        except BlockingIOError:
            pass
        self.pumped.set()

    def close(self) -> None:
        self.ours.close()
        self.keeper.close()
        events.close(self.news)


@pytest.fixture
def lease(clean: None) -> Iterator[FakeLease]:
    fake = FakeLease()
    yield fake
    fake.close()


@pytest.fixture
def device() -> FakeDevice:
    return FakeDevice()


@pytest.fixture
def watch(device: FakeDevice, lease: FakeLease) -> Iterator[Watch]:
    watching = Watch(cast(Device, device), cast(LeaseClient, lease))
    yield watching
    watching.close()


def test_a_device_that_is_wanted_back_is_let_go_of(
    device: FakeDevice, lease: FakeLease, watch: Watch
) -> None:
    lease.leave = DeviceGone("wanted", operation="test")
    events.ring(lease.news, 1)
    assert device.evicted.wait(PATIENCE)
    assert device.why is lease.leave


def test_a_device_whose_keeper_hangs_up_is_let_go_of(
    device: FakeDevice, lease: FakeLease, watch: Watch
) -> None:
    lease.keeper.close()
    assert device.evicted.wait(PATIENCE)
    assert isinstance(device.why, KeeperGone)


def test_answers_and_other_news_are_nothing_to_it(
    device: FakeDevice, lease: FakeLease, watch: Watch
) -> None:
    lease.keeper.send(b"an answer")
    assert lease.pumped.wait(PATIENCE)
    lease.pumped.clear()
    events.ring(lease.news, 1)
    assert lease.pumped.wait(PATIENCE)
    assert not device.evicted.is_set()


def test_it_ends_when_it_is_closed_and_says_nothing(device: FakeDevice, lease: FakeLease) -> None:
    watch = Watch(cast(Device, device), cast(LeaseClient, lease))
    watch.close()
    watch.close()
    lease.keeper.close()
    assert not device.evicted.is_set()
