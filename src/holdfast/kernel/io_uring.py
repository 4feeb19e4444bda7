# SPDX-License-Identifier: Apache-2.0
"""Long-term page pins, taken and dropped one by one: io_uring's registered buffers.

Facts. A page that is mapped, locked or on hugetlbfs is not pinned: whoever holds the file can punch
it out, and the frame goes to somebody else while a card still writes to it. A *pin*
(``pin_user_pages`` with ``FOLL_LONGTERM``) keeps the frame until it is dropped, whatever happens to
the file and to the mapping (Documentation/core-api/pin_user_pages.rst). Without an IOMMU there is
no VFIO map that would take one.

Consequence. Something in user space must take such pins, and be able to drop each alone.

Choice. A registered buffer of an io_uring is such a pin (io_uring/rsrc.c,
``io_sqe_buffer_register``), and any process may have one. One ring holds a sparse table of slots;
a slot is filled and emptied with IORING_REGISTER_BUFFERS_UPDATE. Nothing is ever submitted to the
ring, and its queues are not mapped.

Cost. At most 16384 slots, and 1 GiB in each. The pins belong to the ring: they are dropped when its
last descriptor is closed, a little later and by a kernel worker (``io_ring_exit_work``). Without
CAP_IPC_LOCK they count against RLIMIT_MEMLOCK of the *user*. io_uring can be switched off for the
whole machine (sysctl ``kernel.io_uring_disabled``) and is by some container runtimes.
"""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path
from typing import Final

from holdfast.errors import (
    BadBuffer,
    Closed,
    HoldfastError,
    NoPermission,
    NotSupported,
    ResourceError,
    SystemFailure,
    UsageError,
)
from holdfast.kernel import libc
from holdfast.kernel.failure import failure
from holdfast.kernel.limits import Charge, require_lockable
from holdfast.uapi import io_uring as u

LARGEST_PIN: Final = u.MAX_BUFFER
"""Bytes that one slot can pin."""

_SWITCH: Final = Path("/proc/sys/kernel/io_uring_disabled")
_TARGET: Final = "io_uring"


class PinTable:
    """Pins of this process's memory, by slot. Thread-safe. Owns the ring's descriptor.

    A forked child has the descriptor too, and with it keeps the pins of whoever forked it.
    """

    def __init__(self, slots: int = 1024) -> None:
        """Make the ring and its table of ``slots`` empty slots.

        Raises NoPermission if io_uring is switched off, NotSupported if the kernel has none or
        no sparse tables (before 5.19).
        """
        if not 0 < slots <= u.MAX_REG_BUFFERS:
            raise UsageError(f"{slots} slots", operation="make pin table", target=_TARGET)
        self._lock = threading.Lock()
        self._free = list(range(slots - 1, -1, -1))
        self._held: dict[int, int] = {}
        self._fd = _setup()
        table = bytearray(u.RSRC_REGISTER.pack(slots, u.RSRC_REGISTER_SPARSE, 0, 0, 0))
        try:
            libc.io_uring_register(self._fd, u.REGISTER_BUFFERS2, table, len(table))
        except OSError as error:
            os.close(self._fd)
            raise _no_table(error) from error

    @property
    def pinned_bytes(self) -> int:
        """Bytes pinned now; a page that is pinned twice counts twice."""
        with self._lock:
            return sum(self._held.values())

    def pin(self, address: int, nbytes: int) -> int:
        """Pin the pages of ``nbytes`` at ``address``; returns the slot. Faults them in, writable.

        Afterwards the frames stay, whatever becomes of mapping and file. Raises OutOfMemory if
        RLIMIT_MEMLOCK or memory does not allow it, BadBuffer for a range that cannot be pinned,
        ResourceError if no slot is free. Nothing is pinned then.
        """
        if not 0 < nbytes <= LARGEST_PIN:
            raise BadBuffer(
                f"{nbytes} bytes; one pin has 1 to {LARGEST_PIN}", operation="pin", target=_TARGET
            )
        require_lockable(nbytes, Charge.USER, operation="pin", target=_TARGET)
        with self._lock:
            self._require_open("pin")
            if not self._free:
                raise ResourceError(
                    f"all {len(self._held)} slots are taken",
                    operation="pin",
                    target=_TARGET,
                    hint="free buffers; memory of dead leases returns once the function is quiet",
                )
            slot = self._free[-1]
            try:
                self._update(slot, address, nbytes)
            except OSError as error:
                raise _no_pin(error, address, nbytes) from error
            self._free.pop()
            self._held[slot] = nbytes
        return slot

    def unpin(self, slot: int) -> None:
        """Drop one pin. When this returns, the frames are only held by what else holds them.

        UsageError for a slot that is empty.
        """
        with self._lock:
            self._require_open("unpin")
            if slot not in self._held:
                raise UsageError(f"slot {slot} is empty", operation="unpin", target=_TARGET)
            try:
                self._update(slot, 0, 0)
            except OSError as error:
                raise failure(error, "unpin", _TARGET) from error
            del self._held[slot]
            self._free.append(slot)

    def close(self) -> None:
        """Drop every pin, and the ring. Idempotent."""
        with self._lock:
            if self._fd < 0:
                return
            try:
                # Closing alone would drop them too, but only some time after it has returned.
                libc.io_uring_register(self._fd, u.UNREGISTER_BUFFERS, None, 0)
            except OSError as error:
                raise failure(error, "drop all pins", _TARGET) from error
            finally:
                os.close(self._fd)
                self._fd = -1
                self._held.clear()

    def _update(self, slot: int, address: int, nbytes: int) -> None:
        """Put one buffer into one slot, or nothing if both are 0."""
        place = bytearray(u.IOVEC.pack(address, nbytes))
        request = bytearray(u.RSRC_UPDATE2.pack(slot, 0, libc.address_of(place), 0, 1, 0))
        done = libc.io_uring_register(self._fd, u.REGISTER_BUFFERS_UPDATE, request, len(request))
        if done != 1:
            raise SystemFailure(
                f"{done} of 1 slots were updated", operation="update pins", target=_TARGET
            )

    def _require_open(self, operation: str) -> None:
        if self._fd < 0:
            raise Closed("the pin table was closed", operation=operation, target=_TARGET)


def _setup() -> int:
    try:
        return libc.io_uring_setup(1, bytearray(u.PARAMS_SIZE))
    except OSError as error:
        if error.errno == errno.ENOSYS:
            raise NotSupported(
                "this kernel is built without io_uring (CONFIG_IO_URING)",
                operation="make pin table",
                target=_TARGET,
                errno=error.errno,
            ) from error
        if error.errno == errno.EPERM:
            raise _forbidden(error) from error
        raise failure(error, "make pin table", _TARGET) from error


def _forbidden(error: OSError) -> HoldfastError:
    """Who forbids it: the sysctl (io_uring/io_uring.c, ``io_uring_allowed``), or a filter."""
    try:
        value = int(_SWITCH.read_text(encoding="ascii"))
    except (OSError, ValueError):
        value = 0
    return NoPermission(
        f"io_uring is switched off: kernel.io_uring_disabled is {value}"
        if value
        else "io_uring is forbidden to this process",
        operation="make pin table",
        target=_TARGET,
        errno=error.errno,
        hint="sysctl kernel.io_uring_disabled=0"
        if value
        else "allow io_uring_setup and io_uring_register in the seccomp filter or LSM policy",
    )


def _no_table(error: OSError) -> HoldfastError:
    if error.errno == errno.EINVAL:
        return NotSupported(
            "this kernel has no sparse tables of registered buffers (before Linux 5.19)",
            operation="make pin table",
            target=_TARGET,
            errno=error.errno,
        )
    return failure(error, "make pin table", _TARGET)


def _no_pin(error: OSError, address: int, nbytes: int) -> HoldfastError:
    target = f"{nbytes} bytes at {address:#x}"
    if error.errno in (errno.EFAULT, errno.EOPNOTSUPP, errno.EOVERFLOW):
        return BadBuffer(
            "not all of it is writable memory that can be pinned",
            operation="pin",
            target=target,
            errno=error.errno,
        )
    found = failure(error, "pin", target)
    if error.errno == errno.ENOMEM:
        # The charge is the user's and no file shows it: see kernel.limits.
        found.hint = "no memory, or RLIMIT_MEMLOCK of this user is used up: raise it (ulimit -l)"
    return found
