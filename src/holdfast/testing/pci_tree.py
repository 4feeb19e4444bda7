# SPDX-License-Identifier: Apache-2.0
"""A machine that is not there: sysfs, /dev and /proc as files below a directory, for tests.

Everything that reads the host's PCI functions takes the roots of these trees. The layout is the
kernel's, as far as Holdfast reads it. :meth:`PciTree.write` stands for the kernel: it does what
writes to ``driver_override``, ``unbind``, ``bind`` and ``drivers_probe`` would do. Not thread-safe.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from holdfast.kernel.pci_binding import UIO_DRIVER, VFIO_DRIVER, Machine
from holdfast.kernel.sysfs_writes import Write, WriteFailed, WriteHangs
from holdfast.values import Bdf

BOOT = "11111111-2222-3333-4444-555555555555"


class PciTree:
    """A machine below ``root``; starts without functions, as root with every capability."""

    def __init__(self, root: Path) -> None:
        self.sysfs, self.dev, self.proc = root / "sys", root / "dev", root / "proc"
        self.runtime = root / "run/holdfast"
        self.native: dict[str, str] = {}
        """By address, the driver that the kernel finds for a function by its ids."""
        self.held: set[str] = set()
        """Addresses whose unbind never returns."""
        self.broken: set[str] = set()
        """Drivers whose probe fails."""
        self.refused: dict[str, int] = {}
        """Name of an attribute to the errno that writing it gives."""
        self.written: list[str] = []
        """Every write, as a line of shell."""
        self.fill(self.sysfs, {"bus/pci/drivers_probe": "", "class/block/": "", "class/net/": ""})
        self.fill(self.dev, {"vfio/vfio": ""})
        self.fill(
            self.proc,
            {
                "cmdline": "quiet",
                "self/status": "Name:\tpython3\nCapEff:\t000001ffffffffff\n",
                "self/uid_map": "         0          0 4294967295\n",
                "self/limits": "Max locked memory         unlimited            unlimited   bytes\n",
                "self/cgroup": "0::/\n",
                "self/mountinfo": "",
                "mounts": "none /dev/hugepages hugetlbfs rw 0 0\n",
                "sys/kernel/random/boot_id": BOOT,
            },
        )
        for driver in (VFIO_DRIVER, UIO_DRIVER):
            self.driver(driver)

    @staticmethod
    def fill(root: Path, files: Mapping[str, str]) -> None:
        """Write files below ``root``; a name that ends in a slash is a directory."""
        for name, content in files.items():
            path = root / name
            (path if name.endswith("/") else path.parent).mkdir(parents=True, exist_ok=True)
            if not name.endswith("/"):
                path.write_text(content)

    def machine(self) -> Machine:
        """The same for ``pci_binding``; no module can be loaded."""
        return Machine(
            self.sysfs, self.dev, self.proc, self.runtime, self.write, modprobe="/bin/false"
        )

    # -- what there is ------------------------------------------------------------

    def driver(self, name: str) -> Path:
        """Load a driver."""
        directory = self.sysfs / "bus/pci/drivers" / name
        directory.mkdir(parents=True, exist_ok=True)
        return directory

    def add(
        self,
        address: str,
        *,
        ids: tuple[int, int] = (0x1234, 0x11E8),
        class_code: int = 0x00FF00,
        driver: str | None = None,
        group: int | None = 7,
        group_type: str = "DMA",
        reset: str = "flr",
    ) -> Bdf:
        """A function; ``driver`` is bound to it and is the one that the kernel finds for it."""
        here = self.sysfs / "devices/pci0000:00" / address
        attributes = {
            "vendor": f"{ids[0]:#06x}",
            "device": f"{ids[1]:#06x}",
            "subsystem_vendor": "0x1af4",
            "subsystem_device": "0x1100",
            "class": f"{class_code:#08x}",
            "revision": "0x10",
            "driver_override": "(null)\n",
            "resource": "0xfe700000 0xfe7fffff 0x40200\n" + "0x0 0x0 0x0\n" * 12,
        }
        if reset:
            attributes["reset_method"] = reset
        self.fill(here, attributes)
        _link(self.sysfs / "bus/pci/devices" / address, here)
        if group is not None:
            place = self.sysfs / "kernel/iommu_groups" / str(group)
            self.fill(place, {"type": f"{group_type}\n", "reserved_regions": ""})
            _link(place / "devices" / address, here)
            _link(here / "iommu_group", place)
        if driver is not None:
            self.native[address] = driver
            self.bind(address, driver)
        return Bdf.parse(address)

    def here(self, address: str) -> Path:
        """The function's directory."""
        return (self.sysfs / "bus/pci/devices" / address).resolve()

    def bind(self, address: str, driver: str | None) -> None:
        """Give the function to a driver, with what VFIO and UIO make then; None: take it away."""
        here = self.here(address)
        (here / "driver").unlink(missing_ok=True)
        for made in ("vfio-dev", "uio"):
            shutil.rmtree(here / made, ignore_errors=True)
        if driver is None:
            return
        _link(here / "driver", self.driver(driver))
        if driver == VFIO_DRIVER:
            (here / "vfio-dev/vfio0").mkdir(parents=True)
            if (here / "iommu_group").exists():
                self.fill(self.dev, {f"vfio/{(here / 'iommu_group').resolve().name}": ""})
        elif driver == UIO_DRIVER:
            (here / "uio/uio0").mkdir(parents=True)
            self.fill(self.dev, {"uio0": ""})

    def add_cdev(self, address: str) -> None:
        """Let a function bound to vfio-pci have a character device, and the kernel iommufd."""
        self.fill(self.here(address), {"vfio-dev/vfio0/dev": "511:0"})
        self.fill(self.dev, {"iommu": "", "vfio/devices/vfio0": ""})

    def process(
        self,
        pid: int,
        command: str,
        descriptors: Sequence[str] = (),
        *,
        syspath: str = "",
        maps: str = "",
    ) -> None:
        """A process with these links in its ``fd``; ``syspath`` is what fdinfo tells of each."""
        base = self.proc / str(pid)
        self.fill(base, {"comm": f"{command}\n", "maps": maps, "fd/": ""})
        for number, link in enumerate(descriptors, 3):
            (base / "fd" / str(number)).symlink_to(link)
            told = f"vfio-device-syspath: {syspath}\n" if syspath else ""
            self.fill(base, {f"fdinfo/{number}": f"pos:\t0\n{told}"})

    # -- the kernel ------------------------------------------------------------

    def write(self, writes: Sequence[Write], deadline: float) -> None:
        """What ``sysfs_writes.carry_out`` does, on this tree."""
        for write in writes:
            self.written.append(str(write))
            code = self.refused.get(write.path.name, 0)
            if code:
                raise WriteFailed(write, code)
            self._take(write)

    def _take(self, write: Write) -> None:
        name, value = write.path.name, write.text.strip()
        if name == "driver_override":
            write.path.write_text(value or "(null)\n")
        elif name == "unbind":
            if self._driver(value) != write.path.parent.name:
                raise WriteFailed(write, errno.ENODEV)
            self.bind(value, None)
            if value in self.held:
                raise WriteHangs(write)
        elif name == "bind":
            self._probe(value, write.path.parent.name)
        elif name == "drivers_probe" and self._driver(value) is None:
            override = (self.here(value) / "driver_override").read_text().strip()
            wanted = self.native.get(value) if override == "(null)" else override
            if wanted is not None:
                self._probe(value, wanted)

    def _probe(self, address: str, driver: str) -> None:
        if driver not in self.broken:
            self.bind(address, driver)

    def _driver(self, address: str) -> str | None:
        link = self.here(address) / "driver"
        return link.resolve().name if link.is_symlink() else None


def _link(link: Path, to: Path) -> None:
    link.parent.mkdir(parents=True, exist_ok=True)
    link.symlink_to(os.path.relpath(to, link.parent))
