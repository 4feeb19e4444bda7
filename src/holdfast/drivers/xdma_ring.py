# SPDX-License-Identifier: Apache-2.0
"""The descriptor ring of one XDMA channel: layout, preparation, and posting in batches.

Facts. A ring is a cyclic list of 32-byte descriptors. The address of each one's successor never
changes, nor does the count of adjacent descriptors that the engine may fetch in one go (blocks of
64, which do not cross a 4 KiB page; PG344 "Descriptors", Nxt_adj). What changes per transfer is
length, source, destination and two flags.

Choice. :func:`prepare_ring` writes the constant part once. A batch has its descriptors as whole
rows with the constant part left zero. :meth:`Ring.write` joins them with the constant part of the
slots they go to, in one NumPy operation straight into the ring; the last one is marked, so that the
engine reports it. There is no Python per descriptor. Cost: the constant part is written again with
every batch; that is less than it costs NumPy to step over it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from holdfast.dma.sg import SgList
from holdfast.driver import ControlMemory
from holdfast.regs import xdma as regs
from holdfast.regs.xdma import Desc, Direction

RING = 1024
"""Descriptors in a ring; one fewer can be outstanding, which is also the most credits."""
BLOCK = 64
_ROW = regs.DESC_SIZE // 8
_RING_BYTES = RING * regs.DESC_SIZE
METADATA_STRIDE = 32
_METADATA_BYTES = RING * METADATA_STRIDE
_COUNT_BYTES = 4096
_DIRECTION_BYTES = _RING_BYTES + _METADATA_BYTES + _COUNT_BYTES
CONTROL_BYTES = 2 * _DIRECTION_BYTES
"""Control memory per channel pair, in bytes."""

U32s = npt.NDArray[np.uint32]
U64s = npt.NDArray[np.uint64]


@dataclass(frozen=True, slots=True)
class Layout:
    """Where the parts of one ring lie in the lease's control memory (byte offsets)."""

    place: int
    """Position of the channel among the lease's channels."""
    direction: Direction

    @property
    def ring(self) -> int:
        return self.place * CONTROL_BYTES + int(self.direction) * _DIRECTION_BYTES

    @property
    def metadata(self) -> int:
        """Stream write-backs, one per descriptor, 32 bytes apart."""
        return self.ring + _RING_BYTES

    @property
    def count(self) -> int:
        """The poll-mode write-back dword."""
        return self.metadata + _METADATA_BYTES


def _constant_control() -> U32s:
    place = np.arange(RING, dtype=np.uint32) % BLOCK
    # Inside a block the count runs down; the last one announces the next full block.
    adjacent = np.where(place < BLOCK - 1, np.maximum(BLOCK - 2 - place.astype(np.int64), 0), 63)
    return (regs.DESC_MAGIC | adjacent << regs.DESC_ADJACENT.lo).astype(np.uint32)


CONTROL = _constant_control()


def prepare_ring(control: ControlMemory, layout: Layout) -> None:
    """Write the constant part of a ring into its control memory.

    A block of 64 descriptors fills half a page, so it is contiguous for the function even where
    the memory is in pieces.
    """
    memory = np.frombuffer(control.data, np.uint8)
    memory[layout.ring : layout.ring + _DIRECTION_BYTES] = 0
    ring = memory[layout.ring : layout.ring + _RING_BYTES].view(regs.DESCRIPTOR)
    ring["control"] = CONTROL
    successors = np.arange(1, RING + 1, dtype=np.int64) % RING
    ring["next"] = control.iovas(layout.ring + successors * regs.DESC_SIZE)


@dataclass(frozen=True, slots=True)
class Batch:
    """Descriptors ready to be posted, any number of times.

    ``rows`` is uint64[n, 4]: whole descriptors, zero where the ring has its constant part. The
    engine reports the last one.
    """

    rows: U64s
    nbytes: int

    @classmethod
    def build(cls, direction: Direction, sg: SgList, address: int) -> Batch:
        """Descriptors that move ``sg`` to or from consecutive card addresses. Vectorised."""
        pieces = sg.split(regs.DESC_MAX_LENGTH & ~0xFFF)
        lengths = pieces.lengths
        card = np.uint64(address) + np.cumsum(lengths, dtype=np.uint64) - lengths
        return cls.of(direction, lengths, pieces.iovas, card)

    @classmethod
    def of(
        cls,
        direction: Direction,
        lengths: npt.NDArray[np.uint64],
        host: npt.NDArray[np.uint64],
        card: npt.NDArray[np.uint64],
    ) -> Batch:
        """Descriptors from arrays of lengths, host IOVAs and card addresses (or metadata)."""
        source, destination = (host, card) if direction is Direction.H2C else (card, host)
        rows = np.zeros(len(lengths), regs.DESCRIPTOR)
        rows["length"] = lengths
        rows["source"] = source
        rows["destination"] = destination
        rows["control"][-1:] = _REPORTED
        words = rows.view(np.uint64).reshape(-1, _ROW)
        return cls(words, int(lengths.sum(dtype=np.uint64)))

    def __len__(self) -> int:
        return len(self.rows)


class Ring:
    """The client's view of one prepared ring. Not thread-safe: the queue holds its lock."""

    def __init__(self, control: ControlMemory, layout: Layout) -> None:
        memory = np.frombuffer(control.data, np.uint8)
        table = memory[layout.ring : layout.ring + _RING_BYTES]
        self._rows: U64s = table.view(np.uint64).reshape(RING, _ROW)
        self._count = memory[layout.count : layout.count + 4].data.cast("I")
        meta = memory[layout.metadata : layout.metadata + _METADATA_BYTES]
        self.metadata = meta.reshape(RING, METADATA_STRIDE)[:, :8]
        self.restart()

    def restart(self) -> None:
        """The keeper prepared the ring anew."""
        constant = np.zeros(RING, regs.DESCRIPTOR)
        constant["control"] = CONTROL
        constant["next"] = self._rows.view(regs.DESCRIPTOR)["next"][:, 0]
        self._constant: U64s = constant.view(np.uint64).reshape(RING, _ROW)
        self.posted = 0
        self.done = 0

    @property
    def free(self) -> int:
        """Descriptors that can be posted now."""
        return RING - 1 - (self.posted - self.done)

    def refresh(self) -> int:
        """Read the write-back; returns the count of finished descriptors since the start."""
        word: int = self._count[0]
        # 24 bits of a count that only rises: the distance to what was seen before is exact,
        # because fewer than 2^24 descriptors fit in the ring.
        self.done += (word - self.done) & _COUNT
        return self.done

    @property
    def error(self) -> bool:
        """Whether the engine reported an error."""
        return bool(self._count[0] & _ERROR)

    def write(self, batch: Batch) -> None:
        """Put a batch behind what was posted; there must be room. The doorbell is the caller's."""
        at = self.posted % RING
        rows = batch.rows
        end = at + len(rows)
        if end <= RING:
            _join(rows, self._constant[at:end], self._rows[at:end])
        else:
            first = RING - at
            _join(rows[:first], self._constant[at:], self._rows[at:])
            _join(rows[first:], self._constant[: end - RING], self._rows[: end - RING])
        self.posted += len(rows)


_join = np.bitwise_or
# Plain numbers: arithmetic with enum flags costs a microsecond, and this is done for every post.
_COUNT, _ERROR = int(regs.Writeback.COUNT), int(regs.Writeback.ERROR)
_REPORTED = int(Desc.COMPLETED | Desc.EOP)
