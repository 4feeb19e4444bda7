# SPDX-License-Identifier: Apache-2.0
"""Taking windows away from a vfio-user server, many requests on their way at once.

An unmap is a message there and back through two processes and their threads. The slabs of one
lease, or those of many leases that die together, go in the time of one.
"""

from __future__ import annotations

import errno
from collections.abc import Sequence
from typing import Final

from holdfast.backends.unmapping import Outcome
from holdfast.backends.vfio_user_discover import decoded
from holdfast.backends.vfio_user_link import ClientLink, raised
from holdfast.backends.vfio_user_memory import ServedMemory
from holdfast.errors import HoldfastError, ProtocolError
from holdfast.uapi.vfio_user import Command
from holdfast.values import Iova
from holdfast.wire.vfio_user import messages as m
from holdfast.wire.vfio_user.frame import Part, Parts

AT_ONCE: Final = 64
"""Requests in flight; more could fill the socket buffers in both directions."""


def unmap_many(
    link: ClientLink,
    memory: ServedMemory,
    ranges: Sequence[tuple[Iova, int]],
    timeout: float,
    target: str,
) -> list[Outcome]:
    """Unmap and stop serving; see ``contracts.FunctionBackend.dma_unmap_many``."""
    outcomes: list[Outcome] = []
    for at in range(0, len(ranges), AT_ONCE):
        batch = ranges[at : at + AT_ONCE]
        bodies: list[Parts] = [[m.DmaUnmap(0, iova, size).encode()] for iova, size in batch]
        replies = link.outcomes(Command.DMA_UNMAP, bodies, timeout=timeout)
        for (iova, size), reply in zip(batch, replies, strict=True):
            try:
                unmapped = _unmapped(raised(reply), iova, size, target)
                memory.remove(iova)
                outcomes.append(unmapped)
            except HoldfastError as error:
                if error.errno == errno.ENOENT:
                    memory.remove(iova)  # a predecessor was killed before the server had it
                outcomes.append(error)
    return outcomes


def _unmapped(payload: Part, iova: Iova, size: int, target: str) -> int:
    """How many bytes a reply says are gone."""
    if not payload:
        # What libvfio-user answers for a function that does no DMA. There are no partial unmaps,
        # so a success means the whole window.
        return size
    reply = decoded(m.DmaUnmap.decode_reply, payload, target)
    if reply.address != iova:
        raise ProtocolError(
            f"asked to unmap {iova!r}, the server unmapped {reply.address:#x}",
            operation="dma_unmap",
            target=target,
        )
    return reply.size
