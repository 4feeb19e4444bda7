# SPDX-License-Identifier: Apache-2.0
"""What the running system would lose if a function were taken from its driver.

A driver lets go of its function when sysfs says so, mounted disk or not: the kernel asks nobody. So
we look first at what hangs below the function in sysfs: block devices with a mounted file system or
in use as swap, directly or through device mapper and RAID (``holders``), network interfaces
that are up, virtual functions, and, for a bridge, the functions behind it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

from holdfast.kernel.pci_holders import PROC
from holdfast.kernel.pci_sysfs import SYSFS, device_path, text
from holdfast.values import Bdf

_IFF_UP = 0x1
"""linux/if.h"""
_ROUTE_UP = 0x1
"""linux/route.h, RTF_UP"""
_DEEPEST = 8
"""Layers of stacked block devices that are followed."""


def in_use(bdf: Bdf, *, sysfs: Path = SYSFS, proc: Path = PROC) -> list[str]:
    """One clause for each thing the system would lose; empty if it would lose nothing. Read only.

    What the kernel does not show is not found: a raw disk open in a database, a card used through
    a device node of its own.
    """
    directory = device_path(bdf, sysfs)
    return [
        *_disks(directory, sysfs, proc),
        *_networks(directory, sysfs, proc),
        *_virtual_functions(directory),
    ]


def _below(directory: Path, kind: Path) -> list[str]:
    """Names in a class of sysfs whose device hangs below this directory."""
    root = f"{directory.resolve()}/"
    try:
        names = sorted(os.listdir(kind))
    except OSError:
        return []
    return [name for name in names if str((kind / name).resolve()).startswith(root)]


def _disks(directory: Path, sysfs: Path, proc: Path) -> Iterator[str]:
    block = sysfs / "class/block"
    mounted = _mounted(proc)
    swaps = _swaps(proc)
    for name in _below(directory, block):
        for user in _stacked(name, block, _DEEPEST):
            number = text(block / user / "dev") or ""
            through = "" if user == name else f" (through {name})"
            for place in mounted.get(number, []):
                yield f"{user}{through} is mounted on {place}"
            if user in swaps:
                yield f"{user}{through} is in use as swap"


def _stacked(name: str, block: Path, depth: int) -> Iterator[str]:
    """A block device and those built upon it."""
    yield name
    if depth:
        try:
            above = sorted(os.listdir(block / name / "holders"))
        except OSError:
            return
        for other in above:
            yield from _stacked(other, block, depth - 1)


def _mounted(proc: Path) -> dict[str, list[str]]:
    """``major:minor`` to mount points (proc_pid_mountinfo(5), fields 3 and 5).

    Btrfs and others mount under a device number of their own; there the source names the device.
    """
    found: dict[str, list[str]] = {}
    for line in _lines(proc / "self/mountinfo"):
        fields = line.split()
        if len(fields) < 5:
            continue
        place = _unescape(fields[4])
        found.setdefault(fields[2], []).append(place)
        behind = line.partition(" - ")[2].split()
        if len(behind) > 1 and fields[2].startswith("0:"):
            number = _device_number(_unescape(behind[1]))
            found.setdefault(number, []).append(place)
    return found


def _device_number(source: str) -> str:
    """``major:minor`` of a block device's node; empty for a source that is none (``tmpfs``)."""
    if not source.startswith("/dev/"):
        return ""
    try:
        number = os.stat(source).st_rdev
    except OSError:
        return ""
    return f"{os.major(number)}:{os.minor(number)}"


def _unescape(field: str) -> str:
    """Undo mountinfo's octal escapes of blanks and backslashes."""
    return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), field)


def _swaps(proc: Path) -> set[str]:
    lines = list(_lines(proc / "swaps"))[1:]
    return {os.path.basename(os.path.realpath(line.split()[0])) for line in lines if line.split()}


def _networks(directory: Path, sysfs: Path, proc: Path) -> Iterator[str]:
    routes = _default_routes(proc)
    for name in _below(directory, sysfs / "class/net"):
        flags = int(text(sysfs / "class/net" / name / "flags") or "0", 16)
        if not flags & _IFF_UP:
            continue
        clause = f"network interface {name} is up"
        if name in routes:
            only = routes == {name}
            clause += f" and carries {'the only' if only else 'a'} default route"
        yield clause


def _default_routes(proc: Path) -> set[str]:
    """Interfaces with a default route, IPv4 or IPv6 (proc_net(5): route, ipv6_route)."""
    found = set()
    for line in list(_lines(proc / "net/route"))[1:]:
        fields = line.split()
        if len(fields) > 7 and fields[1] == fields[7] == "00000000":
            found.add(fields[0])
    for line in _lines(proc / "net/ipv6_route"):
        fields = line.split()
        default = len(fields) > 9 and fields[0] == "0" * 32 and fields[1] == "00"
        if default and int(fields[8], 16) & _ROUTE_UP and fields[9] != "lo":
            found.add(fields[9])
    return found


def _virtual_functions(directory: Path) -> Iterator[str]:
    count = text(directory / "sriov_numvfs") or "0"
    if count != "0":
        yield f"{count} virtual functions belong to it"


def _lines(path: Path) -> Iterator[str]:
    try:
        yield from path.read_text("utf-8", "replace").splitlines()
    except OSError:
        return
