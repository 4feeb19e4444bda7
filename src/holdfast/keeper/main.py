# SPDX-License-Identifier: Apache-2.0
"""``holdfast serve``: bring a function up, or go on where a killed keeper left it, and keep it."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from holdfast import backends
from holdfast.dma.iova import IovaSpace
from holdfast.errors import DeviceGone, HoldfastError, SystemFailure
from holdfast.keeper import descriptor_store, embedded, standby
from holdfast.keeper.anchor_link import AnchorLink, Guard
from holdfast.keeper.bringing_up import bring_up
from holdfast.keeper.continuity import Inherited
from holdfast.keeper.event_log import EventLog
from holdfast.keeper.held import Scope
from holdfast.keeper.server import Keeper, Settings
from holdfast.keeper.succession import inherit
from holdfast.keeper.unit import Unit
from holdfast.kernel import limits, packets
from holdfast.values import Target

BEAT = 0.5
"""Seconds between two heartbeats."""


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
    socket: Path | None = None
    """Where to listen; None: in the user's private directory, or with an allow-list in the
    system's."""
    on_ready: Callable[[], None] = lambda: None
    """Called once clients can come."""
    command: tuple[str, ...] = ()
    """Starts another standby for the same service, with ``--standby-fd N`` behind it."""
    standby_fd: int | None = None
    """The way to an anchor that waits for a standby; None: start from the beginning."""
    log: str = ""
    """File to which every step of every lease is appended."""
    guard: Guard = field(default_factory=Guard)


def run(service: Service) -> None:
    """Serve until idle or told to stop. Raises what kept it from coming up.

    The calling process becomes the standby and never returns from here; the keeper, its child,
    does. Call it with one thread only.
    """
    anchor = _way_to_anchor(service)
    listener = -1
    if anchor is None:
        try:
            listener = _listen(service, service.target).detach()
        except HoldfastError as error:
            _report(service.ready_fd, error)
            raise
    backends.warm(service.target)
    unneeded = [fd for fd in (service.ready_fd, listener) if fd is not None and fd >= 0]
    orders = standby.split(anchor, unneeded)
    limits.raise_descriptors()
    if orders.link is None:
        _begin(service, orders, socket.socket(fileno=listener))
    else:
        _go_on(service, orders, orders.link)


def _way_to_anchor(service: Service) -> socket.socket | None:
    """To an anchor that waits for a standby: one that runs, or one for what a service manager kept
    of a keeper; None if there is nothing to go on with."""
    if service.standby_fd is not None:
        return socket.socket(fileno=service.standby_fd)
    kept = descriptor_store.take(os.environ)
    if not kept:
        return None
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    AnchorLink.revive(theirs, _command(service), service.guard, kept)
    for item in kept.values():
        for fd in item.fds:
            os.close(fd)
    return ours


def _command(service: Service) -> tuple[str, ...]:
    return service.command or (sys.executable, "-m", "holdfast", "serve", str(service.target))


def _go_on(service: Service, orders: standby.Orders, sock: socket.socket) -> None:
    """Be a successor."""
    link = AnchorLink.inherit(sock, service.guard)
    try:
        asyncio.run(_Household(service, link, orders, None).serve())
    except DeviceGone:
        link.end()  # nothing is left that could write, and nothing to keep
        raise
    link.end()


def _begin(service: Service, orders: standby.Orders, listener: socket.socket) -> None:
    """Be the first keeper."""
    assert orders.standby is not None
    try:
        link = AnchorLink.start(orders.standby, _command(service), service.guard)
        try:
            if service.ready_fd is not None:
                link.put("ready", [service.ready_fd])
            link.put("0/listener", [listener.fileno()])
            asyncio.run(_Household(service, link, orders, listener).serve())
        finally:
            link.end()
    except HoldfastError as error:
        _report(service.ready_fd, error)
        raise
    finally:
        _abandon(listener)


def _listen(service: Service, target: Target) -> socket.socket:
    allow = service.settings.allow
    # Anybody may connect to a keeper with a list; who is not on it is told so at the greeting.
    mode = 0o666 if allow else 0o600
    if service.socket is not None and target == service.target:
        path = service.socket
    elif allow:
        path = embedded.make_system_dir() / embedded.socket_name(target)
    else:
        path = embedded.socket_path(target)
    return packets.listen(str(path), 128, mode=mode)


def _abandon(listener: socket.socket) -> None:
    """Close a listener that never served; else the name is gone, or a successor's."""
    if listener.fileno() >= 0:
        Path(listener.getsockname()).unlink(missing_ok=True)
        listener.close()


def _report(fd: int | None, error: HoldfastError | None) -> None:
    if fd is not None:
        with suppress(OSError):  # the one who started us is gone, or was told already
            embedded.report_ready(fd, error)


class _Household:
    """The keepers of one isolation unit, on one loop, with one link to the anchor."""

    def __init__(
        self,
        service: Service,
        link: AnchorLink,
        orders: standby.Orders,
        listener: socket.socket | None,
    ) -> None:
        self.service = service
        self.listener = listener
        self.link = link
        self.orders = orders
        self.targets = [service.target, *backends.siblings(service.target)]
        self.unit = Unit(backends.connect if service.target.scheme == "pci" else None)
        self.over = asyncio.Event()
        self.space: IovaSpace | None = None
        self.log = EventLog(service.log)

    async def serve(self) -> None:
        """Serve the function asked for, and its siblings as soon as somebody asks for them."""
        keepers = self._keepers()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.unit.stop)
        self._watch_anchor()
        if self.service.metrics_port is not None:
            _serve_metrics(keepers[0], self.service.metrics_port)
        beating = asyncio.create_task(self._beat())
        others = [
            asyncio.create_task(self._serve_sibling(index, keepers.get(index)))
            for index in range(1, len(self.targets))
        ]
        self._ready(keepers[0])
        await keepers[0].serve(self._listener(0))
        self.over.set()
        await asyncio.gather(*others)
        beating.cancel()
        self.link.quiet()
        self.log.say("end", self.link, keepers[0].host)

    def _ready(self, keeper: Keeper) -> None:
        """Tell whoever started the first of us; a successor does if that one had not."""
        waiting = self.link.get("ready")
        if waiting is not None:
            _report(waiting.fds[0], None)
            self.link.drop("ready")
        if self.orders.link is None:
            self.service.on_ready()
        what = "succession" if self.orders.link else "start"
        self.log.say("safe mode" if self.orders.safe else what, self.link, keeper.host)

    # -- functions ------------------------------------------------------------

    def _keepers(self) -> dict[int, Keeper]:
        """The function asked for, and (in a successor) every one that was served. Blocking.

        All that was mapped is known before anything new is.
        """
        found = {}
        for index, target in enumerate(self.targets):
            scope = self._scope(index)
            if self.orders.link is not None and scope.find("up") is not None:
                found[index] = inherit(target, scope, self.orders, self._siblings(target),
                                       self.space)  # fmt: skip
            elif index == 0:
                found[index] = self._bring_up(target, scope)
            else:
                continue
            self.space = found[index].host.space if len(self.targets) > 1 else None
        return {index: self._keeper(inherited) for index, inherited in found.items()}

    def _bring_up(self, target: Target, scope: Scope) -> Inherited:
        asked_for = target == self.service.target
        return bring_up(
            target,
            scope,
            arena=self.service.arena if asked_for else 0,
            faults=self.service.faults if asked_for else "",
            siblings=self._siblings(target),
            space=self.space,
            safe=self.orders.safe,
        )

    def _keeper(self, inherited: Inherited) -> Keeper:
        return Keeper(inherited, self.service.settings, self.unit, self.link, self.log)

    def _siblings(self, target: Target) -> list[Target]:
        return [other for other in self.targets if other != target]

    def _scope(self, index: int) -> Scope:
        return Scope(self.link, f"{index}/")

    def _listener(self, index: int) -> socket.socket:
        """Where clients come, and came to a predecessor."""
        if index == 0 and self.listener is not None:
            return self.listener
        held = self._scope(index).find("listener")
        if held is not None:
            return socket.socket(fileno=held[0][0])
        listener = _listen(self.service, self.targets[index])
        self._scope(index).put("listener", [listener.fileno()])
        return listener

    async def _serve_sibling(self, index: int, keeper: Keeper | None) -> None:
        """Serve another function of the unit from the moment somebody asks for it."""
        target = self.targets[index]
        try:
            listener = await asyncio.to_thread(self._listener, index)
        except HoldfastError as error:
            _complain(target, error)
            return
        try:
            if keeper is None:
                if not await self._asked_for(listener):
                    return
                keeper = self._keeper(
                    await asyncio.to_thread(self._bring_up, target, self._scope(index))
                )
            await keeper.serve(listener)
        except HoldfastError as error:
            _complain(target, error)
        finally:
            self._scope(index).drop("listener")
            _abandon(listener)

    async def _asked_for(self, listener: socket.socket) -> bool:
        """Wait for the first client of a listener; False if it is over before one comes."""
        loop = asyncio.get_running_loop()
        asked = asyncio.Event()
        loop.add_reader(listener.fileno(), asked.set)
        waits = [asyncio.create_task(event.wait()) for event in (asked, self.over)]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            loop.remove_reader(listener.fileno())
            for wait in waits:
                wait.cancel()
        return asked.is_set()

    # -- the anchor ------------------------------------------------------------

    async def _beat(self) -> None:
        """Tell the anchor that this loop runs."""
        while True:
            self.link.beat()
            await asyncio.sleep(BEAT)

    def _watch_anchor(self) -> None:
        """Start another anchor as soon as this one is dead."""
        asyncio.get_running_loop().add_reader(self.link.pidfd, self._anchor_died, self.link.pidfd)

    def _anchor_died(self, dead: int) -> None:
        asyncio.get_running_loop().remove_reader(dead)
        self.unit.keepers[0].host.keep(self._replace_anchor(dead))

    async def _replace_anchor(self, dead: int) -> None:
        await asyncio.to_thread(self.link.replace, dead)
        self._watch_anchor()


def _complain(target: Target, error: HoldfastError) -> None:
    """A sibling that cannot be served does not stop the function that was asked for."""
    sys.stderr.write(f"holdfast: {target} is not served: {error}\n")


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
