# SPDX-License-Identifier: Apache-2.0
"""Isolation units: what functions of one IOMMU group share within a process.

A group opens once, and an I/O address space belongs to the whole group. So the first function that
is opened makes the space, and the last one that is closed ends it.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from typing import Generic, TypeVar

from holdfast.backends.pci_usable import blockers
from holdfast.errors import Busy, HoldfastError
from holdfast.kernel.pci_holders import HolderScan
from holdfast.kernel.pci_sysfs import PciFunction, group_members
from holdfast.values import Bdf

GROUPS = "/dev/vfio"
DEVICES = "/dev/vfio/devices"


class Unit:
    """Something that the functions of one group share; :meth:`end` lets it go."""

    def end(self) -> None:
        raise NotImplementedError


U = TypeVar("U", bound=Unit)


class Units(Generic[U]):
    """The units of this process, each with the functions opened through it. Any thread.

    A forked child has none: what it inherited are duplicates of its parent's descriptors.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open: dict[tuple[int, int], tuple[U, frozenset[Bdf]]] = {}

    def take(self, group: int, function: Bdf, make: Callable[[], U]) -> U:
        """The group's unit, made if there is none. To be given back with :meth:`drop`.

        Raises Busy if the function is open in this process already: type1 would open it a second
        time, with one set of interrupts for both.
        """
        key = (os.getpid(), group)
        with self._lock:
            unit, users = self._open.get(key, (None, frozenset()))
            if function in users:
                raise Busy(
                    f"this process (pid {os.getpid()}) has it open already",
                    operation="open",
                    target=str(function),
                    hint="close it first",
                )
            if unit is None:
                unit = make()
            self._open[key] = (unit, users | {function})
            return unit

    def drop(self, group: int, function: Bdf, unit: U) -> None:
        """One function less. The last one ends the unit; in a forked child, the first one does."""
        key = (os.getpid(), group)
        with self._lock:
            _, users = self._open.pop(key, (unit, frozenset()))
            if users - {function}:
                self._open[key] = (unit, users - {function})
            else:
                unit.end()


def held(function: PciFunction, error: HoldfastError, target: str) -> Busy:
    """The error for an EBUSY: who holds the function, its group, or a sibling of it."""
    group = function.iommu_group
    members = [function] if group is None else group_members(group) or [function]
    scan = HolderScan()
    found = {holder.pid: holder for member in members for holder in scan.of(member)}
    # An anonymous descriptor on an older kernel may be any VFIO device's: second choice.
    sure = [holder for holder in found.values() if holder.certain] or list(found.values())
    who = ", ".join(str(holder) for holder in sure)
    if not who:
        who = f"not to be seen from here ({scan.hidden} processes of others)"
    return Busy(
        f"the function or its group is held: {who}",
        operation=error.operation,
        target=target,
        errno=error.errno,
        hint="end the holder; descriptors passed on and mapped BARs hold as well",
    )


def not_viable(function: PciFunction, target: str) -> Busy:
    """The error for a group that cannot be had, with the functions that prevent it."""
    others = blockers(function)
    names = ", ".join(f"{other.bdf} ({other.driver})" for other in others)
    return Busy(
        f"IOMMU group {function.iommu_group} is not viable: {names or 'a driver'} uses it as well",
        operation="open group",
        target=target,
        hint="holdfast bind " + " ".join(str(other.bdf) for other in others) if others else "",
    )
