# SPDX-License-Identifier: Apache-2.0
"""What the processes of a torture campaign do: a client's whole life, a survivor, a victim.

The *client* passes every step there is: it opens, allocates twice, pins, keeps transfers in flight,
waits, looks at its own data, takes the pin away, frees, trims and closes. Somewhere on the way it
dies, or its keeper does; who is left alive must come to the end without an exception.

The *survivor* has a channel of its own, is never killed, and sends random bytes to the card and
back through everything that happens to the others. The *victim* has memory only. It takes some
right after a death, looks whether it is empty, fills it, and later looks whether anything else is
in it. It lives as long as its lane, so keepers and anchors die under it as well.

All of them speak in lines of JSON over pipes.
"""

from __future__ import annotations

import json
import os
import select
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

import holdfast
from holdfast import steps
from holdfast.device import Device
from holdfast.drivers.edu import EduEngine
from holdfast.drivers.xdma_engine import XdmaEngine
from holdfast.errors import DeviceReset, UsageError
from holdfast.regs import edu
from holdfast.regs.xdma import Direction
from holdfast.torture.actors import FOREIGN, OPEN_TIMEOUT

Body = Callable[[int, int], None]

NBYTES = 128 << 10
"""Bytes of one XDMA transfer."""
DEPTH = 3
ROUNDS = 3
"""Transfers in flight, and how many more are posted as they finish."""
SECOND = 512 << 10
"""Bytes of a second buffer: it needs a slab of its own."""
PINNED = 32 << 10
EDU_NBYTES = edu.BUFFER_SIZE - 64
VICTIM = 768 << 10
"""Bytes that a victim takes: a client's rings and its first slab are of about this size."""
SURVIVOR = 16 << 10
SURVIVOR_AT = 768 << 10
"""Card address of the survivor's transfers; the clients read from address 0."""
FILLED = SURVIVOR_AT + SURVIVOR
SURVIVOR_PAUSE = 0.03
"""Seconds between two rounds of a survivor: it is there to notice, not to load the card."""


@dataclass(frozen=True, slots=True)
class Life:
    """What a client needs to know of its life."""

    target: str
    driver: str
    access: str
    slots: tuple[int, ...] = ()
    """Slots of the board that mean this client."""
    patience: float = OPEN_TIMEOUT
    """Seconds that it waits for a transfer."""

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Life:
        fields = json.loads(text)
        return cls(**{**fields, "slots": tuple(fields["slots"])})


def say(writing: int, **told: Any) -> None:
    """Send one line. A reader that is gone does not matter."""
    try:
        os.write(writing, json.dumps(told).encode() + b"\n")
    except BrokenPipeError:
        pass


def hear(reading: int, timeout: float) -> dict[str, Any] | None:
    """Receive one line; None if the other end ended. Raises TimeoutError."""
    line = b""
    deadline = time.monotonic() + timeout
    while not line.endswith(b"\n"):
        if not select.select([reading], [], [], max(0.0, deadline - time.monotonic()))[0]:
            raise TimeoutError("nothing was said in time")
        piece = os.read(reading, 4096)
        if not piece:
            return None
        line += piece
    told = json.loads(line.splitlines()[0])  # whoever ends at once may have said more
    return told if isinstance(told, dict) else None


# -- the client ------------------------------------------------------------


def client(life: Life) -> Body:
    """A client in a fork."""

    def body(_: int, writing: int) -> None:
        _live(life, writing)

    return body


def fresh_client(life: Life) -> Body:
    """A client that is a new interpreter: the fork that runs this becomes one."""

    def body(_: int, writing: int) -> None:
        os.set_inheritable(writing, True)
        command = [sys.executable, "-m", "holdfast.torture.scripts", life.to_json(), str(writing)]
        os.execv(sys.executable, command)  # noqa: S606 - our own interpreter

    return body


def _live(life: Life, writing: int) -> None:
    """Live; say what went wrong, if anything did."""
    board = steps.board
    try:
        if board is not None:
            board.enlist(life.slots)
        card = holdfast.open(
            life.target,
            access=life.access,
            timeout=OPEN_TIMEOUT,
            channels=1 if life.access == "shared" and life.driver == "xdma" else None,
        )

        def wake() -> None:
            if board is not None:
                board.wake(life.slots)

        (_live_xdma if life.driver == "xdma" else _live_edu)(card, life, wake)
        card.close()
    except Exception as error:
        say(writing, error=f"{type(error).__name__}: {error}"[:2000])
        raise


def _live_xdma(card: Device, life: Life, wake: Callable[[], None]) -> None:
    engine = card.dma
    if not isinstance(engine, XdmaEngine):
        raise UsageError(f"its driver is {card.driver!r}", operation="torture", target=life.target)
    buffer, second = card.alloc(NBYTES), card.alloc(SECOND)
    buffer.array[:] = 0
    second.array[:] = mark = os.getpid() % 0x7F + 1  # 1..127: never FOREIGN, never zero
    own = np.zeros(PINNED, np.uint8)
    pin = card.pin(own)
    queue = engine.queue(Direction.C2H)
    batch = engine.prepare(Direction.C2H, buffer, 0)
    running = [queue.post(batch, [buffer]) for _ in range(DEPTH)]
    wake()
    for _ in range(ROUNDS):
        running.pop(0).wait(life.patience)
        running.append(queue.post(batch, [buffer]))
    running.append(engine.from_card(pin, 0))
    while running:
        running.pop(0).wait(life.patience)
    _check(buffer.array, own)
    _check(second.array, byte=mark)
    pin.free()
    buffer.free()
    second.free()
    card.trim()


def _live_edu(card: Device, life: Life, wake: Callable[[], None]) -> None:
    engine = card.dma
    if not isinstance(engine, EduEngine):
        raise UsageError(f"its driver is {card.driver!r}", operation="torture", target=life.target)
    buffer = card.alloc(EDU_NBYTES, align=4096)
    second = card.alloc(SECOND)
    buffer.array[:] = 0
    second.array[:] = mark = os.getpid() % 0x7F + 1
    own = np.zeros(1 << 12, np.uint8)
    pin = card.pin(own[:512])
    wake()
    engine.from_card(buffer).wait(life.patience)
    engine.from_card(pin).wait(life.patience)
    _check(buffer.array, own[:512])
    _check(second.array, byte=mark)
    pin.free()
    buffer.free()
    second.free()
    card.trim()


def _check(*pieces: npt.NDArray[np.uint8], byte: int = FOREIGN) -> None:
    """A living client's own data, through whatever happened to its keeper."""
    wrong = sum(int(np.count_nonzero(piece != byte)) for piece in pieces)
    if wrong:
        raise ValueError(f"{wrong} bytes of the client's own data are wrong")


# -- the survivor ------------------------------------------------------------


def survivor(target: str, *, tolerant: bool) -> Body:
    """Random bytes to the card and back, until told to stop; then says how it went.

    ``tolerant``: resets are no error, because the function breaks promises.
    """

    def body(reading: int, writing: int) -> None:
        told: dict[str, Any] = {"rounds": 0, "wrong": 0, "resets": 0, "longest_ms": 0.0}
        try:
            with holdfast.open(target, access="shared", channels=1, timeout=OPEN_TIMEOUT) as card:
                say(writing, ready=True)
                _survive(card, reading, told, tolerant)
        except Exception as error:  # noqa: BLE001 - what it was is the finding
            told["error"] = f"{type(error).__name__}: {error}"
        say(writing, **told)

    return body


def _survive(card: Device, reading: int, told: dict[str, Any], tolerant: bool) -> None:
    source, back = card.alloc(SURVIVOR), card.alloc(SURVIVOR)
    chance = np.random.default_rng(os.getpid())
    while not select.select([reading], [], [], SURVIVOR_PAUSE)[0]:
        source.array[:] = chance.integers(0, 256, SURVIVOR, np.uint8)
        begun = time.monotonic()
        try:
            card.dma.to_card(source, SURVIVOR_AT).wait(OPEN_TIMEOUT)
            card.dma.from_card(back, SURVIVOR_AT).wait(OPEN_TIMEOUT)
        except DeviceReset:
            if not tolerant:
                raise
            told["resets"] += 1
            continue
        told["wrong"] += int(np.count_nonzero(source.array != back.array))
        told["rounds"] += 1
        told["longest_ms"] = max(told["longest_ms"], (time.monotonic() - begun) * 1e3)


# -- the victim ------------------------------------------------------------


def victim(target: str) -> Body:
    """Takes memory when told ``g``, judges it when told ``j``, ends with its orders.

    A stack that is gone at the judgement is not its business: the memory it has is what counts.
    """

    def body(reading: int, writing: int) -> None:
        try:
            own = holdfast.open(target, access="shared", channels=0, timeout=OPEN_TIMEOUT)
            say(writing, ready=True)
            while os.read(reading, 1) == b"g":
                _be_a_victim(own, reading, writing)
        except Exception as error:  # noqa: BLE001 - the lane decides what it means
            say(writing, error=f"{type(error).__name__}: {error}")

    return body


def _be_a_victim(own: Device, reading: int, writing: int) -> None:
    buffer = own.alloc(VICTIM)
    residue = int(np.count_nonzero(buffer.array))
    pattern = np.uint8(os.getpid() % 0x7F + 1)  # 1..127: never FOREIGN, never zero
    buffer.array[:] = pattern
    say(writing, filled=True)
    if os.read(reading, 1) != b"j":
        return
    zeroed = int(np.count_nonzero(buffer.array == 0))
    foreign = int(np.count_nonzero(buffer.array != pattern)) - zeroed
    say(writing, iova=int(buffer.iova), foreign=foreign, zeroed=zeroed, residue=residue)
    buffer.free()
    del buffer
    own.trim()


def fill_card(target: str, driver: str) -> None:
    """Fill what the clients read of the card with :data:`~holdfast.torture.actors.FOREIGN`."""
    shared = driver == "xdma"
    access = "shared" if shared else "exclusive"
    with holdfast.open(target, access=access, timeout=OPEN_TIMEOUT) as card:
        source = card.alloc(FILLED if shared else EDU_NBYTES, align=4096)
        source.array[:] = FOREIGN
        card.dma.to_card(source, 0).wait(OPEN_TIMEOUT)


def main(arguments: Sequence[str]) -> None:
    """A fresh client: its life, and the descriptor to report on."""
    _live(Life.from_json(arguments[0]), int(arguments[1]))


if __name__ == "__main__":
    main(sys.argv[1:])
