# SPDX-License-Identifier: Apache-2.0
"""A pin is taken away once, when it is freed and no transfer uses it; never while one does."""

from __future__ import annotations

import array
import weakref

import numpy as np
import numpy.typing as npt
import pytest

from holdfast.dma.pin import Pin, flat_bytes
from holdfast.errors import BadBuffer, Closed
from holdfast.values import Iova


class Undo:
    """Counts how often, and with what, the pin was taken away."""

    def __init__(self) -> None:
        self.calls: list[object | None] = []

    def __call__(self, later: object | None) -> None:
        self.calls.append(later)


def pinned(obj: npt.NDArray[np.uint8], undo: Undo) -> Pin:
    data, writable = flat_bytes(obj)
    return Pin(obj, data, Iova(0x5000), writable, "relayed", undo)


def test_any_contiguous_memory_is_flattened_without_a_copy() -> None:
    matrix = np.zeros((3, 4), np.float32)
    data, writable = flat_bytes(matrix)
    assert (data.nbytes, writable) == (48, True)
    data[:] = 0xFF
    assert np.isnan(matrix).all()
    assert flat_bytes(b"read only")[1] is False
    assert flat_bytes(bytearray(5))[1] is True
    assert flat_bytes(array.array("d", [1.0]))[0].nbytes == 8


@pytest.mark.parametrize("obj", [7, "text", b"", np.zeros((4, 4))[:, 1], np.zeros((0, 3)), None])
def test_what_is_no_memory_in_one_piece_is_refused(obj: object) -> None:
    with pytest.raises(BadBuffer):
        flat_bytes(obj)


def test_a_pin_says_where_the_function_sees_it() -> None:
    memory = np.zeros(100, np.uint8)
    pin = pinned(memory, Undo())
    assert list(pin.sg) == [(0x5000, 100)]
    assert np.shares_memory(pin.array, memory)
    assert pin.how == "relayed"
    pin.free()


def test_a_freed_pin_is_taken_away_once_and_good_for_nothing() -> None:
    undo = Undo()
    with pinned(np.zeros(8, np.uint8), undo) as pin:
        assert undo.calls == []
    pin.free()
    assert undo.calls == [None]
    assert pin.closed
    for use in (pin.hold, pin.require_open):
        with pytest.raises(Closed):
            use()
    with pytest.raises(Closed):
        _ = pin.sg


def test_a_transfer_postpones_the_end_of_a_pin() -> None:
    undo = Undo()
    pin = pinned(np.zeros(8, np.uint8), undo)
    pin.hold()
    pin.hold()
    pin.free()
    pin.release()
    assert undo.calls == []
    pin.release()
    assert undo.calls == [None]


def test_a_dropped_pin_goes_later_and_its_memory_lives_until_then() -> None:
    undo = Undo()
    memory = np.zeros(8, np.uint8)
    alive = weakref.ref(memory)
    pin = pinned(memory, undo)
    del memory
    assert alive() is not None
    del pin
    assert len(undo.calls) == 1
    assert alive() is not None, "the memory went before the pin"
    undo.calls.clear()
    assert alive() is None
