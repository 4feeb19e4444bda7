# SPDX-License-Identifier: Apache-2.0
"""The first transfer: an array to the card and back.

``holdfast.open`` leases the function. With an ``emu:`` target it also starts what is missing, for
this user: the emulated card in a process of its own, and the keeper, which owns the card and the
memory. Both end by themselves a few seconds after the last client.

Run it: ``python examples/hello_dma.py``
"""

import numpy as np

import holdfast

CARD_ADDRESS = 0x1000
SAMPLES = 1 << 20


def main() -> None:
    with holdfast.open("emu:xdma") as card:
        print(f"opened {card!r}")

        # DMA memory is a NumPy array. Its pages belong to the keeper, not to this process:
        # if the process were killed in the next lines, they would stay until the card is quiet.
        there = card.alloc(SAMPLES, np.uint32)
        back = card.alloc(SAMPLES, np.uint32)
        there.array[:] = np.arange(SAMPLES, dtype=np.uint32)

        # A transfer is posted at once; wait() blocks until the card is done with the memory.
        card.dma.to_card(there, CARD_ADDRESS).wait(timeout=5)
        print(f"{there.nbytes} bytes are on the card")

        # On this card, BAR 2 is a window onto the same memory: look through it, without DMA.
        window = card.bars[2].view(CARD_ADDRESS, there.nbytes).view(np.uint32)
        print(f"through the window: {window[:4]} ... {window[-1]}")
        assert np.array_equal(window, there.array)

        card.dma.from_card(back, CARD_ADDRESS).wait(timeout=5)
        assert np.array_equal(back.array, there.array)
        print(f"and the same {back.nbytes} bytes came back")


if __name__ == "__main__":
    main()
