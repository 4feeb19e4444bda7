# SPDX-License-Identifier: Apache-2.0
"""Bring a function up from nothing: reach it, find its driver, have everything held, take over."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Sequence

from holdfast import backends, driver
from holdfast.contracts import FunctionBackend
from holdfast.dma.iova import IovaSpace
from holdfast.driver import Driver
from holdfast.keeper import embedded
from holdfast.keeper.addresses import dma_bits, iova_range, usable_range
from holdfast.keeper.continuity import Continuity, Inherited
from holdfast.keeper.function import FunctionHost
from holdfast.keeper.held import FunctionProcess, Scope, hold_backend
from holdfast.keeper.journal import Journal
from holdfast.kernel import pci_sysfs
from holdfast.uapi import pci_regs
from holdfast.values import CONFIG_REGION, Target


def bring_up(
    target: Target,
    scope: Scope,
    *,
    arena: int = 0,
    faults: str = "",
    siblings: Sequence[Target] = (),
    space: IovaSpace | None = None,
    safe: bool = False,
) -> Inherited:
    """A function at rest, with nothing mapped but the arena. Blocking; on error all is let go.

    ``space`` is shared with the ``siblings`` if there are any; None: made here. With ``safe`` no
    driver is loaded: it may be what several keepers crashed of before this one.
    """
    forget_all(scope)
    backend, child = _reach(target, scope, faults)
    try:
        hold_backend(scope, backend)
        found = Driver if safe else find_driver(target, backend)
        if siblings and space is None:
            space = shared_space([target, *siblings], backend)
        host = FunctionHost.start(target, scope, backend, found, arena, child, space, safe=safe)
    except BaseException:
        # Not left to the end of the process: what is mapped and pinned goes in order.
        backend.close()
        if child is not None:
            child.end()
        raise
    journal = Journal.create()
    scope.put("journal", [journal.fd])
    # Without the driver, which safe mode does without, nobody knows the function's address bits.
    bounds = {"base": host.space.base, "limit": host.space.limit}
    scope.put("up", note={"irq_index": host.irq_index, **bounds})
    return Inherited(host, Continuity(scope, journal, safe_mode=safe))


def forget_all(scope: Scope) -> None:
    """Let go of what a keeper left that was killed before it had brought the function up."""
    process = scope.find("process")
    if process is not None:
        FunctionProcess(int(process[1]), os.dup(process[0][0])).end()
    for name in scope.names():
        if name != "listener":
            scope.forget(name)


def find_driver(target: Target, backend: FunctionBackend) -> type[Driver]:
    """The driver class for what the function says it is."""
    config = backend.region_read(CONFIG_REGION, pci_regs.VENDOR_ID, 4)
    vendor, device = (int.from_bytes(config[at : at + 2], "little") for at in (0, 2))
    return driver.find(target, vendor, device)


def shared_space(targets: Sequence[Target], backend: FunctionBackend) -> IovaSpace:
    """IOVAs for all functions of a unit: what the one with the fewest address bits can reach."""
    bits = []
    for target in targets:
        found = pci_sysfs.function(target.bdf)
        bits.append(dma_bits(target, driver.find(target, found.vendor, found.device)))
    return IovaSpace(*usable_range(*iova_range(min(bits)), backend.iova_ranges))


def _reach(
    target: Target, scope: Scope, faults: str
) -> tuple[FunctionBackend, FunctionProcess | None]:
    """The backend of the target; an emulated function is started for it."""
    if target.scheme != "emu":
        return backends.connect(target), None
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    reading, writing = os.pipe2(os.O_CLOEXEC)
    with theirs, os.fdopen(writing, "wb"):
        arguments = ["emu", target.rest, "--fd", str(theirs.fileno()), "--ready-fd", str(writing)]
        if faults:
            arguments += ["--test-faults", faults]
        started = embedded.Detached(
            [sys.executable, "-m", "holdfast", *arguments],
            stdin=subprocess.DEVNULL,
            pass_fds=(theirs.fileno(), writing),
        )
    child = FunctionProcess.of(started.pid)
    try:
        with os.fdopen(reading, "rb"):
            scope.put("process", [child.pidfd], child.pid)
            embedded.raise_unless_ready(embedded.read_line(reading), target)
        return backends.adopt(ours, str(target)), child
    except BaseException:
        ours.close()
        child.end()
        raise
