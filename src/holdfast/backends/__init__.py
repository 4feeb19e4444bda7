# SPDX-License-Identifier: Apache-2.0
"""Ways to reach a function, by the scheme of its target. Loaded when first asked for."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterable
from importlib import import_module
from typing import Protocol, cast

from holdfast.contracts import FileWindow, FunctionBackend, Handover, MemoryWindow
from holdfast.errors import BadTarget
from holdfast.values import Target

REGISTRY = {
    "pci": "holdfast.backends.pci:open_target",
    "vfio-user": "holdfast.backends.vfio_user:open_target",
}
"""Scheme to ``module:callable``; the callable takes a Target and returns a FunctionBackend.

``emu`` is not here: an emulated function is started first, then its socket goes to :func:`adopt`.
"""


class _Opener(Protocol):
    def __call__(self, target: Target) -> FunctionBackend: ...


def warm(target: Target) -> None:
    """Import what a keeper of ``target`` will need, before it is forked."""
    names = {
        "emu": ["vfio_user"],
        "vfio-user": ["vfio_user"],
        "pci": ["pci", "vfio_type1", "vfio_iommufd", "uio"],
    }
    for name in names.get(target.scheme, []):
        import_module(f"holdfast.backends.{name}")


def connect(target: Target) -> FunctionBackend:
    """Reach the function behind ``target``.

    Raises :class:`BadTarget` if no backend knows the scheme, :class:`DeviceGone` if nothing answers
    there. The caller closes the backend.
    """
    place = REGISTRY.get(target.scheme)
    if place is None:
        raise BadTarget(
            f"no backend for {target.scheme!r}",
            operation="connect",
            target=str(target),
            hint=f"what works: {', '.join(sorted(['emu', *REGISTRY]))}",
        )
    module, _, name = place.partition(":")
    opener = cast(_Opener, getattr(import_module(module), name))
    return opener(target)


def siblings(target: Target) -> list[Target]:
    """The other functions that whoever keeps ``target`` must keep, too (one IOMMU group)."""
    if target.scheme != "pci":
        return []
    from holdfast.backends.pci import group_targets

    return [other for other in group_targets(target) if other.bdf != target.bdf]


def caution(target: Target) -> str | None:
    """What is lost on a target that was asked for by name, to be shown; None if nothing is."""
    if target.scheme != "pci":
        return None
    from holdfast.backends.pci import caution as of_pci

    return of_pci(target)


def adopt(sock: socket.socket, target: str) -> FunctionBackend:
    """A vfio-user function at the other end of a connected socket. Takes ownership of ``sock``.

    ``target`` names it in errors.
    """
    from holdfast.backends.vfio_user import VfioUserBackend

    return VfioUserBackend(sock, target=target)


def resume(
    target: Target,
    handover: Handover,
    memories: Iterable[MemoryWindow] = (),
    files: Iterable[FileWindow] = (),
) -> FunctionBackend:
    """Go on with a function where a process that was killed left it, without disturbing it.

    ``handover`` is what :meth:`FunctionBackend.hand_over` said there, with duplicates of the
    descriptors. Ownership of them passes to the backend, also on error: they are closed then.
    ``memories`` and ``files`` are the windows that were mapped, without and with a descriptor
    (these stay the caller's); what the kernel or the server keeps mapped needs them to be named
    only where this process has a part in it.

    The function may be in the middle of DMA, and stays so: no reset, no change of bus mastering,
    and interrupts that were wired stay wired. Where this process carries interrupts (no IOMMU),
    none arrives before ``set_irqs``. Calling that with the eventfds that were wired is right on
    every backend; ring them once afterwards, as one may have been lost meanwhile.

    Raises :class:`DeviceGone` if the function is gone, :class:`BadTarget` if no backend knows the
    scheme, :class:`ProtocolError` if the handover does not fit the target.
    """
    if target.scheme in ("emu", "vfio-user"):
        from holdfast.backends.vfio_user import VfioUserBackend

        return VfioUserBackend.resume(handover, target=str(target), memories=memories, files=files)
    if target.scheme == "pci":
        from holdfast.backends.pci import resume as resume_pci

        return resume_pci(target, handover)
    for fd in handover.fds.values():
        os.close(fd)
    raise BadTarget(f"no backend for {target.scheme!r}", operation="resume", target=str(target))
