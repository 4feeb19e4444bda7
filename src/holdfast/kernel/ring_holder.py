# SPDX-License-Identifier: Apache-2.0
"""Somebody else who has an io_uring, so that its pins outlive the process that took them.

Facts. Pins of registered buffers belong to the ring, and the ring ends with its last descriptor.
A ring's descriptor cannot be sent over a socket: since Linux 6.7 ``SCM_RIGHTS`` refuses it with
EINVAL (net/core/scm.c, ``scm_fp_copy``). It can be inherited, and it can be copied out of a process
that one may trace (pidfd_getfd(2), PTRACE_MODE_ATTACH_REALCREDS).

Choice. A process that does nothing: it inherits the ring and reads from a pipe until that ends. Its
pidfd and the pipe's other end *can* be sent. A successor copies the ring out of it; when nobody has
the pipe any more it ends, and the pins with it.

Cost. A small process for each function without an IOMMU. Killed alone, it changes nothing as long
as the process that pins lives. Killed together with that, the pins are gone: then memory has to be
pinned anew, and only if it is still where it was (``dma.physical``).
"""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Final, Self

from holdfast.errors import HoldfastError
from holdfast.kernel import libc, pidfd
from holdfast.kernel.failure import failure
from holdfast.kernel.handover import Incoming

_PROGRAM: Final = "import os; os.read(0, 1)"


class RingHolder:
    """The process, by its pidfd, and the pipe that keeps it. Not thread-safe.

    A forked child that has duplicates of both keeps the process, too.
    """

    def __init__(self, holder: int, lifeline: int, number: int) -> None:
        """Takes ownership of the descriptors; ``number`` is the ring's over there."""
        self.holder = holder
        self.lifeline = lifeline
        self.number = number
        self._child: subprocess.Popen[bytes] | None = None

    @classmethod
    def start(cls, ring: int) -> Self:
        """Start a process that has a copy of ``ring``, which stays the caller's."""
        reading = writing = -1
        try:
            reading, writing = os.pipe2(os.O_CLOEXEC)
            child = subprocess.Popen(
                [sys.executable, "-I", "-S", "-c", _PROGRAM],
                stdin=reading,
                pass_fds=(ring,),
                env={},
                start_new_session=True,
            )
        except OSError as error:
            if writing >= 0:
                os.close(writing)
            raise failure(error, "start holder", f"descriptor {ring}") from error
        finally:
            if reading >= 0:
                os.close(reading)
        try:
            self = cls(pidfd.open_process(child.pid), writing, ring)
        except BaseException:
            os.close(writing)
            child.wait()
            raise
        self._child = child
        return self

    @classmethod
    def resume(cls, found: Incoming) -> Self:
        """Go on with a predecessor's: ``holder`` and ``lifeline`` are taken from the handover."""
        number = found.number("ring")
        found.fd("lifeline")
        return cls(found.take("holder"), found.take("lifeline"), number)

    def ring(self) -> int | None:
        """A copy of the ring, which the caller owns; None if the process is gone.

        NoPermission if this process must not look into the other one (CAP_SYS_PTRACE).
        """
        if pidfd.is_dead(self.holder):
            return None
        try:
            return libc.pidfd_getfd(self.holder, self.number)
        except ProcessLookupError:
            return None
        except OSError as error:
            raise failure(error, "copy ring", f"descriptor {self.holder}") from error

    def let_go(self) -> None:
        """Close the descriptors; the process stays as long as somebody has the pipe. Idempotent."""
        fds = (self.holder, self.lifeline)
        self.holder = self.lifeline = -1
        for fd in fds:
            if fd >= 0:
                os.close(fd)

    def end(self) -> None:
        """End the process: nothing has to be held any more. Idempotent."""
        try:
            if self.holder >= 0:
                pidfd.kill(self.holder)
            if self._child is not None:
                self._child.wait()
        except HoldfastError:
            pass  # another user's by now; it ends with the pipe
        self.let_go()
