# SPDX-License-Identifier: Apache-2.0
"""A client without manners: says what it likes on a lease's socket, for tests and campaigns."""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from types import TracebackType
from typing import Self

from holdfast.errors import HoldfastError
from holdfast.keeper import embedded
from holdfast.kernel import packets
from holdfast.values import Access, Target
from holdfast.wire import lease as wire

TIMEOUT = 10.0


class Rude:
    """One raw connection to a target's keeper. A context manager; owns its socket."""

    def __init__(self, target: str) -> None:
        self.sock = packets.connect(str(embedded.socket_path(Target.parse(target))), TIMEOUT)
        self.sock.settimeout(TIMEOUT)
        self.seq = 0

    def send(self, message: wire.Message | bytes, fds: Sequence[int] = ()) -> None:
        """Send a message, or whatever bytes, with descriptors (the caller keeps them)."""
        packet = message if isinstance(message, bytes) else wire.encode(message)
        packets.send(self.sock, packet, fds)

    def receive(self) -> tuple[wire.Reply | None, list[int]]:
        """The next message and its descriptors, which the caller owns; None at hang-up."""
        try:
            packet, fds = packets.receive(self.sock, wire.MAX_PACKET, wire.MAX_FDS)
        except ConnectionError:
            return None, []
        return (wire.decode_reply(packet), fds) if packet else (None, [])

    def ask(
        self, message: wire.Message | bytes, fds: Sequence[int] = (), *, keep: bool = False
    ) -> tuple[wire.Reply | None, list[int]]:
        """Send, and take the next message that is no notice. Its descriptors are closed unless
        the caller wants to ``keep`` them."""
        self.send(message, fds)
        while True:
            reply, received = self.receive()
            if not keep:
                for fd in received:
                    os.close(fd)
                received = []
            if not isinstance(reply, wire.Notice):
                return reply, received

    def refusal(self, message: wire.Message, fds: Sequence[int] = ()) -> str:
        """The name of the error that a request is answered with; "" if it was carried out."""
        reply, _ = self.ask(message, fds)
        return str(reply.error["kind"]) if isinstance(reply, wire.Failed) else ""

    def open(self, channels: int | None = 0, access: Access | None = None) -> wire.Opened:
        """Greet and take a lease."""
        return self.open_with_fds(channels, access, keep=False)[0]

    def open_with_fds(
        self, channels: int | None, access: Access | None = None, *, keep: bool = True
    ) -> tuple[wire.Opened, list[int]]:
        """Greet and take a lease, with its descriptors."""
        self.ask(wire.Hello(version=wire.VERSION))
        reply, fds = self.ask(wire.Open(channels=channels, access=access), keep=keep)
        if not isinstance(reply, wire.Opened):
            raise HoldfastError(f"no lease, but {reply}", operation="open")
        return reply, fds

    def take_slab(self, nbytes: int) -> tuple[wire.SlabInfo, int]:
        """A slab and its descriptor, which the caller owns."""
        reply, fds = self.ask(wire.TakeSlab(nbytes=nbytes), keep=True)
        if not isinstance(reply, wire.SlabTaken):
            raise HoldfastError(f"no slab, but {reply}", operation="take slab")
        return reply.info, fds[reply.info.fd]

    def hung_up(self) -> bool:
        """Wait until the keeper hangs up; whatever comes before is thrown away."""
        while True:
            reply, fds = self.receive()
            for fd in fds:
                os.close(fd)
            if reply is None:
                return True

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.sock.close()

    def half_close(self, how: int = socket.SHUT_WR) -> None:
        """Close one direction only."""
        self.sock.shutdown(how)
