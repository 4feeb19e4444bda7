# SPDX-License-Identifier: Apache-2.0
"""DMA by message: the engine thread asks the client for memory over the socket.

The engine thread sends and waits; the socket thread, which owns receiving, brings the answer. One
message is under way at a time.
"""

from __future__ import annotations

import errno
import queue
import threading
from typing import Final

from holdfast.errors import HoldfastError
from holdfast.kernel.stream import Stream
from holdfast.wire.vfio_user.frame import Parts
from holdfast.wire.vfio_user.server import DmaDone, ServerSession

REPLY_TIME: Final = 4.0
"""Seconds a client may take to answer. Below the 5 s after which clients give up on a server, so
that one which cannot answer while it waits for us gets its own reply in time."""


class Link:
    """Fulfils ``windows.Messages``. ``session_lock`` guards the session, used by two threads."""

    def __init__(self, session: ServerSession, session_lock: threading.Lock) -> None:
        self._session = session
        self._session_lock = session_lock
        self._stream: Stream | None = None
        self._sending = threading.Lock()
        self._answers: queue.SimpleQueue[DmaDone | None] = queue.SimpleQueue()

    def open(self, stream: Stream) -> None:
        """Send over this stream: the main socket or its twin."""
        self._stream = stream

    @property
    def chunk(self) -> int:
        """Most bytes of one message."""
        return self._session.dma_chunk

    def fetch(self, iova: int, into: memoryview) -> None:
        """DMA_READ; ``OSError`` with the client's errno, ETIMEDOUT, or ENODEV once it is gone."""
        with self._session_lock:
            ticket, parts = self._session.dma_read(iova, len(into))
        into[:] = self._ask(ticket, parts).data

    def store(self, iova: int, data: memoryview) -> None:
        """DMA_WRITE; errors as for :meth:`fetch`."""
        with self._session_lock:
            ticket, parts = self._session.dma_write(iova, data)
        self._ask(ticket, parts)

    def answered(self, done: DmaDone) -> None:
        """Socket thread: the client answered."""
        self._answers.put(done)

    def abort(self) -> None:
        """Fail the message under way, if any; its answer will be dropped."""
        self._answers.put(None)

    def close(self) -> None:
        """Fail everything from now on. Interrupt the stream first: a send may be waiting in it."""
        with self._sending:
            self._stream = None
        self.abort()

    def _ask(self, ticket: int, parts: Parts) -> DmaDone:
        try:
            while not self._answers.empty():  # an abort that nobody was there for
                self._answers.get()
            with self._sending:
                if self._stream is None:
                    raise OSError(errno.ENODEV, "the client is gone")
                self._stream.send(parts)
            return self._wait(ticket)
        except HoldfastError as error:  # the stream was interrupted
            raise OSError(errno.ENODEV, error.what) from error
        finally:
            with self._session_lock:
                self._session.forget(ticket)

    def _wait(self, ticket: int) -> DmaDone:
        while True:
            try:
                done = self._answers.get(timeout=REPLY_TIME)
            except queue.Empty:
                raise OSError(errno.ETIMEDOUT, "the client does not answer") from None
            if done is None:
                raise OSError(errno.ECANCELED, "the access was cut short")
            if done.ticket != ticket:
                continue
            if done.error is not None:
                raise OSError(done.error, "the client refused the access")
            return done
