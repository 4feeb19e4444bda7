# SPDX-License-Identifier: Apache-2.0
"""Can this function be used by this user, and if not: exactly why, and which command fixes it.

:func:`examine` looks at one function, :func:`machine_findings` at what all have in common. Both
only read; nothing is opened. Findings come in the order in which to mend them: what stands first
is often the cause of what follows, so the first that is False is the best hint for a failed open.

``ok`` is True where nothing is in the way, False where the function cannot be used so, and None for
what does not prevent use but is better known: a protection that is missing, a limit that may come.

Sources for each rule stand beside it. Paths are those of the real machine unless told otherwise.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from holdfast.backends import pci_limits
from holdfast.backends.pci_limits import Finding
from holdfast.kernel import pci_sysfs
from holdfast.kernel.pci_binding import UIO_DRIVER, VFIO_DRIVER
from holdfast.kernel.pci_holders import DEV, PROC, HolderScan, has_vfio_driver, uio_name
from holdfast.kernel.pci_sysfs import SYSFS, PciFunction, text
from holdfast.values import Bdf

__all__ = [
    "Finding",
    "View",
    "blockers",
    "examine",
    "machine_findings",
    "may_open",
    "untranslated",
    "usable",
]

HARMLESS = ("pcieport", "pci-stub")
"""Drivers beside VFIO's that leave DMA ownership to user space: ``driver_managed_dma`` is set in
drivers/pci/pcie/portdrv.c and drivers/pci/pci-stub.c, and, beyond VFIO, nowhere else."""


def may_open(path: Path) -> bool:
    """Whether this user (effective ids) may open a node for reading and writing."""
    return os.access(path, os.R_OK | os.W_OK, effective_ids=True)


@dataclass(frozen=True, slots=True)
class View:
    """Where to look, and what is known beforehand."""

    sysfs: Path = SYSFS
    dev: Path = DEV
    proc: Path = PROC
    keepers: Mapping[int, str] = field(default_factory=dict)
    """Pid to description of the Holdfast keepers that answered."""
    may_open: Callable[[Path], bool] = may_open


def examine(
    bdf: Bdf,
    *,
    backend: str | None = None,
    sysfs: Path = SYSFS,
    dev: Path = DEV,
    proc: Path = PROC,
    keepers: Mapping[int, str] | None = None,
    may_open: Callable[[Path], bool] = may_open,
) -> list[Finding]:
    """Everything that decides whether this function can be used. Raises BadTarget if there is none.

    ``backend`` "uio" asks about use without an IOMMU, any other about VFIO; None takes what the
    function's present driver is for. ``keepers`` are the processes known to be keepers: that they
    hold the function is as it should be.
    """
    view = View(sysfs, dev, proc, keepers or {}, may_open)
    function = pci_sysfs.function(bdf, sysfs)
    uio = backend == "uio" or (backend is None and function.driver == UIO_DRIVER)
    parts = _for_uio(function, view) if uio else _for_vfio(function, view)
    return [*parts, _holders(function, view), _reset(function, view)]


def usable(findings: list[Finding]) -> bool:
    """Whether nothing stands in the way."""
    return all(finding.ok is not False for finding in findings)


def machine_findings(*, sysfs: Path = SYSFS, dev: Path = DEV, proc: Path = PROC) -> list[Finding]:
    """What all functions of this machine have in common."""
    view = View(sysfs, dev, proc)
    every = pci_sysfs.functions(sysfs)
    pci = Finding("PCI", bool(every), f"{len(every)} functions", "" if every else _NO_PCI)
    return [
        pci,
        _iommu(any(function.translated for function in every), view),
        _module(VFIO_DRIVER, view),
        _iommufd(view),
        pci_limits.memlock(proc),
        *(_advice(finding) for finding in pci_limits.for_uio(sysfs, proc)),
        pci_limits.lifetime(proc),
    ]


_NO_PCI = "a container or virtual machine without PCI: nothing to be done from inside"


def _advice(finding: Finding) -> Finding:
    """What only concerns use without an IOMMU prevents nothing on the machine as a whole."""
    ok = finding.ok or None
    return Finding(finding.name, ok, f"{finding.what} (matters only without an IOMMU)", finding.fix)


# -- VFIO ------------------------------------------------------------


def _for_vfio(function: PciFunction, view: View) -> Iterator[Finding]:
    yield _iommu(function.translated, view)
    yield from _domain(function, view)
    yield _driver(function, view)
    yield _group(function, view)
    if has_vfio_driver(function, view.sysfs):
        yield _vfio_node(function, view)
    yield pci_limits.memlock(view.proc)


def _iommu(there: bool, view: View) -> Finding:
    if there:
        return Finding("IOMMU", True, "on")
    tables = view.sysfs / "firmware/acpi/tables"
    command_line = (text(view.proc / "cmdline") or "").split()
    if (tables / "DMAR").exists():
        # drivers/iommu/intel: off unless CONFIG_INTEL_IOMMU_DEFAULT_ON; a later option wins.
        wrong = [word for word in command_line if word in ("intel_iommu=off", "iommu=off")]
        remove = f", remove {' '.join(wrong)}" if wrong else ""
        return Finding(
            "IOMMU",
            False,
            "the firmware offers one (VT-d), but the kernel does not use it",
            f"add intel_iommu=on to the kernel's command line{remove} (/etc/default/grub: "
            "GRUB_CMDLINE_LINUX, then sudo update-grub), and boot again",
        )
    if (tables / "IVRS").exists():
        wrong = [word for word in command_line if word in ("amd_iommu=off", "iommu=off")]
        remove = f"remove {' '.join(wrong)} from" if wrong else "add amd_iommu=on to"
        return Finding(
            "IOMMU",
            False,
            "the firmware offers one (AMD-Vi), but the kernel does not use it",
            f"{remove} the kernel's command line, and boot again",
        )
    return Finding(
        "IOMMU",
        False,
        "none: the firmware does not offer one",
        "switch VT-d (Intel) or AMD-Vi/IOMMU (AMD) on in the firmware setup, and boot again with "
        "intel_iommu=on (Intel)",
    )


def _domain(function: PciFunction, view: View) -> Iterator[Finding]:
    """The group's default domain: what the function can reach while nobody holds it."""
    group = function.iommu_group
    if group is None:
        return
    regions = text(view.sysfs / "kernel/iommu_groups" / str(group) / "reserved_regions") or ""
    if any(line.split()[-1:] == ["direct"] for line in regions.splitlines()):
        # IOMMU_RESV_DIRECT: __iommu_device_set_domain refuses a domain without the mapping.
        yield Finding(
            "firmware mapping",
            False,
            "the firmware demands a fixed 1:1 mapping (RMRR) for it: the kernel will not give it "
            "to user space",
            "ask the maker for a firmware without, or use another slot",
        )
    if function.iommu_type == "identity":
        yield Finding(
            "default domain",
            None,
            "identity: while nobody holds it, it can reach all memory, so a transfer that is "
            "still running when its keeper ends is not stopped by the IOMMU",
            "boot without iommu=pt (iommu.passthrough=0)",
        )


def _module(name: str, view: View) -> Finding:
    if (view.sysfs / "bus/pci/drivers" / name).is_dir():
        return Finding("module", True, f"{name} is in")
    return Finding("module", False, f"{name} is not loaded", f"sudo modprobe {name}")


def _driver(function: PciFunction, view: View) -> Finding:
    if has_vfio_driver(function, view.sysfs):
        return Finding("driver", True, str(function.driver))
    have = f"{function.driver} has it" if function.driver else "no driver has it"
    if function.is_bridge:
        return Finding("driver", False, "it is a bridge, not a function to drive")
    return Finding("driver", False, f"{have}, not vfio-pci", f"sudo holdfast bind {function.bdf}")


def blockers(function: PciFunction, sysfs: Path = SYSFS) -> list[PciFunction]:
    """The functions of its IOMMU group that keep the whole group from being given to user space.

    Those with a kernel driver that does DMA of its own (drivers/pci/pci-driver.c,
    pci_dma_configure). Functions without a driver and bridges with ``pcieport`` are fine.
    """
    if function.iommu_group is None:
        return []
    return [
        other
        for other in pci_sysfs.group_members(function.iommu_group, sysfs)
        if other.bdf != function.bdf
        and other.driver is not None
        and other.driver not in HARMLESS
        and not has_vfio_driver(other, sysfs)
    ]


def _group(function: PciFunction, view: View) -> Finding:
    group = function.iommu_group
    if group is None:
        return Finding("group", False, "it is in no IOMMU group")
    others = [
        other
        for other in pci_sysfs.group_members(group, view.sysfs)
        if other.bdf != function.bdf and not other.is_bridge
    ]
    blocking = blockers(function, view.sysfs)
    if blocking:
        named = ", ".join(f"{other.bdf} ({other.driver})" for other in blocking)
        movable = " ".join(str(other.bdf) for other in blocking if not other.is_bridge)
        return Finding(
            "group",
            False,
            f"group {group} is not viable: {named} would be within reach of it",
            f"sudo holdfast bind {movable}" if movable else "",
        )
    shared = f", shared with {', '.join(str(other.bdf) for other in others)}" if others else ""
    return Finding("group", True, f"group {group}{shared}")


def _vfio_node(function: PciFunction, view: View) -> Finding:
    """The node to open: the character device and /dev/iommu, else the group's."""
    vfio = view.dev / "vfio"
    ways = [[vfio / "vfio", vfio / str(function.iommu_group)]]
    if function.vfio_cdev:
        ways.insert(0, [view.dev / "iommu", vfio / "devices" / function.vfio_cdev])
    for way in ways:
        if all(path.exists() and view.may_open(path) for path in way):
            return Finding("device node", True, str(way[-1]))
    there = [way for way in ways if all(path.exists() for path in way)]
    if not there:
        missing = ", ".join(str(path) for path in ways[-1] if not path.exists())
        return Finding(
            "device node",
            False,
            f"missing: {missing}",
            "sudo modprobe vfio_iommu_type1; in a container: pass /dev/vfio into it",
        )
    return _denied(there[0], view)


def _denied(paths: list[Path], view: View) -> Finding:
    denied = " ".join(str(path) for path in paths if not view.may_open(path))
    return Finding(
        "device node",
        False,
        f"this user may not open {denied}",
        f"sudo chown {pci_limits.user_name()} {denied} (until the next boot or bind; for good: the "
        "udev rule in docs/hardware.md)",
    )


def _iommufd(view: View) -> Finding:
    if (view.dev / "iommu").exists():
        return Finding("iommufd", True, "the kernel has it")
    if (view.dev / "vfio/vfio").exists():
        return Finding("iommufd", None, "not in this kernel: the older type1 interface is used")
    return Finding(
        "iommufd", None, "neither /dev/iommu nor /dev/vfio/vfio yet", "sudo modprobe vfio-pci"
    )


# -- without an IOMMU ------------------------------------------------------------


def _for_uio(function: PciFunction, view: View) -> Iterator[Finding]:
    yield untranslated(function)
    yield _uio_driver(function)
    yield from pci_limits.for_uio(view.sysfs, view.proc)
    node = uio_name(function, view.sysfs)
    if node is not None:
        path = view.dev / node
        fine = path.exists() and view.may_open(path)
        yield Finding("device node", True, str(path)) if fine else _denied([path], view)
    yield pci_limits.memlock(view.proc)


def untranslated(function: PciFunction) -> Finding:
    """Physical addresses work only where nothing translates them."""
    group, kind = function.iommu_group, function.iommu_type
    if not function.translated:
        return Finding(
            "isolation", None, "none: no IOMMU stands between the function and all of memory"
        )
    if kind == "identity":
        return Finding(
            "isolation", None, "none: its IOMMU domain is identity, it reaches all of memory"
        )
    return Finding(
        "isolation",
        False,
        f"the IOMMU translates for it (domain {kind}): physical addresses would fault",
        f"use vfio-pci: sudo holdfast bind {function.bdf}; or, without a driver bound, "
        f"echo identity | sudo tee /sys/kernel/iommu_groups/{group}/type",
    )


def _uio_driver(function: PciFunction) -> Finding:
    if function.driver == UIO_DRIVER:
        return Finding("driver", True, UIO_DRIVER)
    bind = f"sudo holdfast bind {function.bdf} --driver {UIO_DRIVER}"
    if function.driver is None:
        return Finding("driver", None, "no driver has it: it works, without interrupts", bind)
    return Finding("driver", False, f"{function.driver} has it, not {UIO_DRIVER}", bind)


# -- both ------------------------------------------------------------


def _holders(function: PciFunction, view: View) -> Finding:
    scan = HolderScan(sysfs=view.sysfs, dev=view.dev, proc=view.proc)
    found = scan.of(function)
    kept = [holder for holder in found if holder.pid in view.keepers]
    if kept:
        return Finding("holder", True, f"kept by Holdfast: {view.keepers[kept[0].pid]}")
    certain = [holder for holder in found if holder.certain]
    if certain:
        pids = " ".join(str(holder.pid) for holder in certain)
        return Finding(
            "holder",
            False,
            "; ".join(map(str, certain)),
            f"open it through that process if it is a keeper; else end it: kill {pids}",
        )
    if found:
        return Finding("holder", None, f"perhaps: {'; '.join(map(str, found))}")
    unseen = f" among those this user can see ({scan.hidden} are hidden)" if scan.hidden else ""
    return Finding("holder", True, f"nobody{unseen}")


def _reset(function: PciFunction, view: View) -> Finding:
    """A bus reset is refused while others are on the bus (drivers/pci/pci.c,
    pci_parent_bus_reset); sysfs lists it by what the bus looked like when the function came."""
    methods = function.reset_methods
    if not methods:
        return Finding(
            "reset",
            None,
            "none: after a client's death only its driver can quiet it, else its memory stays in "
            "quarantine",
        )
    listed = ", ".join(methods)
    neighbours = [
        other.bdf
        for other in pci_sysfs.functions(view.sysfs)
        if (other.bdf.domain, other.bdf.bus) == (function.bdf.domain, function.bdf.bus)
        and other.bdf != function.bdf
    ]
    if methods[0] == "bus" and neighbours:
        return Finding(
            "reset",
            None,
            f"{listed}: the kernel refuses it because {', '.join(map(str, neighbours))} on the "
            "same bus would be reset too",
        )
    return Finding("reset", True, listed)
