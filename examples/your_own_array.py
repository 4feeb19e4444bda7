# SPDX-License-Identifier: Apache-2.0
"""DMA with memory that the process already has: pinned, not copied.

``card.pin(obj)`` takes anything with a buffer, at any alignment: an array, a part of one, a
``bytes``, a ``memoryview``. The pin keeps the object alive. ``Pin.how`` says what keeps it safe;
on an emulated card it is *relayed*: the card's accesses are carried out on this process's address
space, and fail, harming nobody, once there is no such process any more.

Run it: ``python examples/your_own_array.py``
"""

import numpy as np

import holdfast
from holdfast.errors import BadBuffer, BadTransfer


def main() -> None:
    image = np.random.default_rng(1998).integers(0, 256, (480, 641), dtype=np.uint8)
    result = np.zeros_like(image)

    with holdfast.open("emu:xdma") as card:
        with card.pin(image) as source, card.pin(result) as destination:
            print(f"pinned {source.nbytes} bytes of this process, {source.how}")
            card.dma.to_card(source, 0).wait(timeout=5)
            card.dma.from_card(destination, 0).wait(timeout=5)
        assert np.array_equal(image, result)
        print("the image went to the card and came back into the other array")

        # Alignment does not matter: rows of 641 bytes start anywhere.
        result[:] = 0
        with card.pin(result[100:103]) as rows:
            card.dma.from_card(rows, 100 * 641).wait(timeout=5)
        assert np.array_equal(result[100:103], image[100:103])
        assert not result[:100].any()
        assert not result[103:].any()
        print("three rows, unaligned at both ends, were written; not a byte beside them")

        # Read-only memory can be a source. The card could not write to it even if it tried.
        with card.pin(b"read-only bytes are a good source") as text:
            card.dma.to_card(text, 0).wait(timeout=5)
            seen = card.bars[2].view(0, text.nbytes).tobytes()
            print(f"on the card: {seen!r}")
            assert seen == b"read-only bytes are a good source"
            try:
                card.dma.from_card(text, 0)
            except BadTransfer as error:
                print(f"as a destination it is refused: {error.what}")
            else:
                raise AssertionError("a transfer into read-only memory was accepted")

        # What is not one piece of memory cannot be pinned as one.
        try:
            card.pin(image[:, ::2])
        except BadBuffer as error:
            print(f"every other column: {error.what}; {error.hint}")
        else:
            raise AssertionError("a strided array was pinned")


if __name__ == "__main__":
    main()
