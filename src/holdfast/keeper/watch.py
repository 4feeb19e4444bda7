# SPDX-License-Identifier: Apache-2.0
"""A thread that lets go of a device when the keeper says so, or is gone.

Facts. The kernel cannot take a function away from VFIO, and cannot release it after its keeper's
death, while any process has one of its BARs mapped: it waits (drivers/vfio/vfio_main.c). A client
may be busy with something else for hours.

Choice. One thread per open device sleeps on the lease's socket and on its news. It takes part in
nothing else. Cost: a thread of its own for clients of real hardware; emulated functions need none.
"""

from __future__ import annotations

import select
import threading
import weakref

from holdfast.device import Device
from holdfast.errors import HoldfastError
from holdfast.keeper.client import LeaseClient
from holdfast.kernel import events


class Watch:
    """Watches one device's lease until :meth:`close`. Holds no reference to the device."""

    def __init__(self, device: Device, lease: LeaseClient) -> None:
        self._device = weakref.ref(device)
        self._lease = lease
        self._end = events.make()
        self._poll = select.epoll()
        self._poll.register(self._end, select.EPOLLIN)
        # Edge-triggered: what arrives is somebody else's answer most of the time.
        edges = select.EPOLLIN | select.EPOLLRDHUP | select.EPOLLET
        self._poll.register(lease.fileno(), edges)
        self._poll.register(lease.news, select.EPOLLIN | select.EPOLLET)
        self._thread = threading.Thread(target=self._run, name="holdfast-watch", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while True:
            for fd, _ in self._poll.poll():
                if fd == self._end:
                    return
            if (why := self._news()) is not None:
                device = self._device()
                if device is not None:
                    device.evict(why)
                return

    def _news(self) -> HoldfastError | None:
        """Why the device must be let go of, if it must."""
        if self._lease.leave is None:
            try:
                self._lease.pump()
            except HoldfastError as error:
                return error
        return self._lease.leave

    def close(self) -> None:
        """End the thread. Idempotent; also from the thread itself."""
        if self._end < 0:
            return
        if threading.current_thread() is not self._thread:
            events.ring(self._end, 1)
            self._thread.join()
        self._forget()

    def orphan(self) -> None:
        """In a forked child, where the thread does not exist."""
        if self._end >= 0:
            self._forget()

    def _forget(self) -> None:
        self._poll.close()
        events.close(self._end)
        self._end = -1
