# SPDX-License-Identifier: Apache-2.0
"""Lease messages between a client and its keeper: versioned, typed, sans-IO.

One connection is one lease. A message is one packet of a ``SOCK_SEQPACKET`` Unix socket,
MessagePack with a type tag, at most :data:`MAX_PACKET` bytes; descriptors ride with the packet they
belong to. The client asks, the keeper answers with the same ``seq``; notices (``seq`` 0) may come
at any time.
The first message must be :class:`Hello`, whose layout never changes, so that a keeper of any
version can refuse a client of any other with a clear error.

Unknown tags, missing or surplus fields, wrong types and values out of range are a
:class:`~holdfast.errors.ProtocolError`: the keeper closes the connection, which is a hang-up like
any other and starts the death protocol.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import msgspec

from holdfast.errors import ProtocolError
from holdfast.values import Access

VERSION = 3
MAX_PACKET = 64 * 1024
MAX_FDS = 128
MAX_REGISTER_BLOCK = 4096
"""Most bytes that one RegionRead or RegionWrite moves."""

PS_PAGE = 24
"""Most leases in one answer to Ps."""
PS_BYTES = 48 * 1024
"""Most bytes that they take in it."""

U16 = Annotated[int, msgspec.Meta(ge=0, le=0xFFFF)]
U32 = Annotated[int, msgspec.Meta(ge=0, le=0xFFFF_FFFF)]
U63 = Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)]
Name = Annotated[str, msgspec.Meta(max_length=128)]


Token = Annotated[str, msgspec.Meta(max_length=64)]


class Message(msgspec.Struct, tag=True, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Base of all messages; ``seq`` pairs a reply with its request."""

    seq: U32 = 0


# -- client to keeper ------------------------------------------------------------


class Hello(Message, frozen=True, forbid_unknown_fields=False):
    """First message. Descriptors: optionally one, the client's own pidfd."""

    version: U16
    client: Name = ""
    lifeline: U63 = 0
    """Inode of the client's end of this socket: for showing who holds it, never trusted."""
    run: Token = ""
    """Token of the ``holdfast run`` that the client is a part of."""


class Open(Message, frozen=True):
    """Ask for the lease. ``channels`` None lets the driver choose; 0 asks for memory only."""

    access: Access | None = None
    channels: Annotated[int, msgspec.Meta(ge=0, le=64)] | None = None


class TakeSlab(Message, frozen=True):
    """Ask for DMA memory of at least ``nbytes`` bytes."""

    nbytes: U63


class GiveSlab(Message, frozen=True):
    """Give a slab back; the keeper lets it go once nothing in flight can reach it."""

    slab: U63


class Pin(Message, frozen=True):
    """Let the function reach the client's own memory. Descriptor: /proc/self/mem, at first.

    Answered with :class:`Pinned`, or with :class:`PinHere` where the client itself asks the kernel.
    """

    address: U63
    nbytes: U63
    writable: bool


class PinDone(Message, frozen=True):
    """The client has mapped what :class:`PinHere` reserved. Not answered."""

    pin: U63


class Unpin(Message, frozen=True):
    pin: U63


class RegionRead(Message, frozen=True):
    index: Annotated[int, msgspec.Meta(ge=0, le=63)]
    offset: U63
    count: Annotated[int, msgspec.Meta(ge=1, le=MAX_REGISTER_BLOCK)]


class RegionWrite(Message, frozen=True):
    index: Annotated[int, msgspec.Meta(ge=0, le=63)]
    offset: U63
    data: Annotated[bytes, msgspec.Meta(min_length=1, max_length=MAX_REGISTER_BLOCK)]


class Unmask(Message, frozen=True):
    """Let the level-triggered interrupt (INTx) be raised again; it masks itself."""


class Command(Message, frozen=True):
    """Call a command of the driver's keeper half."""

    name: Name
    args: dict[Name, Any] = {}


class Regrant(Message, frozen=True):
    """Stop the lease's channels and start them anew, with fresh doorbells."""


class Reset(Message, frozen=True):
    """Function-level reset; announced to every other lease."""


class Ps(Message, frozen=True):
    """Ask for leases numbered above ``after``, living or ended, at most ``PS_PAGE``.

    Allowed without a lease.
    """

    after: U63 = 0
    run: Token = ""
    """If given: only leases of this ``holdfast run``."""


class Retry(Message, frozen=True):
    """Look at a quarantined lease now. For the keeper's own user; allowed without a lease.

    With ``force`` also by a function-level step that other leases would lose transfers by.
    Answered with :class:`Result`: the lease's state, and the last line of its log.
    """

    lease: U63
    force: bool = False


class Close(Message, frozen=True):
    """Orderly end; the connection hangs up after the reply."""


Request = (
    Hello
    | Open
    | TakeSlab
    | GiveSlab
    | Pin
    | PinDone
    | Unpin
    | RegionRead
    | RegionWrite
    | Unmask
    | Command
    | Regrant
    | Reset
    | Ps
    | Retry
    | Close
)

# -- keeper to client ------------------------------------------------------------


class Welcome(Message, frozen=True):
    version: U16
    target: str
    keeper: U32
    driver: str
    policy: str


class RegionInfo(msgspec.Struct, frozen=True, kw_only=True):
    """``fd`` is the position of the region's descriptor in this message, or None."""

    index: int
    size: U63
    readable: bool
    writable: bool
    areas: list[tuple[U63, U63]]
    file_offset: U63
    fd: int | None = None


class IrqVector(msgspec.Struct, frozen=True, kw_only=True):
    """An interrupt vector granted to this lease, and the position of its eventfd."""

    vector: int
    fd: int
    level: bool = False
    """It masks itself when raised (INTx) and waits for :class:`Unmask`."""


class BellInfo(msgspec.Struct, frozen=True, kw_only=True):
    """A doorbell granted to this lease, and the position of its eventfd."""

    region: int
    offset: U63
    size: int
    value: int | None
    fd: int


class SlabInfo(msgspec.Struct, frozen=True, kw_only=True):
    """A slab: ``extents`` of the file in order, mapped behind each other from ``iovas``."""

    slab: U63
    size: U63
    extents: list[tuple[U63, U63]]
    iovas: list[int]
    fd: int


class RingInfo(msgspec.Struct, frozen=True, kw_only=True):
    """How a mediated lease posts: positions of its rings (:mod:`holdfast.wire.rings`), of the
    eventfd that it rings, and of the pipe's end that becomes readable when requests have ended; and
    what requests must keep to."""

    fd: int
    submit: int
    done: int
    card: tuple[U63, U63]
    """First card address, and the one behind the last."""
    align: Annotated[int, msgspec.Meta(ge=1, le=4096)]


class Opened(Message, frozen=True):
    lease: U63
    access: Access
    channels: list[int]
    regions: list[RegionInfo]
    vectors: list[IrqVector]
    bells: list[BellInfo]
    control: SlabInfo | None
    grant: dict[str, Any]
    quota: U63
    watch: bool = False
    """The system may want the function back: be ready to let go at any time."""
    rings: RingInfo | None = None
    """Mediated access only."""


class SlabTaken(Message, frozen=True):
    info: SlabInfo


class Pinned(Message, frozen=True):
    pin: U63
    iova: int


class PinHere(Message, frozen=True):
    """Room for a pin is reserved and written down: map ``size`` bytes at ``iova``, then confirm.

    Whole pages around what was asked for. Descriptor: the I/O address space, of this ``kind``.
    """

    pin: U63
    iova: int
    size: U63
    kind: str
    ioas: U32


class Data(Message, frozen=True):
    data: bytes


class Result(Message, frozen=True):
    value: Any = None


class Regranted(Message, frozen=True):
    bells: list[BellInfo]
    grant: dict[str, Any]


class Done(Message, frozen=True):
    """The request was carried out."""


class Failed(Message, frozen=True):
    """The request had no effect; see :func:`holdfast.errors.from_fields`."""

    error: dict[str, str | int | None]


class Notice(Message, frozen=True):
    """Something happened to the function that this lease should know of.

    ``what``: "reset" or "isolated" (what was in flight is lost), "gone" (the function went away),
    "leave" (the system wants the function back: unmap, close, say goodbye), "successor" (the keeper
    was killed and another one goes on: send what was not answered again, with the same ``seq``).
    """

    what: str
    text: str


Reply = (
    Welcome
    | Opened
    | SlabTaken
    | Pinned
    | PinHere
    | Data
    | Result
    | Regranted
    | Done
    | Failed
    | Notice
)

_encoder = msgspec.msgpack.Encoder()
_requests: msgspec.msgpack.Decoder[Request] = msgspec.msgpack.Decoder(Request)
_replies: msgspec.msgpack.Decoder[Reply] = msgspec.msgpack.Decoder(Reply)


def encode(message: Message) -> bytes:
    """One packet. Raises :class:`ProtocolError` if it would not fit."""
    packet = _encoder.encode(message)
    if len(packet) > MAX_PACKET:
        raise ProtocolError(
            f"a {type(message).__name__} of {len(packet)} bytes is over {MAX_PACKET}",
            operation="encode lease message",
        )
    return packet


def page_of(told: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """As many of these as fit one answer to Ps, from the first on; at least one of them."""
    page: list[dict[str, Any]] = []
    size = 0
    for each in told[:PS_PAGE]:
        size += len(_encoder.encode(each))
        if page and size > PS_BYTES:
            break
        page.append(each)
    return page


def decode_request(packet: bytes) -> Request:
    """Parse what a client sent; raises :class:`ProtocolError`."""
    try:
        return _requests.decode(packet)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise ProtocolError(str(error), operation="decode lease request") from error


def decode_reply(packet: bytes) -> Reply:
    """Parse what the keeper sent; raises :class:`ProtocolError`."""
    try:
        return _replies.decode(packet)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise ProtocolError(
            str(error), operation="decode keeper reply", hint="stop the keeper and start it anew"
        ) from error
