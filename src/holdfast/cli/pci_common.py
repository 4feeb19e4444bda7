# SPDX-License-Identifier: Apache-2.0
"""What the commands about the machine's PCI functions have in common."""

from __future__ import annotations

import re
from collections.abc import Sequence

import click

from holdfast.cli.ps import ask
from holdfast.errors import HoldfastError
from holdfast.keeper import embedded
from holdfast.kernel.pci_binding import Machine
from holdfast.values import Bdf


def parse_bdf(text: str) -> Bdf:
    """``0000:03:00.0``, ``03:00.0`` or ``pci:0000:03:00.0``, options ignored. Raises BadTarget."""
    plain = text.removeprefix("pci:").partition("?")[0]
    if re.fullmatch(r"[0-9a-fA-F]{2}:[0-9a-fA-F]{2}\.[0-7]", plain):
        plain = f"0000:{plain}"
    return Bdf.parse(plain)


def bdfs(ctx: click.Context, param: click.Parameter, texts: tuple[str, ...]) -> tuple[Bdf, ...]:
    """Callback of an argument that takes PCI addresses; each comes out once, in order."""
    found = []
    for text in texts:
        try:
            found.append(parse_bdf(text))
        except HoldfastError as error:
            what = f"{text!r} is not a PCI address such as 0000:03:00.0"
            raise click.BadParameter(what, ctx, param) from error
    return tuple(dict.fromkeys(found))


def this_machine() -> Machine:
    """Where all of these commands look. Tests put a fabricated machine here."""
    return Machine()


def keepers() -> dict[int, str]:
    """The keepers of this user that answer: pid to what they keep and for how many leases.

    Other users' keepers cannot be asked: they show up as holders.
    """
    found: dict[int, str] = {}
    try:
        sockets = sorted(embedded.runtime_dir().glob("*.sock"))
    except HoldfastError:
        return found  # no place for sockets, so none are there; who opens a target is told why
    for path in sockets:
        try:
            told = ask(str(path))
        except (OSError, HoldfastError):
            continue  # ended, or another version's: it holds nothing we could name
        leases = sum(lease["state"] != "released" for lease in told["leases"])
        found[int(told["keeper"])] = f"keeper {told['keeper']} of {told['target']}, {leases} leases"
    return found


def table(rows: Sequence[Sequence[str]], gap: str = "  ") -> str:
    """Rows in columns as wide as their widest cell; nothing is cut. The first row is the head."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = (gap.join(c.ljust(w) for c, w in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)
