# SPDX-License-Identifier: Apache-2.0
"""A process's own memory, pinned in place on an I/O address space that it was handed.

For clients: the keeper passes them the descriptor of a container or of an iommufd
(``contracts.DmaContext``). The pins belong to that open file, not to the process: they outlive it,
and whoever holds the file can take them away. Thread-safe.
"""

from __future__ import annotations

import errno
from typing import Final

from holdfast.errors import BadBuffer, HoldfastError, NotSupported, ResourceError
from holdfast.kernel import iommufd, vfio_type1
from holdfast.kernel.limits import Charge, require_lockable
from holdfast.values import Perm

PAGE: Final = 4096


def map_own(
    context_kind: str, fd: int, ioas: int, address: int, size: int, iova: int, writable: bool
) -> None:
    """Pin ``size`` bytes at ``address`` of this process, and map them at ``iova``.

    context_kind, fd, ioas
        as in ``contracts.DmaContext``: "type1" with a container, or "iommufd" with an IOAS
    address, size, iova
        in bytes, whole pages of 4096
    writable
        whether the function may write there; the pages must then be writable for this process

    Raises BadBuffer if they are no whole pages or cannot be pinned (``VM_PFNMAP``, not mapped,
    read-only), OutOfMemory if RLIMIT_MEMLOCK or memory does not suffice, ResourceError if the
    address space takes no more maps, SystemFailure (EEXIST) if something is mapped there. On error
    nothing is mapped or pinned.
    """
    operation = "pin in place"
    if size < PAGE or (address | size | iova) % PAGE:
        raise BadBuffer(
            f"{size} bytes at {address:#x} for {iova:#x} are no whole pages", operation=operation
        )
    perm = Perm.RW if writable else Perm.READ
    try:
        if context_kind == "type1":
            require_lockable(size, Charge.MM, operation=operation)
            vfio_type1.map_memory(fd, iova, size, perm, address)
        elif context_kind == "iommufd":
            require_lockable(size, Charge.USER, operation=operation)
            iommufd.map_memory(fd, ioas, iova, size, perm, address)
        else:
            raise NotSupported(f"context {context_kind!r}", operation=operation)
    except HoldfastError as error:
        raise explained(error, iova, size) from error


def unmap_own(context_kind: str, fd: int, ioas: int, iova: int, size: int) -> int:
    """Unmap and unpin. Returns the bytes really unmapped: compare them with ``size``."""
    if context_kind == "type1":
        return vfio_type1.unmap(fd, iova, size)
    if context_kind == "iommufd":
        return iommufd.unmap(fd, ioas, iova, size)
    raise NotSupported(f"context {context_kind!r}", operation="unpin")


def explained(error: HoldfastError, iova: int, size: int) -> HoldfastError:
    """What the errno of a failed map means; the error itself where its errno says it all.

    Sources: ``vfio_dma_do_map`` and ``vfio_pin_map_dma`` (drivers/vfio/vfio_iommu_type1.c);
    ``iopt_insert_area`` (drivers/iommu/iommufd/io_pagetable.c).
    """
    where = f"{size:#x} bytes at IOVA {iova:#x}"
    kind: type[HoldfastError] = type(error)
    hint = error.hint
    match error.errno:
        case errno.ENOSPC:
            kind = ResourceError
            what = f"the container takes no more maps (its map limit is used up); {where}"
            hint = (
                "unmap something, use fewer and larger buffers, or raise the limit:"
                " /sys/module/vfio_iommu_type1/parameters/dma_entry_limit (65535 by default)"
            )
        case errno.ENOMEM if not hint:
            what = f"no memory, or RLIMIT_MEMLOCK, for pins that count against the user; {where}"
            hint = "see `holdfast doctor`; raise the limit of locked memory (ulimit -l), or free"
        case errno.EEXIST | errno.EADDRINUSE:
            what = f"something is mapped in this range already: {where}"
        case errno.EFAULT:
            kind = BadBuffer
            what = f"the pages cannot be pinned (not mapped, read-only, or no memory): {where}"
        case errno.EINVAL:
            what = f"no whole pages, or outside the IOVAs that the IOMMU can use: {where}"
        case _:
            return error
    return kind(what, operation=error.operation, target=error.target, errno=error.errno, hint=hint)
