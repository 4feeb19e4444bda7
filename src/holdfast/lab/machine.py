# SPDX-License-Identifier: Apache-2.0
"""What a guest is made of: the description users give, and the devices it turns into.

A function specification is ``KIND[,PROPERTY=VALUE]...[@PLACE]``:

=============  ==================================================================================
``edu``        on the root bus: no reset at all; the first one is 0000:00:03.0
``edu@port``   behind a PCI Express root port of its own: has a bus reset, can be unplugged
``edu@bridge`` behind the one PCIe-to-PCI bridge: all functions there are one IOMMU group, because
               a conventional bus does not say which device a request comes from
=============  ==================================================================================

Functions are named f0, f1, ... in the order given. Where they will be is written as a path of
slots, because bus numbers are the firmware's to choose; the guest finds the address itself.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from holdfast.errors import UsageError

KINDS: Final = {"edu": "edu", "nvme": "nvme"}
"""Kinds of functions, and QEMU's names for the devices."""
PLACES: Final = ("root", "port", "bridge")
DRIVERS: Final = ("vfio-pci", "uio_pci_generic", "none")
KERNELS: Final = ("stock", "full")

MAX_FUNCTIONS: Final = 8
FIRST_SLOT: Final = 3
"""Of functions on the root bus; 0 is the host bridge, 1 and 2 are left for a display and a NIC."""
FIRST_PORT_SLOT: Final = 0x10
BRIDGE_PORT_SLOT: Final = 0x1C

_PROPERTY: Final = re.compile(r"[a-z0-9_.-]+=[A-Za-z0-9_.-]+")
_MEMORY: Final = re.compile(r"([1-9][0-9]*)([MG])")
_NUMBER: Final = re.compile(r"0x[0-9a-fA-F]+|0|[1-9][0-9]*")
_DRIVE_SIZE: Final = "64M"
_ROOT: Final = "/sys/devices/pci0000:00"


@dataclass(frozen=True, slots=True)
class Guest:
    """A machine to boot. Nothing is checked before :func:`holdfast.lab.run`.

    ``kernel`` is ``stock`` (Debian's), ``full`` (``holdfast lab kernel``) or the path of a kernel
    image with everything built in. ``driver`` is bound to every function before the command
    starts (``none``: left alone). ``hugepages`` of 2 MiB are set aside at boot. ``append`` goes to
    the kernel's command line. ``timeout`` is in seconds, from start to power-off.
    """

    kernel: str = "stock"
    functions: tuple[str, ...] = ("edu",)
    iommu: bool = True
    memory: str = "2G"
    cpus: int = 2
    driver: str = "vfio-pci"
    hugepages: int = 0
    append: str = ""
    timeout: float = 600.0


@dataclass(frozen=True, slots=True)
class PlacedFunction:
    """A function in its place. ``path`` is a shell pattern that fits its directory in sysfs."""

    name: str
    place: str
    path: str
    devices: tuple[str, ...]
    """Values for QEMU's ``-device``, in order."""
    drive: bool


def memory_bytes(text: str) -> int:
    """``2G`` or ``512M`` in bytes."""
    if (found := _MEMORY.fullmatch(text)) is None:
        raise UsageError(f"not a size: {text!r}", operation="lab", hint="write 512M or 2G")
    return int(found[1]) << {"M": 20, "G": 30}[found[2]]


def check(guest: Guest) -> None:
    """Raise UsageError for what can be seen to be wrong before a machine is started."""
    wrong = ""
    if memory_bytes(guest.memory) < 768 << 20:
        wrong = "a guest needs at least 768M: its root file system is in memory"
    elif not 1 <= guest.cpus <= 8:
        wrong = f"{guest.cpus} processors: must be 1 to 8"
    elif guest.driver not in DRIVERS:
        wrong = f"driver {guest.driver!r}: must be one of {', '.join(DRIVERS)}"
    elif guest.hugepages < 0 or guest.hugepages << 21 > memory_bytes(guest.memory) // 2:
        wrong = f"{guest.hugepages} huge pages of 2 MiB: at most half of {guest.memory}"
    elif guest.timeout <= 0:
        wrong = "the timeout must be positive"
    elif "\n" in guest.append:
        wrong = "a kernel command line is one line"
    elif guest.kernel not in KERNELS and not Path(guest.kernel).is_file():
        wrong = f"kernel {guest.kernel!r}: neither stock nor full, nor a file"
    if wrong:
        raise UsageError(wrong, operation="lab")
    place_functions(guest.functions)


def place_functions(specs: tuple[str, ...]) -> list[PlacedFunction]:
    """Turn specifications into devices and places; UsageError if one is not understood."""
    if len(specs) > MAX_FUNCTIONS:
        raise UsageError(f"at most {MAX_FUNCTIONS} functions in a guest", operation="lab")
    placed: list[PlacedFunction] = []
    for index, spec in enumerate(specs):
        body, _, place = spec.partition("@")
        kind, *properties = body.split(",")
        place = place or "root"
        bad = [text for text in properties if not _PROPERTY.fullmatch(text)]
        if kind not in KINDS or place not in PLACES or bad:
            raise UsageError(
                f"function {spec!r} is not understood",
                operation="lab",
                hint=f"write KIND[,PROPERTY=VALUE]...[@PLACE] with KIND one of {', '.join(KINDS)} "
                f"and PLACE one of {', '.join(PLACES)}, for example edu,dma_mask=0xffffffff@port",
            )
        name = f"f{index}"
        device = ",".join([KINDS[kind], f"id={name}", *properties])
        drive = kind == "nvme"
        if drive:
            device += f",serial=holdfast-{name},drive=d{name}"
        placed.append(_place(name, place, device, drive, [one.place for one in placed]))
    return placed


def _place(name: str, place: str, device: str, drive: bool, before: list[str]) -> PlacedFunction:
    """Give a device its slot; ``before`` are the places of the functions already there."""
    nth = before.count(place)
    if place == "root":
        slot = FIRST_SLOT + nth
        path = f"{_ROOT}/0000:00:{slot:02x}.0"
        return PlacedFunction(name, place, path, (f"{device},addr={slot:#x}",), drive)
    if place == "port":
        slot = FIRST_PORT_SLOT + nth
        port = f"pcie-root-port,id=port-{name},chassis={slot},slot={slot},addr={slot:#x}"
        path = f"{_ROOT}/0000:00:{slot:02x}.0/0000:*:00.0"
        return PlacedFunction(name, place, path, (port, f"{device},bus=port-{name}"), drive)
    slot = BRIDGE_PORT_SLOT
    bridge = (
        f"pcie-root-port,id=port-bridge,chassis={slot},slot={slot},addr={slot:#x}",
        "pcie-pci-bridge,id=bridge,bus=port-bridge",
    )
    # Slot 0 of the conventional bus belongs to the bridge's hot-plug controller.
    path = f"{_ROOT}/0000:00:{slot:02x}.0/0000:*:00.0/0000:*:{1 + nth:02x}.0"
    own = f"{device},bus=bridge,addr={1 + nth:#x}"
    return PlacedFunction(name, place, path, ((*bridge, own) if not nth else (own,)), drive)


def properties(function: PlacedFunction) -> dict[str, str | int]:
    """The function's device as arguments of QMP's ``device_add``, where numbers are no strings."""
    driver, *pairs = function.devices[-1].split(",")
    found: dict[str, str | int] = {"driver": driver}
    for pair in pairs:
        name, _, value = pair.partition("=")
        number = name not in {"id", "bus", "addr", "serial", "drive"} and _NUMBER.fullmatch(value)
        found[name] = int(value, 0) if number else value
    return found


def device_arguments(placed: list[PlacedFunction], directory: Path) -> list[str]:
    """QEMU's arguments for the functions; ``directory`` takes the images of their drives."""
    found: list[str] = []
    for function in placed:
        if function.drive:
            image = directory / f"{function.name}.img"
            with image.open("wb") as file:
                file.truncate(memory_bytes(_DRIVE_SIZE))
            path = str(image).replace(",", ",,")  # as QEMU wants commas in a value
            found += ["-drive", f"if=none,id=d{function.name},format=raw,file={path}"]
        for device in function.devices:
            found += ["-device", device]
    return found
