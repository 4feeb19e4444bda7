# SPDX-License-Identifier: Apache-2.0
"""A digitiser: the card starts DMA by itself, and says so when the program is too slow.

The emulated card's stream source makes 32-bit samples that count up, at a given rate. The card
writes them into a ring of blocks; the program takes the blocks in order. When the program pauses
for longer than ring and FIFO can bridge, the card has to drop samples. It counts what it drops, and
the samples' own numbers tell the same story.

Run it: ``python examples/digitiser.py``
"""

import asyncio
from collections.abc import AsyncIterator

import numpy as np

import holdfast
from holdfast.drivers.xdma_stream import Block

RATE = 8 << 20  # bytes per second
BLOCK_BYTES = 64 << 10
BLOCKS = 32  # in the ring: with the card's FIFO of 1 MiB, enough for 0.37 s


class Counter:
    """Follows the sample numbers and finds what is missing between them."""

    def __init__(self) -> None:
        self.next = 0
        self.missing = 0

    def take(self, block: Block) -> None:
        samples = block.data.view("<u4").astype(np.int64)
        steps = np.diff(samples, prepend=self.next - 1)
        assert (steps >= 1).all(), "samples out of order"
        self.missing += int((steps - 1).sum())
        self.next = int(samples[-1]) + 1


async def record(blocks: AsyncIterator[Block], count: int, counter: Counter) -> None:
    """Take ``count`` blocks. ``block.data`` is the DMA memory itself: use it or copy it now."""
    for _ in range(count):
        counter.take(await anext(blocks))


async def main() -> None:
    counter = Counter()
    with holdfast.open("emu:xdma") as card:
        with card.dma.stream(rate=RATE, block_bytes=BLOCK_BYTES, blocks=BLOCKS) as stream:
            blocks = aiter(stream)

            await record(blocks, 32, counter)
            print(f"kept up: {counter.next} samples, {stream.overrun_bytes} bytes dropped")

            print("now the program is busy with something else for 0.8 s ...")
            await asyncio.sleep(0.8)

            # First comes what ring and FIFO kept, then the gap, then the present.
            await record(blocks, 96, counter)
            dropped = stream.overrun_bytes
            print(f"the card dropped {dropped} bytes of {stream.produced_bytes}")
            print(f"the samples' numbers show {4 * counter.missing} bytes missing")
            assert 0 < 4 * counter.missing <= dropped


if __name__ == "__main__":
    asyncio.run(main())
