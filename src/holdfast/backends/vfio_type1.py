# SPDX-License-Identifier: Apache-2.0
"""Functions of real hardware through VFIO groups and a type1 container.

One group, one container: the functions of a group that are opened in this process share both, and
with them the I/O address space. The container's descriptor is kept until the last of them closes,
because without it nothing could be unmapped any more; a device descriptor that was passed on keeps
group, container and all pins alive beyond that.
"""

from __future__ import annotations

import errno
import os
from functools import partial
from typing import Final, Self

from holdfast.backends import vfio_resume, vfio_units
from holdfast.backends.vfio_device import Descriptor, VfioBackend
from holdfast.contracts import DmaContext
from holdfast.errors import HoldfastError, NotSupported, SystemFailure
from holdfast.kernel import dma_pin, vfio_type1
from holdfast.kernel.handover import Incoming
from holdfast.kernel.limits import Charge, require_lockable
from holdfast.kernel.pci_sysfs import PciFunction
from holdfast.values import Bdf, Handover, Perm

KIND: Final = "type1"
"""What ``notes["backend"]`` of a handover says."""


class Type1Space(vfio_units.Unit):
    """A group in a container of its own: ``IoSpace``. Any thread."""

    def __init__(self, function: PciFunction, target: str) -> None:
        """Open both. Raises Busy (held, or not viable), NoPermission, NotSupported."""
        group = function.iommu_group
        if group is None:
            raise NotSupported(
                "no IOMMU reaches this function", operation="open group", target=target
            )
        self._number = group
        self._group = Descriptor(_open_group(function, group, target), target)
        try:
            container = vfio_type1.open_container(target)
            self._container = Descriptor(container, target)
            try:
                with self._group as fd:
                    _join(function, fd, container, target)
                self.info = vfio_type1.info(container, target)
            except BaseException:
                self._container.close()
                raise
        except BaseException:
            self._group.close()
            raise

    @classmethod
    def resume(cls, number: int, group: int, container: int, target: str) -> Self:
        """Go on with a predecessor's group and container. Takes ownership of the descriptors, also
        on error. What is mapped stays mapped."""
        self = cls.__new__(cls)
        self._number = number
        self._group = Descriptor(group, target)
        self._container = Descriptor(container, target)
        try:
            self.info = vfio_type1.info(container, target)
        except BaseException:
            self.end()
            raise
        return self

    @property
    def isolation(self) -> str:
        return f"group {self._number}"

    @property
    def iova_ranges(self) -> tuple[tuple[int, int], ...]:
        return self.info.ranges

    def maps_left(self) -> int | None:
        """How many more maps the container takes; None if the kernel does not say."""
        with self._container as fd:
            return vfio_type1.info(fd, self.isolation).maps_left

    def open_device(self, function: PciFunction, target: str) -> int:
        """A descriptor of one of the group's functions; the caller owns it."""
        with self._group as fd:
            try:
                return vfio_type1.device_of(fd, str(function.bdf), target)
            except HoldfastError as error:
                if error.errno == errno.EBUSY:
                    raise vfio_units.held(function, error, target) from error
                raise

    def map_file(self, iova: int, size: int, perm: Perm, fd: int, offset: int, target: str) -> None:
        require_lockable(size, Charge.MM, operation="dma_map", target=target)
        with self._container as container:
            try:
                vfio_type1.map_file(container, iova, size, perm, fd, offset, target)
            except HoldfastError as error:
                raise dma_pin.explained(error, iova, size) from error

    def unmap(self, iova: int, size: int, target: str) -> int:
        with self._container as container:
            return vfio_type1.unmap(container, iova, size, target)

    def unmap_all(self, target: str) -> None:
        with self._container as container:
            vfio_type1.unmap_all(container, target)

    def context(self) -> DmaContext:
        return DmaContext("type1", self._container.number)

    def hand_over(self) -> Handover:
        fds = {"group": self._group.number, "container": self._container.number}
        return Handover(fds, {"backend": KIND, "group": self._number})

    def end(self) -> None:
        # The group first: its release detaches it from the container and unpins everything.
        self._group.close()
        self._container.close()


_UNITS: Final[vfio_units.Units[Type1Space]] = vfio_units.Units()


def open_function(function: PciFunction, target: str) -> VfioBackend:
    """Open a function bound to vfio-pci through its group. The caller closes it.

    Raises Busy (naming the processes or sibling functions), NoPermission, NotSupported,
    SystemFailure.
    """
    group = -1 if function.iommu_group is None else function.iommu_group
    space = _UNITS.take(group, function.bdf, partial(Type1Space, function, target))
    leave = partial(_UNITS.drop, group, function.bdf, space)
    try:
        fd = space.open_device(function, target)
    except BaseException:
        leave()
        raise
    return VfioBackend(fd, space, target, leave)


def resume_function(bdf: Bdf, found: Incoming, target: str) -> VfioBackend:
    """Go on with a function of a predecessor's: no call is made that changes anything.

    The functions of a group were handed over with the same group and container: the first one's
    are used for all. ProtocolError if the handover does not make sense.
    """
    group = found.number("group")

    def make() -> Type1Space:
        found.fd("container")
        return Type1Space.resume(group, found.take("group"), found.take("container"), target)

    space = _UNITS.take(group, bdf, make)
    return vfio_resume.device(found, space, target, partial(_UNITS.drop, group, bdf, space))


def _open_group(function: PciFunction, group: int, target: str) -> int:
    path = f"{vfio_units.GROUPS}/{group}"
    try:
        fd = vfio_type1.open_node(path, target)
    except HoldfastError as error:
        if error.errno == errno.EBUSY:
            raise vfio_units.held(function, error, target) from error
        raise
    try:
        if not vfio_type1.group_viable(fd, target):
            raise vfio_units.not_viable(function, target)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _join(function: PciFunction, group: int, container: int, target: str) -> None:
    try:
        vfio_type1.join(group, container, target)
    except HoldfastError as error:
        if error.errno == errno.EBUSY:
            raise vfio_units.not_viable(function, target) from error
        if error.errno == errno.EPERM:
            # vfio_iommu_type1_attach_group: interrupts of the function could not be confined.
            raise SystemFailure(
                "the platform has no interrupt remapping",
                operation=error.operation,
                target=target,
                errno=error.errno,
                hint="turn it on in the firmware; where every user of the machine is trusted:"
                " echo 1 > /sys/module/vfio_iommu_type1/parameters/allow_unsafe_interrupts",
            ) from error
        raise
