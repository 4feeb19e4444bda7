# SPDX-License-Identifier: Apache-2.0
"""Raw bytes for every decoder that a stranger can reach, and for a keeper that is served meanwhile.

Frames are made from valid ones by damage: most random bytes are refused at the first look, and
nothing behind that look would ever be tried. Everything follows from the seed. A decoder may refuse
a frame by its own kind of error and by no other; sizes that a frame claims must not be allocated.
"""

from __future__ import annotations

import itertools
import os
import random
import resource
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field

import msgspec

from holdfast.errors import HoldfastError, ProtocolError
from holdfast.torture.rude import Rude
from holdfast.uapi.vfio_user import Command
from holdfast.values import Access
from holdfast.wire import lease as wire
from holdfast.wire.vfio_user import client as vfio_client
from holdfast.wire.vfio_user import server as vfio_server
from holdfast.wire.vfio_user.frame import Header, MalformedError

BATCH = 1000
"""Frames between two looks at the memory."""
TRACED = 16
"""Of this many batches of a target one has its allocations watched."""
GROWTH = 16 << 20
"""Bytes that a target may grow by while it is fuzzed."""


class Found(AssertionError):
    """A frame did what no frame may do."""


@dataclass(slots=True)
class Tally:
    """How many frames a target was given, and how many of them it took for good."""

    frames: int = 0
    taken: int = 0
    by_target: dict[str, int] = field(default_factory=dict)

    def count(self, target: str, *, taken: bool) -> None:
        """One more frame."""
        self.frames += 1
        self.taken += taken
        self.by_target[target] = self.by_target.get(target, 0) + 1


EDGES = (0, 1, 2, 3, 4, 7, 8, 15, 16, 31, 32, 63, 64, 127, 128, 255, 256, 4095, 4096, 4097, 65535,
         65536, (1 << 31) - 1, 1 << 31, (1 << 32) - 1, 1 << 32, (1 << 47), (1 << 63) - 1, 1 << 63,
         (1 << 64) - 1)  # fmt: skip
"""Numbers at which something often goes wrong."""


def damaged(frame: bytes, dice: random.Random) -> bytes:
    """A frame with a few bytes changed, cut out, doubled, or replaced by an edge."""
    data = bytearray(frame)
    for _ in range(dice.randrange(4)):
        at = dice.randrange(len(data) + 1)
        match dice.randrange(6):
            case 0:
                del data[at:]
            case 1:
                data[at:at] = data[at : at + dice.randrange(16)]
            case 2:
                width = dice.choice((1, 2, 4, 8))
                edge = dice.choice(EDGES) & ((1 << 8 * width) - 1)
                data[at : at + width] = edge.to_bytes(width, dice.choice(("little", "big")))
            case 3:
                data += dice.randbytes(dice.randrange(32))
            case _:
                if at < len(data):
                    data[at] = dice.randrange(256)
    return bytes(data)


# -- decoders -------------------------------------------------------------------------------------

REQUESTS: tuple[wire.Message, ...] = (
    wire.Hello(version=wire.VERSION, client="fuzz", lifeline=1, run=7),
    wire.Open(access=Access.SHARED, channels=1),
    wire.TakeSlab(nbytes=4096),
    wire.GiveSlab(slab=1),
    wire.Pin(address=4096, nbytes=4096, writable=True),
    wire.PinDone(pin=1),
    wire.Unpin(pin=1),
    wire.RegionRead(index=0, offset=0, count=4),
    wire.RegionWrite(index=0, offset=0, data=b"\0\0\0\0"),
    wire.Unmask(),
    wire.Command(name="channel_status", args={"x": [1, {"y": b"z"}]}),
    wire.Regrant(),
    wire.Ps(after=3, run=1),
)
REPLIES: tuple[wire.Message, ...] = (
    wire.Done(),
    wire.Data(data=b"1234"),
    wire.Result(value={"leases": [1, 2, None]}),
    wire.Failed(error={"kind": "Busy", "what": "x", "errno": 4}),
    wire.Notice(what="reset", text="x"),
    wire.Pinned(pin=1, iova=1 << 32),
)


def _lease(frames: tuple[wire.Message, ...], decode: Callable[[bytes], object], name: str) -> Fuzz:
    seeds = [wire.encode(msgspec.structs.replace(frame, seq=5)) for frame in frames]

    def one(dice: random.Random) -> bool:
        packet = damaged(dice.choice(seeds), dice)
        try:
            decode(packet)
        except ProtocolError:
            return False
        except Exception as error:
            raise Found(f"{name}: {packet!r} raised {type(error).__name__}: {error}") from error
        return True

    return one


Fuzz = Callable[[random.Random], bool]
"""Gives one frame to a target; whether it was taken. Raises :class:`Found`."""


def vfio_frame(dice: random.Random) -> bytes:
    """A vfio-user message with a sound header and a payload of edges; then perhaps damaged."""
    payload = b"".join(
        (dice.choice(EDGES) & ((1 << 8 * width) - 1)).to_bytes(width, "little")
        for width in dice.choices((4, 8), k=dice.randrange(9))
    )
    flags = dice.choice((0, 0, 0, 1, 0x10, 0x20, 0x21, dice.randrange(1 << 8)))
    header = Header(dice.randrange(4), dice.randrange(20), 16 + len(payload), flags,
                    dice.choice((0, 0, 22)))  # fmt: skip
    frame = header.encode() + payload
    return damaged(frame, dice) if dice.random() < 0.3 else frame


class VfioSessions:
    """A server's and a client's session that have negotiated; renewed when one is at its end."""

    def __init__(self) -> None:
        self.renew()

    def renew(self) -> None:
        """Negotiate anew."""
        self.server = vfio_server.ServerSession()
        self.client = vfio_client.ClientSession()
        _, parts = self.client.command(Command.VERSION, [self.client.hello()])
        told = self.server.receive(b"".join(bytes(part) for part in parts))
        if not isinstance(told, vfio_server.Negotiated):
            raise Found(f"a plain VERSION was answered with {told}")
        self.client.accept(b"".join(bytes(part) for part in told.reply)[16:], int(told.twin))

    def to_server(self, dice: random.Random) -> bool:
        """What a hostile client sends."""
        return self._give(
            lambda frame: self.server.receive(frame, dice.randrange(3), twin=dice.random() < 0.1),
            dice,
        )

    def to_client(self, dice: random.Random) -> bool:
        """What a hostile function sends."""
        return self._give(lambda frame: self.client.receive(frame, twin=dice.random() < 0.5), dice)

    def _give(self, take: Callable[[bytes], object], dice: random.Random) -> bool:
        frame = vfio_frame(dice)
        try:
            # As the stream does: a message is taken off by its header, and handed over whole.
            if len(frame) < 16 or Header.decode(frame).size != len(frame):
                return False
            event = take(frame)
        except (ProtocolError, MalformedError):
            self.renew()
            return False
        except Exception as error:
            raise Found(f"{frame.hex()} raised {type(error).__name__}: {error}") from error
        if getattr(event, "fatal", False):
            self.renew()
        return not isinstance(event, vfio_server.Refused | vfio_client.Refused)


def decoders() -> dict[str, Fuzz]:
    """Everything that takes bytes from strangers without a socket."""
    sessions = VfioSessions()
    return {
        "lease requests": _lease(REQUESTS, wire.decode_request, "lease request"),
        "lease replies": _lease(REPLIES, wire.decode_reply, "lease reply"),
        "vfio-user server": sessions.to_server,
        "vfio-user client": sessions.to_client,
    }


def fuzz_decoders(seed: int, frames: int) -> Iterator[Tally]:
    """Give every decoder its share of ``frames``; yields the tally now and then.

    Raises :class:`Found` with the frame that did it, or if a target's memory grows.
    """
    tally, dice = Tally(), random.Random(seed)  # noqa: S311 - it must be repeatable
    targets = list(decoders().items())
    before = _most_resident()
    for batch in itertools.count():
        name, one = targets[batch % len(targets)]
        # Every frame's allocations are watched in some batches only: that takes ten times as long.
        traced = batch // len(targets) % TRACED == 0
        if traced:
            tracemalloc.start()
        try:
            for _ in range(min(BATCH, frames - tally.frames)):
                tally.count(name, taken=one(dice))
            peak = tracemalloc.get_traced_memory()[1] if traced else 0
        finally:
            tracemalloc.stop()
        peak = max(peak, _most_resident() - before)
        if peak > GROWTH:
            raise Found(f"{name}: {peak} bytes more than before, seed {seed}")
        yield tally
        if tally.frames >= frames:
            return


def _most_resident() -> int:
    """The most memory that this process ever had, in bytes (getrusage(2))."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


# -- a keeper -------------------------------------------------------------------------------------


def fuzz_keeper(target: str, seed: int, frames: int) -> Iterator[Tally]:
    """Send damaged requests, some with descriptors, to a keeper that runs; yields after each
    connection. Whether it still serves others, and what it holds, is for the caller to see."""
    tally, dice = Tally(), random.Random(seed)  # noqa: S311 - it must be repeatable
    seeds = [wire.encode(msgspec.structs.replace(frame, seq=5)) for frame in REQUESTS]
    null = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
    try:
        while tally.frames < frames:
            with Rude(target) as client, suppress(OSError, HoldfastError):
                client.sock.settimeout(20)
                if dice.random() < 0.8:
                    client.open(dice.choice((0, 0, 1)))
                for _ in range(dice.randrange(1, 60)):
                    packet = damaged(dice.choice(seeds), dice)
                    if packet:
                        tally.count("keeper", taken=False)
                        reply, _ = client.ask(packet, [null] * dice.choice((0, 0, 0, 1, 3)))
                        tally.taken += reply is not None and not isinstance(reply, wire.Failed)
                        if reply is None:
                            break
            yield tally
    finally:
        os.close(null)
