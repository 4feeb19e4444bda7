# SPDX-License-Identifier: Apache-2.0
"""What ``holdfast.open`` costs: with a keeper running, and with none."""

from __future__ import annotations

import os
import select
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager

import holdfast
from holdfast.bench.echo import echo_server
from holdfast.bench.plan import OPEN_TIMEOUT, Run
from holdfast.bench.result import Result, ratios, times
from holdfast.device import Device
from holdfast.errors import HoldfastError
from holdfast.keeper import embedded
from holdfast.keeper.opening import connect
from holdfast.regs.xdma import CONFIG_BAR, CONFIG_IDENTIFIER
from holdfast.values import Target

INTERPRETER = (sys.executable, "-c", "import numpy")
IDLE = "30"
"""Seconds: the keeper is ended by the bench, not by idling in the middle of a round."""
END = 10.0
BLOCKS = 5


def open_cold(run: Run) -> list[Result]:
    """Open with nothing running: a keeper and an emulated function are started."""
    own: list[float] = []
    peer: list[float] = []
    verified = True
    for _ in range(run.sizes.opens_cold):
        with _no_keeper():
            begun = time.perf_counter()
            card = holdfast.open(run.target, access="shared", timeout=OPEN_TIMEOUT)
            own.append(time.perf_counter() - begun)
            verified &= _answers(card)
            card.close()
            _end_keeper(run.target)
        begun = time.perf_counter()
        for _ in range(2):
            subprocess.run(INTERPRETER, check=True)
        peer.append(time.perf_counter() - begun)
    return [_result("open_cold", own, peer, "two starts of python -c 'import numpy'", verified)]


def open_warm(run: Run) -> list[Result]:
    """Open with the keeper running: a lease, its rings, its BARs mapped."""
    own: list[float] = []
    peer: list[float] = []
    verified = True
    count = max(1, run.sizes.opens_warm // BLOCKS)
    run.open().close()
    with tempfile.TemporaryDirectory(prefix="holdfast-bench-") as directory:
        with echo_server(directory) as path:
            for _ in range(BLOCKS):
                for _ in range(count):
                    begun = time.perf_counter()
                    card = run.open()
                    own.append(time.perf_counter() - begun)
                    verified &= _answers(card)
                    card.close()
                peer += [_bare(path) for _ in range(count)]
    what = "a bare connect with one SOCK_SEQPACKET echo"
    return [_result("open_warm", own, peer, what, verified)]


def _bare(path: str) -> float:
    begun = time.perf_counter()
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
        sock.connect(path)
        sock.send(b"x" * 64)
        sock.recv(64)
        return time.perf_counter() - begun


def _answers(card: Device) -> bool:
    return card.bars[CONFIG_BAR].read(CONFIG_IDENTIFIER) == CONFIG_IDENTIFIER.reset


def _result(name: str, own: list[float], peer: list[float], what: str, verified: bool) -> Result:
    ratio = [theirs / mine for theirs, mine in zip(peer, own, strict=True)]
    return Result(
        name,
        statistics.median(own) * 1e3,
        "ms",
        statistics.median(peer) / statistics.median(own),
        what,
        verified=verified,
        detail={"ms": times(own, 1e3), "peer_ms": times(peer, 1e3), "ratio": ratios(ratio)},
    )


@contextmanager
def _no_keeper() -> Iterator[None]:
    """A runtime directory in which nothing runs."""
    chosen = {embedded.IDLE_VARIABLE: IDLE}
    with tempfile.TemporaryDirectory(prefix="holdfast-") as directory:
        chosen[embedded.RUNTIME_VARIABLE] = directory
        before = {name: os.environ.get(name) for name in chosen}
        os.environ.update(chosen)
        try:
            yield
        finally:
            for name, value in before.items():
                if value is None:
                    del os.environ[name]
                else:
                    os.environ[name] = value


def _end_keeper(target: str) -> None:
    """End the keeper that an open started, and wait until it is gone."""
    client = connect(Target.parse(target))
    try:
        pidfd = os.pidfd_open(client.ps()["keeper"])
    finally:
        client.close()
    try:
        signal.pidfd_send_signal(pidfd, signal.SIGTERM)
        poller = select.poll()
        poller.register(pidfd, select.POLLIN)
        if not poller.poll(END * 1000):
            raise HoldfastError("the keeper does not end", operation="bench", target=target)
    finally:
        os.close(pidfd)
