# SPDX-License-Identifier: Apache-2.0
"""XDMA for mediated access: the keeper writes descriptors for clients it has checked.

The same rings as the client half's, in control memory of the keeper's own. Nothing here reads a
register: credits and acknowledgements are doorbells, the count of finished descriptors lies in
memory. Where a function offers no doorbells the same registers are written through the backend.
"""

from __future__ import annotations

from collections.abc import Callable

from holdfast.driver import ControlMemory
from holdfast.drivers.xdma_ring import RING, Batch, Layout, Ring
from holdfast.errors import RingFull
from holdfast.poster import Bells, U64s
from holdfast.regs import xdma as regs
from holdfast.regs.spec import Register
from holdfast.regs.view import RegisterView
from holdfast.regs.xdma import CHANNEL, SG, Direction


class XdmaLane:
    """One direction of one channel. Fulfils ``poster.Lane``."""

    def __init__(
        self,
        control: ControlMemory,
        layout: Layout,
        vector: int,
        give: Callable[[int], None],
        acknowledge: Callable[[int], None],
    ) -> None:
        self._ring = Ring(control, layout)
        self._direction = layout.direction
        self._vector = vector
        self._give = give
        self._acknowledge = acknowledge

    @property
    def vector(self) -> int | None:
        return self._vector

    def room(self) -> int:
        return RING - 1 - self._ring.posted + self._ring.done

    def post(self, host: U64s, card: U64s, lengths: U64s) -> None:
        count = len(host)
        if count > self.room():
            raise RingFull(f"{count} descriptors", operation="post")
        self._ring.write(Batch.of(self._direction, lengths, host, card))
        self._give(count)

    def completed(self) -> int:
        return self._ring.refresh()

    def error(self) -> bool:
        return self._ring.error

    def acknowledge(self) -> None:
        self._acknowledge(1)


def make_lane(
    control: ControlMemory,
    direction: Direction,
    channel: int,
    vector: int,
    bar: tuple[int, RegisterView],
    bells: Bells,
) -> XdmaLane:
    """The lane of a channel that was granted as the first of its lease. ``bar``: index, view."""
    index, view = bar

    def bell(register: Register, value: int | None) -> Callable[[int], None]:
        ring = bells(index, register.at(channel))
        if ring is not None:
            return ring
        return lambda count: view.write(register, count if value is None else value, channel)

    return XdmaLane(
        control,
        Layout(0, direction),
        vector,
        bell(SG[direction].descriptor_credits, None),
        bell(CHANNEL[direction].status, regs.STATUS_CLEARABLE),
    )
