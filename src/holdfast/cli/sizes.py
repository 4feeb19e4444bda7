# SPDX-License-Identifier: Apache-2.0
"""A command-line type for sizes: ``4096``, ``64K``, ``16M``, ``1G``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    IntType = click.ParamType[int]
else:
    IntType = click.ParamType  # not generic before click 8.3

_UNITS = {"K": 10, "M": 20, "G": 30}


def parse_size(text: str) -> int:
    """Bytes; raises ValueError."""
    shift = _UNITS.get(text[-1:].upper(), 0)
    number = int(text[:-1] if shift else text)
    if number < 0:
        raise ValueError("negative size")
    return number << shift


class _Size(IntType):
    name = "size"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> int:
        try:
            return value if isinstance(value, int) else parse_size(str(value))
        except ValueError:
            self.fail(f"{value!r} is not a size such as 4096, 64K, 16M or 1G", param, ctx)


SIZE = _Size()
