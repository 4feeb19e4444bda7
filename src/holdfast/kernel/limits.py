# SPDX-License-Identifier: Apache-2.0
"""RLIMIT_MEMLOCK and RLIMIT_NOFILE, looked at before the kernel says no.

Facts. Long-term pins count against RLIMIT_MEMLOCK unless the process has CAP_IPC_LOCK *in the
initial user namespace* (``capable()``). VFIO type1 charges the address space, in the same counter
as mlock (``mm->locked_vm``, VmLck: drivers/vfio/vfio_iommu_type1.c ``vfio_lock_acct``). iommufd and
io_uring charge the user, in a counter that no file shows (``user->locked_vm``), and add to
``mm->pinned_vm`` (VmPin: drivers/iommu/iommufd/pages.c ``iopt_pages_update_pinned``). When the
limit is hit the kernel answers a bare ENOMEM, after it has pinned up to the limit.

Consequence. Only a check beforehand can tell the limit from a lack of memory, and say by how much.

Choice. The counter of this process is compared with the soft limit. For pins charged to the user
that is a lower bound: the kernel may still refuse what other processes of the user have used up.

Cost. Two cheap system calls for who has no limit or is above it; else a read in /proc, some 50 us.
"""

from __future__ import annotations

import ctypes
import enum
import errno
import os
import re
import resource
import struct
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

from holdfast.errors import OutOfMemory, ResourceError
from holdfast.kernel.failure import failure

CAP_IPC_LOCK: Final = 14
_CAPABILITY_VERSION_3: Final = 0x2008_0522
"""linux/capability.h"""

_INITIAL_USER_NAMESPACE: Final = "user:[4026531837]"
"""PROC_USER_INIT_INO (linux/proc_ns.h): the only namespace whose number is fixed."""

_capget = ctypes.CDLL(None, use_errno=True).capget
_capget.argtypes = (ctypes.c_char_p, ctypes.c_char_p)


class Charge(enum.StrEnum):
    """Which counter of /proc/PID/status a pin raises."""

    MM = "VmLck"
    USER = "VmPin"


def pinned(charge: Charge) -> int:
    """Bytes that this process has charged to a counter."""
    try:
        # Raw: /proc tells no size beforehand, and a text file would read it in pieces.
        fd = os.open("/proc/self/status", os.O_RDONLY | os.O_CLOEXEC)
        try:
            status = os.read(fd, 1 << 16)
        finally:
            os.close(fd)
    except OSError as error:
        raise failure(error, "read limits", "/proc/self/status") from error
    found = re.search(charge.value.encode() + rb":\s*([0-9]+) kB", status)
    return int(found[1]) * 1024 if found else 0


def exempt() -> bool:
    """Whether no limit holds for this thread: CAP_IPC_LOCK in the initial user namespace.

    In any other namespace ``capable()`` says no, whatever capabilities the thread has there.
    """
    header = struct.pack("=Ii", _CAPABILITY_VERSION_3, 0)
    sets = ctypes.create_string_buffer(24)  # two of: effective, permitted, inheritable
    if _capget(header, sets):
        number = ctypes.get_errno()
        error = OSError(number, os.strerror(number))
        raise failure(error, "capget") from error
    (effective,) = struct.unpack_from("=I", sets)
    if not effective >> CAP_IPC_LOCK & 1:
        return False
    try:
        return os.readlink("/proc/self/ns/user") == _INITIAL_USER_NAMESPACE
    except OSError:
        return True  # a kernel without user namespaces


@lru_cache(maxsize=8)
def _exempt_as(identity: tuple[int, ...]) -> bool:  # noqa: ARG001 - the key
    """:func:`exempt`, asked once for each process and user ids: capabilities go with those.

    A process that gives up the capability alone, or moves to another namespace, is told by the
    kernel.
    """
    return exempt()


@dataclass(frozen=True, slots=True)
class Memlock:
    """RLIMIT_MEMLOCK and what is used of it, in bytes. ``hard`` is None where unlimited."""

    soft: int
    hard: int | None
    used: int

    def missing(self, nbytes: int) -> int:
        """By how many bytes the limit is too low to pin ``nbytes`` more; 0 if it is not."""
        return max(self.used + nbytes - self.soft, 0)


def memlock(charge: Charge) -> Memlock | None:
    """The limit that holds for pins of the calling thread, or None where there is none."""
    soft, hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if soft == resource.RLIM_INFINITY or _exempt_as((os.getpid(), *os.getresuid())):
        return None
    return Memlock(soft, None if hard == resource.RLIM_INFINITY else hard, pinned(charge))


def require_lockable(nbytes: int, charge: Charge, *, operation: str, target: str = "") -> None:
    """Raise OutOfMemory (ENOMEM) if pinning ``nbytes`` more would pass RLIMIT_MEMLOCK."""
    limit = memlock(charge)
    missing = 0 if limit is None else limit.missing(nbytes)
    if limit is None or not missing:
        return
    raise OutOfMemory(
        f"RLIMIT_MEMLOCK is {limit.soft} bytes; {limit.used} are pinned already"
        f" ({charge.value}) and {nbytes} more are asked for",
        operation=operation,
        target=target,
        errno=errno.ENOMEM,
        hint=_raise_it(limit, limit.soft + missing),
    )


def raise_descriptors() -> int:
    """Let this process have as many descriptors as its hard limit allows; returns how many."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard


def descriptors_left() -> int:
    """How many descriptors this process can still open, at most.

    A new descriptor has the lowest free number (open(2)), so its number says how many are in use at
    least; counting them in /proc would take milliseconds where there are thousands.
    """
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        fd = os.dup(0)
    except OSError as error:
        if error.errno in (errno.EMFILE, errno.ENFILE):
            return 0
        fd = os.eventfd(0, os.EFD_CLOEXEC)  # there is no descriptor 0
    os.close(fd)
    return soft - fd


def require_descriptors(reserve: int, *, operation: str, target: str = "") -> None:
    """Raise ResourceError unless more than ``reserve`` descriptors can still be opened."""
    left = descriptors_left()
    if left <= reserve:
        raise ResourceError(
            f"only {left} more files can be opened, and {reserve} are kept for what must not fail",
            operation=operation,
            target=target,
            errno=errno.EMFILE,
            hint="free buffers or close leases; raise the hard limit of open files (ulimit -H -n,"
            " LimitNOFILE= of the systemd unit)",
        )


def _raise_it(limit: Memlock, wanted: int) -> str:
    if limit.hard is None or wanted <= limit.hard:
        return f"raise the soft limit: `ulimit -S -l {-(-wanted // 1024)}` before the start"
    return (
        f"as root: `prlimit --pid {os.getpid()} --memlock={wanted}:{wanted}`; for good:"
        " `memlock` in /etc/security/limits.conf, or LimitMEMLOCK= of the systemd unit"
    )
