# SPDX-License-Identifier: Apache-2.0
"""``holdfast doctor``: can functions be used, and if not, why, and what fixes it."""

from __future__ import annotations

import json
import sys
from typing import Any

import click

from holdfast.backends.pci_usable import Finding, examine, machine_findings, usable
from holdfast.cli.pci_common import bdfs as to_bdfs
from holdfast.cli.pci_common import keepers, this_machine
from holdfast.kernel import pci_sysfs
from holdfast.kernel.pci_binding import DRIVERS
from holdfast.values import Bdf

_MARKS = {True: "ok  ", False: "NO  ", None: "note"}


@click.command(
    help="Say what stands in the way of using PCI functions, and which command removes it: for the "
    "machine, and for the functions named; without any, for those that vfio-pci or uio_pci_generic "
    "has. Exit status 0 if everything asked for is usable, 1 if not."
)
@click.argument("bdfs", callback=to_bdfs, nargs=-1, metavar="[BDF]...")
@click.option("--json", "as_json", is_flag=True, help="machine-readable")
@click.option(
    "--backend",
    type=click.Choice(["vfio", "uio"]),
    help="examine for use with or without an IOMMU  [default: what its driver is for]",
)
@click.option(
    "--try",
    "tried",
    is_flag=True,
    help="also open the functions named, and see whether this kernel really unmaps for another "
    "process than the one that mapped; resets them, transfers nothing",
)
def command(bdfs: tuple[Bdf, ...], as_json: bool, backend: str | None, tried: bool) -> None:
    if tried and not bdfs:
        raise click.UsageError("--try needs to be told which functions to open")
    here = this_machine()
    chosen = list(bdfs) or [f.bdf for f in pci_sysfs.functions(here.sysfs) if f.driver in DRIVERS]
    kept = keepers()
    machine = machine_findings(sysfs=here.sysfs, dev=here.dev, proc=here.proc)
    functions = {
        bdf: examine(
            bdf, backend=backend, sysfs=here.sysfs, dev=here.dev, proc=here.proc, keepers=kept
        )
        for bdf in chosen
    }
    if tried:
        from holdfast.backends.pci_try import try_unmap

        for bdf, findings in functions.items():
            if usable(findings):
                findings += try_unmap(bdf)
    # Named functions count alone: one used without an IOMMU does not need the machine to have one.
    counting = [*functions.values(), *([] if bdfs else [machine])]
    good = all(map(usable, counting))
    if as_json:
        click.echo(json.dumps(_to_json(machine, functions, good)))
    else:
        _show(machine, functions, bool(bdfs))
    if not good:
        sys.exit(1)


def _to_json(
    machine: list[Finding], functions: dict[Bdf, list[Finding]], good: bool
) -> dict[str, Any]:
    def plain(findings: list[Finding]) -> list[dict[str, Any]]:
        return [{"name": f.name, "ok": f.ok, "what": f.what, "fix": f.fix} for f in findings]

    return {
        "usable": good,
        "machine": plain(machine),
        "functions": [
            {"bdf": str(bdf), "usable": usable(findings), "findings": plain(findings)}
            for bdf, findings in functions.items()
        ],
    }


def _show(machine: list[Finding], functions: dict[Bdf, list[Finding]], named: bool) -> None:
    click.echo("this machine")
    _list(machine)
    for bdf, findings in functions.items():
        click.echo(f"\n{bdf}: {'usable' if usable(findings) else 'NOT usable'}")
        _list(findings)
    if not functions and not named:
        click.echo(
            f"\nno function is bound to {' or '.join(DRIVERS)}: see holdfast ls, and name one to "
            "have it examined"
        )


def _list(findings: list[Finding]) -> None:
    width = max(len(finding.name) for finding in findings)
    for finding in findings:
        click.echo(f"  {_MARKS[finding.ok]}  {finding.name:<{width}}  {finding.what}")
        if finding.fix:
            click.echo(f"        {'':<{width}}  -> {finding.fix}")
