# SPDX-License-Identifier: Apache-2.0
"""INTx through uio_pci_generic: a thread that carries the kernel's count over to an eventfd.

The kernel's handler masks the function (INTX_DISABLE in the command register) and raises a count,
which ``/dev/uioN`` gives to readers (drivers/uio/uio_pci_generic.c, uio.c ``uio_read``). The
descriptor polls as an error once the driver has let go of the function. As long as it is open the
driver stays; when it is closed, also by the death of this process, the driver clears bus master
(``release``): so it is opened once, held for the backend's life, and worth having without
interrupts too.
"""

from __future__ import annotations

import os
import select
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Final

from holdfast.kernel import events
from holdfast.kernel.failure import failure

_COUNT: Final = 4
"""Bytes of the count; uio takes no other size."""


class IntxRelay:
    """Owns ``/dev/uioN`` and, if the function has an interrupt, a thread that reads it.

    The thread rings the eventfd that was set last, and calls ``on_gone`` once when the driver has
    lost the function. It owns a predecessor's descriptor that it is given in the place of a path,
    also on error.
    """

    def __init__(
        self, path: Path | int, *, interrupts: bool, on_gone: Callable[[], object]
    ) -> None:
        try:
            self._fd = path if isinstance(path, int) else os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise failure(error, "open", str(path)) from error
        self._lock = threading.Lock()
        self._target: int | None = None
        self._on_gone = on_gone
        self._thread: threading.Thread | None = None
        if interrupts:
            try:
                self._stop = events.make()
            except BaseException:
                os.close(self._fd)
                raise
            self._thread = threading.Thread(target=self._run, name="intx", daemon=True)
            self._thread.start()

    @property
    def fd(self) -> int:
        """``/dev/uioN``, for a successor. It stays owned here."""
        return self._fd

    def aim(self, eventfd: int | None) -> None:
        """Ring a duplicate of ``eventfd`` from now on, or nothing."""
        try:
            fresh = None if eventfd is None else os.dup(eventfd)
        except OSError as error:
            raise failure(error, "wire INTx", f"descriptor {eventfd}") from error
        with self._lock:
            old, self._target = self._target, fresh
        if old is not None:
            os.close(old)

    def close(self) -> None:
        """End the thread, then let the device node go. Idempotent. Not from the thread itself."""
        if self._thread is not None:
            events.ring(self._stop)
            self._thread.join()
            os.close(self._stop)
            self._thread = None
        self.aim(None)
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def _run(self) -> None:
        poller = select.poll()
        poller.register(self._fd, select.POLLIN)
        poller.register(self._stop, select.POLLIN)
        while True:
            ready = dict(poller.poll())
            if self._stop in ready:
                return
            try:
                if ready.get(self._fd) != select.POLLIN or not os.read(self._fd, _COUNT):
                    break
            except OSError:
                break
            self._ring()
        self._on_gone()

    def _ring(self) -> None:
        with self._lock:
            if self._target is None:
                return
            try:
                events.ring(self._target)
            except BlockingIOError:
                pass  # its count is full: it is readable, which is all it is for
