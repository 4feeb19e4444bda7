# SPDX-License-Identifier: Apache-2.0
"""``pci:`` targets: which way to reach a function of real hardware.

iommufd with VFIO character devices if the kernel has both and this user may open them, else VFIO
groups with type1; ``backend=`` in the target decides otherwise. Without an IOMMU nothing is chosen
silently: ``backend=uio`` has to be written, and :func:`caution` says what is lost then.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

from holdfast.contracts import FunctionBackend, Handover
from holdfast.errors import HoldfastError, NotSupported
from holdfast.kernel.handover import Incoming
from holdfast.kernel.pci_holders import has_vfio_driver
from holdfast.kernel.pci_sysfs import SYSFS, PciFunction, function, group_members
from holdfast.values import Bdf, Target

DEV: Final = Path("/dev")


def open_target(target: Target) -> FunctionBackend:
    """Take the function over; the caller closes it. For the registry.

    Raises BadTarget if there is no such function, Busy if somebody holds it or its group (the
    holders are named), NoPermission, NotSupported or SystemFailure. The hint is the command that
    removes the first obstacle that ``holdfast doctor`` finds.
    """
    if target.options.get("backend") == "uio":
        from holdfast.backends import uio

        return uio.open_target(target)
    found = function(target.bdf)
    try:
        return _open(found, choose(target, found), str(target))
    except HoldfastError as error:
        raise _with_reason(error, found.bdf) from error


def resume(target: Target, handover: Handover) -> FunctionBackend:
    """Go on with a function of a process that was killed; see ``backends.resume``."""
    with Incoming(handover, str(target)) as found:
        kind = found.text("backend")
        if kind == "type1":
            from holdfast.backends import vfio_type1

            return vfio_type1.resume_function(target.bdf, found, str(target))
        if kind == "iommufd":
            from holdfast.backends import vfio_iommufd

            return vfio_iommufd.resume_function(target.bdf, found, str(target))
        if kind == "uio":
            from holdfast.backends.uio import UioBackend

            return UioBackend.resume(target, found)
        raise found.wrong(f"backend is {kind!r}")


def _open(found: PciFunction, way: str, target: str) -> FunctionBackend:
    if not found.translated:
        raise NotSupported("no IOMMU reaches this function", operation="open", target=target)
    if not has_vfio_driver(found):
        raise NotSupported(
            f"it is bound to {found.driver or 'no driver'}, not to vfio-pci",
            operation="open",
            target=target,
        )
    if way == "iommufd":
        from holdfast.backends import vfio_iommufd

        return vfio_iommufd.open_function(found, target)
    from holdfast.backends import vfio_type1

    return vfio_type1.open_function(found, target)


def choose(target: Target, found: PciFunction, dev: Path = DEV) -> str:
    """ "iommufd", "type1" or "uio": the way this target goes. Opens nothing.

    What this user may open comes before what is newer; if neither may be opened, the newer one
    that is there is named, so that the error is about it.
    """
    asked = target.options.get("backend")
    if asked:
        return asked
    cdev = [dev / "iommu", dev / "vfio/devices" / (found.vfio_cdev or "none")]
    group = [dev / "vfio/vfio", dev / "vfio" / str(found.iommu_group)]
    for way, nodes in (("iommufd", cdev), ("type1", group)):
        if all(os.access(node, os.R_OK | os.W_OK) for node in nodes):
            return way
    return "iommufd" if all(node.exists() for node in cdev) else "type1"


def caution(target: Target) -> str | None:
    """What is lost on this target, for whoever talks to the user; None if nothing is."""
    if target.scheme != "pci" or target.options.get("backend") != "uio":
        return None
    from holdfast.backends import uio

    return uio.CAUTION


def group_targets(target: Target, sysfs: Path = SYSFS) -> list[Target]:
    """Every function that the keeper of this one has to serve, itself first.

    These are the functions of its IOMMU group that are bound to vfio-pci: a group opens once. They
    are reached the same way; other options of the target are its own. Without an IOMMU, or with
    ``backend=uio``, just the target.
    """
    found = function(target.bdf, sysfs)
    backend = target.options.get("backend")
    if not found.translated or found.iommu_group is None or backend == "uio":
        return [target]
    option = f"?backend={backend}" if backend else ""
    return [target] + [
        Target("pci", f"{member.bdf}{option}")
        for member in group_members(found.iommu_group, sysfs)
        if member.bdf != found.bdf and has_vfio_driver(member, sysfs)
    ]


def _with_reason(error: HoldfastError, bdf: Bdf) -> HoldfastError:
    """The error with the first fix that an examination of the function comes up with.

    An error that names its own remedy keeps it: it knows what happened, the examination only what
    is the case.
    """
    if error.hint:
        return error
    from holdfast.backends.pci_usable import examine

    for finding in examine(bdf, backend="vfio"):
        if finding.ok is False and finding.fix:
            return type(error)(
                f"{error.what} ({finding.what})",
                operation=error.operation,
                target=error.target,
                errno=error.errno,
                hint=finding.fix,
            )
    return error
