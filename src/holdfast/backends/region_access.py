# SPDX-License-Identifier: Apache-2.0
"""What may be asked of a region, checked here before anybody is asked.

Servers in the field do not all check, and a bad access would take them down; the kernel checks, but
says no more than EINVAL.
"""

from __future__ import annotations

from collections.abc import Sequence

from holdfast.errors import BadAccess
from holdfast.values import Region

LARGEST_OF_MANY = 8
"""Bytes in one access of ``region_read_multi`` and ``region_write_multi``."""


def existing(regions: Sequence[Region], index: int, operation: str, target: str) -> Region:
    """The region, or BadAccess."""
    if not 0 <= index < len(regions):
        raise BadAccess(f"there is no region {index}", operation=operation, target=target)
    return regions[index]


def checked(
    regions: Sequence[Region], index: int, offset: int, count: int, *, write: bool, target: str
) -> Region:
    """The region, if ``count`` bytes at ``offset`` of it may be read or written; or BadAccess."""
    operation = "region_write" if write else "region_read"
    region = existing(regions, index, operation, target)
    if offset < 0 or count < 1 or offset + count > region.size:
        raise BadAccess(
            f"{count} bytes at {offset:#x} of region {index}, which has {region.size:#x}",
            operation=operation,
            target=target,
        )
    if not (region.writable if write else region.readable):
        raise BadAccess(f"region {index} does not allow it", operation=operation, target=target)
    return region


def require_small(count: int, operation: str, target: str) -> None:
    """BadAccess for more than one of many accesses can be."""
    if count > LARGEST_OF_MANY:
        raise BadAccess(
            f"{count} bytes in one of many accesses", operation=operation, target=target
        )
