# SPDX-License-Identifier: Apache-2.0
"""The VERSION message and the capabilities in its JSON.

Each side states its *own* abilities and limits; the other side obeys them. Nothing is negotiated
but the minor version and the twin socket (vfio-user specification, "Version Data Format").
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import msgspec

from holdfast.uapi import vfio_user as u
from holdfast.wire.vfio_user.frame import MAX_DATA, MalformedError, Part

MAX_JSON = 16 * 1024
"""Longest VERSION text accepted. Known peers send about 200 bytes."""

_Count = Annotated[int, msgspec.Meta(ge=0, le=1 << 31)]
_Size = Annotated[int, msgspec.Meta(ge=1, le=1 << 40)]
_Pages = Annotated[int, msgspec.Meta(ge=1)]


class _Twin(msgspec.Struct, omit_defaults=True):
    supported: bool = False
    fd_index: _Count | None = None


class _Names(msgspec.Struct, omit_defaults=True):
    max_msg_fds: _Count = u.DEFAULT_MAX_MSG_FDS
    max_data_xfer_size: _Size = u.DEFAULT_MAX_DATA_XFER
    max_dma_maps: _Size = u.DEFAULT_MAX_DMA_MAPS
    pgsizes: _Pages = u.DEFAULT_PGSIZES
    twin_socket: _Twin | None = None
    write_multiple: bool = False
    migration: dict[str, Any] | None = None  # read for its type only; Holdfast cannot migrate


class _Document(msgspec.Struct):
    capabilities: _Names = msgspec.field(default_factory=_Names)


_DECODER = msgspec.json.Decoder(_Document)
_ENCODER = msgspec.json.Encoder()


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What one side can do. Absent names count as the specification's defaults.

    ``max_data_xfer_size`` in bytes; ``pgsizes`` is the bitwise OR of usable page sizes in bytes;
    ``twin_fd_index`` is meaningful in a server's answer only.
    """

    max_msg_fds: int = u.DEFAULT_MAX_MSG_FDS
    max_data_xfer_size: int = u.DEFAULT_MAX_DATA_XFER
    max_dma_maps: int = u.DEFAULT_MAX_DMA_MAPS
    pgsizes: int = u.DEFAULT_PGSIZES
    twin_socket: bool = False
    twin_fd_index: int | None = None
    write_multiple: bool = False


CLIENT = Capabilities(max_msg_fds=32, max_data_xfer_size=MAX_DATA, write_multiple=True)
SERVER = Capabilities(max_msg_fds=16, max_data_xfer_size=MAX_DATA, write_multiple=True)
"""Sixteen, because a client in the field refuses a server that states more than it does itself."""


@dataclass(frozen=True, slots=True)
class Version:
    """A VERSION request or reply."""

    major: int
    minor: int
    capabilities: Capabilities

    def encode(self) -> bytes:
        """Payload with the names that differ from their defaults, always with a JSON object.

        Short on purpose: a client in the field takes no reply longer than its own request, and
        another one wants the ``capabilities`` object to be there.
        """
        caps = self.capabilities
        twin = _Twin(True, caps.twin_fd_index) if caps.twin_socket else None
        names = _Names(
            caps.max_msg_fds,
            caps.max_data_xfer_size,
            caps.max_dma_maps,
            caps.pgsizes,
            twin,
            caps.write_multiple,
        )
        text = _ENCODER.encode({"capabilities": names})
        return u.VERSION.pack(self.major, self.minor) + text + b"\0"

    @classmethod
    def decode(cls, payload: Part) -> Version:
        """Read and check a VERSION payload; the JSON may be absent altogether."""
        if len(payload) < u.VERSION.size:
            raise MalformedError("VERSION payload is shorter than 4 bytes")
        major, minor = u.VERSION.unpack_from(payload)
        text = bytes(payload[u.VERSION.size : u.VERSION.size + MAX_JSON + 1])
        if not text:
            return cls(major, minor, Capabilities())
        if len(text) > MAX_JSON:
            raise MalformedError(f"VERSION text is longer than {MAX_JSON} bytes")
        if text[-1:] != b"\0":
            raise MalformedError("VERSION text has no terminating NUL")
        try:
            names = _DECODER.decode(text[:-1]).capabilities
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise MalformedError(f"VERSION text: {error}") from error
        if names.pgsizes >> 64:  # beyond what msgspec can bound, and it may use all 64 bits
            raise MalformedError("pgsizes is not a 64-bit mask")
        twin = names.twin_socket or _Twin()
        return cls(
            major,
            minor,
            Capabilities(
                names.max_msg_fds,
                names.max_data_xfer_size,
                names.max_dma_maps,
                names.pgsizes,
                twin.supported,
                twin.fd_index,
                names.write_multiple,
            ),
        )
