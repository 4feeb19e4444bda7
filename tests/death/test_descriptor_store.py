# SPDX-License-Identifier: Apache-2.0
"""A service manager that keeps descriptors: every process of a keeper is killed, nothing is lost.

The manager here speaks what sd_notify(3) and sd_listen_fds(3) say of FDSTORE; it is not systemd.
"""

from __future__ import annotations

import array
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.conftest import eventually

import holdfast
from holdfast.keeper import embedded
from holdfast.keeper.client import LeaseClient
from holdfast.kernel import pidfd, procfs
from holdfast.values import Target

TARGET = "emu:xdma?memory=1M&link_rate=512K&link_chunk=4096"
SIZE = 256 << 10
LONG = 20.0


class Manager:
    """Keeps what it is sent, by name, and starts a service with it."""

    def __init__(self, directory: Path) -> None:
        self.path = str(directory / "notify")
        self.kept: dict[str, int] = {}
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._sock.bind(self.path)
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        while True:
            data, ancillary, _, _ = self._sock.recvmsg(4096, socket.CMSG_SPACE(64))
            fds = array.array("i")
            for _, _, payload in ancillary:
                fds.frombytes(payload)
            fields = dict(line.split("=", 1) for line in data.decode().splitlines())
            name = fields.get("FDNAME", "")
            if "STOP" in fields:
                return
            if (old := self.kept.pop(name, None)) is not None:
                os.close(old)
            if "FDSTORE" in fields:
                (self.kept[name],) = fds

    def start(self) -> subprocess.Popen[bytes]:
        """Start the service with everything kept, as descriptors from 3 on."""
        names = sorted(self.kept)  # in no order that means anything
        fds = [os.dup(self.kept[name]) for name in names]
        environment = {
            **os.environ,
            "NOTIFY_SOCKET": self.path,
            "LISTEN_FDS": str(len(fds)),
            "LISTEN_FDNAMES": ":".join(names),
        }
        launcher = (
            "import os, sys\n"
            f"fds = [os.dup(fd) for fd in {fds}]\n"  # out of the way first
            "for place, fd in enumerate(fds): os.dup2(fd, 1000 + place)\n"
            "for place in range(len(fds)): os.dup2(1000 + place, 3 + place)\n"
            "os.closerange(3 + len(fds), 2000)\n"
            "os.environ['LISTEN_PID'] = str(os.getpid())\n"
            f"os.execv(sys.executable, [sys.executable, '-m', 'holdfast', 'serve', {TARGET!r},"
            " '--idle', '60'])\n"
        )
        process = subprocess.Popen(
            [sys.executable, "-c", launcher], env=environment, pass_fds=fds,
            stdout=subprocess.DEVNULL,
        )  # fmt: skip
        for fd in fds:
            os.close(fd)
        return process

    def close(self) -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.sendto(b"STOP=1", self.path)
        self._thread.join()
        self._sock.close()
        for fd in self.kept.values():
            os.close(fd)


@pytest.fixture
def manager(tmp_path: Path, runtime: object) -> Iterator[Manager]:
    made = Manager(tmp_path)
    yield made
    made.close()


def ps(card: holdfast.Device) -> dict[str, Any]:
    assert isinstance(card.lease, LeaseClient)
    return card.lease.ps()


def test_a_service_whose_processes_were_all_killed_goes_on_with_its_clients(
    manager: Manager,
) -> None:
    first = manager.start()
    path = embedded.socket_path(Target.parse(TARGET))
    assert eventually(path.exists, LONG)  # else the client would start a keeper of its own
    with holdfast.open(TARGET, timeout=LONG) as card:
        source, into = card.alloc(SIZE), card.alloc(SIZE)
        source.array[:] = np.random.default_rng(5).integers(0, 256, SIZE, np.uint8)
        transfer = card.dma.to_card(source)
        told = ps(card)
        assert "0/backend#0" in manager.kept
        below = [pid for pid in procfs.descendants(first.pid) if pid != told["function"]]
        fds = [os.pidfd_open(pid) for pid in below]
        for fd in fds:
            pidfd.kill(fd, 19)
        first.kill()
        for fd in fds:
            pidfd.kill(fd)
            assert pidfd.await_death(fd, LONG)
            os.close(fd)
        first.wait()
        second = manager.start()
        transfer.wait(LONG)
        card.dma.from_card(into).wait(LONG)
        assert np.array_equal(into.array, source.array)
        again = ps(card)
        assert again["function"] == told["function"]
        assert again["unaccounted_bytes"] == 0
    second.terminate()
    assert second.wait(LONG) == 0
    # Orderly ended, it leaves nothing of a keeper in the store.
    assert eventually(lambda: not [name for name in manager.kept if not name.startswith("notes-")])
