# SPDX-License-Identifier: Apache-2.0
"""From an errno to the error class that says whose fault it is."""

from __future__ import annotations

import errno

from holdfast.errors import HoldfastError, NoPermission, OutOfMemory, ResourceError, SystemFailure

_DESCRIPTORS = "raise the limit of open files (ulimit -n), or close some"


def failure(error: OSError, operation: str, target: str = "") -> HoldfastError:
    """The Holdfast error for a failed system call; raise it ``from error``."""
    text = error.strerror or str(error)
    if error.errno in (errno.EPERM, errno.EACCES):
        return NoPermission(text, operation=operation, target=target, errno=error.errno)
    if error.errno in (errno.ENOMEM, errno.ENOSPC):
        return OutOfMemory(text, operation=operation, target=target, errno=error.errno)
    if error.errno in (errno.EMFILE, errno.ENFILE):
        return ResourceError(
            text, operation=operation, target=target, errno=error.errno, hint=_DESCRIPTORS
        )
    return SystemFailure(text, operation=operation, target=target, errno=error.errno)
