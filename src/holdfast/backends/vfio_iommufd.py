# SPDX-License-Identifier: Apache-2.0
"""Functions of real hardware through VFIO character devices and iommufd.

The functions of a group that are opened in this process are bound to one iommufd and attached to
one IOAS: the kernel gives a group to one iommufd only (``iommu_device_claim_dma_owner``). Files are
pinned as files (IOMMU_IOAS_MAP_FILE) where the kernel can, so that no address space is involved.
"""

from __future__ import annotations

import errno
import os
from functools import partial
from typing import Final, Self

from holdfast.backends import vfio_resume, vfio_units
from holdfast.backends.pci_usable import blockers
from holdfast.backends.vfio_device import Descriptor, VfioBackend
from holdfast.contracts import DmaContext
from holdfast.errors import HoldfastError, NotSupported
from holdfast.kernel import dma_pin, iommufd, vfio_type1
from holdfast.kernel.handover import Incoming
from holdfast.kernel.limits import Charge, require_lockable
from holdfast.kernel.pci_sysfs import PciFunction
from holdfast.values import Bdf, Handover, Perm

KIND: Final = "iommufd"
"""What ``notes["backend"]`` of a handover says."""


class IommufdSpace(vfio_units.Unit):
    """An iommufd with one IOAS, for one group: ``IoSpace``. Any thread."""

    def __init__(self, group: int, target: str) -> None:
        self._start(group, vfio_type1.open_node(iommufd.NODE, target), None, target)

    @classmethod
    def resume(cls, group: int, fd: int, ioas: int, target: str) -> Self:
        """Go on with a predecessor's iommufd. Takes ownership of ``fd``, also on error. What is
        mapped stays mapped."""
        self = cls.__new__(cls)
        self._start(group, fd, ioas, target)
        return self

    def _start(self, group: int, fd: int, ioas: int | None, target: str) -> None:
        self._group = group
        self._fd = Descriptor(fd, target)
        try:
            self.ioas = iommufd.new_ioas(fd, target) if ioas is None else ioas
            self._map = (
                iommufd.map_file if iommufd.has_map_file(fd, target) else iommufd.map_file_here
            )
        except BaseException:
            self._fd.close()
            raise

    @property
    def isolation(self) -> str:
        return f"group {self._group}"

    @property
    def iova_ranges(self) -> tuple[tuple[int, int], ...]:
        with self._fd as fd:
            return iommufd.iova_ranges(fd, self.ioas, self.isolation)

    def open_device(self, function: PciFunction, target: str) -> int:
        """The function's descriptor, bound and attached; the caller owns it."""
        device = vfio_type1.open_node(f"{vfio_units.DEVICES}/{function.vfio_cdev}", target)
        try:
            with self._fd as fd:
                try:
                    iommufd.bind(device, fd, target)
                    iommufd.attach(device, self.ioas, target)
                except HoldfastError as error:
                    raise _explained(error, function, target) from error
        except BaseException:
            os.close(device)
            raise
        return device

    def map_file(self, iova: int, size: int, perm: Perm, fd: int, offset: int, target: str) -> None:
        require_lockable(size, Charge.USER, operation="dma_map", target=target)
        with self._fd as mine:
            try:
                self._map(mine, self.ioas, iova, size, perm, fd, offset, target)
            except HoldfastError as error:
                raise dma_pin.explained(error, iova, size) from error

    def unmap(self, iova: int, size: int, target: str) -> int:
        with self._fd as fd:
            return iommufd.unmap(fd, self.ioas, iova, size, target)

    def unmap_all(self, target: str) -> None:
        # The whole range means everything there is, guarded or not (iommufd/ioas.c).
        with self._fd as fd:
            iommufd.unmap(fd, self.ioas, 0, (1 << 64) - 1, target)

    def context(self) -> DmaContext:
        return DmaContext("iommufd", self._fd.number, self.ioas)

    def hand_over(self) -> Handover:
        notes = {"backend": KIND, "group": self._group, "ioas": self.ioas}
        return Handover({"iommufd": self._fd.number}, notes)

    def end(self) -> None:
        self._fd.close()


_UNITS: Final[vfio_units.Units[IommufdSpace]] = vfio_units.Units()


def open_function(function: PciFunction, target: str) -> VfioBackend:
    """Open a function bound to vfio-pci through its character device. The caller closes it.

    Raises Busy (naming the processes or sibling functions), NoPermission, NotSupported,
    SystemFailure.
    """
    group = function.iommu_group
    if group is None or function.vfio_cdev is None:
        raise NotSupported(
            "the function has no VFIO character device",
            operation="open device",
            target=target,
            hint="bind it to vfio-pci, on a kernel with CONFIG_VFIO_DEVICE_CDEV; or backend=type1",
        )
    space = _UNITS.take(group, function.bdf, partial(IommufdSpace, group, target))
    leave = partial(_UNITS.drop, group, function.bdf, space)
    try:
        fd = space.open_device(function, target)
    except BaseException:
        leave()
        raise
    return VfioBackend(fd, space, target, leave)


def resume_function(bdf: Bdf, found: Incoming, target: str) -> VfioBackend:
    """Go on with a function of a predecessor's: no call is made that changes anything.

    The functions of a group were handed over with the same iommufd: the first one's is used for
    all. ProtocolError if the handover does not make sense.
    """
    group, ioas = found.number("group"), found.number("ioas")

    def make() -> IommufdSpace:
        return IommufdSpace.resume(group, found.take("iommufd"), ioas, target)

    space = _UNITS.take(group, bdf, make)
    return vfio_resume.device(found, space, target, partial(_UNITS.drop, group, bdf, space))


def _explained(error: HoldfastError, function: PciFunction, target: str) -> HoldfastError:
    """EBUSY: the group is open, another process has the device, or a sibling has a driver.

    EINVAL comes from vfio_df_open if the device is open elsewhere.
    """
    if error.errno not in (errno.EBUSY, errno.EINVAL, errno.EPERM):
        return error
    if blockers(function):
        return vfio_units.not_viable(function, target)
    return vfio_units.held(function, error, target)
