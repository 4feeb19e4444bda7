# SPDX-License-Identifier: Apache-2.0
"""A digitiser: the card starts DMA by itself into a ring of blocks, and says when it had to drop.

The stream's blocks are posted once; the card fills them as samples arrive. The consumer takes them
in order, and each block goes back to the card when the next one is asked for. A consumer that is
too slow leaves the card without blocks: its FIFO fills up, and the bytes it drops are counted.
"""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Self

import numpy as np
import numpy.typing as npt

from holdfast.drivers.xdma_ring import METADATA_STRIDE, RING, Batch
from holdfast.errors import BadTransfer, NotSupported
from holdfast.regs import xdma as regs
from holdfast.regs.spec import Register
from holdfast.regs.xdma import Direction, SourceControl
from holdfast.transfer import Transfer

if TYPE_CHECKING:
    from holdfast.drivers.xdma_engine import XdmaQueue

PATTERNS = {"counter": SourceControl(0), "sine": SourceControl.SINE}


@dataclass(frozen=True, slots=True)
class Block:
    """One filled block. ``data`` (uint8) is valid until the next block is taken."""

    data: npt.NDArray[np.uint8]
    number: int
    end_of_packet: bool


class Stream:
    """Samples from a C2H channel's source: ``for`` or ``async for`` over :class:`Block`.

    Close it (or leave its ``with``) before the device. Closing starts the lease's channels anew,
    so other transfers of the lease that are still running end with DeviceReset.
    """

    def __init__(
        self, queue: XdmaQueue, rate: int, block_bytes: int, blocks: int, pattern: str
    ) -> None:
        target = str(queue.device.target)
        if pattern not in PATTERNS or not 2 <= blocks < RING or not 0 <= rate < 1 << 32:
            raise BadTransfer(
                f"pattern {pattern!r}, {blocks} blocks, rate {rate}",
                operation="stream",
                target=target,
                hint=f"pattern of {sorted(PATTERNS)}, 2 to {RING - 1} blocks, rate below 2^32 B/s",
            )
        if block_bytes <= 0 or block_bytes % regs.DATA_WIDTH:
            raise BadTransfer(
                f"blocks of {block_bytes} bytes, not a multiple of {regs.DATA_WIDTH}",
                operation="stream",
                target=target,
            )
        self._queue = queue
        self._user = queue.device.bars[regs.USER_BAR]
        if self._user.read(regs.USER_IDENTIFIER) != regs.USER_IDENTIFIER_VALUE:
            raise NotSupported("the card has no stream source", operation="stream", target=target)
        self._buffer = queue.device.alloc((blocks, block_bytes), np.uint8)
        self._iovas = [
            self._buffer.sg.slice(block * block_bytes, block_bytes) for block in range(blocks)
        ]
        self._running: deque[Transfer] = deque()
        self._taken = 0
        self._first = queue.ring.posted
        self._closed = False
        self._write(regs.SOURCE_RATE, rate)
        self._write(regs.SOURCE_CONTROL, int(SourceControl.ENABLE | PATTERNS[pattern]))
        for number in range(blocks):
            self._post(number)

    def _write(self, register: Register, value: int) -> None:
        self._user.write(register, value, self._queue.channel)

    def _read64(self, low: Register, high: Register) -> int:
        channel = self._queue.channel
        return self._user.read(high, channel) << 32 | self._user.read(low, channel)

    def _post(self, number: int) -> None:
        """Hand a block to the card: one descriptor, its metadata at the slot's own place."""
        queue = self._queue
        slot = queue.ring.posted % RING
        queue.ring.metadata[slot] = 0
        where = queue.control.iova(queue.layout.metadata + slot * METADATA_STRIDE)
        piece = self._iovas[number % len(self._iovas)]
        if len(piece.lengths) != 1:
            raise BadTransfer("a block is not contiguous for the card", operation="stream")
        batch = Batch.of(
            Direction.C2H, piece.lengths, piece.iovas, np.array([where], dtype=np.uint64)
        )
        self._running.append(queue.post(batch, [self._buffer]))

    @property
    def overrun_bytes(self) -> int:
        """Bytes the card had to drop because no block was free."""
        return self._read64(regs.SOURCE_OVERRUN_LO, regs.SOURCE_OVERRUN_HI)

    @property
    def produced_bytes(self) -> int:
        """Bytes the source has made, dropped ones included."""
        return self._read64(regs.SOURCE_PRODUCED_LO, regs.SOURCE_PRODUCED_HI)

    def _block(self) -> Block:
        number = self._taken
        self._taken += 1
        meta = self._queue.ring.metadata[(self._first + number) % RING].view(np.uint32)
        length = min(int(meta[1]), self._buffer.array.shape[1])
        row = self._buffer.array[number % len(self._iovas)]
        return Block(row[:length], number, bool(meta[0] & regs.METADATA_EOP))

    def __iter__(self) -> Iterator[Block]:
        while not self._closed:
            self._running[0].wait()
            self._running.popleft()
            block = self._block()
            yield block
            if not self._closed:
                self._post(block.number)

    async def __aiter__(self) -> AsyncIterator[Block]:
        while not self._closed:
            await self._running[0]
            self._running.popleft()
            block = self._block()
            yield block
            if not self._closed:
                self._post(block.number)

    def close(self) -> None:
        """Stop: the channel first, so that no descriptor outlives the source. Idempotent."""
        if self._closed:
            return
        self._closed = True
        self._queue.device.regrant()
        self._running.clear()
        self._buffer.free()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
