# SPDX-License-Identifier: Apache-2.0
"""A pin: memory the process already has, made reachable for the function.

``how`` says what keeps it safe. *relayed*: the function's accesses arrive at the keeper as messages
and are carried out through this process's own ``/proc/self/mem``; when the process is dead they
fail, and nothing is written anywhere. *in place*: the process itself asked the kernel to pin its
pages on the I/O address space that the keeper also holds; these pins belong to open files, not to
the process, and outlive it until the keeper unmaps (drivers/vfio/vfio_iommu_type1.c,
drivers/iommu/iommufd/pages.c). *bounced*: the function never reaches the memory; what is moved
is copied through a buffer at the transfer's ends. The pin holds the Python object, so its memory
cannot be freed or moved while the function may reach it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from holdfast import steps
from holdfast.dma.sg import SgList
from holdfast.errors import BadBuffer, Closed, NotSupported
from holdfast.values import Iova


def flat_bytes(obj: Any, *, target: str = "") -> tuple[npt.NDArray[np.uint8], bool]:
    """``obj``'s memory as a flat byte array without a copy, and whether it is writable.

    Raises BadBuffer if it has no buffer, is empty, or is not C-contiguous.
    """
    try:
        view = memoryview(obj)
    except TypeError as error:
        raise BadBuffer(str(error), operation="pin", target=target) from error
    if not view.c_contiguous:
        raise BadBuffer(
            "the memory is not contiguous",
            operation="pin",
            target=target,
            hint="pin the array it is a part of, or a copy (numpy.ascontiguousarray)",
        )
    if not view.nbytes:
        raise BadBuffer("there is nothing to pin: 0 bytes", operation="pin", target=target)
    array = np.frombuffer(view, np.uint8)
    return array, not view.readonly


class Pin:
    """Pinned memory of this process. A context manager; dropped pins are taken away, too.

    Thread-safe. ``free()`` waits for nothing: if a transfer still uses the memory, the pin goes
    when the transfer is finished.
    """

    def __init__(
        self,
        obj: Any,
        data: npt.NDArray[np.uint8],
        iova: Iova,
        writable: bool,
        how: str,
        undo: Callable[[object | None], None],
    ) -> None:
        self._obj = obj
        self._data = data
        self.iova = iova
        self.nbytes = data.nbytes
        self.writable = writable
        """False for read-only memory: then only card-bound transfers are possible."""
        self.how = how
        """"relayed", "in place" or "bounced"."""
        self._undo: Callable[[object | None], None] | None = undo
        self._users = 0
        self._freed = False
        self._lock = threading.Lock()

    @property
    def array(self) -> npt.NDArray[np.uint8]:
        """The pinned bytes (a view, not a copy)."""
        return self._data

    @property
    def closed(self) -> bool:
        return self._freed

    @property
    def sg(self) -> SgList:
        """Where the function sees the memory. NotSupported for a bounced pin: nowhere."""
        self.require_open()
        if self.how == "bounced":
            raise NotSupported(
                "the function does not see a bounced pin's memory",
                operation="use pin",
                hint="hand the pin itself to device.dma",
            )
        return SgList.of([(self.iova, self.nbytes)])

    def require_open(self) -> None:
        """Raise Closed if the pin was freed."""
        if self._freed:
            raise Closed("the pin was freed", operation="transfer")

    def hold(self) -> object:
        """A transfer begins to use the memory, until :meth:`release`."""
        with self._lock:
            self.require_open()
            self._users += 1
        return self

    def release(self) -> None:
        """A transfer is done with the memory."""
        with self._lock:
            self._users -= 1
        self._maybe_undo()

    def free(self) -> None:
        """Take the pin away, at the latest when the last transfer is finished. Idempotent."""
        self._freed = True
        self._maybe_undo()

    def _maybe_undo(self, *, later: object | None = None) -> None:
        with self._lock:
            if not self._freed or self._users or self._undo is None:
                return
            undo, self._undo = self._undo, None
        steps.reach("client.unpin")
        undo(later)
        steps.reach("client.unpinned")
        self._obj = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.free()

    def __del__(self) -> None:
        # A transfer in flight holds a reference, so there are no users here. The collector may
        # run in the middle of a request: the pin is taken away with the next one, and the
        # memory is kept until then.
        if getattr(self, "_undo", None) is not None:
            self._freed = True
            self._maybe_undo(later=self._data)
