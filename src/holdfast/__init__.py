# SPDX-License-Identifier: Apache-2.0
"""PCI functions driven from Python, with DMA memory that outlives the process.

>>> import holdfast
>>> with holdfast.open("emu:xdma") as card:          # doctest: +SKIP
...     samples = card.alloc(1 << 20, "u1")
...     card.dma.from_card(samples, 0).wait()

Names are loaded when first used, so that ``import holdfast`` stays quick.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from holdfast.errors import HoldfastError

if TYPE_CHECKING:
    from holdfast import emu as emu
    from holdfast.device import Device
    from holdfast.dma.buffer import Buffer
    from holdfast.driver import Driver
    from holdfast.keeper.opening import open  # noqa: A004
    from holdfast.transfer import Transfer

__version__ = "0.1.0"
__all__ = ["Buffer", "Device", "Driver", "HoldfastError", "Transfer", "emu", "open"]

_LAZY = {
    "Buffer": "holdfast.dma.buffer",
    "Device": "holdfast.device",
    "Driver": "holdfast.driver",
    "Transfer": "holdfast.transfer",
    "open": "holdfast.keeper.opening",
}


def __getattr__(name: str) -> object:
    if name in ("emu", "errors"):
        return import_module(f"holdfast.{name}")
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'holdfast' has no attribute {name!r}")
