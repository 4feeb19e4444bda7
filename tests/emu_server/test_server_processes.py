# SPDX-License-Identifier: Apache-2.0
"""A server at a path, and clients in processes of their own that are killed."""

from __future__ import annotations

import os
import signal
import socket
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from holdfast.backends.vfio_user import VfioUserBackend
from holdfast.emu.function import BarSpec, Function, Identity
from holdfast.emu.server import SWITCH_INTERVAL, Server, tune_process
from holdfast.errors import Busy, DeviceGone, UsageError
from holdfast.regs.spec import Bank, Register

VALUE = Register("value", 0x00)

CLIENT = """
import os, sys, time
from holdfast.backends.vfio_user import VfioUserBackend
from holdfast.kernel import memfd
from holdfast.values import Iova, IrqIndex, Perm

backend = VfioUserBackend.connect(sys.argv[1])
fd = memfd.create("killed", 1 << 20)
for index in range(8):
    backend.dma_map(Iova(index << 20), 1 << 20, Perm.RW, fd, 0)
backend.set_irqs(IrqIndex.MSI, 0, [os.eventfd(0) for _ in range(4)])
backend.region_write(0, 0, bytes([int(sys.argv[2])]) * 4)
print("ready", flush=True)
time.sleep(60)
"""


class Toy(Function):
    identity = Identity(vendor=0x1234, device=0x0003)
    msi = 4
    bars = (BarSpec(0, 4096, banks=(Bank("toy", (VALUE,)),)),)

    def __init__(self) -> None:
        super().__init__()
        self.attaches = 0
        self.gone = threading.Semaphore(0)

    def detach(self) -> None:
        super().detach()
        self.attaches += 1
        self.gone.release()


class Served:
    """A toy that is served at a path."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.toy = Toy()
        self.server = Server(self.toy)
        self.thread = threading.Thread(target=self.server.serve_path, args=(path,))
        self.thread.start()

    def connect(self) -> VfioUserBackend:
        """Connect as soon as it listens."""
        for _ in range(5000):
            try:
                return VfioUserBackend.connect(self.path)
            except DeviceGone:
                threading.Event().wait(0.001)
        raise AssertionError("the server never listened")

    def close(self) -> None:
        self.server.stop()
        self.thread.join(10)
        assert not self.thread.is_alive()
        self.toy.close()


@pytest.fixture
def served(tmp_path: Path, clean: None) -> Iterator[Served]:
    served = Served(tmp_path / "toy.sock")
    yield served
    served.close()


def test_the_socket_is_for_its_owner_only_and_goes_with_the_server(served: Served) -> None:
    served.connect().close()
    assert stat.S_IMODE(served.path.stat().st_mode) == 0o600
    served.server.stop()
    served.thread.join(5)
    assert not served.path.exists()


def test_a_killed_client_leaves_nothing_and_the_next_finds_the_state(served: Served) -> None:
    first = served.connect()
    first.close()
    assert served.toy.gone.acquire(timeout=5)
    before = len(os.listdir("/proc/self/fd"))
    for value in (5, 6):
        client = subprocess.Popen(
            [sys.executable, "-c", CLIENT, str(served.path), str(value)], stdout=subprocess.PIPE
        )
        assert client.stdout is not None
        assert client.stdout.readline() == b"ready\n"
        client.send_signal(signal.SIGKILL)
        client.wait()
        client.stdout.close()
        assert served.toy.gone.acquire(timeout=5)
    successor = served.connect()
    assert successor.region_read(0, 0, 4) == bytes([6] * 4)
    assert successor.region_read(7, 0, 2) == b"\x34\x12"
    successor.close()
    assert served.toy.gone.acquire(timeout=5)
    while len(os.listdir("/proc/self/fd")) > before:  # the connection closes its last ones
        threading.Event().wait(0.001)
    assert served.toy.attaches == 4


def test_a_second_client_waits_for_the_first(served: Served) -> None:
    first = served.connect()
    connected = threading.Event()

    def second() -> None:
        backend = VfioUserBackend.connect(served.path)
        connected.set()
        backend.close()

    thread = threading.Thread(target=second)
    thread.start()
    assert not connected.wait(0.05)
    first.close()
    assert connected.wait(5)
    thread.join()


def test_two_servers_cannot_share_a_path(served: Served) -> None:
    served.connect().close()
    toy = Toy()
    with pytest.raises(Busy, match="a server already answers"):
        Server(toy).serve_path(served.path)
    toy.close()
    served.connect().close()


def test_a_stale_socket_is_replaced(tmp_path: Path, clean: None) -> None:
    path = tmp_path / "stale.sock"
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as old:
        old.bind(str(path))
    served = Served(path)
    served.connect().close()
    served.close()


def test_what_is_no_socket_is_never_removed(tmp_path: Path, clean: None) -> None:
    path = tmp_path / "precious"
    path.write_text("data")
    toy = Toy()
    with pytest.raises(Busy, match="something else than a socket"):
        Server(toy).serve_path(path)
    assert path.read_text() == "data"
    with pytest.raises(UsageError):
        Server(toy).serve_path(tmp_path / ("x" * 120))
    toy.close()


def test_once_ends_after_the_first_client(tmp_path: Path, clean: None) -> None:
    toy = Toy()
    path = tmp_path / "once.sock"
    server = Server(toy)
    thread = threading.Thread(target=server.serve_path, args=(path,), kwargs={"once": True})
    thread.start()
    while True:
        try:
            backend = VfioUserBackend.connect(path)
            break
        except DeviceGone:
            threading.Event().wait(0.001)
    backend.close()
    thread.join(5)
    assert not thread.is_alive()
    toy.close()


def test_stop_at_the_moment_of_the_end_is_harmless(tmp_path: Path, clean: None) -> None:
    """The loop may see that it is to end, and end, before ``stop`` has come to wake it."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    toy = Toy()
    for number in range(200):
        server = Server(toy)
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        if number % 2:
            thread = threading.Thread(target=server.serve_socket, args=(theirs,))
        else:
            thread = threading.Thread(target=server.serve_path, args=(tmp_path / "toy.sock",))
        thread.start()
        ours.close()
        while thread.is_alive():
            server.stop()
        thread.join()
        theirs.close()
    toy.close()
    sys.setswitchinterval(before)


def test_stop_before_serving_returns_at_once(tmp_path: Path, clean: None) -> None:
    toy = Toy()
    server = Server(toy)
    server.stop()
    server.serve_path(tmp_path / "never.sock")
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    server.serve_socket(theirs)
    ours.close()
    toy.close()


def test_the_serving_process_switches_threads_quickly() -> None:
    before = sys.getswitchinterval()
    try:
        tune_process()
        assert sys.getswitchinterval() == pytest.approx(SWITCH_INTERVAL)
    finally:
        sys.setswitchinterval(before)
