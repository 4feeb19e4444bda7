# SPDX-License-Identifier: Apache-2.0
"""Who has a PCI function open: processes with its nodes, BARs or VFIO descriptors.

Facts. A VFIO group, a VFIO character device and a UIO device are held by name: /proc/PID/fd shows
the node. A device descriptor that came out of a group is an anonymous file, ``[vfio-device]``;
which function it belongs to is told by its fdinfo (``vfio-device-syspath``, vfio_main.c,
``vfio_device_show_fdinfo``), but only on newer kernels. A mapped BAR keeps a function as open as a
descriptor does, and /proc/PID/maps shows it.

Choice. One pass over /proc for all functions. What an older kernel leaves open is reported as *a*
VFIO device, not as this one. Processes of other users cannot be looked into without privilege:
they are counted, so that "nobody" is never said without grounds. Everything is a snapshot.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from holdfast.kernel.pci_sysfs import SYSFS, PciFunction, device_path, text

DEV: Final = Path("/dev")
PROC: Final = Path("/proc")
_ANONYMOUS = "anon_inode:[vfio-device]"
_DELETED = " (deleted)"
_SYSPATH = "vfio-device-syspath:"


@dataclass(frozen=True, slots=True)
class Holder:
    """One process that holds a function open, and how.

    ``certain`` is False for a VFIO device of which the kernel does not say which one it is.
    """

    pid: int
    command: str
    how: str
    certain: bool = True

    def __str__(self) -> str:
        return f"pid {self.pid} ({self.command}) holds {self.how}"


@dataclass(frozen=True, slots=True)
class _Open:
    """Something of interest that a process has open or mapped; ``syspath`` if the kernel says."""

    pid: int
    path: str
    mapped: bool
    syspath: str


class HolderScan:
    """What all processes held at one moment, asked by function. Thread-safe once made."""

    def __init__(self, *, sysfs: Path = SYSFS, dev: Path = DEV, proc: Path = PROC) -> None:
        self._sysfs, self._dev, self._proc = sysfs, dev, proc
        self._prefixes = (f"{dev}/vfio", f"{dev}/uio", _ANONYMOUS, f"{sysfs.resolve()}/devices/")
        self.hidden = 0
        """Processes that this user may not look into."""
        self._open = [item for pid in _pids(proc) for item in self._of_process(pid)]

    def of(self, function: PciFunction) -> list[Holder]:
        """Who holds this function, by pid. The same process is named once."""
        directory = str(device_path(function.bdf, self._sysfs).resolve())
        nodes = {str(node) for node in self._nodes(function)}
        found: dict[int, Holder] = {}
        for item in self._open:
            holder = self._match(item, function, directory, nodes)
            if holder and not (item.pid in found and found[item.pid].certain):
                found[item.pid] = holder
        return [found[pid] for pid in sorted(found)]

    def _match(
        self, item: _Open, function: PciFunction, directory: str, nodes: set[str]
    ) -> Holder | None:
        node = item.path.removesuffix(_DELETED)
        how = f"a mapping of {node}" if item.mapped else node
        in_sysfs = item.path.startswith(f"{directory}/resource")
        if node in nodes or in_sysfs or item.syspath == directory:
            return Holder(item.pid, self._command(item.pid), how)
        if item.syspath:
            return None
        # A character device vanishes from /dev, and the driver from sysfs, while an unbind waits.
        unbound = function.driver is None and item.path == f"{node}{_DELETED}"
        if unbound or (node == _ANONYMOUS and has_vfio_driver(function, self._sysfs)):
            return Holder(item.pid, self._command(item.pid), "a VFIO device", certain=False)
        return None

    def _nodes(self, function: PciFunction) -> Iterator[Path]:
        if function.iommu_group is not None:
            yield self._dev / "vfio" / str(function.iommu_group)
            yield self._dev / "vfio" / f"noiommu-{function.iommu_group}"
        if function.vfio_cdev:
            yield self._dev / "vfio/devices" / function.vfio_cdev
        uio = uio_name(function, self._sysfs)
        if uio:
            yield self._dev / uio

    def _of_process(self, pid: int) -> Iterator[_Open]:
        base = self._proc / str(pid)
        try:
            names = os.listdir(base / "fd")
        except PermissionError:
            self.hidden += 1
            return
        except OSError:
            return  # it has ended
        seen = set()
        for name in names:
            link = _link(base / "fd" / name)
            if link.startswith(self._prefixes):
                item = _Open(pid, link, mapped=False, syspath=self._syspath(base, name, link))
                if item not in seen:
                    seen.add(item)
                    yield item
        yield from self._mapped(pid, base)

    def _mapped(self, pid: int, base: Path) -> Iterator[_Open]:
        try:
            lines = (base / "maps").read_text("utf-8", "replace").splitlines()
        except OSError:
            return
        named = (line.split(maxsplit=5)[5:] for line in lines)
        for path in sorted({rest[0] for rest in named if rest}):
            if path.startswith(self._prefixes):
                yield _Open(pid, path, mapped=True, syspath="")

    def _syspath(self, base: Path, name: str, link: str) -> str:
        if link != _ANONYMOUS and not link.startswith(f"{self._dev}/vfio/devices/"):
            return ""
        for line in (text(base / "fdinfo" / name) or "").splitlines():
            if line.startswith(_SYSPATH):
                return line.removeprefix(_SYSPATH).strip()
        return ""

    def _command(self, pid: int) -> str:
        name = text(self._proc / str(pid) / "comm") or "?"
        return "".join(c if c.isprintable() else "?" for c in name)


def has_vfio_driver(function: PciFunction, sysfs: Path = SYSFS) -> bool:
    """Whether the bound driver is one of VFIO's, vendor variants such as mlx5_vfio_pci included.

    Each makes a ``vfio-dev`` directory (since Linux 6.1); before, vfio-pci is known by name.
    """
    if function.driver is None:
        return False
    return function.driver == "vfio-pci" or (device_path(function.bdf, sysfs) / "vfio-dev").is_dir()


def uio_name(function: PciFunction, sysfs: Path = SYSFS) -> str | None:
    """The UIO device of a function, such as ``uio0``, or None."""
    try:
        names = sorted(os.listdir(device_path(function.bdf, sysfs) / "uio"))
    except OSError:
        return None
    return names[0] if names else None


def _link(path: Path) -> str:
    try:
        return os.readlink(path)
    except OSError:
        return ""  # closed since it was listed


def _pids(proc: Path) -> list[int]:
    try:
        return sorted(int(name) for name in os.listdir(proc) if name.isdecimal())
    except OSError:
        return []
