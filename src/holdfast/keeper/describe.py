# SPDX-License-Identifier: Apache-2.0
"""What the keeper tells a client of memory, doorbells and the function: messages with descriptors.

Each function appends the descriptors that its message refers to by position. They stay the
keeper's.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import ExitStack

from holdfast.contracts import Doorbell
from holdfast.dma.sg import SgList
from holdfast.driver import ControlMemory
from holdfast.keeper.function import FunctionHost
from holdfast.keeper.lease import HeldSlab, Lease
from holdfast.keeper.mediated_lease import MediatedLease
from holdfast.kernel.mapping import Mapping
from holdfast.values import CONFIG_REGION, Access, IrqIndex
from holdfast.wire import lease as wire

Bells = list[tuple[int, Doorbell]]


def describe_lease(lease: Lease, host: FunctionHost, bells: Bells, fds: list[int]) -> wire.Opened:
    """The whole of a lease, as the answer to Open. Notes whether it gets registers to map."""
    regions = _describe_regions(lease, host, fds)
    vectors = []
    for vector in lease.grant.vectors:
        level = host.irq_index is IrqIndex.INTX
        vectors.append(wire.IrqVector(vector=vector, fd=len(fds), level=level))
        fds.append(host.irq_fds[vector])
    told = describe_bells(bells, fds)
    return wire.Opened(
        lease=int(lease.number),
        access=lease.access,
        channels=list(lease.channels),
        regions=regions,
        vectors=vectors,
        bells=told,
        control=describe_slab(lease.control, fds) if lease.control else None,
        grant=dict(lease.grant.info),
        quota=0,
        watch=host.backend.request_fd is not None,
        rings=describe_rings(lease.mediated, fds) if lease.mediated is not None else None,
    )


def _describe_regions(lease: Lease, host: FunctionHost, fds: list[int]) -> list[wire.RegionInfo]:
    regions = []
    for region in host.backend.regions:
        if lease.access is Access.MEDIATED and region.index != CONFIG_REGION:
            continue
        place = None
        mapped = host.backend.region_map(region.index) if lease.claimed else None
        if mapped is not None:
            place = len(fds)
            fds.append(mapped.fd)
            lease.maps_registers |= bool(region.areas) and region.index in host.facts.engine_bars
        regions.append(
            wire.RegionInfo(
                index=region.index,
                size=region.size,
                readable=region.readable,
                writable=region.writable,
                areas=[(area.offset, area.size) for area in region.areas],
                file_offset=region.file_offset,
                fd=place,
            )
        )
    return regions


def control_memory(lease: Lease, stack: ExitStack) -> ControlMemory | None:
    """A lease's control memory, mapped until the stack is left; None if it has none."""
    slab = lease.control
    if slab is None:
        return None
    mapping = Mapping.extents(slab.memory.fd, slab.memory.extents)
    stack.callback(mapping.close)
    sizes = [size for _, size in slab.memory.extents]
    return ControlMemory(mapping.array.data, SgList.of(zip(slab.iovas, sizes, strict=True)))


def describe_slab(slab: HeldSlab, fds: list[int]) -> wire.SlabInfo:
    fds.append(slab.memory.fd)
    return wire.SlabInfo(
        slab=slab.number,
        size=slab.size,
        extents=list(slab.memory.extents),
        iovas=[int(iova) for iova in slab.iovas],
        fd=len(fds) - 1,
    )


def describe_rings(held: MediatedLease, fds: list[int]) -> wire.RingInfo:
    """What a mediated lease posts through."""
    seat, limits = held.seat, held.seat.limits
    at = len(fds)
    fds += [held.ring_fd, seat.submit, held.heard]
    return wire.RingInfo(
        fd=at,
        submit=at + 1,
        done=at + 2,
        card=(limits.card_first, limits.card_end),
        align=limits.align,
    )


def describe_bells(bells: Bells, fds: list[int]) -> list[wire.BellInfo]:
    told = []
    for bar, bell in bells:
        told.append(
            wire.BellInfo(
                region=bar,
                offset=bell.info.offset,
                size=bell.info.size,
                value=bell.info.value,
                fd=len(fds),
            )
        )
        fds.append(bell.fd)
    return told


def close_bells(bells: Sequence[tuple[int, Doorbell]]) -> None:
    for _, bell in bells:
        os.close(bell.fd)
