# SPDX-License-Identifier: Apache-2.0
"""``holdfast regs``."""

from __future__ import annotations

import json
from typing import Any

import click

from holdfast.regs import edu, xdma
from holdfast.regs.spec import Bank

BANKS: dict[str, tuple[Bank, ...]] = {
    "edu": (edu.BANK,),
    "xdma": (*xdma.CONFIG_BANKS, xdma.USER),
}


@click.command(help="Print a function's registers, from the rows its driver uses.")
@click.argument("name", type=click.Choice(sorted(BANKS)))
@click.option("--json", "as_json", is_flag=True, help="machine-readable")
def command(name: str, as_json: bool) -> None:
    rows = [row for bank in BANKS[name] for row in _rows(bank)]
    if as_json:
        click.echo(json.dumps(rows))
        return
    for row in rows:
        again = f" x{row['count']} every {row['stride']:#x}" if row["count"] > 1 else ""
        click.echo(
            f"{row['bank']:<10} {row['offset']:#07x} {row['width']} {row['mode']:<3} "
            f"{row['name']:<26}{again}  {row['doc']}".rstrip()
        )


def _rows(bank: Bank) -> list[dict[str, Any]]:
    return [
        {
            "bank": bank.name,
            "name": register.name,
            "offset": register.offset,
            "width": register.width,
            "mode": str(register.mode),
            "reset": register.reset,
            "count": register.count,
            "stride": register.stride,
            "doc": register.doc,
        }
        for register in bank.registers
    ]
