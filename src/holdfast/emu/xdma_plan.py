# SPDX-License-Identifier: Apache-2.0
"""What one step of an XDMA channel will move: a batch of copies, planned under the lock."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from holdfast.emu.link import Link
from holdfast.emu.port import Bytes, U64s
from holdfast.emu.xdma_channel import Channel, Phase
from holdfast.emu.xdma_stream import cut
from holdfast.regs import xdma as regs
from holdfast.regs.xdma import Control, Direction, Status

STEP_BYTES = 16 << 20
"""A step moves no more, so that a stop is never far away: about 2 ms. Each step costs 0.1 ms, and
up to 0.5 when the copy before drove all that it touches out of the caches. Twice as much at a time
was not measurably faster."""
_FIXED_BYTES = 16 << 10  # with a fixed card address every beat is an access of its own
_NON_INCREMENTING = int(Control.NON_INCREMENTING)
_SHORT, _LONG = 0.0002, 0.05  # bounds of a wait for stream data, seconds


@dataclass(slots=True)
class Batch:
    """Copies between host memory and ``local``, one entry each.

    owner
        Which descriptor of the queue each entry belongs to.
    finished, partial
        If every entry is carried out: descriptors done, and bytes moved of the one after them.
    metadata
        Stream write-back: where each finished descriptor's goes, and what.
    error
        Set instead of entries: the next descriptor cannot be executed at all.
    """

    local: Bytes
    host: U64s
    offsets: U64s
    lengths: U64s
    owner: npt.NDArray[np.intp]
    finished: int
    partial: int
    metadata: tuple[U64s, Bytes] | None = None
    error: int = 0

    def beyond(self) -> npt.NDArray[np.bool_]:
        """Which entries leave the card's memory."""
        size = np.uint64(len(self.local))
        return (self.offsets > size) | (self.lengths > size - np.minimum(self.offsets, size))


def plan_memory(channel: Channel, memory: Bytes, link: Link, limit: int) -> Batch | float:
    """A batch between host and card memory, or the seconds to wait for the link."""
    queue = channel.queue
    fixed = bool(channel.control & _NON_INCREMENTING)
    count = 1 if fixed or channel.phase is Phase.STOPPING else min(len(queue), limit)
    done = np.uint64(queue.done)
    lengths = queue.lengths[:count].copy()
    lengths[:1] -= done
    sums = lengths.cumsum()
    budget, wait = link.grant(min(int(sums[-1]), _FIXED_BYTES if fixed else STEP_BYTES))
    if wait:
        return wait
    finished = int(sums.searchsorted(budget, "right"))
    partial = budget - (int(sums[finished - 1]) if finished else 0) if finished < count else 0
    count = finished + (partial > 0)
    lengths = lengths[:count]
    if partial:
        lengths[-1] = partial
    from_card = channel.direction is Direction.C2H
    host = (queue.destination if from_card else queue.source)[:count].copy()
    card = (queue.source if from_card else queue.destination)[:count].copy()
    host[:1] += done
    if not fixed:  # a fixed card address stays where it is when a descriptor goes on
        card[:1] += done
    owner = lengths.nonzero()[0]
    if len(owner) < count:  # descriptors without data are just done
        host, card, lengths = host[owner], card[owner], lengths[owner]
    if fixed and len(owner):
        host, card, lengths = _beats(host[0], card[0], int(lengths[0]))
        owner = np.zeros(len(host), np.intp)
    return Batch(memory, host, card, lengths, owner, finished, partial)


def _beats(host: np.uint64, card: np.uint64, length: int) -> tuple[U64s, U64s, U64s]:
    """One descriptor as single beats that all go to the same card address."""
    starts = np.arange(0, length, regs.DATA_WIDTH, dtype=np.uint64)
    lengths = np.minimum(np.uint64(regs.DATA_WIDTH), np.uint64(length) - starts)
    return np.full(len(starts), host) + starts, np.full(len(starts), card), lengths


def plan_stream(channel: Channel, link: Link, limit: int) -> Batch | float | None:
    """A batch of stream data, or the seconds to wait, or None to wait for the source's owner.

    Stopping, and the current descriptor cannot be finished with the data there is: abandons it
    without consuming any (None, and the channel is idle).
    """
    source, queue = channel.source, channel.queue
    source.sync(channel.clock())
    stopping = channel.phase is Phase.STOPPING
    count = 1 if stopping else min(len(queue), limit)
    odd = np.flatnonzero(queue.lengths[:count] % np.uint64(regs.DATA_WIDTH))
    if len(odd) and not odd[0]:
        return _invalid()
    room = queue.lengths[: odd[0] if len(odd) else count].astype(np.int64)
    room[0] -= queue.done
    need = int(room[0])
    if source.packet:
        need = min(need, source.packet - source.into_packet % source.packet)
    if stopping and source.available < need:
        channel.stopped()
        return None
    # Half a FIFO is worth moving even if it doesn't fill the descriptor.
    want = need if stopping else min(need, max(source.depth // 2, regs.DATA_WIDTH))
    if source.available < want:
        if not (source.enabled and source.rate):
            return None
        return min(max((want - source.available) / source.rate, _SHORT), _LONG)
    total = need if stopping else min(int(room.sum()), source.available, STEP_BYTES)
    budget, wait = link.grant(total)
    if wait:
        return wait
    return _stream_batch(channel, room, budget)


def _invalid() -> Batch:
    none = np.zeros(0, np.uint64)
    owner = np.zeros(0, np.intp)
    return Batch(
        np.zeros(0, np.uint8), none, none, none, owner, 0, 0, error=int(Status.INVALID_LENGTH)
    )


def _stream_batch(channel: Channel, room: npt.NDArray[np.int64], budget: int) -> Batch:
    source, queue = channel.source, channel.queue
    laid = cut(room, budget, source.packet, source.into_packet)
    finished, partial = len(laid.delivered), laid.partial
    lengths = np.append(laid.delivered, partial) if partial else laid.delivered
    data = source.take(int(lengths.sum()))
    if source.packet:
        source.into_packet = (source.into_packet + len(data)) % source.packet
    offsets = lengths.cumsum() - lengths
    host = queue.destination[: len(lengths)].copy()
    host[:1] += np.uint64(queue.done)
    metadata = None
    if finished and not channel.control & Control.NO_STREAM_WRITEBACK:
        words = np.zeros(finished, regs.METADATA)
        words["status"] = regs.METADATA_MAGIC | laid.eop * regs.METADATA_EOP
        words["length"] = laid.delivered
        words["length"][0] += queue.done
        metadata = queue.source[:finished].copy(), words.view(np.uint8)
    owner = lengths.nonzero()[0]
    return Batch(
        data,
        host[owner],
        offsets[owner].astype(np.uint64),
        lengths[owner].astype(np.uint64),
        owner,
        finished,
        partial,
        metadata,
    )
