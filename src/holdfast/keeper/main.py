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
from pathlib import Path

from holdfast import backends, driver
from holdfast.contracts import FunctionBackend
from holdfast.dma.iova import IovaSpace
from holdfast.errors import HoldfastError, SystemFailure
from holdfast.keeper import embedded
from holdfast.keeper.addresses import dma_bits, iova_range, usable_range
from holdfast.keeper.function import FunctionHost
from holdfast.keeper.server import Keeper, Settings
from holdfast.keeper.unit import Unit
from holdfast.kernel import packets, pci_sysfs
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
        listener = _listen(service.target)
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
        _abandon(listener)


def _listen(target: Target) -> socket.socket:
    return packets.listen(str(embedded.socket_path(target)), 128)


def _abandon(listener: socket.socket) -> None:
    """Close a listener that never served; else the name is gone, or a successor's."""
    if listener.fileno() >= 0:
        Path(listener.getsockname()).unlink(missing_ok=True)
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
    siblings = backends.siblings(service.target)
    space = _shared_space([service.target, *siblings], backend) if siblings else None
    host = _take_over(service, service.target, backend, child, space)
    unit = Unit(backends.connect if service.target.scheme == "pci" else None)
    keeper = Keeper(host, service.settings, unit)
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, unit.stop)
    if service.metrics_port is not None:
        _serve_metrics(keeper, service.metrics_port)
    over = asyncio.Event()
    others = [
        asyncio.create_task(_serve_sibling(service, target, unit, space, over))
        for target in siblings
    ]
    _report(service, None)
    service.on_ready()
    await keeper.serve(listener)
    over.set()
    await asyncio.gather(*others)


def _take_over(
    service: Service,
    target: Target,
    backend: FunctionBackend,
    child: subprocess.Popen[bytes] | None,
    space: IovaSpace | None,
) -> FunctionHost:
    """Find the function's driver and bring it up. Blocking; on error the backend is closed."""
    try:
        config = backend.region_read(CONFIG_REGION, pci_regs.VENDOR_ID, 4)
        vendor, device = (int.from_bytes(config[at : at + 2], "little") for at in (0, 2))
        found = driver.find(target, vendor, device)
        return FunctionHost.start(target, backend, found, service.arena, child, space)
    except BaseException:
        # Not left to the end of the process: what is mapped and pinned goes in order.
        backend.close()
        if child is not None:
            child.kill()
            child.wait()
        raise


async def _serve_sibling(
    service: Service, target: Target, unit: Unit, space: IovaSpace | None, over: asyncio.Event
) -> None:
    """Serve another function of the unit from the moment somebody asks for it, until ``over``."""
    try:
        listener = _listen(target)
    except HoldfastError as error:
        _complain(target, error)
        return
    try:
        if not await _asked_for(listener, over):
            return
        backend = await asyncio.to_thread(backends.connect, target)
        host = await asyncio.to_thread(_take_over, service, target, backend, None, space)
        keeper = Keeper(host, service.settings, unit)
        await keeper.serve(listener)
    except HoldfastError as error:
        _complain(target, error)
    finally:
        _abandon(listener)


async def _asked_for(listener: socket.socket, over: asyncio.Event) -> bool:
    """Wait for the first client of a listener; False if it is over before one comes."""
    loop = asyncio.get_running_loop()
    asked = asyncio.Event()
    loop.add_reader(listener.fileno(), asked.set)
    waits = [asyncio.create_task(event.wait()) for event in (asked, over)]
    try:
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
    finally:
        loop.remove_reader(listener.fileno())
        for wait in waits:
            wait.cancel()
    return asked.is_set()


def _complain(target: Target, error: HoldfastError) -> None:
    """A sibling that cannot be served does not stop the function that was asked for."""
    sys.stderr.write(f"holdfast: {target} is not served: {error}\n")


def _shared_space(targets: list[Target], backend: FunctionBackend) -> IovaSpace:
    """IOVAs for all functions of a unit: what the one with the fewest address bits can reach."""
    bits = []
    for target in targets:
        found = pci_sysfs.function(target.bdf)
        bits.append(dma_bits(target, driver.find(target, found.vendor, found.device)))
    return IovaSpace(*usable_range(*iova_range(min(bits)), backend.iova_ranges))


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
