# SPDX-License-Identifier: Apache-2.0
"""The handshake with a new client: who it is, whether it may come in, and in which version."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from holdfast.errors import (
    DeviceGone,
    HoldfastError,
    KeeperUnreachable,
    ProtocolError,
    VersionMismatch,
    to_fields,
)
from holdfast.keeper.connection import Connection
from holdfast.kernel import disposal, pidfd
from holdfast.wire import lease as wire

if TYPE_CHECKING:
    from holdfast.keeper.server import Keeper


async def greet(keeper: Keeper, connection: Connection) -> tuple[pidfd.Peer, wire.Hello] | None:
    """Take the first message. None if the client left or was refused; else the peer's pidfd is the
    caller's."""
    packet, fds = await connection.receive()
    if not packet:
        return None
    try:
        offered = fds.pop(0) if fds else None
        peer = pidfd.identify(connection.sock, offered)
    except HoldfastError as error:
        connection.send(wire.Failed(error=to_fields(error)))
        return None
    finally:
        disposal.discard(fds)
    try:
        hello = wire.decode_request(packet)
    except ProtocolError:
        os.close(peer.pidfd)
        raise
    problem = _refusal(keeper, hello, peer)
    if problem is not None or not isinstance(hello, wire.Hello):
        problem = problem or ProtocolError("say Hello first", operation="greet")
        connection.send(wire.Failed(seq=hello.seq, error=to_fields(problem)))
        os.close(peer.pidfd)
        return None
    connection.send(
        wire.Welcome(
            seq=hello.seq,
            version=wire.VERSION,
            target=str(keeper.host.target),
            keeper=os.getpid(),
            driver=keeper.host.facts.name,
            policy=str(keeper.settings.policy),
        )
    )
    return peer, hello


def _refusal(keeper: Keeper, hello: wire.Request, peer: pidfd.Peer) -> HoldfastError | None:
    target = str(keeper.host.target)
    try:
        keeper.settings.allow.require(peer, target)
    except HoldfastError as error:
        return error
    if isinstance(hello, wire.Hello) and hello.version != wire.VERSION:
        return VersionMismatch(
            f"the client speaks version {hello.version}, the keeper {wire.VERSION}",
            operation="greet",
            target=target,
        )
    if keeper.leaving:
        return DeviceGone(
            "the system wants the function back",
            operation="greet",
            target=target,
            hint="open it again once it is bound to its VFIO driver anew",
        )
    if keeper.ending:
        return KeeperUnreachable(
            "the keeper is ending",
            operation="greet",
            target=target,
            hint="open the target again",
        )
    return None
