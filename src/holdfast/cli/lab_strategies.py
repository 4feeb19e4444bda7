# SPDX-License-Identifier: Apache-2.0
"""``holdfast lab strategies``: the strategies of 1998 and today, on real kernels, in a table."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import click

from holdfast.errors import SystemFailure
from holdfast.lab import Guest, run
from holdfast.lab.strategies.report import (
    BEGIN,
    RESULTS,
    Boot,
    decode,
    encode,
    generated,
    mismatches,
    table,
    update,
)
from holdfast.lab.strategies.rows import Machine
from holdfast.lab.strategies.trials import TRIALS

_MASK = "dma_mask=0xffffffffff"
"""edu cuts addresses to 28 bits by default; without an IOMMU memory is wherever it is."""
_TIMEOUT = 600.0
"""Seconds for a boot; it takes one to two minutes."""


@click.command(
    "strategies",
    help="Run every strategy for keeping memory safe under DMA in two guests, one without an IOMMU "
    "and one with, and print what became of an innocent process's memory. Exit status 1 if "
    "anything is not as expected.",
)
@click.option("--kernel", default="stock", show_default=True, help="stock, full, or a kernel image")
@click.option("--trials", type=click.IntRange(1, 100), default=TRIALS, show_default=True)
@click.option(
    "--update",
    "document",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help=f"put the table into this document, after {BEGIN}",
)
@click.option(
    "--json",
    "directory",
    type=click.Path(path_type=Path, file_okay=False),
    help="keep figures here",
)
def command(kernel: str, trials: int, document: Path | None, directory: Path | None) -> None:
    if document is not None:
        generated(
            document.read_text(encoding="utf-8"), str(document)
        )  # before the minutes, not after
    boots = [_boot(machine, kernel, trials) for machine in Machine]
    if directory is not None:
        directory.mkdir(parents=True, exist_ok=True)
        for boot in boots:
            (directory / f"{boot.machine.name.lower()}.json").write_bytes(encode(boot))
    click.echo(table(boots))
    wrong = mismatches(boots, complete=kernel == "stock")
    for line in wrong:
        click.echo(f"NOT AS EXPECTED: {line}", err=True)
    if wrong:
        sys.exit(1)
    if document is not None:
        changed = update(document, boots)
        click.echo(f"{document}: {'updated' if changed else 'unchanged'}", err=True)


def _boot(machine: Machine, kernel: str, trials: int) -> Boot:
    """Boot a guest, let it run its rows, and read what it has seen."""
    guest = Guest(
        kernel=kernel,
        functions=(f"edu,{_MASK}", f"edu,{_MASK}@port"),
        iommu=machine is Machine.VTD,
        driver="none",
        timeout=_TIMEOUT,
    )
    inside = ["python3", "-m", "holdfast.lab.strategies"]
    inside += ["--json", f"/results/{RESULTS}", "--trials", str(trials)]
    with tempfile.TemporaryDirectory(prefix="holdfast-lab-") as place:
        results = Path(place)
        status = run(guest, inside, output=_output, results=results)
        file = results / RESULTS
        if not file.exists():
            raise SystemFailure(
                f"the trials were not finished (exit status {status})",
                operation="lab strategies",
                target=str(machine),
                hint="the guest's output above says why",
            )
        return decode(file.read_bytes())


def _output(data: bytes) -> None:
    """The guest's words are progress here."""
    click.echo(data, nl=False, err=True)
