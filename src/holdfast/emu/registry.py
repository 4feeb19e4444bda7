# SPDX-License-Identifier: Apache-2.0
"""Emulated functions by name: the built-in ones, and a user's own from a file or a module."""

from __future__ import annotations

from collections.abc import Mapping

from holdfast.emu.faults import FaultPlan
from holdfast.emu.function import Function
from holdfast.errors import UsageError
from holdfast.loading import load_class

BUILT_IN = {
    "edu": "holdfast.emu.edu:Edu",
    "xdma": "holdfast.emu.xdma:Xdma",
}
"""Loaded when asked for."""


def load(name: str) -> type[Function]:
    """The class behind ``edu``, ``xdma``, ``path/to/file.py:Class`` or ``package.module:Class``.

    A file is run as a module of its own name space, once per process. Raises
    :class:`~holdfast.errors.BadTarget` if there is nothing of that name, or not a function; errors
    that the user's own code raises while it is loaded come through as they are.
    """
    hint = f"use {', '.join(BUILT_IN)}, path/to/file.py:Class or package.module:Class"
    return load_class(BUILT_IN.get(name, name), Function, target=f"emu:{name}", hint=hint)


def create(name: str, options: Mapping[str, str], faults: FaultPlan | None = None) -> Function:
    """Make the function ``name`` with option texts, as they stand in a target.

    Raises :class:`~holdfast.errors.UsageError` for an option the function does not have or a
    value it cannot read. The caller owns the function and must ``close()`` it.
    """
    cls = load(name)
    values: dict[str, object] = {}
    for option, text in options.items():
        read = cls.options.get(option)
        if read is None:
            valid = ", ".join(sorted(cls.options)) or "none"
            raise UsageError(
                f"unknown option {option!r}",
                operation="create",
                target=f"emu:{name}",
                hint=f"valid options: {valid}",
            )
        try:
            values[option] = read(text)
        except ValueError as error:
            raise UsageError(
                f"option {option}: {error}", operation="create", target=f"emu:{name}"
            ) from error
    function = cls(**values)
    try:
        if faults is not None:
            function.faults = faults
    except UsageError:
        function.close()
        raise
    return function
