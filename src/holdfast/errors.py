# SPDX-License-Identifier: Apache-2.0
"""Every error Holdfast raises, by whose fault it is.

Each error answers five questions: which operation, on which target, with which errno (if the
kernel or a peer gave one), whose fault it is, and what to do next. ``str(error)`` prints them all
in one line. Errors cross the lease socket as :func:`to_fields` / :func:`from_fields`, so a client
sees the same type that the keeper raised.

Whose fault:

=============  ====================================================================
``you``        the caller broke a rule that it could have checked
``resource``   nobody did wrong, but there is not enough (quota, ring slots, IOVAs)
``device``     the function, or the process that emulates it
``peer``       the other end of a socket spoke nonsense or went away
``system``     the kernel or the environment said no
=============  ====================================================================
"""

from __future__ import annotations

import errno as _errno
from typing import ClassVar


class HoldfastError(Exception):
    """Base of all errors. ``fault`` says whose it is; ``hint`` what to do next."""

    fault: ClassVar[str] = "system"
    default_hint: ClassVar[str] = ""

    def __init__(
        self,
        what: str,
        *,
        operation: str = "",
        target: str = "",
        errno: int | None = None,
        hint: str = "",
    ) -> None:
        super().__init__(what)
        self.what = what
        self.operation = operation
        self.target = target
        self.errno = errno
        self.hint = hint or self.default_hint

    def __str__(self) -> str:
        head = ": ".join(part for part in (self.operation, self.target, self.what) if part)
        code = f" [{_errno.errorcode.get(self.errno, self.errno)}]" if self.errno else ""
        tail = f" Next: {self.hint}" if self.hint else ""
        return f"{head}{code} (fault: {self.fault}).{tail}"

    def __reduce__(self) -> tuple[object, ...]:
        return (from_fields, (to_fields(self),))


# -- you ------------------------------------------------------------


class UsageError(HoldfastError):
    """The caller broke a rule; nothing was changed."""

    fault = "you"


class BadTarget(UsageError, ValueError):
    """The target is not one of the forms of the target grammar, or names nothing known."""

    default_hint = "use emu:NAME, vfio-user:/path/to.sock or pci:DDDD:BB:DD.F"


class BadAccess(UsageError, ValueError):
    """A register access is out of range, misaligned, of the wrong width, or against its mode."""


class BadTransfer(UsageError, ValueError):
    """A transfer request cannot be carried out as asked: outside its buffer, empty, misdirected."""


class BadBuffer(UsageError, ValueError):
    """The object cannot be pinned or the shape cannot be allocated (not contiguous, empty)."""


class Closed(UsageError):
    """The object was closed or freed by its owner, or belongs to the parent of this fork."""

    default_hint = "open it again; objects do not survive close(), free() or fork()"


class Busy(UsageError):
    """Someone else holds what was asked for."""


class NotSupported(UsageError):
    """The function, driver or backend does not have this ability."""


# -- resource ------------------------------------------------------------


class ResourceError(HoldfastError):
    """Not enough of something; the request had no effect and may be repeated later."""

    fault = "resource"


class QuotaExceeded(ResourceError):
    """The lease's quota of bytes or buffers is used up."""

    default_hint = "free buffers, or serve with a larger quota"


class OutOfMemory(ResourceError):
    """The arena or the system has no frames left."""


class QuarantineFull(ResourceError):
    """As much memory is in quarantine as the keeper may hold there; no more is given out."""

    default_hint = "see holdfast ps; ask for another look with holdfast ps --retry LEASE"


class IovaExhausted(ResourceError):
    """No IOVA range of this size is left below the function's address limit."""

    default_hint = "free buffers; retired ranges return only once the function is proven quiet"


class RingFull(ResourceError):
    """The descriptor ring has fewer free slots than the request needs."""

    default_hint = "wait for an earlier transfer, or post fewer descriptors at once"


class WaitTimeout(ResourceError, TimeoutError):
    """The wait ended before the event. Nothing was cancelled: the buffer is still in flight."""

    default_hint = "wait again; a timeout never cancels a transfer"


# -- device ------------------------------------------------------------


class DeviceError(HoldfastError):
    """The function misbehaved or is gone."""

    fault = "device"


class DriverFailed(DeviceError):
    """The driver's code in the keeper raised something, or answered nonsense."""

    default_hint = "this is a fault in the driver; see holdfast ps"


class StaysStuck(DeviceError):
    """A call of the keeper to the driver or the function did not come back in time."""

    default_hint = "the function or its driver hangs; see holdfast ps"


class DeviceGone(DeviceError):
    """The function, or the process that emulates it, went away."""

    default_hint = "start it again and open the target anew"


class DeviceReset(DeviceError):
    """The function was reset under this operation; its outcome is unknown."""

    default_hint = "post the transfer again"


class TransferFailed(DeviceError):
    """The engine stopped with an error before the transfer was complete."""


class DmaFault(DeviceError):
    """The function tried to reach an IOVA that is not mapped, or against its permission."""


# -- peer ------------------------------------------------------------


class PeerError(HoldfastError):
    """The other end of a socket broke the protocol or left."""

    fault = "peer"


class ProtocolError(PeerError):
    """A message that the protocol does not allow. The connection is of no further use."""


class RemoteError(PeerError):
    """The peer answered a well-formed request with an error number."""


class KeeperGone(PeerError):
    """The keeper of this function ended under the client."""

    default_hint = "open the target again; a new keeper starts from a reset function"


class KeeperUnreachable(PeerError):
    """No keeper answers on the socket of this target."""


class VersionMismatch(PeerError):
    """The keeper speaks another version of the lease protocol."""

    default_hint = "stop the old keeper, or use the Holdfast version that it runs"


# -- system ------------------------------------------------------------


class SystemFailure(HoldfastError):
    """A system call failed for a reason that is neither the caller's nor the device's."""

    fault = "system"


class NoPermission(SystemFailure, PermissionError):
    """The kernel, or the keeper's socket permissions, do not let this user in."""


_BY_NAME: dict[str, type[HoldfastError]] = {}


def _register(cls: type[HoldfastError]) -> None:
    _BY_NAME[cls.__name__] = cls
    for sub in cls.__subclasses__():
        _register(sub)


_register(HoldfastError)


def to_fields(error: HoldfastError) -> dict[str, str | int | None]:
    """Flatten an error for the wire; the inverse of :func:`from_fields`."""
    return {
        "kind": type(error).__name__,
        "what": error.what,
        "operation": error.operation,
        "target": error.target,
        "errno": error.errno,
        "hint": error.hint,
    }


def from_fields(fields: dict[str, str | int | None]) -> HoldfastError:
    """Rebuild an error from its fields; an unknown kind becomes the base class."""
    cls = _BY_NAME.get(str(fields.get("kind")), HoldfastError)
    number = fields.get("errno")
    return cls(
        str(fields.get("what", "")),
        operation=str(fields.get("operation", "")),
        target=str(fields.get("target", "")),
        errno=number if isinstance(number, int) else None,
        hint=str(fields.get("hint", "")),
    )
