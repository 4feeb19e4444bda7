# SPDX-License-Identifier: Apache-2.0
"""Emulated PCI functions: subclass :class:`Function`, declare registers as data, override hooks."""

from holdfast.emu.function import BarSpec, Function, Identity

__all__ = ["BarSpec", "Function", "Identity"]
