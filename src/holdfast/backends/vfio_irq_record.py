# SPDX-License-Identifier: Apache-2.0
"""Which interrupts of a VFIO function are wired, in memory that outlives the process.

The kernel does not tell which types are wired (VFIO_DEVICE_GET_IRQ_INFO has the counts only), and a
successor must know: the types exclude each other, and what is wired has to be disabled. One page of
shared memory has a word for each type, written before the call that wires it. A type whose word is
set may therefore not be wired; one whose word is 0 is not.
"""

from __future__ import annotations

import os

from holdfast.kernel import memfd
from holdfast.kernel.mapping import PAGE, Mapping
from holdfast.values import IrqIndex


class IrqRecord:
    """Owns its descriptor. Thread-safe: each word is written by one store."""

    def __init__(self, fd: int | None = None) -> None:
        """A new record, or a predecessor's: takes ownership of ``fd``, also on error."""
        self.fd = memfd.create("holdfast-irqs", PAGE) if fd is None else fd
        try:
            memfd.require_sealed(self.fd, PAGE)
            self._mapping = Mapping(self.fd, PAGE)
        except BaseException:
            os.close(self.fd)
            raise

    def vectors(self, index: IrqIndex) -> int:
        """How many vectors of a type may be wired."""
        return self._mapping.load(8 * index, 8)

    def note(self, index: IrqIndex, vectors: int) -> None:
        """So many vectors are, or are about to be, wired; 0: none is."""
        self._mapping.store(8 * index, 8, vectors)

    def close(self) -> None:
        """Let it go. Idempotent."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            self._mapping.close()
            os.close(fd)
