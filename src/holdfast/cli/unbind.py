# SPDX-License-Identifier: Apache-2.0
"""``holdfast unbind``: give functions back to the drivers they had."""

from __future__ import annotations

import click

from holdfast.cli.pci_common import bdfs as to_bdfs
from holdfast.cli.pci_common import this_machine
from holdfast.kernel import pci_binding
from holdfast.kernel.pci_binding import DEADLINE
from holdfast.values import Bdf


@click.command(
    help="Give PCI functions back to the drivers they had before 'holdfast bind'; if nothing is "
    "remembered, to the one that the kernel finds. A function that is held is asked for, and "
    "waited for. Needs root."
)
@click.argument("bdfs", callback=to_bdfs, nargs=-1, required=True, metavar="BDF...")
@click.option("--dry-run", is_flag=True, help="print what would be written, write nothing")
@click.option(
    "--timeout",
    type=click.FloatRange(min=0, min_open=True),
    default=DEADLINE,
    show_default=True,
    metavar="SECONDS",
    help="how long to wait for a holder to let go",
)
def command(bdfs: tuple[Bdf, ...], dry_run: bool, timeout: float) -> None:
    machine = this_machine()
    for bdf in bdfs:
        plan = pci_binding.plan_unbind(bdf, machine)
        if dry_run:
            change = f"{plan.had or 'no driver'} -> {plan.wanted or 'what the kernel finds'}"
            click.echo(f"# {bdf}: {plan.why or change}")
            for line in plan.lines():
                click.echo(line)
            continue
        now = pci_binding.unbind(plan, machine, timeout)
        if plan.writes:
            click.echo(f"{bdf}: {plan.had or 'no driver'} -> {now or 'no driver'}")
        else:
            click.echo(f"{bdf}: {plan.why}")
