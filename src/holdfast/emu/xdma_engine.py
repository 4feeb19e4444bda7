# SPDX-License-Identifier: Apache-2.0
"""The XDMA data mover: one bounded step of one channel at a time.

A step has three parts. *Prepare*, with the lock: is there anything to do, and may it be done?
*Move*, without the lock: fetch descriptors if none are left, and copy a batch of them in one call.
*Publish*, with the lock again: counts, status, interrupt.

The order in which effects become visible is what drivers are built on (PG195, "Poll Mode" and
"Channel Status"; the Linux drivers): data, stream metadata, completed count, write-back, status,
interrupt. Between write-back and status the channel's acknowledge doorbell is drained. A client
that acknowledges and then reads the write-back thus never sleeps through a completion: either its
acknowledge is found here, and the status bit set afterwards is a fresh edge, or it comes later,
and then the write-back that it goes on to read already has the new count.

A batch is bounded (16 MiB, 1024 descriptors), so that a stop is never far away; on a limited link
it is one chunk. Writes to host memory are posted: one that hits nothing is lost without a trace
on the card, and the next one goes on, as on the bus. A refused *read* is answered and logged.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from holdfast.emu.function import Function
from holdfast.emu.link import Link
from holdfast.emu.port import Bytes, DmaPort, U64s
from holdfast.emu.xdma_channel import Channel, Late, Phase
from holdfast.emu.xdma_fetch import DEPTH
from holdfast.emu.xdma_plan import Batch, plan_memory, plan_stream
from holdfast.errors import DmaFault
from holdfast.regs import xdma as regs
from holdfast.regs.xdma import Control, Desc, Direction, Status

WILD_BYTE = 0xA5
"""What a card gone wild writes."""
_WILD_BYTES = 4096
_WILD_PERIOD = 0.001
# Plain integers: an IntFlag costs a microsecond per operation, and more beside an array.
_STOP, _COMPLETED = int(Desc.STOP), int(Desc.COMPLETED)
_DESCRIPTOR_STOPPED = int(Status.DESCRIPTOR_STOPPED)
_DESCRIPTOR_COMPLETED = int(Status.DESCRIPTOR_COMPLETED)
_POLL_WRITEBACK = int(Control.POLL_WRITEBACK)

LATE_SECONDS = 0.02
"""How long after its completion a piece lands (fault ``early_completion``)."""


class Engine:
    """Moves the data of all channels, taking turns. :meth:`work` is for the engine thread only.

    ``drain(channel)`` takes the count of a channel's acknowledge doorbell.
    """

    def __init__(
        self,
        function: Function,
        channels: Sequence[Channel],
        memory: Bytes,
        link: Link,
        drain: Callable[[Channel], int],
    ) -> None:
        self._function = function
        self._channels = channels
        self._memory = memory
        self._link = link
        self._drain = drain
        self._turn = 0
        self._settled = threading.Condition(function.lock)

    def work(self) -> float | None:
        """One step of the first channel, in turn, that has something to do."""
        waits = []
        for _ in self._channels:
            channel = self._channels[self._turn]
            self._turn = (self._turn + 1) % len(self._channels)
            if channel.at_rest:
                continue  # whoever starts it wakes the engine after that
            wait = self._service(channel)
            if wait == 0:
                return 0
            if wait is not None:
                waits.append(wait)
        return min(waits) if waits else None

    def settle(self, seconds: float) -> bool:
        """Wait until no step is under way. Lock held (and released while waiting)."""
        return self._settled.wait_for(
            lambda: not any(channel.in_step for channel in self._channels), seconds
        )

    # -- prepare ---------------------------------------------------------------------------------

    def _service(self, channel: Channel) -> float | None:
        """0: a step was done; more: seconds to wait; None: nothing to do until somebody writes."""
        with self._function.lock:
            wait = self._prepare(channel)
            if wait is None or wait > 0:
                return wait
            try:
                dma = self._function.dma
            except DmaFault:
                return None  # bus master off or nobody there: stalls until that changes
            channel.in_step = True
            epoch, late = channel.epoch, channel.late
            wild = late is None and channel.phase is Phase.IDLE
        try:
            if late is not None:
                return self._land(channel, dma, epoch, late)
            return self._write_wild(channel, dma) if wild else self._step(channel, dma, epoch)
        finally:
            with self._function.lock:
                channel.in_step = False
                self._settled.notify_all()

    def _prepare(self, channel: Channel) -> float | None:
        now = channel.clock()
        if channel.late is not None:
            return max(0.0, channel.late.at - now)
        if channel.phase is Phase.IDLE:
            return max(0.0, channel.ready_at - now) if channel.wild else None
        if self._function.faulty("hang", self._function.transfers + 1):
            return None
        if channel.phase is Phase.STOPPING and not channel.queue.done:
            channel.stopped()
            return self._prepare(channel)
        if not len(channel.queue):
            if not channel.fetchable:
                channel.starved = True
                return None
            if channel.starved:
                channel.starved = False
                channel.ready_at = now + self._link.latency
            return max(0.0, channel.ready_at - now)
        return 0

    # -- move ------------------------------------------------------------------------------------

    def _step(self, channel: Channel, dma: DmaPort, epoch: int) -> float | None:
        if not len(channel.queue) and not self._fetch(channel, dma, epoch):
            return 0
        with self._function.lock:
            if channel.epoch != epoch:
                return 0
            limit = self._before_hang()
            if channel.stream:
                batch = plan_stream(channel, self._link, limit)
            else:
                batch = plan_memory(channel, self._memory, self._link, limit)
            if not isinstance(batch, Batch):
                return batch
            late = self._hold_back(channel, batch)
            reached = self._function.transfers + max(1, batch.finished)
        if self._function.faulty("unplug", reached):
            self._carry(channel, dma, batch, (len(batch.host) + 1) // 2)
            self._function.unplug()
        finished, error = self._carry(channel, dma, batch, len(batch.host) - (late is not None))
        self._publish(channel, dma, epoch, batch, finished, error, late)
        return 0

    def _before_hang(self) -> int:
        """How many descriptors go through before the first one that hangs. Lock held."""
        hang, done = self._function.faults.hang, self._function.transfers
        if hang is None or (hang.last is not None and done >= hang.last):
            return sys.maxsize
        return max(0, hang.first - 1 - done)

    def _fetch(self, channel: Channel, dma: DmaPort, epoch: int) -> bool:
        """Refill the queue. False: there is nothing to move in this step."""
        budget = min(channel.credits, DEPTH) if channel.credit_mode else DEPTH
        fetched = channel.fetcher.fetch(dma, budget)
        with self._function.lock:
            if channel.epoch != epoch:
                return False
            channel.credits = max(0, channel.credits - len(fetched))
            if channel.phase is Phase.STOPPING:
                channel.in_step = False
                channel.stopped()  # before the next descriptor began
                return False
            if len(fetched):
                channel.queue.fill(fetched)
                # A batch keeps the kind it was fetched as, whatever becomes of the source.
                channel.stream = channel.source.enabled
                return True
        if channel.fetcher.error:
            self._finish(channel, dma, epoch, 0, channel.fetcher.error, None)
        return False

    def _hold_back(self, channel: Channel, batch: Batch) -> Late | None:
        """With ``early_completion``: the last copy of a batch that completes, to be done later."""
        function = self._function
        number = function.transfers + batch.finished
        if not (len(batch.host) and function.faulty("early_completion", number)):
            return None
        if not (channel.queue.control[: batch.finished] & _COMPLETED).any():
            return None
        iova, offset = int(batch.host[-1]), int(batch.offsets[-1])
        piece = batch.local[offset : offset + int(batch.lengths[-1])]
        to_host = channel.direction is Direction.C2H
        if to_host:
            piece = piece.copy()  # left the card by now, and is under way

        def move(dma: DmaPort) -> None:
            try:
                if to_host:
                    dma.write(iova, piece)
                else:
                    dma.read(iova, piece)
            except DmaFault:
                return  # completed long ago: there is nobody to tell

        return Late(channel.clock() + LATE_SECONDS, move)

    def _land(self, channel: Channel, dma: DmaPort, epoch: int, late: Late) -> float:
        late.move(dma)
        with self._function.lock:
            if channel.epoch == epoch:
                channel.late = None
        return 0

    def _carry(
        self, channel: Channel, dma: DmaPort, batch: Batch, count: int
    ) -> tuple[int | None, int]:
        """Do the first ``count`` copies: the descriptor it stopped at (None: none), and errors."""
        if batch.error:
            return 0, batch.error
        to_host = channel.direction is Direction.C2H
        copy = dma.write_many if to_host else dma.read_many
        bad = batch.beyond()[:count].nonzero()[0]
        error = 0
        at = 0
        while at < count:
            beyond = bad.searchsorted(at)
            end = int(bad[beyond]) if beyond < len(bad) else count
            if at < end:
                part = slice(at, end)
                at += copy(batch.host[part], batch.local, batch.offsets[part], batch.lengths[part])
                if at == end:
                    continue
                if to_host:  # a posted write that hit nothing: nobody answers
                    at += 1
                    continue
                found = int(Status.READ_UNSUPPORTED_REQUEST)
            else:
                found = int(Status.READ_DECODE_ERROR if to_host else Status.WRITE_DECODE_ERROR)
            error |= found
            if channel.stops_on(found):
                return int(batch.owner[at]), error
            at += 1
        if batch.metadata is not None:
            self._write_metadata(dma, *batch.metadata)
        return None, error

    def _write_metadata(self, dma: DmaPort, iovas: U64s, words: Bytes) -> None:
        size = regs.METADATA.itemsize
        offsets = np.arange(0, len(words), size, dtype=np.uint64)
        lengths = np.full(len(iovas), size, np.uint64)
        at = 0
        while at < len(iovas):
            # One beyond each refused write, which is lost like any posted write.
            at += dma.write_many(iovas[at:], words, offsets[at:], lengths[at:]) + 1

    def _write_wild(self, channel: Channel, dma: DmaPort) -> float:
        destination = channel.last_destination
        if destination is not None:
            iova, length = destination
            try:
                dma.write(iova, np.full(min(length, _WILD_BYTES), WILD_BYTE, np.uint8))
            except DmaFault:
                pass  # posted
        channel.ready_at = channel.clock() + _WILD_PERIOD
        return _WILD_PERIOD

    # -- publish ---------------------------------------------------------------------------------

    def _publish(
        self,
        channel: Channel,
        dma: DmaPort,
        epoch: int,
        batch: Batch,
        stopped_at: int | None,
        error: int,
        late: Late | None,
    ) -> None:
        finished = batch.finished if stopped_at is None else stopped_at
        with self._function.lock:
            if channel.epoch != epoch:
                return
            if len(batch.host) and channel.direction is Direction.C2H:
                channel.last_destination = int(batch.host[-1]), int(batch.lengths[-1])
            channel.late = late if stopped_at is None else None
            channel.perf.beats += -(-int(batch.lengths.sum()) // regs.DATA_WIDTH)
        self._finish(channel, dma, epoch, finished, error, batch if stopped_at is None else None)

    def _finish(
        self,
        channel: Channel,
        dma: DmaPort,
        epoch: int,
        finished: int,
        error: int,
        whole: Batch | None,
    ) -> None:
        """Account for ``finished`` descriptors and an error. ``whole``: the batch went through."""
        stop = whole is None
        with self._function.lock:
            if channel.epoch != epoch:
                return
            queue = channel.queue
            control = queue.control[:finished]
            marked = (control & _COMPLETED).nonzero()[0]
            ended = bool(finished) and bool(control[-1] & _STOP)
            before = channel.count
            self._function.transfers += finished
            if not channel.restart:
                channel.count = (before + finished) & 0xFFFFFFFF
            queue.drop(finished)
            queue.done += whole.partial if whole is not None else 0
            if not stop and not ended and not len(queue) and channel.fetcher.error:
                error |= channel.fetcher.error
                stop = True
            word = self._writeback_word(channel, error, before, marked)
        if word is not None:
            try:
                dma.write(channel.writeback, np.array([word], "<u4").view(np.uint8))
            except DmaFault:
                pass  # posted
        with self._function.lock:
            if channel.epoch != epoch:
                return
            channel.in_step = False  # busy must read 0 when the interrupt arrives
            channel.ring_acknowledge(self._drain(channel))
            bits = error
            if len(marked):
                bits |= _DESCRIPTOR_COMPLETED
            if ended:
                bits |= _DESCRIPTOR_STOPPED
            if stop or ended:
                channel.go_idle(bits)
                return
            channel.log(bits)
            if channel.phase is Phase.STOPPING and not queue.done:
                channel.stopped()

    @staticmethod
    def _writeback_word(
        channel: Channel, error: int, before: int, marked: npt.NDArray[np.intp]
    ) -> int | None:
        """The poll-mode dword: at each Completed descriptor, and at an error."""
        error &= channel.control  # what is not logged is not an error to software
        if not channel.control & _POLL_WRITEBACK or not (len(marked) or error):
            return None
        # All descriptors count, up to the last one that is marked; after an error, all there are.
        count = channel.count if error else before + int(marked[-1]) + 1
        failed = (channel.status | error) & regs.STATUS_ERRORS
        return count & regs.Writeback.COUNT | (regs.Writeback.ERROR if failed else 0)
