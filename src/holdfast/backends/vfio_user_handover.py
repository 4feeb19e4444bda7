# SPDX-License-Identifier: Apache-2.0
"""What a successor of a vfio-user client gets, and how it starts with it.

The connection goes on: the server notices nothing. Replies to the predecessor's requests may still
come; the successor's ids start behind the predecessor's last one, so they are dropped. The server's
own commands are still in the socket, as far as they were not answered (``vfio_user_trail``).
"""

from __future__ import annotations

import socket
from collections.abc import Iterable
from dataclasses import asdict
from typing import Final

from holdfast.backends.vfio_user_link import ClientLink
from holdfast.backends.vfio_user_memory import Served, ServedMemory, of_file
from holdfast.backends.vfio_user_trail import Trail
from holdfast.contracts import FileWindow, Handover, MemoryWindow
from holdfast.errors import UsageError
from holdfast.kernel.handover import Incoming
from holdfast.wire.vfio_user.capabilities import Capabilities
from holdfast.wire.vfio_user.client import ClientSession

KIND: Final = "vfio-user"
"""What ``notes["backend"]`` of such a handover says."""


def describe(link: ClientLink, peer: Capabilities) -> Handover:
    """What a successor needs; the descriptors stay the link's."""
    return Handover(link.descriptors(), {"backend": KIND, "peer": asdict(peer)})


def take_up(
    handover: Handover,
    memory: ServedMemory,
    memories: Iterable[MemoryWindow],
    files: Iterable[FileWindow],
    target: str,
) -> tuple[ClientSession, ClientLink]:
    """The predecessor's connection, with its windows served from the first moment on.

    Takes ownership of ``handover.fds``, also on error. Descriptors of ``files`` stay the caller's.
    Raises ProtocolError if the handover is not one of a vfio-user connection.
    """
    trail: Trail | None = None
    link: ClientLink | None = None
    with Incoming(handover, target) as found:
        found.require("backend", KIND)
        try:
            peer = Capabilities(**handover.notes["peer"])
        except (KeyError, TypeError) as error:
            raise found.wrong("the peer's capabilities make no sense") from error
        windows = [Served(*window) for window in memories]
        for iova, size, perm, fd, offset in files:
            windows.append(Served(iova, size, perm, of_file(fd, offset, size, perm)))
        _serve(memory, windows, target)
        try:
            trail = Trail(found.take("trail"))
            session = ClientSession(first_id=trail.last_id + 1)
            session.peer = peer
            link = ClientLink(_socket(found), session, memory, target, trail)
            if "twin" in found:
                link.add_twin(found.take("twin"))
        except BaseException:
            if link is not None:
                link.close()
            elif trail is not None:
                trail.close()
            raise
    return session, link


def _serve(memory: ServedMemory, windows: Iterable[Served], target: str) -> None:
    for window in windows:
        try:
            memory.add(window)
        except OSError as error:
            raise UsageError(
                f"window at {window.iova:#x}: {error.strerror}", operation="resume", target=target
            ) from error


def _socket(found: Incoming) -> socket.socket:
    try:
        sock = socket.socket(fileno=found.fd("socket"))
    except OSError as error:
        raise found.wrong("its socket is none") from error
    found.take("socket")
    return sock
