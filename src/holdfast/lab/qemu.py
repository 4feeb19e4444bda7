# SPDX-License-Identifier: Apache-2.0
"""Which QEMU, which accelerator, and its command line.

Facts: Debian's stable QEMU differs from host to host, and with it the device models (edu's range
check changed in 8.2.1 and 9.1; the ``cmpxchg16b`` of 7.2's emulation is wrong, on which a 6.12
kernel oopses in its slab allocator). ``/dev/kvm`` may exist, open, and still not run a guest.
Choice: one QEMU for all hosts, from Debian's backports, unpacked in the cache and started by its
own loader; the host's own only where that cannot be had. KVM only after a small guest really
reached user space with it; that verdict holds until the host is booted again. Cost: 170 MB, and
ten seconds once.
"""

from __future__ import annotations

import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from holdfast.lab import cache, packages
from holdfast.lab.cpio import Writer
from holdfast.lab.failure import LabUnavailable
from holdfast.lab.machine import Guest

PACKAGE: Final = "qemu-system-x86"
PROGRAM: Final = "qemu-system-x86_64"
RECIPE: Final = "2"
KVM: Final = Path("/dev/kvm")
BOOT_ID: Final = Path("/proc/sys/kernel/random/boot_id")
PROBE_DEADLINE: Final = 20.0
"""Seconds. With KVM that works the probe takes two."""
PORTS: Final = ("output", "records", "questions")
"""Serial ports after the console. To the first two the guest only writes: they are pipes, since
QEMU writes byte by byte, and a socket's buffer is full after a few hundred of such writes."""
PIPES: Final = ("output", "records")
SOCKETS: Final = ("questions", "monitor")

_PROBE_INIT: Final = b"""#!/busybox sh
/busybox mkdir /dev
/busybox mount -t devtmpfs dev /dev
echo holdfast >/dev/ttyS1
/busybox poweroff -f
"""


@dataclass(frozen=True, slots=True)
class Emulator:
    """A QEMU that can be started."""

    command: tuple[str, ...]
    own: bool
    """The lab's, not the host's."""
    kvm: bool = False

    @property
    def accelerator(self) -> str:
        """For people."""
        return "KVM" if self.kvm else "TCG (software emulation)"


@dataclass(frozen=True, slots=True)
class Boot:
    """Everything of a machine that is not in its description."""

    kernel: Path
    initrd: Path
    console: Path
    devices: tuple[str, ...]
    ports: Mapping[str, int]
    """QEMU's ends of :data:`PIPES` and :data:`SOCKETS`; any of them may be missing."""


def find(progress: Callable[[str], None]) -> Emulator:
    """The lab's QEMU, fetched if need be, else the host's; without looking at KVM."""

    def build(place: Path) -> None:
        progress("fetching QEMU from Debian's backports")
        root = place / "root"
        packages.fetch([PACKAGE], root, backports=True)
        for name in ("usr/share/doc", "usr/share/locale", "usr/share/man", "var", "boot"):
            shutil.rmtree(root / name, ignore_errors=True)
        _check(_own(root))

    key = cache.key(RECIPE, packages.SUITE, PACKAGE)
    try:
        return _own(cache.get("qemu", key, build) / "root")
    except LabUnavailable as error:
        if (found := shutil.which(PROGRAM)) is None:
            raise
        progress(f"using the host's QEMU; the lab's own cannot be had: {error.what}")
        return Emulator((found,), own=False)


def _own(root: Path) -> Emulator:
    data = [str(root / "usr/share" / name) for name in ("qemu", "seabios")]
    program = str(root / "usr/bin" / PROGRAM)
    return Emulator((*packages.loader(root), program, "-L", data[0], "-L", data[1]), own=True)


def _check(emulator: Emulator) -> None:
    done = subprocess.run(
        [*emulator.command, "--version"], capture_output=True, text=True, check=False
    )
    if done.returncode or not done.stdout.startswith("QEMU"):
        raise LabUnavailable(
            f"Debian's QEMU does not start here: {done.stderr.strip()[-300:]}", operation="lab"
        )


def with_kvm(
    emulator: Emulator, kernel: Path, busybox: Path, progress: Callable[[str], None]
) -> Emulator:
    """The same emulator, with KVM if a guest really runs with it on this host.

    ``kernel`` and ``busybox`` (a static program) are what the probe boots.
    """
    accelerated = Emulator(emulator.command, emulator.own, kvm=True)
    if not os.access(KVM, os.R_OK | os.W_OK):
        return emulator
    boot = BOOT_ID.read_text().strip()
    name = f"kvm-{cache.key(*emulator.command, str(kernel))}"
    verdict = cache.directory() / f"{name}.json"
    with cache.lock(name):
        try:
            told = json.loads(verdict.read_text())
            if told["boot"] == boot:
                return accelerated if told["works"] else emulator
        except (OSError, ValueError, KeyError, TypeError):
            pass  # no verdict yet, or not a whole one
        progress("trying whether KVM works here")
        works = _probe(accelerated, kernel, busybox)
        verdict.write_text(json.dumps({"boot": boot, "works": works}) + "\n")
    return accelerated if works else emulator


def _probe(emulator: Emulator, kernel: Path, busybox: Path) -> bool:
    """Boot a guest that says one word, with a deadline."""
    with cache.scratch("probe") as place:
        with (place / "initrd").open("wb") as out, Writer(out) as writer:
            writer.directory("dev")
            writer.file_from("busybox", busybox, 0o755)
            writer.file("init", _PROBE_INIT, 0o755)
        near, far = os.pipe()
        try:
            guest = Guest(functions=(), memory="1G")
            boot = Boot(kernel, place / "initrd", place / "console", (), {"output": far})
            process = subprocess.Popen(
                arguments(emulator, guest, boot),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=(far,),
            )
        finally:
            os.close(far)
        try:
            return _says(near, b"holdfast", time.monotonic() + PROBE_DEADLINE)
        finally:
            process.kill()
            process.wait()
            os.close(near)


def _says(fd: int, word: bytes, deadline: float) -> bool:
    """Whether the word comes out of a pipe before the deadline and its end."""
    said = b""
    while word not in said:
        left = deadline - time.monotonic()
        if left <= 0 or not select.select([fd], [], [], left)[0]:
            return False
        if not (piece := os.read(fd, 256)):
            return False
        said += piece
    return True


def arguments(emulator: Emulator, guest: Guest, boot: Boot) -> list[str]:
    """The whole command line.

    The machine is a q35 with the interrupt controllers split, which interrupt remapping needs
    (QEMU's docs/system/i386); ``caching-mode`` makes the kernel report every change of a mapping,
    as real hardware may not ask for but vfio in QEMU would.
    """
    line = [*emulator.command, "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"]
    line += ["-machine", "q35,kernel-irqchip=split", "-m", guest.memory, "-smp", str(guest.cpus)]
    if emulator.kvm:
        line += ["-accel", "kvm", "-cpu", "host"]
    else:
        # Guest time is counted in instructions, 4 ns each. On a busy host 100 ms of a card's time
        # would else pass while the guest's processors wait for theirs.
        line += ["-accel", "tcg,thread=single", "-icount", "shift=2,sleep=on"]
        line += ["-cpu", "max" if emulator.own else "max,-cx16"]
    if emulator.own:
        # Not in all versions that hosts have.
        line += ["-run-with", "exit-with-parent=on"]
    line += ["-kernel", str(boot.kernel), "-initrd", str(boot.initrd)]
    line += ["-append", command_line(guest)]
    if guest.iommu:
        line += ["-device", "intel-iommu,intremap=on,caching-mode=on"]
    line += [
        "-chardev",
        f"file,id=console,path={escaped(boot.console)}",
        "-serial",
        "chardev:console",
    ]
    for number, name in enumerate(PIPES):
        if name in boot.ports:
            line += ["-add-fd", f"fd={boot.ports[name]},set={number}"]
            # Without "append" QEMU truncates what it opens, which a pipe refuses.
            line += ["-chardev", f"file,id={name},path=/dev/fdset/{number},append=on"]
    for name in SOCKETS:
        if name in boot.ports:
            line += ["-chardev", f"socket,id={name},fd={boot.ports[name]}"]
    for name in PORTS:
        if name in boot.ports:
            line += ["-serial", f"chardev:{name}"]
    if "monitor" in boot.ports:
        line += ["-mon", "chardev=monitor,mode=control"]
    return [*line, *boot.devices]


def escaped(path: Path) -> str:
    """A path as a value among QEMU's comma-separated options."""
    return str(path).replace(",", ",,")


def command_line(guest: Guest) -> str:
    """The kernel's command line. An oops ends the guest: it is never part of a good run."""
    words = ["console=ttyS0", "quiet", "panic=-1", "oops=panic", "log_buf_len=4M"]
    # The timer check fails (and panics) where a busy host does not run the guest for a moment.
    words.append("no_timer_check")
    words.append("intel_iommu=on" if guest.iommu else "intel_iommu=off")
    if guest.hugepages:
        words += ["hugepagesz=2M", f"hugepages={guest.hugepages}"]
    return " ".join([*words, *guest.append.split()])
