# SPDX-License-Identifier: Apache-2.0
"""The one place that makes ioctls. Other threads run while the kernel works.

The argument is a ``bytearray``, which the kernel reads and writes in place, or a number. A signal
does not restart an ioctl: an InterruptedError comes out as SystemFailure (EINTR).
"""

from __future__ import annotations

import fcntl

from holdfast.kernel.failure import failure


def call(
    fd: int, request: int, argument: bytearray | int = 0, *, operation: str, target: str = ""
) -> int:
    """ioctl(2). Returns what the kernel returned, which is not always 0: look at it.

    Raises the error class of the errno (``failure.py``), with the errno in it.
    """
    try:
        return fcntl.ioctl(fd, request, argument)
    except OSError as error:
        raise failure(error, operation, target) from error
