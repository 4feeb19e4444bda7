# SPDX-License-Identifier: Apache-2.0
"""Which I/O virtual addresses a function can be given."""

from __future__ import annotations

from collections.abc import Sequence

from holdfast.driver import Driver
from holdfast.errors import DeviceError
from holdfast.values import Target

_HIGH_BASE = 1 << 32
_LOW_BASE = 1 << 16
_TOP_BITS = 47
_MSI_WINDOW = 0xFEE0_0000


def iova_range(dma_bits: int) -> tuple[int, int]:
    """First and last+1 IOVA for a function with ``dma_bits`` address bits.

    Above 4 GiB where the function can reach it, so that an IOVA is never mistaken for a small
    number; below the MSI window elsewhere, because writes there are interrupts (Intel SDM vol. 3,
    11.11.1).
    """
    if dma_bits >= 40:
        return _HIGH_BASE, 1 << min(dma_bits, _TOP_BITS)
    return _LOW_BASE, min(1 << dma_bits, _MSI_WINDOW)


def usable_range(
    base: int, limit: int, ranges: Sequence[tuple[int, int]], granule: int = 4096
) -> tuple[int, int]:
    """The largest part of ``base`` up to ``limit`` that lies in one of ``ranges`` (inclusive).

    No ranges: all of it. Raises DeviceError if nothing is left.
    """
    if not ranges:
        return base, limit
    parts = [(max(base, first), min(limit, last + 1)) for first, last in ranges]
    rounded = [(-(-start // granule) * granule, end // granule * granule) for start, end in parts]
    start, end = max(rounded, key=lambda part: part[1] - part[0])
    if start >= end:
        raise DeviceError(
            f"none of the addresses {base:#x}..{limit:#x} that the function has can be mapped",
            operation="take over",
            hint="the IOMMU maps: " + ", ".join(f"{a:#x}..{b:#x}" for a, b in ranges),
        )
    return start, end


def dma_bits(target: Target, driver: type[Driver]) -> int:
    """Address bits of a function's DMA: what its driver knows, or what the target says of it."""
    said = target.options.get("dma_bits") if target.scheme == "pci" else None
    return int(said) if said is not None else driver.dma_bits
