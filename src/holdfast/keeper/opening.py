# SPDX-License-Identifier: Apache-2.0
"""``holdfast.open``: from a target to a :class:`~holdfast.device.Device`.

Also what must happen behind the user's back: devices are closed at interpreter exit, and a forked
child loses every descriptor of its parent's leases.
"""

from __future__ import annotations

import atexit
import os
import time
import weakref
from collections.abc import Callable

from holdfast import steps
from holdfast.bar import Bar, Bell, Config
from holdfast.device import Device
from holdfast.driver import ControlMemory, Driver, Engine, find
from holdfast.errors import Busy, KeeperGone, KeeperUnreachable, ProtocolError, UsageError
from holdfast.interrupt import Interrupt
from holdfast.keeper import embedded
from holdfast.keeper.client import LeaseClient, close_all, expect, sg_of, take_bells
from holdfast.keeper.watch import Watch
from holdfast.kernel import bells
from holdfast.kernel.mapping import Mapping
from holdfast.mediated import MediatedEngine
from holdfast.uapi import pci_regs
from holdfast.values import CONFIG_REGION, Access, Area, Region, Target
from holdfast.wire import lease as wire
from holdfast.wire.rings import RING_BYTES, ClientEnd

MEDIATED_BELL = -1
"""Stands for the BAR of the bell that tells the keeper of requests: it is in none."""
RETRY_PAUSE = 0.005
SUCCESSION = 2.0
SUCCESSIONS = 5
"""Seconds, and keepers that went away, after which there seems to be no lasting successor."""

_devices: weakref.WeakSet[Device] = weakref.WeakSet()
_clients: weakref.WeakSet[LeaseClient] = weakref.WeakSet()


def connect(target: Target, timeout: float | None = None) -> LeaseClient:
    """Connect to the target's keeper, starting one if the target allows it, and greet it."""
    patience = _Patience()
    while True:
        steps.reach("client.connecting")
        client = LeaseClient(embedded.connect(target, timeout), target)
        steps.reach("client.connected")
        _clients.add(client)
        try:
            _require_options(client.greet(), target)
        except (KeeperGone, KeeperUnreachable):
            # It was just ending. Nothing has been asked of it yet, so try its successor.
            client.close()
            if patience.over():
                raise
            time.sleep(RETRY_PAUSE)
        except BaseException:
            client.close()
            raise
        else:
            steps.reach("client.greeted")
            return client


class _Patience:
    """With keepers that go away before they have served: a few, and a few seconds."""

    def __init__(self) -> None:
        self._until = time.monotonic() + SUCCESSION
        self._left = SUCCESSIONS

    def over(self) -> bool:
        """Another one went away: whether that is enough."""
        self._left -= 1
        return self._left <= 0 and time.monotonic() >= self._until


def _require_options(welcome: wire.Welcome, target: Target) -> None:
    """A keeper that runs already was started with options; ours must not say otherwise."""
    if target.scheme != "pci":
        return
    kept = Target.parse(welcome.target)
    if any(kept.options.get(key) != value for key, value in target.options.items()):
        raise Busy(
            f"it is kept as {kept}",
            operation="open",
            target=str(target),
            hint="open it so, or stop that keeper",
        )


def open(  # noqa: A001
    target: str,
    *,
    access: str | None = None,
    timeout: float | None = None,
    channels: int | None = None,
) -> Device:
    """Open a PCI function and lease it.

    target
        ``emu:edu``, ``emu:xdma``, ``emu:FILE.py:Class``, ``vfio-user:/path/to.sock``, ...
        A missing keeper (and emulated function) is started for this user and ends when idle.
    access
        ``"exclusive"`` (the whole function), ``"shared"`` (some channels of it) or ``"mediated"``
        (the keeper checks and posts each request). None: mediated if there are leases of another
        user and the driver can, else shared if the driver has channels, else exclusive.
    timeout
        seconds to wait while others hold what is asked for; None: do not wait.
    channels
        how many channels a shared lease wants; 0 asks for memory only.

    Raises BadTarget, Busy, KeeperUnreachable, NoPermission, VersionMismatch, DeviceError.
    """
    parsed = Target.parse(target)
    wanted = _parse_access(access, target)
    deadline = time.monotonic() + (timeout or 0)
    patience = _Patience()
    while True:
        client = connect(parsed, timeout)
        try:
            return _open(client, parsed, wanted, channels)
        except Busy:
            client.close()
            if time.monotonic() >= deadline:
                raise
            time.sleep(RETRY_PAUSE)
        except KeeperGone:
            # Killed before it had written the lease down; its successor knows nothing of it.
            client.close()
            if patience.over() and time.monotonic() >= deadline:
                raise
            time.sleep(RETRY_PAUSE)
        except BaseException:
            client.close()
            raise


def _parse_access(access: str | None, target: str) -> Access | None:
    try:
        return None if access is None else Access(access)
    except ValueError:
        raise UsageError(
            f"access {access!r} is not one of {[str(a) for a in Access]}",
            operation="open",
            target=target,
        ) from None


def _open(
    client: LeaseClient, target: Target, access: Access | None, channels: int | None
) -> Device:
    reply, fds = client.request(wire.Open(access=access, channels=channels))
    opened = expect(reply, wire.Opened)
    steps.reach("client.opened")
    client.number = opened.lease
    client.access = opened.access
    client.channels = tuple(opened.channels)
    client.grant = opened.grant
    client.granted = client.generation()
    taken: set[int] = set()
    try:
        device = _build(client, target, opened, fds, taken)
    finally:
        close_all([fd for place, fd in enumerate(fds) if place not in taken])
    _devices.add(device)
    steps.reach("client.mapped")
    return device


def _build(
    client: LeaseClient, target: Target, opened: wire.Opened, fds: list[int], taken: set[int]
) -> Device:
    bars: dict[int, Bar] = {}
    config: Config | None = None
    for info in opened.regions:
        region = _region(info)
        if region.index == CONFIG_REGION:
            config = Config(region, client, [], str(target))
        elif region.size and region.index < 6:
            bars[region.index] = Bar(region, client, _map_areas(info, region, fds), str(target))
    if config is None:
        raise ProtocolError("the function has no configuration space", operation="open")
    irqs = {}
    for vector in opened.vectors:
        unmask = client.unmask if vector.level else None
        irqs[vector.vector] = Interrupt(vector.vector, fds[vector.fd], client, unmask)
        taken.add(vector.fd)
    doorbells = take_bells(opened.bells, fds)
    taken.update(bell.fd for bell in opened.bells)
    engine = None
    if opened.rings is not None:
        engine, bell, done = _rings(opened.rings, fds, client)
        doorbells, irqs = [(MEDIATED_BELL, bell)], {0: done}
        taken.update((opened.rings.submit, opened.rings.done))
    control = _map_control(opened.control, fds) if opened.control else None
    driver: type[Driver] = Driver
    if opened.channels or opened.access is not Access.SHARED:
        driver = find(
            target, config.load(pci_regs.VENDOR_ID, 2), config.load(pci_regs.DEVICE_ID, 2)
        )
    device = Device(
        target,
        client,
        driver=driver,
        bars=bars,
        config=config,
        irqs=irqs,
        bells=doorbells,
        control=control,
        engine=engine,
    )
    if opened.watch:
        device.watch = Watch(device, client)
    return device


def _region(info: wire.RegionInfo) -> Region:
    return Region(
        info.index,
        info.size,
        info.readable,
        info.writable,
        tuple(Area(offset, size) for offset, size in info.areas),
        info.file_offset,
    )


def _map_areas(info: wire.RegionInfo, region: Region, fds: list[int]) -> list[tuple[Area, Mapping]]:
    if info.fd is None:
        return []
    return [
        (
            area,
            Mapping(
                fds[info.fd],
                area.size,
                offset=region.file_offset + area.offset,
                writable=region.writable,
                dont_fork=True,
            ),
        )
        for area in region.areas
    ]


def _rings(
    info: wire.RingInfo, fds: list[int], client: LeaseClient
) -> tuple[Callable[[Device], Engine], Bell, Interrupt]:
    """The client half of a mediated lease, and its bells, which the device comes to own."""
    mapping = Mapping(fds[info.fd], RING_BYTES, dont_fork=True)
    bell = Bell(0, None, fds[info.submit])
    done = Interrupt(0, fds[info.done], client, drain=bells.drain)
    end = ClientEnd(mapping.array.data)
    return lambda device: MediatedEngine(device, end, bell, done, info.card), bell, done


def _map_control(info: wire.SlabInfo, fds: list[int]) -> ControlMemory:
    # Not in a forked child: it could write descriptors there.
    mapping = Mapping.extents(fds[info.fd], info.extents, dont_fork=True)
    return ControlMemory(mapping.array.data, sg_of(info))


# -- fork and exit ------------------------------------------------------------


def _in_child() -> None:
    """A forked child can neither post nor hold the lease: its copies of everything are closed."""
    for client in list(_clients):
        client.drop()
    for device in list(_devices):
        device.orphan()


def _at_exit() -> None:
    for device in list(_devices):
        device.close()


os.register_at_fork(after_in_child=_in_child)
atexit.register(_at_exit)
