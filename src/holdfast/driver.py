# SPDX-License-Identifier: Apache-2.0
"""What a driver is: a keeper half that proves quiet, and a client half that posts.

The keeper half (:class:`Driver`) lives in the keeper, next to the function. It finds the engine,
grants channels to leases, and answers the only questions that matter after a death: is anything in
flight, and can it be stopped? The client half (:class:`Engine`) lives in the client and turns
arrays into descriptors. Both are written in one file, because both follow from one datasheet.

Subclass :class:`Driver`, set ``ids`` and ``engine``, and implement :meth:`Driver.in_flight` and
:meth:`Driver.stop`. What they return is believed: *in_flight* must be exact (0 only if the function
will not touch host memory until it is told to), and *stop* may return True only if the function
acknowledged it.

Threads: the keeper calls one method at a time, never from its event loop, and enforces deadlines
from outside: a driver that hangs is abandoned and the ladder goes on without it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from holdfast.dma.sg import SgList
from holdfast.errors import NotSupported
from holdfast.loading import load_class
from holdfast.poster import Bells, Poster
from holdfast.regs.view import RegisterView
from holdfast.values import IrqIndex, Target

if TYPE_CHECKING:
    from holdfast.device import Device
    from holdfast.dma.buffer import Buffer
    from holdfast.dma.pin import Pin
    from holdfast.transfer import Transfer


MAX_VECTORS = 64
"""Most vectors that a lease gets without a driver's choice: they travel in one message."""


class FunctionAccess(Protocol):
    """What the keeper lends to the keeper half: the function's registers."""

    def bar(self, index: int) -> RegisterView:
        """Registers of a BAR."""
        ...

    def config(self) -> RegisterView:
        """Configuration space."""
        ...

    def bar_size(self, index: int) -> int:
        """Size of a BAR in bytes; 0 if it is not implemented."""
        ...

    def vector_count(self, preferred: IrqIndex) -> int:
        """How many interrupt vectors are wired if the driver prefers this type."""
        ...


@dataclass(frozen=True, slots=True)
class ControlMemory:
    """DMA memory that the keeper gives to a lease's rings: written by both halves.

    ``data`` is a writable view of all of it, ``sg`` where the function sees it: without an IOMMU
    in pieces of whole pages. Zeroed when granted. Never available to ``alloc``.

    In the keeper, what is written to ``data`` may become visible to the function only with
    ``flush()``: call it before the function is told to fetch from there. The keeper calls it
    after :meth:`Driver.grant` in any case, and keeps nothing of ``data`` beyond that.
    """

    data: memoryview
    sg: SgList
    flush: Callable[[], None] = lambda: None

    def iovas(self, offsets: npt.NDArray[np.int64]) -> npt.NDArray[np.uint64]:
        """Where the function sees these byte offsets. Vectorised."""
        ends = np.cumsum(self.sg.lengths.astype(np.int64))
        piece = np.searchsorted(ends, offsets, side="right")
        starts = ends - self.sg.lengths.astype(np.int64)
        return self.sg.iovas[piece] + (offsets - starts[piece]).astype(np.uint64)

    def iova(self, offset: int) -> int:
        """Where the function sees one byte offset."""
        return int(self.iovas(np.array([offset]))[0])


@dataclass(frozen=True, slots=True)
class Grant:
    """What a lease may use: handed to the client half as plain data.

    vectors
        interrupt vectors that are this lease's own
    bells
        offsets of doorbell registers, as ``(bar, offset)``, that are this lease's own
    info
        anything else the client half needs; numbers, strings, lists and dicts only
    """

    vectors: tuple[int, ...] = ()
    bells: tuple[tuple[int, int], ...] = ()
    info: Mapping[str, Any] = field(default_factory=dict)


F = TypeVar("F", bound=Callable[..., Any])


def command(function: F) -> F:
    """Mark a method of a keeper half as callable by clients (``device.command(name, ...)``).

    The first argument after ``self`` is the tuple of the caller's channels; the rest are the
    caller's keyword arguments, which come from an untrusted process: check them. Results must be
    numbers, strings, bytes, lists or dicts.
    """
    function.__holdfast_command__ = True  # type: ignore[attr-defined]
    return function


class Driver:
    """Keeper half. The defaults describe a function of which nothing is known."""

    name: ClassVar[str] = "none"
    ids: ClassVar[tuple[tuple[int, int], ...]] = ()
    """``(vendor, device)`` pairs this driver is for."""
    dma_bits: ClassVar[int] = 64
    """How many address bits the function's DMA has: IOVAs stay below."""
    irq_index: ClassVar[IrqIndex] = IrqIndex.MSIX
    """The interrupt type the driver uses; falls back to MSI, then INTx."""
    stop_is_final: ClassVar[bool] = False
    """True if nobody but the keeper can start the engine again after :meth:`stop`.

    It does not count for a lease that has one of ``engine_bars`` mapped: whoever still has the
    window can.
    """
    engine_bars: tuple[int, ...] = tuple(range(6))
    """The BARs through which the engine can be started."""
    reset_stops_dma: ClassVar[bool] = False
    """True if an acknowledged function reset is known to stop DMA."""
    control_bytes: ClassVar[int] = 0
    """Control memory per channel that :meth:`grant` needs."""

    engine: ClassVar[type[Engine] | None] = None
    """The client half."""
    mediates: ClassVar[bool] = False
    """True if :meth:`poster` works: clients that do not trust each other can share the function."""

    def __init__(self, fn: FunctionAccess) -> None:
        self.fn = fn

    def probe(self) -> None:
        """Check that this is the function the driver is for, and bring it to a known idle state.

        Raise :class:`~holdfast.errors.DeviceError` if it is not. Bus mastering may be off: it is
        turned on once the function was seen at rest.
        """

    def resume(self) -> None:
        """Like :meth:`probe`, for a function that may be at work for leases of a dead keeper.

        Those leases live on with what was granted to them. Learn what the other methods need to
        know, by reading; change nothing. Here: nothing. Raise
        :class:`~holdfast.errors.DeviceError` if this is not the function that the driver is for.
        """

    def channels(self) -> int:
        """How many independent channels can be leased apart; 0: only the whole function."""
        return 0

    def default_channels(self) -> int:
        """How many channels a shared lease gets if it does not say."""
        return 1

    def grant(self, channels: Sequence[int], control: ControlMemory | None) -> Grant:
        """Prepare channels for a new lease. They are idle; ``control`` is zeroed.

        Here: every interrupt vector (at most :data:`MAX_VECTORS`), no doorbells.
        """
        count = min(self.fn.vector_count(self.irq_index), MAX_VECTORS)
        return Grant(vectors=tuple(range(count)))

    def drain(self, channels: Sequence[int]) -> None:
        """The lease is frozen and what it posted may finish. Stop what would never end."""

    def in_flight(self, channels: Sequence[int]) -> int:
        """How many transfers (or descriptors) of these channels are not finished. Exact."""
        raise NotSupported("this driver cannot tell", operation="in_flight", target=self.name)

    def failed(self, channels: Sequence[int]) -> bool:
        """True if a channel stopped with an error since it was granted."""
        return False

    def stop(self, channels: Sequence[int]) -> bool:
        """Stop the engine for these channels. True only if it acknowledged."""
        return False

    def poster(
        self, channels: Sequence[int], control: ControlMemory | None, bells: Bells
    ) -> Poster:
        """What posts checked requests on channels that :meth:`grant` has just started.

        Mediated access: the keeper holds the channels itself. ``control`` is what ``grant`` got;
        ``bells`` finds the doorbells it asked for. Raise NotSupported if the extent of the card's
        memory is not known, because then no request could be checked.
        """
        raise NotSupported(
            "this driver cannot post for others",
            operation="open mediated",
            target=self.name,
            hint="open it with access='shared' or 'exclusive', or use a driver with poster()",
        )

    def commands(self) -> dict[str, Callable[..., Any]]:
        """The methods marked with :func:`command`, by name."""
        found = {}
        for attribute in dir(type(self)):
            method = getattr(self, attribute)
            if getattr(method, "__holdfast_command__", False):
                found[attribute] = method
        return found


class Engine:
    """Client half: turns requests into descriptors. One per open device.

    Subclasses set ``retire`` in motion: a transfer must be kept alive (``self.keep``) until the
    function is done with it, so that dropped arrays are never DMA targets.
    """

    def __init__(self, device: Device) -> None:
        self.device = device

    def to_card(self, source: Buffer | Pin, address: int = 0, **options: Any) -> Transfer:
        """Copy a buffer to card address ``address``."""
        raise NotSupported("no card-bound transfers", operation="to_card", target=self._target())

    def from_card(self, into: Buffer | Pin, address: int = 0, **options: Any) -> Transfer:
        """Copy from card address ``address`` into a buffer."""
        raise NotSupported("no host-bound transfers", operation="from_card", target=self._target())

    def regranted(self) -> None:
        """The keeper stopped the channels and started them anew (fresh rings and doorbells)."""

    def close(self) -> None:
        """The device is being closed; called before the lease ends. Must not raise."""

    def _target(self) -> str:
        return str(self.device.target)


# -- finding drivers ------------------------------------------------------------

_BUILT_IN = {
    "edu": "holdfast.drivers.edu:EduDriver",
    "xdma": "holdfast.drivers.xdma:XdmaDriver",
}


def find(target: Target, vendor: int, device: int) -> type[Driver]:
    """The driver class for a target whose function has these ids.

    A user-written emulated function (``emu:FILE.py:Class``) names its own driver class in its
    ``driver`` attribute, in the same module; others are found by id. Without any, the base class:
    registers, memory and interrupts work, but nothing can be proven quiet.
    """
    if target.scheme == "emu" and ":" in target.rest:
        place = target.rest.partition("?")[0]
        function = load_class(place, object, target=str(target))
        own = getattr(function, "driver", None)
        if own:
            return load_class(f"{place.rpartition(':')[0]}:{own}", Driver, target=str(target))
    for spec in _BUILT_IN.values():
        loaded = load_class(spec, Driver, target=str(target))
        if (vendor, device) in loaded.ids:
            return loaded
    return Driver
