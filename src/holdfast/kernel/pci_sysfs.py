# SPDX-License-Identifier: Apache-2.0
"""PCI functions as sysfs shows them: read, never written.

Sources: Documentation/ABI/testing/sysfs-bus-pci, sysfs-kernel-iommu_groups, sysfs-devices-vfio-dev
of the Linux tree; drivers/pci/pci-sysfs.c; drivers/iommu/iommu.c (``iommu_group_show_type``).

A function can vanish between two reads (hot-unplug, SR-IOV switched off): reads of its attributes
then fail with ENODEV or ENOENT. Lists leave such a function out; :func:`function` says that there
is none. Optional attributes that are missing read as None or empty. Every function takes the root
of sysfs, so that a fabricated tree can stand for a machine. Thread-safe: nothing is kept.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from holdfast.errors import BadTarget, HoldfastError
from holdfast.values import Bdf

SYSFS: Final = Path("/sys")

NOIOMMU_TYPE: Final = "vfio-noiommu"
"""``iommu_type`` of a group that VFIO made up for a function without an IOMMU."""

_MOST = 64 * 1024
"""Bytes read of one attribute at most; sysfs attributes end at one page, 4096 bytes."""


@dataclass(frozen=True, slots=True)
class Resource:
    """One line of ``resource``: bus range in bytes, ``end`` inclusive, and the kernel's flags.

    An unused one is all zeros. Flags are IORESOURCE_* (linux/ioport.h).
    """

    start: int
    end: int
    flags: int

    @property
    def size(self) -> int:
        """Bytes; 0 if the resource is not implemented."""
        return self.end - self.start + 1 if self.end else 0


@dataclass(frozen=True, slots=True)
class PciFunction:
    """One PCI function at the moment it was read.

    ``class_code`` is the 24-bit code, base class highest. ``driver`` is None if none is bound,
    ``iommu_group`` None if no IOMMU reaches the function. ``iommu_type`` is the group's *default*
    domain, which says nothing about VFIO's own: "DMA", "DMA-FQ", "identity", "blocked", or
    :data:`NOIOMMU_TYPE`. ``resources`` keeps the kernel's order: BAR 0-5, the ROM, then others.
    """

    bdf: Bdf
    vendor: int
    device: int
    subsystem_vendor: int
    subsystem_device: int
    class_code: int
    revision: int
    driver: str | None
    iommu_group: int | None
    iommu_type: str | None
    reset_methods: tuple[str, ...]
    resources: tuple[Resource, ...]
    vfio_cdev: str | None
    """Name of the VFIO character device, such as ``vfio0`` (below /dev/vfio/devices), or None.

    Kernels without CONFIG_VFIO_DEVICE_CDEV have the name in sysfs but no device: None.
    """

    @property
    def is_bridge(self) -> bool:
        """A bridge that the system needs to reach others: host, ISA, PCI, CardBus and their kin.

        Base class 06h without 80h, "other": that is where non-transparent bridges and switches
        with a function to drive are found.
        """
        return self.class_code >> 16 == 0x06 and self.class_code >> 8 & 0xFF != 0x80

    @property
    def translated(self) -> bool:
        """Whether an IOMMU reaches the function, whatever its default domain does."""
        return self.iommu_group is not None and self.iommu_type != NOIOMMU_TYPE


def device_path(bdf: Bdf, sysfs: Path = SYSFS) -> Path:
    """The function's directory."""
    return sysfs / "bus/pci/devices" / str(bdf)


def functions(sysfs: Path = SYSFS) -> list[PciFunction]:
    """Every PCI function, in the order of its address. Empty if there is no PCI bus at all.

    Functions in domains above FFFFh (Intel VMD) have no address in Holdfast's grammar and are left
    out.
    """
    return list(_present(sysfs / "bus/pci/devices", sysfs))


def function(bdf: Bdf, sysfs: Path = SYSFS) -> PciFunction:
    """The function at this address. Raises BadTarget if there is none."""
    found = _read(bdf, sysfs)
    if found is None:
        raise BadTarget(
            "there is no such PCI function",
            operation="find function",
            target=str(bdf),
            hint="see what there is: holdfast ls --all",
        )
    return found


def group_members(group: int, sysfs: Path = SYSFS) -> list[PciFunction]:
    """Every PCI function of an IOMMU group, bridges included. Empty if there is no such group."""
    return list(_present(sysfs / "kernel/iommu_groups" / str(group) / "devices", sysfs))


def group_type(group: int, sysfs: Path = SYSFS) -> str | None:
    """Type of a group's default domain; :data:`NOIOMMU_TYPE` for one that VFIO made up.

    vfio_noiommu_group_alloc (drivers/vfio/group.c) names such a group; it has no domain, so its
    type reads as "unknown". Older kernels (before 5.11) have no ``type``: None.
    """
    directory = sysfs / "kernel/iommu_groups" / str(group)
    if text(directory / "name") == NOIOMMU_TYPE:
        return NOIOMMU_TYPE
    return text(directory / "type")


def text(path: Path) -> str | None:
    """An attribute without its line end, or None if it cannot be read."""
    try:
        with path.open("rb") as file:
            return file.read(_MOST).decode("utf-8", "replace").strip()
    except OSError:
        return None


def link_name(path: Path) -> str | None:
    """The last part of where a symbolic link points, or None if there is no link."""
    try:
        return path.readlink().name
    except OSError:
        return None


def _present(directory: Path, sysfs: Path) -> Iterator[PciFunction]:
    for bdf in sorted(_addresses(directory), key=str):
        found = _read(bdf, sysfs)
        if found is not None:
            yield found


def _addresses(directory: Path) -> Iterator[Bdf]:
    for name in _names(directory):
        try:
            yield Bdf.parse(name)
        except HoldfastError:
            continue  # not PCI (a group also holds platform devices), or a domain above FFFFh


def _names(directory: Path) -> list[str]:
    try:
        return [entry.name for entry in directory.iterdir()]
    except OSError:
        return []


def _read(bdf: Bdf, sysfs: Path) -> PciFunction | None:
    """A function, or None if it is not there (any more)."""
    path = device_path(bdf, sysfs)
    identity = [_number(path / name) for name in ("vendor", "device", "class")]
    vendor, device, class_code = identity
    if vendor is None or device is None or class_code is None:
        return None
    group = _group(path)
    return PciFunction(
        bdf=bdf,
        vendor=vendor,
        device=device,
        subsystem_vendor=_number(path / "subsystem_vendor") or 0,
        subsystem_device=_number(path / "subsystem_device") or 0,
        class_code=class_code,
        revision=_number(path / "revision") or 0,
        driver=link_name(path / "driver"),
        iommu_group=group,
        iommu_type=None if group is None else group_type(group, sysfs),
        reset_methods=tuple((text(path / "reset_method") or "").split()),
        resources=_resources(path),
        vfio_cdev=_cdev(path / "vfio-dev"),
    )


def _cdev(directory: Path) -> str | None:
    """The entry that has a device number: only then is there a node to open."""
    return next((n for n in sorted(_names(directory)) if (directory / n / "dev").exists()), None)


def _number(path: Path) -> int | None:
    try:
        return int(text(path) or "", 16)
    except ValueError:
        return None


def _group(path: Path) -> int | None:
    name = link_name(path / "iommu_group")
    return int(name) if name is not None and name.isdecimal() else None


def _resources(path: Path) -> tuple[Resource, ...]:
    found = []
    for line in (text(path / "resource") or "").splitlines():
        try:
            start, end, flags = (int(field, 16) for field in line.split())
        except ValueError:
            break  # cut short: the function went away meanwhile
        found.append(Resource(start, end, flags))
    return tuple(found)
