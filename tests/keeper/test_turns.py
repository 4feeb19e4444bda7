# SPDX-License-Identifier: Apache-2.0
"""A connection that always has something to say leaves the loop to others all the same."""

from __future__ import annotations

import asyncio
import socket

import pytest

from holdfast.keeper.connection import TURN, Connection, Traffic

pytestmark = pytest.mark.usefixtures("clean")
PACKETS = 200


def test_others_have_their_turn_while_one_client_never_stops() -> None:
    async def serve() -> int:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        connection = Connection(ours, Traffic())
        turns = 0

        async def others() -> None:
            nonlocal turns
            while True:
                turns += 1
                await asyncio.sleep(0)

        task = asyncio.create_task(others())
        with theirs:
            for _ in range(PACKETS):
                theirs.send(b"more")  # its queue is never empty
                packet, _ = await connection.receive()
                assert packet == b"more"
            task.cancel()
            connection.close()
        return turns

    assert asyncio.run(serve()) >= PACKETS // TURN - 1
