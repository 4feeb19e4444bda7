# SPDX-License-Identifier: Apache-2.0
"""Many copies in one go: scatter and gather between addresses.

Facts. A hardware scatter-gather list has ten thousand entries of about one page. A slice assignment
between two memoryviews costs 0.15 us more than the copy itself; ``ctypes.memmove`` costs twice as
much, a NumPy assignment six times. System calls that take lists (``pwritev``, ``process_vm_readv``
on oneself) look up every page: 1.4 to 2 us per entry. Pieces of 2 to 6 KiB at random places cost
even a loop in C 0.7 us each, twice what as many bytes in one piece cost: each begins with
misses of cache and TLB. NumPy has no "memcpy list", but indexing an array whose items are ``V<W>``
(raw bytes) moves W bytes per index in C, and over memory with a stride of 1 byte every address can
be such an item. Taking mixed lengths apart into few such widths, with a temporary between two
irregular sides, was measured to take one and a half to five times as long as the loop.

One large piece is copied a tenth faster in parts of 128 to 512 KiB than in calls of 1 MiB and more
(measured on one EPYC with glibc 2.36, whose memcpy changes its method with the size).

Choice. Neighbours that continue each other on both sides are joined first. Lists of one length with
one regular side (whole pages to or from one buffer) are an indexing operation without a temporary.
All others are a plain loop of slices. What is large is cut into pieces of 512 KiB, copied by NumPy
with the interpreter lock released.

Cost. Mixed lengths are the interpreter's work: 0.8 to 1.4 us per entry of about 4 KiB, a third of
the bandwidth of one large memcpy at best. Callers must check ranges before: indexing here does not.
"""

from __future__ import annotations

from typing import Any, Final, TypeAlias

import numpy as np
import numpy.typing as npt

from holdfast.emu.port import Bytes

Addresses: TypeAlias = npt.NDArray[np.int64]

_HUGE: Final = 256 * 1024
"""From here on NumPy copies: it lets other threads run meanwhile, which costs a little. Below, the
interpreter lock is held for some 25 us at most."""

_PIECE: Final = 512 * 1024
"""Bytes that are copied by one call."""

_FEW: Final = 48
"""Up to this many entries the loop is quicker than the preparation of an indexing operation."""


class _Items:
    """Memory from ``first`` to ``end`` as overlapping items of ``width`` bytes, one per address."""

    __slots__ = ("__array_interface__",)

    def __init__(self, first: int, end: int, width: int, stride: int) -> None:
        self.__array_interface__ = {
            "version": 3,
            "data": (first, False),
            "shape": ((end - first - width) // stride + 1,),
            "strides": (stride,),
            "typestr": f"|V{width}",
        }


def _items(first: int, end: int, width: int, stride: int = 1) -> npt.NDArray[np.void]:
    return np.asarray(_Items(first, end, width, stride))


def copy_list(
    into: Bytes, to: Addresses, out: Bytes, source: Addresses, lengths: Addresses
) -> None:
    """Copy ``lengths[i]`` bytes from ``out[source[i]:]`` to ``into[to[i]:]``, as if in order.

    All lengths at least 1. The arrays are contiguous and do not overlap each other; destinations
    may overlap among themselves. The caller vouches for every range.
    """
    to, source, lengths = _join(to, source, lengths)
    if len(to) > _FEW:
        # A buffer in pages: all of one length, but for the first and the last.
        usual = int(lengths[len(lengths) // 2])
        same = lengths == usual
        if (
            usual < _HUGE
            and np.count_nonzero(same) > _FEW
            and not overlapping(to, lengths)
            and _index(into, to[same], out, source[same], usual)
        ):
            to, source, lengths = to[~same], source[~same], lengths[~same]
    if len(to):
        copy_in_order(into, to, out, source, lengths)


def copy_in_order(
    into: Bytes, to: Addresses, out: Bytes, source: Addresses, lengths: Addresses
) -> None:
    """The same, one entry after the other, whatever overlaps. Not for an empty list."""
    ends, stops = to + lengths, source + lengths
    target, origin = into.data, out.data
    rows = zip(to.tolist(), ends.tolist(), source.tolist(), stops.tolist(), strict=True)
    if int(lengths.max()) < _HUGE:
        for a, b, c, d in rows:
            target[a:b] = origin[c:d]
        return
    for a, b, c, d in rows:
        if b - a < _HUGE:
            target[a:b] = origin[c:d]
        else:
            copy_large(into[a:b], out[c:d])


def copy_large(into: Bytes, out: Bytes) -> None:
    """Copy one large piece between arrays of the same size."""
    for at in range(0, len(into), _PIECE):
        np.copyto(into[at : at + _PIECE], out[at : at + _PIECE])


def overlapping(to: Addresses, lengths: Addresses) -> bool:
    """True if any two destinations share a byte."""
    ends = to + lengths
    if bool((to[1:] >= ends[:-1]).all()):
        return False
    order = np.argsort(to)
    return bool((to[order[1:]] < ends[order[:-1]]).any())


def _join(
    to: Addresses, source: Addresses, lengths: Addresses
) -> tuple[Addresses, Addresses, Addresses]:
    """Make one entry of neighbours that continue each other on both sides."""
    follows = (to[1:] == to[:-1] + lengths[:-1]) & (source[1:] == source[:-1] + lengths[:-1])
    if not follows.any():
        return to, source, lengths
    starts = np.concatenate(([0], np.flatnonzero(~follows) + 1))
    return to[starts], source[starts], np.add.reduceat(lengths, starts)


def _index(into: Bytes, to: Addresses, out: Bytes, source: Addresses, width: int) -> bool:
    """Copy entries of one width if one side is regular; else False, and nothing was done."""
    low, bottom = int(source.min()), int(to.min())
    first, start = _address(out) + low, _address(into) + bottom
    end, stop = first + int(source.max()) - low + width, start + int(to.max()) - bottom + width
    if _step(source) >= width:
        target = _items(start, stop, width)
        target[to - bottom] = _items(first, end, width, _step(source))
        return True
    offsets = source - low
    if _step(to) == width and not (offsets % width).any():
        # take() wants its source contiguous, so this one works for whole pages only.
        whole: Any = _items(first, end, width, width)
        whole.take(offsets // width, out=_items(start, stop, width, width), mode="clip")
        return True
    return False


def _address(array: Bytes) -> int:
    return int(array.__array_interface__["data"][0])


def _step(addresses: Addresses) -> int:
    """The distance between neighbours if it is always the same and positive, else 0."""
    if len(addresses) < 2:
        return 0
    step = int(addresses[1] - addresses[0])
    return step if step > 0 and bool((np.diff(addresses) == step).all()) else 0
