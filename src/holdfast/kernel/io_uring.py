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
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Final, Self

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
        self._start(slots, _setup())
        table = bytearray(u.RSRC_REGISTER.pack(slots, u.RSRC_REGISTER_SPARSE, 0, 0, 0))
        try:
            libc.io_uring_register(self._fd, u.REGISTER_BUFFERS2, table, len(table))
        except OSError as error:
            os.close(self._fd)
            raise _no_table(error) from error

    def _start(self, slots: int, fd: int) -> None:
        self._lock = threading.Lock()
        # The slot that was emptied longest ago comes first: a number that a successor finds in
        # notes about a slab that was just given back must not be another slab's by then.
        self._free: dict[int, None] = dict.fromkeys(range(slots))
        self._held: dict[int, int] = {}
        self._users: Counter[int] = Counter()
        self._slots = slots
        self._fd = fd

    @classmethod
    def resume(cls, fd: int, slots: int) -> Self:
        """Go on with the ring of a process that is dead: its pins are still there.

        Takes ownership of ``fd``. The kernel does not tell which slots are full: :meth:`claim` says
        so, :meth:`sweep` empties the others. Until then a full one may be used for a new pin, and
        drops the old one.
        """
        self = cls.__new__(cls)
        self._start(slots, fd)
        return self

    @property
    def fd(self) -> int:
        """The ring, for a successor. It stays owned here."""
        return self._fd

    def claim(self, pins: Sequence[tuple[int, int]]) -> None:
        """Slots that a predecessor filled, with their bytes: held from now on.

        A slot has to be unpinned as often as it was claimed. UsageError, with nothing claimed, for
        a slot that was filled here or is not there.
        """
        with self._lock:
            for slot, _ in pins:
                if slot not in self._free and slot not in self._users:
                    raise UsageError(f"slot {slot}", operation="claim pin", target=_TARGET)
            for slot, nbytes in pins:
                self._free.pop(slot, None)
                self._users[slot] += 1
                self._held[slot] = nbytes

    def sweep(self) -> None:
        """Empty every slot that is not held here: pins of a predecessor that nobody claimed."""
        with self._lock:
            self._require_open("sweep")
            first = 0
            for end in [*sorted(self._held), self._slots]:
                try:
                    if first < end:
                        self._empty(first, end - first)
                except OSError as error:
                    raise failure(error, "sweep pins", _TARGET) from error
                first = end + 1

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
            slot = next(iter(self._free))
            try:
                self._update(slot, address, nbytes)
            except OSError as error:
                raise _no_pin(error, address, nbytes) from error
            del self._free[slot]
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
            if self._users[slot] > 1:
                self._users[slot] -= 1
                return
            try:
                self._empty(slot, 1)
            except OSError as error:
                raise failure(error, "unpin", _TARGET) from error
            del self._held[slot], self._users[slot]
            self._free[slot] = None

    def close(self) -> None:
        """Drop every pin, and the ring. Idempotent."""
        with self._lock:
            if self._fd < 0:
                return
            try:
                # Closing alone would drop them too, but only some time after it has returned.
                libc.io_uring_register(self._fd, u.UNREGISTER_BUFFERS, None, 0)
            except OSError as error:
                if error.errno != errno.ENXIO:  # another process that has the ring was here first
                    raise failure(error, "drop all pins", _TARGET) from error
            finally:
                os.close(self._fd)
                self._fd = -1
                self._held.clear()

    def _update(self, slot: int, address: int, nbytes: int) -> None:
        """Put one buffer into one slot."""
        self._put(slot, bytearray(u.IOVEC.pack(address, nbytes)))

    def _empty(self, first: int, count: int) -> None:
        self._put(first, bytearray(u.IOVEC.size * count))

    def _put(self, first: int, places: bytearray) -> None:
        """Put buffers into consecutive slots."""
        count = len(places) // u.IOVEC.size
        request = bytearray(u.RSRC_UPDATE2.pack(first, 0, libc.address_of(places), 0, count, 0))
        done = libc.io_uring_register(self._fd, u.REGISTER_BUFFERS_UPDATE, request, len(request))
        if done != count:
            raise SystemFailure(
                f"{done} of {count} slots were updated", operation="update pins", target=_TARGET
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
