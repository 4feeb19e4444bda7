# SPDX-License-Identifier: Apache-2.0
"""Going on with a VFIO function of a process that was killed: type1 and iommufd alike.

The open files outlive the process, because somebody else holds duplicates. With them live what is
mapped and pinned, the interrupts as they are wired, and bus mastering. So there is nothing to do
but to ask again what the function is; regions, interrupts and limits are the kernel's to tell.
"""

from __future__ import annotations

from collections.abc import Callable

from holdfast.backends.vfio_device import IoSpace, VfioBackend
from holdfast.backends.vfio_irq_record import IrqRecord
from holdfast.kernel.handover import Incoming


def device(found: Incoming, space: IoSpace, target: str, leave: Callable[[], None]) -> VfioBackend:
    """The function of a handover, whose I/O address space is taken in already.

    Calls ``leave`` when it needs the space no more, also when this raises.
    """
    try:
        for name in ("device", "irqs"):
            found.fd(name)
        record = IrqRecord(found.take("irqs"))
    except BaseException:
        leave()
        raise
    request = found.take("request") if "request" in found else None
    return VfioBackend(found.take("device"), space, target, leave, record, request)
