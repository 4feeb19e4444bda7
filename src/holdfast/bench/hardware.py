# SPDX-License-Identifier: Apache-2.0
"""A real function: how long deaths take against the kernel's own way, and pins against the ioctl.

Facts. When a process that holds VFIO alone is killed, the kernel takes bus mastering away, resets
the function if it can, unmaps and unpins (drivers/vfio/pci/vfio_pci_core.c
``vfio_pci_core_disable``). It asks nobody whether a transfer is running. A keeper lets it finish,
which on an edu device takes what is left of its 100 ms, and then unmaps, unpins and punches.

Choice. Both die in the same way, with the same memory mapped and a transfer just posted, in turns.
The keeper's times come from its log; the kernel's are seen from outside, as pins that are gone
(``nr_foll_pin_released``) and as a group that opens again. A pin in place and the bare ioctl are
measured in one process, on the same memory, in turns; with huge pages the ioctl has little to do,
so that the keeper's two round trips weigh more. All clocks are CLOCK_MONOTONIC.
"""

from __future__ import annotations

import errno
import mmap
import os
import signal
import statistics
import struct
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

import holdfast
from holdfast import backends
from holdfast.bench.plan import OPEN_TIMEOUT
from holdfast.bench.result import Goal, Result, ratios, times
from holdfast.errors import Busy, HoldfastError, NotSupported
from holdfast.keeper.access import BackendAccess, set_bus_master
from holdfast.keeper.client import LeaseClient, close_all, expect
from holdfast.kernel import iommufd, memfd, vfio_type1
from holdfast.kernel.mapping import PAGE
from holdfast.regs import edu as regs
from holdfast.torture import edu_scene
from holdfast.torture.actors import spawn
from holdfast.torture.edu_actors import NBYTES, engine_of
from holdfast.torture.outside import settle
from holdfast.values import Iova, Perm, Target
from holdfast.wire import lease as wire

FIGURES = ("kill_to_quiet", "quiet_to_released", "pin_256m", "pin_256m_huge")
MAPPED = 64 << 20
"""Bytes of memory that each of the dying has mapped."""
PINNED = 256 << 20
ROUNDS, QUICK_ROUNDS = 9, 2
PATIENCE = 60.0
MS = 1e-6
"""Milliseconds in a nanosecond."""
SLOWER = 1.05
"""How many times as long as the bare ioctl a pin may take."""
DMA_BITS = "39"
"""Address bits for pins: as many as every IOMMU translates."""
_TOLD = struct.Struct("<QQ")
_PAIR = struct.Struct("<dd")


@dataclass(slots=True)
class Deaths:
    """Nanoseconds of each death."""

    quiet: list[int] = field(default_factory=list)
    """Keeper: from the kill to the proof of quiet."""
    returned: list[int] = field(default_factory=list)
    """Keeper: from there to the memory's return."""
    whole: list[int] = field(default_factory=list)
    unpinned: list[int] = field(default_factory=list)
    """Kernel alone: from the kill until no page is pinned any more."""
    reopened: list[int] = field(default_factory=list)
    """Kernel alone: until the function can be opened again."""


def run_hardware(
    target: str,
    only: Iterable[str] = (),
    *,
    quick: bool = False,
    say: Callable[[str], None] = lambda _: None,
) -> list[Result]:
    """Measure the named figures, or all, on an edu device behind an IOMMU. For root.

    Forks: call it from a single-threaded process. ``say`` is told what is about to be measured.
    Raises NotSupported for other targets.
    """
    parsed = Target.parse(target)
    if parsed.scheme != "pci" or parsed.options.get("backend") == "uio":
        raise NotSupported(
            "only functions behind an IOMMU have figures of their own",
            operation="bench",
            target=target,
            hint="name one that `holdfast ls` shows as usable, or leave --target out",
        )
    chosen = set(only) or set(FIGURES)
    rounds = QUICK_ROUNDS if quick else ROUNDS
    found: list[Result] = []
    if chosen & {"kill_to_quiet", "quiet_to_released"}:
        say("deaths")
        found += _death_figures(_deaths(target, rounds))
    for name, huge in (("pin_256m", False), ("pin_256m_huge", True)):
        if name in chosen:
            say(name)
            found.append(_pin_figure(name, *_pins(parsed, rounds, huge=huge)))
    return [result for result in found if result.name in chosen]


# -- deaths ------------------------------------------------------------


def _deaths(target: str, rounds: int) -> Deaths:
    """Client with keeper, and process alone, in turns: both cannot have the function at once."""
    deaths = Deaths()
    for _ in range(rounds):
        with edu_scene.WarmStack(target) as stack:
            _die_under_keeper(stack, deaths)
        _die_alone(target, deaths)
    return deaths


def _die_under_keeper(stack: edu_scene.WarmStack, deaths: Deaths) -> None:
    def body(_: int, writing: int) -> None:
        card = holdfast.open(stack.target, access="exclusive", timeout=OPEN_TIMEOUT)
        engine_of(card)
        buffer = card.alloc(MAPPED)
        edu_scene.post_to(card.bars[regs.BAR].registers, int(buffer.iova), NBYTES)
        os.write(writing, _TOLD.pack(card.lease.number, 0))
        signal.pause()

    lease, killed = _killed(body)

    def unreleased() -> int:
        return int(stack.lease(lease)["state"] != "released")

    if settle(unreleased, goal=0, timeout=PATIENCE):
        raise HoldfastError("the lease was not released", operation="bench", target=stack.target)
    entered = {state: at for state, at, _ in stack.lease(lease)["log"]}
    deaths.quiet.append(entered["quiet"] - killed)
    deaths.returned.append(entered["released"] - entered["quiet"])
    deaths.whole.append(entered["released"] - killed)


def _die_alone(target: str, deaths: Deaths) -> None:
    """A process that holds function, address space and memory, with no keeper anywhere."""
    before = edu_scene.outstanding_pins()

    def body(_: int, writing: int) -> None:
        parsed = Target.parse(target)
        backend = backends.connect(parsed)
        fd = memfd.create("holdfast-bench", MAPPED)
        backend.dma_map(Iova(PAGE * 16), MAPPED, Perm.RW, fd, 0)
        set_bus_master(backend, parsed, on=True)
        access = BackendAccess(backend, target)
        edu_scene.post_to(access.bar(regs.BAR), PAGE * 16, NBYTES)
        os.write(writing, _TOLD.pack(0, 0))
        signal.pause()

    _, killed = _killed(body)
    opener = spawn(_open_again(target))
    try:
        if settle(lambda: edu_scene.outstanding_pins() - before, goal=0, timeout=PATIENCE) > 0:
            raise HoldfastError("its pins are not gone", operation="bench", target=target)
        deaths.unpinned.append(time.monotonic_ns() - killed)
        told = opener.read(_TOLD.size, PATIENCE)
        if len(told) != _TOLD.size:
            raise HoldfastError("it does not open again", operation="bench", target=target)
        deaths.reopened.append(_TOLD.unpack(told)[0] - killed)
    finally:
        opener.kill()
        opener.reap()


def _killed(body: Callable[[int, int], None]) -> tuple[int, int]:
    """Kill a process that has just posted; what it told, and when it was killed (ns)."""
    child = spawn(body)
    try:
        told = child.read(_TOLD.size, PATIENCE)
        killed = child.kill()
    finally:
        child.reap()
    if len(told) != _TOLD.size:
        raise HoldfastError("a process ended before its transfer ran", operation="bench")
    return int(_TOLD.unpack(told)[0]), killed


def _open_again(target: str) -> Callable[[int, int], None]:
    """Try to open a function until the kernel lets it; tells when the last try began."""

    def body(_: int, writing: int) -> None:
        while True:
            begun = time.monotonic_ns()
            try:
                backend = backends.connect(Target.parse(target))
            except Busy:
                continue
            os.write(writing, _TOLD.pack(begun, 0))
            backend.close()
            return

    return body


def _death_figures(deaths: Deaths) -> list[Result]:
    kernel = {
        "kernel_unpinned_ms": times(deaths.unpinned, MS),
        "kernel_reopened_ms": times(deaths.reopened, MS),
        "kill_to_released_ms": times(deaths.whole, MS),
    }
    return [
        Result(
            "kill_to_quiet",
            statistics.median(deaths.quiet) * MS,
            "ms",
            statistics.median(deaths.unpinned) / statistics.median(deaths.quiet),
            "the kernel's own VFIO close of a killed process, which does not wait for the transfer,"
            " until its pins are gone (medians)",
            detail={"ms": times(deaths.quiet, MS), **kernel},
        ),
        Result(
            "quiet_to_released",
            statistics.median(deaths.returned) * MS,
            "ms",
            statistics.median(deaths.unpinned) / statistics.median(deaths.returned),
            f"the same, with as much memory mapped ({MAPPED >> 20} MiB); medians",
            detail={"ms": times(deaths.returned, MS), **kernel},
        ),
    ]


# -- pins ------------------------------------------------------------


def _pins(target: Target, rounds: int, *, huge: bool) -> tuple[list[float], list[float]]:
    """Seconds of ``Device.pin``, and of the bare ioctl on the same memory."""
    # An edu device has 28 address bits, which are too few; no transfer runs here.
    options = {**target.options, "dma_bits": DMA_BITS}
    wide = f"pci:{target.bdf}?" + "&".join(f"{key}={value}" for key, value in options.items())

    def body(_: int, writing: int) -> None:
        with holdfast.open(wide, access="exclusive", timeout=OPEN_TIMEOUT) as card:
            memory = _memory(huge=huge)
            for _ in range(rounds + 1):
                begun = time.perf_counter()
                pin = card.pin(memory)
                own = time.perf_counter() - begun
                if pin.how != "in place":
                    raise NotSupported(f"it is {pin.how}", operation="bench pin", target=wide)
                pin.free()
                os.write(writing, _PAIR.pack(own, _bare_pin(card, memory)))

    with edu_scene.WarmStack(wide):
        child = spawn(body)
        told = child.read(_PAIR.size * (rounds + 1), 10 * PATIENCE)
        if child.reap() != 0 or len(told) != _PAIR.size * (rounds + 1):
            raise HoldfastError("a pin failed", operation="bench pin", target=wide)
    pairs = list(_PAIR.iter_unpack(told))[1:]  # the first one also warms up
    return [own for own, _ in pairs], [bare for _, bare in pairs]


def _memory(*, huge: bool) -> npt.NDArray[np.uint8]:
    """Anonymous memory in pages of 4 KiB, or in huge ones where the kernel has some."""
    memory = mmap.mmap(-1, PINNED, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    try:
        memory.madvise(mmap.MADV_HUGEPAGE if huge else mmap.MADV_NOHUGEPAGE)
    except OSError as error:
        if error.errno != errno.EINVAL:  # a kernel without huge pages
            raise
    array = np.frombuffer(memory, np.uint8)
    array[:] = 1
    return array


def _bare_pin(card: holdfast.Device, memory: npt.NDArray[np.uint8]) -> float:
    """Seconds of the ioctl alone, where the keeper made room; undone before this returns."""
    if not isinstance(card.lease, LeaseClient):
        raise NotSupported("no lease of a keeper", operation="bench pin")
    address = memory.ctypes.data
    reply, fds = card.lease.request(wire.Pin(address=address, nbytes=memory.nbytes, writable=True))
    try:
        here = expect(reply, wire.PinHere)
        first = address - address % PAGE
        if here.kind == "type1":
            begun = time.perf_counter()
            vfio_type1.map_memory(fds[0], here.iova, here.size, Perm.RW, first)
            taken = time.perf_counter() - begun
            undone = vfio_type1.unmap(fds[0], here.iova, here.size)
        else:
            begun = time.perf_counter()
            iommufd.map_memory(fds[0], here.ioas, here.iova, here.size, Perm.RW, first)
            taken = time.perf_counter() - begun
            undone = iommufd.unmap(fds[0], here.ioas, here.iova, here.size)
        if undone != here.size:
            raise HoldfastError(f"{undone} bytes unmapped", operation="bench pin")
    finally:
        close_all(fds)
    card.lease.request(wire.Unpin(pin=here.pin))
    return taken


def _pin_figure(name: str, own: Sequence[float], bare: Sequence[float]) -> Result:
    return Result(
        name,
        statistics.median(own) * 1e3,
        "ms",
        statistics.median(bare) / statistics.median(own),
        "the bare ioctl in the same process, on the same memory, in turns (medians)",
        (Goal(1 / SLOWER),),
        detail={
            "ms": times(own, 1e3),
            "bare_ms": times(bare, 1e3),
            "ratio": ratios([b / o for o, b in zip(own, bare, strict=True)]),
        },
    )
