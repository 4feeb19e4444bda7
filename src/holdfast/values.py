# SPDX-License-Identifier: Apache-2.0
"""Small frozen values that never mix: addresses, regions, interrupts, permissions, targets.

An :class:`Iova` is an ``int`` that refuses to be added to another Iova, because an address plus an
address is always a mistake. Everything else here is a frozen dataclass or an enumeration.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NewType, Self

from holdfast.errors import BadTarget

LeaseId = NewType("LeaseId", int)


class Iova(int):
    """An I/O virtual address: what the function puts on the bus.

    ``Iova + int`` and ``Iova - int`` are Iovas, ``Iova - Iova`` is a plain distance in bytes, and
    ``Iova + Iova`` is a TypeError.
    """

    __slots__ = ()

    def __add__(self, other: int) -> Iova:
        if isinstance(other, Iova):
            raise TypeError("an Iova cannot be added to an Iova")
        return Iova(int(self) + other)

    def __sub__(self, other: int) -> int:
        distance = int(self) - int(other)
        return distance if isinstance(other, Iova) else Iova(distance)

    def __repr__(self) -> str:
        return f"Iova({int(self):#x})"


class Perm(enum.IntFlag):
    """What a function may do with mapped memory (VFIO_DMA_MAP_FLAG_READ/WRITE, linux/vfio.h)."""

    READ = 1
    WRITE = 2
    RW = 3


class Access(enum.StrEnum):
    """How clients share a function (design: access modes)."""

    EXCLUSIVE = "exclusive"
    SHARED = "shared"
    MEDIATED = "mediated"


class Policy(enum.StrEnum):
    """What happens to a dead client's transfers."""

    DRAIN = "drain"
    REVOKE = "revoke"
    RELEASE = "release"


class IrqIndex(enum.IntEnum):
    """Interrupt types in VFIO's order (linux/vfio.h, VFIO_PCI_*_IRQ_INDEX)."""

    INTX = 0
    MSI = 1
    MSIX = 2
    ERR = 3
    REQ = 4


CONFIG_REGION = 7
"""Region index of PCI configuration space (linux/vfio.h, VFIO_PCI_CONFIG_REGION_INDEX)."""


@dataclass(frozen=True, slots=True)
class Area:
    """A piece of a region, in bytes from its start."""

    offset: int
    size: int

    @property
    def end(self) -> int:
        return self.offset + self.size


@dataclass(frozen=True, slots=True)
class Region:
    """One region of a function: BAR 0-5, ROM 6, configuration space 7.

    ``size`` 0 means that the region is not implemented. ``areas`` are the pieces that can be
    mapped; ``file_offset`` is where offset 0 of the region lies in the descriptor to map.
    """

    index: int
    size: int
    readable: bool = True
    writable: bool = True
    areas: tuple[Area, ...] = ()
    file_offset: int = 0


@dataclass(frozen=True, slots=True)
class IrqInfo:
    """One interrupt type: how many vectors, and whether they can be wired to eventfds."""

    index: IrqIndex
    count: int
    eventfd: bool = True


@dataclass(frozen=True, slots=True)
class DoorbellInfo:
    """A register that can be rung through an eventfd instead of a message.

    Every count added to the eventfd stands for one write of ``value`` (``size`` bytes wide) at
    ``offset``. With ``value`` None any write rings, and the value written is lost
    (KVM_IOEVENTFD without DATAMATCH).
    """

    offset: int
    size: int
    value: int | None


@dataclass(frozen=True, slots=True)
class Promises:
    """What a backend can promise about the function's reach.

    strict_unmap
        After an unmap returned, no access through the unmapped IOVAs lands any more.
    reset
        The function has a reset. Whether it stops DMA is for the driver to declare.
    assign_bars
        Nobody has given the BARs addresses: whoever takes the function over must, as firmware
        would. False for real hardware, where the system has.
    """

    strict_unmap: bool
    reset: bool
    assign_bars: bool = False


@dataclass(frozen=True, slots=True)
class Handover:
    """What a successor needs to go on with something that this process holds.

    fds
        descriptors by name. They stay the giver's: who wants to outlive it takes duplicates, which
        refer to the same open files
    notes
        what else must be known, as JSON has it: numbers, strings, lists and mappings only
    """

    fds: Mapping[str, int] = field(default_factory=dict)
    notes: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Bdf:
    """A PCI address, ``DDDD:BB:DD.F``."""

    domain: int
    bus: int
    device: int
    function: int

    @classmethod
    def parse(cls, text: str) -> Self:
        match = re.fullmatch(r"([0-9a-fA-F]{4}):([0-9a-fA-F]{2}):([01][0-9a-fA-F])\.([0-7])", text)
        if match is None:
            raise BadTarget("not a PCI address", operation="parse", target=text)
        domain, bus, device, function = (int(part, 16) for part in match.groups())
        return cls(domain, bus, device, function)

    def __str__(self) -> str:
        return f"{self.domain:04x}:{self.bus:02x}:{self.device:02x}.{self.function:x}"


SCHEMES = ("emu", "vfio-user", "qemu", "pci")
PCI_BACKENDS = ("type1", "iommufd", "uio")
"""What ``backend=`` of a ``pci:`` target may say."""


def _check_options(options: dict[str, str], text: str) -> None:
    """Raise BadTarget for options of a ``pci:`` target that mean nothing."""
    for key, value in options.items():
        good = {
            "backend": value in PCI_BACKENDS,
            "dma_bits": value.isdecimal() and 16 <= int(value) <= 64,
        }.get(key)
        if not good:
            what = f"{key}={value!r} is out of place" if good is False else f"no option {key!r}"
            raise BadTarget(
                what,
                operation="parse target",
                target=text,
                hint=f"backend={'|'.join(PCI_BACKENDS)}, dma_bits=16..64",
            )


@dataclass(frozen=True, slots=True)
class Target:
    """A parsed target: ``scheme:rest``. The grammar is the same in the CLI and in the API.

    ``rest`` may end in options, ``?key=value&key=value``.
    """

    scheme: str
    rest: str

    @classmethod
    def parse(cls, text: str) -> Self:
        scheme, colon, rest = text.partition(":")
        if not colon or scheme not in SCHEMES or not rest:
            raise BadTarget("unknown target", operation="parse target", target=text)
        if scheme == "vfio-user" and not rest.startswith("/"):
            raise BadTarget(
                "the socket path must be absolute", operation="parse target", target=text
            )
        if scheme == "pci":
            address, mark, options = rest.partition("?")
            rest = f"{Bdf.parse(address)}{mark}{options}"
            _check_options(cls(scheme, rest).options, text)
        return cls(scheme, rest)

    @property
    def bdf(self) -> Bdf:
        """The PCI address of a ``pci:`` target."""
        return Bdf.parse(self.rest.partition("?")[0])

    @property
    def options(self) -> dict[str, str]:
        """What follows the ``?``. A key without ``=`` has an empty value."""
        _, _, text = self.rest.partition("?")
        pairs = (item.partition("=") for item in text.split("&") if item)
        return {key: value for key, _, value in pairs}

    def __str__(self) -> str:
        return f"{self.scheme}:{self.rest}"
