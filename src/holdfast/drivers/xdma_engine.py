# SPDX-License-Identifier: Apache-2.0
"""XDMA, client half: arrays to descriptors, and nothing of the keeper on the way.

A transfer costs one batch written to the ring and one eventfd write; its end is a dword in memory
and, for those who sleep, an interrupt. The status bit behind the interrupt is acknowledged through
a doorbell as well. Where a function offers no doorbells, the same registers are stored to.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from holdfast import steps
from holdfast.driver import Engine
from holdfast.drivers.xdma_ring import RING, Batch, Layout, Ring
from holdfast.errors import (
    BadTransfer,
    Closed,
    HoldfastError,
    NotSupported,
    RingFull,
    TransferFailed,
)
from holdfast.regs import xdma as regs
from holdfast.regs.xdma import CHANNEL, SG, Direction
from holdfast.transfer import Held, Queue, Transfer

if TYPE_CHECKING:
    from holdfast.device import Device
    from holdfast.dma.buffer import Buffer
    from holdfast.dma.pin import Pin
    from holdfast.drivers.xdma_stream import Stream


class XdmaQueue(Queue):
    """One direction of one channel. Thread-safe."""

    def __init__(self, device: Device, place: int, direction: Direction) -> None:
        vectors: Sequence[int] = device.lease.grant["vectors"]
        vector = vectors[2 * place + int(direction)]
        super().__init__(device.irqs.get(vector), device.lease.generation, device.granted)
        self.device = device
        self.place = place
        self.channel = device.lease.channels[place]
        self.direction = direction
        self.layout = Layout(place, direction)
        if device.control is None:
            raise NotSupported("the lease has no rings", operation="open xdma queue")
        self.control = device.control
        self.ring = Ring(self.control, self.layout)
        self._ring_credits, self._acknowledge = self._bells()

    def _bells(self) -> tuple[Callable[[int], None], Callable[[int], None]]:
        bar_index: int = self.device.lease.grant["bar"]
        credits_at = SG[self.direction].descriptor_credits.at(self.channel)
        status_at = CHANNEL[self.direction].status.at(self.channel)
        credit, status = (self.device.bell(bar_index, at) for at in (credits_at, status_at))
        bar = self.device.bars[bar_index]
        return (
            credit.ring if credit else lambda count: bar.store(credits_at, count),
            status.ring if status else lambda _: bar.store(status_at, regs.STATUS_CLEARABLE),
        )

    def post(self, batch: Batch, held: Sequence[Held]) -> Transfer:
        """Post a batch. RingFull (nothing posted) if the ring has no room for it.

        ``held`` is kept alive and usable until the function is done with the batch.
        """
        count = len(batch.rows)
        if self._generation() != self._born or self.ring.error:  # _lost(), without the calls
            # Not under the queue's lock: starting anew takes the locks of all queues.
            self.reap()
            self.device.regrant(only_if=self._lost)
        with self._lock:
            ring = self.ring
            if count > RING - 1 - ring.posted + ring.done:
                self._make_room(count)
            transfer = self.keep(ring.posted + count, batch.nbytes, held)
            steps.reach("client.post")
            ring.write(batch)
            steps.reach("client.posted")
            self._ring_credits(count)
        steps.reach("client.doorbell")
        return transfer

    def _lost(self) -> bool:
        """Whether the channel must be started anew before it can be used."""
        return self.stale or self.ring.error

    def _make_room(self, count: int) -> None:
        self.reap()
        self.ring.refresh()
        if count > self.ring.free:
            raise RingFull(
                f"{count} descriptors, {self.ring.free} of {RING - 1} slots are free",
                operation="post",
                target=str(self.device.target),
            )

    def completed(self) -> int:
        return self.ring.refresh()

    def acknowledge(self) -> None:
        with self._lock:  # a regrant in another thread closes the doorbell behind this lock
            self._acknowledge(1)

    def problem(self) -> HoldfastError | None:
        if not self.ring.error:
            return None
        told = self.device.command("channel_status")
        mine = [
            row
            for row in told
            if row["channel"] == self.channel and row["direction"] == self.direction.name
        ]
        status = mine[0]["status"] if mine else 0
        bits = regs.Status(status & regs.STATUS_ERRORS)
        return TransferFailed(
            f"the engine stopped after {self.ring.done} of {self.ring.posted} descriptors: "
            f"status {status:#010x} ({bits.name or 'no detail'})",
            operation=f"{self.direction.name} transfer",
            target=f"{self.device.target} channel {self.channel}",
            hint="check the card address; the next post starts the channel anew",
        )

    def restart(self) -> None:
        """The keeper prepared the ring anew and handed out fresh doorbells."""
        with self._lock:
            self.renew()
            self.ring.restart()
            self._ring_credits, self._acknowledge = self._bells()


class XdmaEngine(Engine):
    """Client half: ``device.dma`` of an open XDMA function. Thread-safe."""

    def __init__(self, device: Device) -> None:
        super().__init__(device)
        self._queues = {
            (place, direction): XdmaQueue(device, place, direction)
            for place in range(len(device.lease.channels))
            for direction in Direction
        }

    def to_card(
        self,
        source: Buffer | Pin,
        address: int = 0,
        *,
        offset: int = 0,
        nbytes: int | None = None,
        channel: int = 0,
        **options: Any,
    ) -> Transfer:
        """Copy ``nbytes`` from ``offset`` of a buffer to card address ``address``.

        ``channel`` counts the lease's own channels from 0. Raises BadTransfer, Closed or RingFull
        with nothing posted.
        """
        return self._move(Direction.H2C, source, address, offset, nbytes, channel)

    def from_card(
        self,
        into: Buffer | Pin,
        address: int = 0,
        *,
        offset: int = 0,
        nbytes: int | None = None,
        channel: int = 0,
        **options: Any,
    ) -> Transfer:
        """Copy ``nbytes`` from card address ``address`` to ``offset`` of a buffer."""
        if not getattr(into, "writable", True):
            raise BadTransfer(
                "read-only memory cannot be the destination",
                operation="from_card",
                target=self._target(),
                hint="pin a writable array",
            )
        return self._move(Direction.C2H, into, address, offset, nbytes, channel)

    def _move(
        self,
        direction: Direction,
        memory: Buffer | Pin,
        address: int,
        offset: int,
        nbytes: int | None,
        channel: int,
    ) -> Transfer:
        batch = self.prepare(direction, memory, address, offset=offset, nbytes=nbytes)
        return self.queue(direction, channel).post(batch, [memory])

    def prepare(
        self,
        direction: Direction,
        memory: Buffer | Pin,
        address: int,
        *,
        offset: int = 0,
        nbytes: int | None = None,
    ) -> Batch:
        """Build the descriptors of a transfer once, to post them many times."""
        count = memory.nbytes - offset if nbytes is None else nbytes
        if count <= 0 or offset < 0 or offset + count > memory.nbytes:
            raise BadTransfer(
                f"{count} bytes at {offset} of a buffer of {memory.nbytes} bytes",
                operation=direction.name,
                target=self._target(),
                hint="ask for at least one byte inside the buffer",
            )
        if not 0 <= address < 1 << 64:
            raise BadTransfer(
                f"card address {address:#x}", operation=direction.name, target=self._target()
            )
        return Batch.build(direction, memory.sg.slice(offset, count), address)

    def queue(self, direction: Direction, channel: int = 0) -> XdmaQueue:
        """The queue of one of the lease's channels."""
        found = self._queues.get((channel, direction))
        if self.device.closed:
            raise Closed("the device is closed", operation=direction.name, target=self._target())
        if found is None:
            raise BadTransfer(
                f"channel {channel} is not one of this lease's {len(self._queues) // 2}",
                operation=direction.name,
                target=self._target(),
                hint="open with channels=N, or access='exclusive'",
            )
        return found

    def stream(
        self,
        *,
        rate: int,
        block_bytes: int = 64 << 10,
        blocks: int = 16,
        pattern: str = "counter",
        channel: int = 0,
    ) -> Stream:
        """Start the digitiser behind a C2H channel; see :class:`~.xdma_stream.Stream`."""
        from holdfast.drivers.xdma_stream import Stream

        return Stream(self.queue(Direction.C2H, channel), rate, block_bytes, blocks, pattern)

    def close(self) -> None:
        """Let the rings go, so that their memory is unmapped before the lease ends."""
        self._queues.clear()

    def regranted(self) -> None:
        for queue in self._queues.values():
            queue.restart()
