# SPDX-License-Identifier: Apache-2.0
"""``holdfast serve``: bring a function up, then keep it."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field

from holdfast import backends, driver
from holdfast.contracts import FunctionBackend
from holdfast.errors import HoldfastError, SystemFailure
from holdfast.keeper import embedded
from holdfast.keeper.function import FunctionHost
from holdfast.keeper.server import Keeper, Settings
from holdfast.kernel import packets
from holdfast.uapi import pci_regs
from holdfast.values import CONFIG_REGION, Target


@dataclass(frozen=True, slots=True)
class Service:
    """What to serve and how."""

    target: Target
    settings: Settings = field(default_factory=Settings)
    arena: int = 0
    faults: str = ""
    """Fault plan for the emulated function; a test option."""
    ready_fd: int | None = None
    metrics_port: int | None = None
    on_ready: Callable[[], None] = lambda: None
    """Called once clients can come."""


def run(service: Service) -> None:
    """Serve until idle or told to stop. Raises what kept it from coming up."""
    try:
        path = embedded.socket_path(service.target)
        listener = packets.listen(str(path), 128)
    except HoldfastError as error:
        _report(service, error)
        raise
    try:
        backend, child = _reach(service)
        asyncio.run(_serve(service, backend, child, listener))
    except HoldfastError as error:
        _report(service, error)
        raise
    finally:
        if listener.fileno() >= 0:  # it never served: else the name is gone, or a successor's
            path.unlink(missing_ok=True)
            listener.close()


def _report(service: Service, error: HoldfastError | None) -> None:
    if service.ready_fd is not None:
        try:
            embedded.report_ready(service.ready_fd, error)
        except OSError:
            pass  # the one who started us is gone, or was told already


def _reach(service: Service) -> tuple[FunctionBackend, subprocess.Popen[bytes] | None]:
    """The backend of the target; an emulated function is started for it."""
    target = service.target
    if target.scheme != "emu":
        return backends.connect(target), None
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    reading, writing = os.pipe2(os.O_CLOEXEC)
    with theirs, os.fdopen(writing, "wb"):
        arguments = ["emu", target.rest, "--fd", str(theirs.fileno()), "--ready-fd", str(writing)]
        if service.faults:
            arguments += ["--test-faults", service.faults]
        child = subprocess.Popen(
            [sys.executable, "-m", "holdfast", *arguments],
            stdin=subprocess.DEVNULL,
            pass_fds=(theirs.fileno(), writing),
        )
    try:
        with os.fdopen(reading, "rb"):
            embedded.raise_unless_ready(embedded.read_line(reading), target)
        return backends.adopt(ours, str(target)), child
    except BaseException:
        ours.close()
        child.kill()
        child.wait()
        raise


async def _serve(
    service: Service,
    backend: FunctionBackend,
    child: subprocess.Popen[bytes] | None,
    listener: socket.socket,
) -> None:
    config = backend.region_read(CONFIG_REGION, pci_regs.VENDOR_ID, 4)
    vendor, device = (int.from_bytes(config[at : at + 2], "little") for at in (0, 2))
    host = FunctionHost.start(
        service.target,
        backend,
        driver.find(service.target, vendor, device),
        service.arena,
        child,
    )
    keeper = Keeper(host, service.settings)
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, keeper.stop)
    if service.metrics_port is not None:
        _serve_metrics(keeper, service.metrics_port)
    _report(service, None)
    service.on_ready()
    await keeper.serve(listener)


def _serve_metrics(keeper: Keeper, port: int) -> None:
    """Counters for Prometheus on a loopback port (design: only in ``serve``)."""
    from prometheus_client import Gauge, start_http_server

    leases = Gauge("holdfast_leases", "leases living or dying")
    leases.set_function(lambda: len(keeper.leases))
    held = Gauge("holdfast_held_bytes", "DMA memory held for leases")
    held.set_function(lambda: keeper.host.source.held_bytes)
    quarantined = Gauge("holdfast_quarantined_bytes", "memory held because nothing proved quiet")
    quarantined.set_function(keeper.quarantined)
    try:
        start_http_server(port, addr="127.0.0.1")
    except OSError as error:
        raise SystemFailure(
            str(error), operation="serve metrics", target=f"port {port}", errno=error.errno
        ) from error
