# SPDX-License-Identifier: Apache-2.0
"""The processes of a story that is played against a real keeper: they use Holdfast as anybody."""

from __future__ import annotations

import os
import socket
from typing import Any, Final

import numpy as np

import holdfast
from holdfast.drivers.edu import EduEngine
from holdfast.errors import HoldfastError
from holdfast.keeper import embedded
from holdfast.keeper.client import LeaseClient
from holdfast.replay.life import Life
from holdfast.torture.edu_actors import NBYTES, PAGE
from holdfast.values import Target

OPEN_TIMEOUT: Final = 1.0
"""Seconds to wait for a lease: the engine is granted to one at a time."""


class ClientLife(Life):
    """Orders from a socket, carried out with the public interface."""

    def __init__(self, sock: socket.socket, ram: int, pattern: int, target: str) -> None:
        super().__init__(sock, ram, pattern)
        self.target = target
        # A keeper that is gone shall stay so: whoever finds none would start another one.
        os.environ[embedded.SOCKET_VARIABLE] = str(embedded.socket_path(Target.parse(target)))
        self.card: holdfast.Device | None = None
        self.buffer: Any = None

    def do_open(self, posts: bool) -> dict[str, Any]:
        """A lease and a buffer, full of its pattern."""
        try:
            how = {"access": "exclusive"} if posts else {"access": "shared", "channels": 0}
            self.card = holdfast.open(self.target, timeout=OPEN_TIMEOUT, **how)
            self.buffer = self.card.alloc(NBYTES, align=PAGE)
        except HoldfastError as error:
            return {"refused": str(error)}
        self.buffer.array[:] = self.pattern
        return {"lease": self.card.lease.number, "iova": int(self.buffer.iova)}

    def do_post(self) -> dict[str, Any]:
        """Have the card write to the buffer."""
        assert self.card is not None
        try:
            assert isinstance(self.card.dma, EduEngine)
            self.card.dma.from_card(self.buffer)
        except HoldfastError as error:
            return {"refused": str(error)}
        return {}

    def do_hang_up(self) -> None:
        """Close the connection without a word, and keep everything else."""
        assert self.card is not None
        assert isinstance(self.card.lease, LeaseClient)
        self.card.lease.drop()

    def do_foreign(self, rightful: list[int]) -> int:
        """How many bytes of the buffer are neither its own nor one of these."""
        if self.buffer is None:
            return 0
        mine = np.isin(self.buffer.array, np.array([self.pattern, *rightful], np.uint8))
        return int(np.count_nonzero(~mine))
