# SPDX-License-Identifier: Apache-2.0
"""The 16-byte header in front of every vfio-user message, and how a whole message is put together.

A message is one header and one payload. The header's size field counts both; nothing else delimits
messages on the stream, so after a bad header there is no way back in step and the connection ends
(vfio-user specification, "Header").
"""

from __future__ import annotations

import errno
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

from holdfast.errors import ProtocolError
from holdfast.uapi import vfio_user as u

Part: TypeAlias = bytes | memoryview
Parts: TypeAlias = list[Part]

HEADER_SIZE = u.HEADER.size
DATA_HEAD = 16
"""Bytes between the header and the data of a region or DMA access."""

MAX_DATA = 128 * 1024
"""Most data bytes that Holdfast puts into, or accepts in, one message.

Bigger messages are legal but unwise: with Linux's default socket buffers (208 KiB, counted with
overhead) more than this may not be queued at once, and then neither "send whole" nor "take whole"
can hold. Both sides advertise this as ``max_data_xfer_size``.
"""

MAX_MESSAGE = HEADER_SIZE + DATA_HEAD + MAX_DATA
"""Most bytes of one incoming message, header included. A longer one ends the connection."""


class MalformedError(ValueError):
    """A payload that its command does not allow: framing is intact, so answer with an error."""

    def __init__(self, what: str, number: int = errno.EINVAL) -> None:
        super().__init__(what)
        self.errno = number


@dataclass(frozen=True, slots=True)
class Header:
    """One message header. ``size`` includes the header itself."""

    msg_id: int
    command: int
    size: int
    flags: int = 0
    error: int = 0

    @property
    def is_reply(self) -> bool:
        return self.flags & u.TYPE_MASK == u.TYPE_REPLY

    @property
    def no_reply(self) -> bool:
        return bool(self.flags & u.NO_REPLY)

    @property
    def failure(self) -> int | None:
        """The errno of an error reply; None for success. An error without a code is EINVAL."""
        if not self.flags & u.ERROR:
            return None
        return self.error or errno.EINVAL

    def encode(self) -> bytes:
        return u.HEADER.pack(self.msg_id, self.command, self.size, self.flags, self.error)

    @classmethod
    def decode(cls, data: Part, limit: int = MAX_MESSAGE) -> Header:
        """Read the first 16 bytes; :class:`ProtocolError` if the header breaks the framing."""
        msg_id, command, size, flags, error = u.HEADER.unpack_from(data)
        if flags & u.TYPE_MASK > u.TYPE_REPLY:
            raise ProtocolError(f"message type {flags & u.TYPE_MASK} does not exist")
        if not HEADER_SIZE <= size <= limit:
            raise ProtocolError(f"message of {size} bytes; 16 to {limit} are allowed")
        return cls(msg_id, command, size, flags, error)


def message(msg_id: int, command: int, payload: Sequence[Part], flags: int = 0) -> Parts:
    """Header and payload as a gather list for one ``sendmsg``."""
    size = HEADER_SIZE + sum(len(part) for part in payload)
    return [Header(msg_id, command, size, flags).encode(), *payload]


def reply(header: Header, payload: Sequence[Part] = ()) -> Parts:
    """A success reply to the command with this header."""
    return message(header.msg_id, header.command, payload, u.TYPE_REPLY)


def error_reply(header: Header, number: int) -> Parts:
    """An error reply: header only (vfio-user specification, "Header", Error flag)."""
    flags = u.TYPE_REPLY | u.ERROR
    return [Header(header.msg_id, header.command, HEADER_SIZE, flags, number).encode()]
