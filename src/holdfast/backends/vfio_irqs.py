# SPDX-License-Identifier: Apache-2.0
"""Interrupts of a VFIO function: what is wired to which eventfd.

Facts (drivers/vfio/pci/vfio_pci_intrs.c). INTx, MSI and MSI-X exclude each other. To disable a
type that is not wired is EINVAL. A type with NORESIZE (MSI; MSI-X before 6.5) gets its vectors when
it is first wired: more come only after all were disabled.

Consequence. What is wired has to be remembered, as descriptors that stay ours: the caller may
close its own, and its number may then be another file's.

Choice. Duplicates of the eventfds, for NORESIZE types only. When one grows, everything is disabled
and wired anew, and every eventfd wired before is rung once, since an interrupt may have been lost
in between: who waits looks at the device and finds out. What is wired is recorded for a successor
(``vfio_irq_record``). It has not the duplicates: a NORESIZE type grows there only if every vector
of before is named anew.

Cost. A descriptor per vector, and a spurious interrupt when a NORESIZE type grows.
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Final

from holdfast.backends.vfio_irq_record import IrqRecord
from holdfast.errors import BadAccess, Busy, NotSupported, SystemFailure
from holdfast.kernel import events
from holdfast.kernel import vfio_device as kernel
from holdfast.kernel.failure import failure
from holdfast.uapi import vfio as u
from holdfast.values import IrqIndex, IrqInfo

_INHERITED: Final = -2
"""In a table of eventfds: a vector that a predecessor wired, to one that is not known here."""

_EXCLUSIVE: Final = (IrqIndex.INTX, IrqIndex.MSI, IrqIndex.MSIX)


class Irqs:
    """The interrupts behind a device descriptor, which is borrowed. Any thread.

    ``request_fd`` is an eventfd wired to VFIO's device request, owned here; None if there is none.
    """

    def __init__(
        self,
        device: AbstractContextManager[int],
        target: str,
        record: IrqRecord | None = None,
        request_fd: int | None = None,
    ) -> None:
        """With a predecessor's ``record`` and ``request_fd`` (owned here, also on error) nothing is
        wired: it is already."""
        self._device = device
        self._target = target
        self._lock = threading.Lock()
        self._wired: dict[IrqIndex, list[int]] = {}
        self._inherited: set[IrqIndex] = set()
        self.request_fd = request_fd
        self.record = record
        try:
            self._look()
            if record is not None:
                self._inherit(record)
            else:
                self.record = IrqRecord()
                if self.infos[IrqIndex.REQ].count:
                    self.request_fd = events.make()
                    self._wire_request()
        except BaseException:
            self.close()
            raise

    def _look(self) -> None:
        with self._device as fd:
            found = {index: kernel.irq_info(fd, index, self._target) for index in IrqIndex}
        self._flags = {index: flags for index, (flags, _) in found.items()}
        self.infos = tuple(
            IrqInfo(index, count, bool(flags & u.IRQ_INFO_EVENTFD))
            for index, (flags, count) in found.items()
        )

    def _inherit(self, record: IrqRecord) -> None:
        for index in IrqIndex:
            vectors = min(record.vectors(index), self.infos[index].count)
            if vectors:
                fixed = self._flags[index] & u.IRQ_INFO_NORESIZE
                self._wired[index] = [_INHERITED] * vectors if fixed else []
                self._inherited.add(index)

    def wire(self, index: IrqIndex, start: int, eventfds: Sequence[int]) -> None:
        """Wire vectors ``start``... to eventfds, replacing earlier ones. Empty: disable the type.

        Raises BadAccess for vectors that are not there, Busy while another of INTx, MSI and MSI-X
        is wired, ResourceError if the system has not so many. If growing a NORESIZE type fails,
        the type is disabled afterwards; otherwise the vectors named are without an eventfd.

        REQ that is disabled goes back to ``request_fd``.
        """
        with self._lock:
            if not eventfds:
                self._disable(index)
                return
            count = self.infos[index].count
            if start < 0 or start + len(eventfds) > count:
                raise BadAccess(
                    f"vectors {start} to {start + len(eventfds) - 1} of {count}",
                    operation="set_irqs",
                    target=self._target,
                )
            self._require_alone(index)
            try:
                self._note(index, start + len(eventfds))
                if self._flags[index] & u.IRQ_INFO_NORESIZE:
                    self._wire_fixed(index, start, eventfds)
                else:
                    with self._device as fd:
                        kernel.set_eventfds(fd, index, start, eventfds, self._target)
                    self._wired[index] = []
            finally:
                self._note(index)

    def unmask_intx(self) -> None:
        """INTx was handled: let it be raised again. NotSupported while it is not wired."""
        with self._lock:
            if IrqIndex.INTX not in self._wired:
                raise NotSupported(
                    "INTx is not wired", operation="unmask_intx", target=self._target
                )
            with self._device as fd:
                kernel.unmask_irq(fd, IrqIndex.INTX, self._target)

    def close(self) -> None:
        """Close our eventfds; the kernel ends the interrupts with the device. Idempotent."""
        wired, self._wired = self._wired, {}
        for fds in wired.values():
            _close(fds)
        mine, self.request_fd = self.request_fd, None
        if mine is not None:
            os.close(mine)
        record, self.record = self.record, None
        if record is not None:
            record.close()

    def _require_alone(self, index: IrqIndex) -> None:
        for other in _EXCLUSIVE:
            if index in _EXCLUSIVE and other != index and other in self._wired:
                raise Busy(
                    f"{other.name} is wired, and {index.name} excludes it",
                    operation="set_irqs",
                    target=self._target,
                    hint=f"disable {other.name} first",
                )

    def _wire_fixed(self, index: IrqIndex, start: int, eventfds: Sequence[int]) -> None:
        """Wire vectors of a type that cannot grow while it is in use."""
        fresh = _duplicates(eventfds, self._target)
        old = self._wired.get(index, [])
        grows = bool(old) and start + len(fresh) > len(old)
        if grows and _INHERITED in old[:start]:
            _close(fresh)
            raise NotSupported(
                f"{index.name} cannot grow: vectors below {start} are a predecessor's",
                operation="set_irqs",
                target=self._target,
                hint="wire all vectors from 0 on",
            )
        table = old + [-1] * (start + len(fresh) - len(old))
        replaced = table[start : start + len(fresh)]
        table[start : start + len(fresh)] = fresh
        try:
            with self._device as fd:
                if grows:
                    self._turn_off(fd, index)
                    del self._wired[index]
                    kernel.set_eventfds(fd, index, 0, table, self._target)
                else:
                    kernel.set_eventfds(fd, index, start, fresh, self._target)
        except BaseException:
            _close(fresh)
            if grows:
                # Nothing is wired now, or the disabling failed and everything is as it was.
                _close(old if index not in self._wired else [])
            elif old:
                # The kernel takes the whole block away (vfio_msi_set_block).
                _close(replaced)
                old[start : start + len(fresh)] = [-1] * len(fresh)
            raise
        self._wired[index] = table
        _close(replaced)
        if grows:
            _ring([fd for fd in old if fd not in replaced])

    def _disable(self, index: IrqIndex) -> None:
        if index not in self._wired:
            return
        with self._device as fd:
            self._turn_off(fd, index)
        _close(self._wired.pop(index))
        self._note(index)
        if index is IrqIndex.REQ:
            self._wire_request()

    def _turn_off(self, fd: int, index: IrqIndex) -> None:
        try:
            kernel.disable_irqs(fd, index, self._target)
        except SystemFailure as error:
            # A predecessor may have been killed when it was about to wire it.
            if index not in self._inherited or error.errno != errno.EINVAL:
                raise
        self._inherited.discard(index)

    def _note(self, index: IrqIndex, at_least: int = 0) -> None:
        """Record what is wired, or is about to be."""
        if self.record is not None:
            wired = len(self._wired[index]) or 1 if index in self._wired else 0
            self.record.note(index, max(wired, at_least))

    def _wire_request(self) -> None:
        if self.request_fd is not None:
            with self._device as fd:
                kernel.set_eventfds(fd, IrqIndex.REQ, 0, [self.request_fd], self._target)


def _duplicates(eventfds: Sequence[int], target: str) -> list[int]:
    found: list[int] = []
    try:
        for fd in eventfds:
            found.append(os.dup(fd))  # noqa: PERF401 - what is open must be closed if one fails
    except OSError as error:
        _close(found)
        raise failure(error, "set_irqs", target) from error
    return found


def _ring(fds: Sequence[int]) -> None:
    for fd in fds:
        if fd >= 0:
            try:
                events.ring(fd)
            except BlockingIOError:
                pass  # full: whoever waits for it is awake


def _close(fds: Sequence[int]) -> None:
    for fd in fds:
        if fd >= 0:
            os.close(fd)
