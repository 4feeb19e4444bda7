# SPDX-License-Identifier: Apache-2.0
"""Does this kernel unmap for another process than the one that mapped? Found out, not assumed.

Facts. A client pins its own memory on the I/O address space that the keeper holds, and dies; the
keeper unmaps. In type1 a mapping belonged to the address space that made it: kernels that still
compare the two (``dma->task->mm != current->mm`` in vfio_dma_do_unmap) skip what another process
has mapped, and answer success with size 0. The pages then stay pinned, and within the function's
reach, until the last descriptor is closed.

Choice. The function is opened as a keeper would open it, a child maps memory of its own twice, and
we unmap: once while it lives, once when it is dead. Nothing is transferred; bus master stays off.
"""

from __future__ import annotations

import mmap
import select
import subprocess
import sys
from typing import IO, Final

import numpy as np

from holdfast import backends
from holdfast.backends.pci_limits import Finding
from holdfast.contracts import DmaContext, FunctionBackend
from holdfast.errors import HoldfastError
from holdfast.kernel import dma_pin
from holdfast.values import Bdf, Iova, Target

SIZE: Final = 64 * 1024
"""Bytes of each trial mapping."""
_FIRST: Final = 0x0100_0000
"""IOVA of the first: above what firmware reserves below 16 MiB, below every device's limit."""
_CHILD_TIMEOUT: Final = 60.0

NAME: Final = "unmap by another"


def try_unmap(bdf: Bdf) -> list[Finding]:
    """Open the function, try it, let it go. Never raises for what it finds out.

    Whoever opens a VFIO function resets it, if it has a reset.
    """
    try:
        backend = backends.connect(Target("pci", str(bdf)))
    except HoldfastError as error:
        return [Finding("open", False, error.what, error.hint)]
    try:
        opened = Finding("open", True, f"as {backend.isolation}")
        context = backend.dma_context()
        if context is None:
            return [opened, Finding(NAME, None, "cannot be tried: no shared I/O address space")]
        return [opened, _try(backend, context)]
    except HoldfastError as error:
        return [Finding(NAME, False, str(error))]
    finally:
        backend.close()


def _try(backend: FunctionBackend, context: DmaContext) -> Finding:
    starts = [_FIRST, _FIRST + SIZE]
    with subprocess.Popen(
        [
            sys.executable, "-c", "from holdfast.backends.pci_try import child; child()",
            context.kind, str(context.fd), str(context.ioas), *map(str, starts),
        ],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        pass_fds=(context.fd,),
    ) as process:  # fmt: skip
        assert process.stdout is not None
        try:
            said = _line(process.stdout)
            if said != b"mapped\n":
                return Finding(NAME, None, f"could not be tried: {said.decode() or 'no answer'}")
            alive = backend.dma_unmap(Iova(starts[0]), SIZE)
        finally:
            process.kill()
            process.wait()
    dead = backend.dma_unmap(Iova(starts[1]), SIZE)
    if (alive, dead) == (SIZE, SIZE):
        return Finding(NAME, True, f"works ({context.kind}), its mapper alive or dead")
    return Finding(
        NAME,
        False,
        f"{context.kind}: of {SIZE} bytes the kernel unmapped {alive} while the mapper lived, "
        f"and {dead} when it was dead",
        "use alloc, not pin, on this kernel; or a newer kernel",
    )


def _line(pipe: IO[bytes]) -> bytes:
    """The child's answer: one line, or nothing if it ends or takes too long."""
    ready, _, _ = select.select([pipe], [], [], _CHILD_TIMEOUT)
    return pipe.readline(4096) if ready else b""


def child() -> None:
    """In the child: map memory of its own, say so, and wait to be killed.

    Arguments: kind, descriptor and IOAS of the context; IOVAs.
    """
    kind, fd, ioas, *iovas = sys.argv[1:]
    memory = mmap.mmap(-1, SIZE * len(iovas), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    address = np.frombuffer(memory, np.uint8).ctypes.data
    try:
        for number, iova in enumerate(iovas):
            at = address + number * SIZE
            dma_pin.map_own(kind, int(fd), int(ioas), at, SIZE, int(iova), writable=True)
        answer = "mapped"
    except HoldfastError as error:
        answer = str(error)
    sys.stdout.write(f"{answer}\n")
    sys.stdout.flush()
    sys.stdin.read()
