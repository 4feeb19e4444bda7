# SPDX-License-Identifier: Apache-2.0
"""``holdfast bind``: give functions to a driver that leaves them to user space."""

from __future__ import annotations

import click

from holdfast.backends.pci_usable import blockers, untranslated
from holdfast.cli.pci_common import bdfs as to_bdfs
from holdfast.cli.pci_common import this_machine
from holdfast.errors import Busy
from holdfast.kernel import pci_binding, pci_sysfs
from holdfast.kernel.pci_binding import DEADLINE, DRIVERS, VFIO_DRIVER, Machine, Plan
from holdfast.kernel.pci_in_use import in_use
from holdfast.values import Bdf


@click.command(
    help="Take PCI functions from their drivers and give them to vfio-pci (or uio_pci_generic). "
    "What they had is remembered: 'holdfast unbind' restores it. Other functions of the same IOMMU "
    "group are named, not touched. A function with a mounted disk or a network interface that is "
    "up is refused. Needs root. Does nothing to a function that is bound already."
)
@click.argument("bdfs", callback=to_bdfs, nargs=-1, required=True, metavar="BDF...")
@click.option("--driver", type=click.Choice(DRIVERS), default=VFIO_DRIVER, show_default=True)
@click.option("--group", is_flag=True, help="also the other functions of their IOMMU groups")
@click.option("--force", is_flag=True, help="even if the system uses it: disks, network")
@click.option("--dry-run", is_flag=True, help="print what would be written, write nothing")
@click.option(
    "--timeout",
    type=click.FloatRange(min=0, min_open=True),
    default=DEADLINE,
    show_default=True,
    metavar="SECONDS",
    help="how long to wait for a holder to let go",
)
def command(
    bdfs: tuple[Bdf, ...], driver: str, group: bool, force: bool, dry_run: bool, timeout: float
) -> None:
    machine = this_machine()
    chosen = _with_siblings(bdfs, machine) if group else list(bdfs)
    # Everything that can be refused is refused before anything is touched.
    plans = [pci_binding.plan_bind(bdf, driver, machine) for bdf in chosen]
    if not force:
        for plan in plans:
            _refuse_if_in_use(plan, machine)
    for plan in plans:
        if not plan.writes:
            click.echo(f"{plan.bdf}: {plan.why}")
        elif dry_run:
            _tell(plan, machine)
        else:
            pci_binding.bind(plan, machine, timeout)
            click.echo(f"{plan.bdf}: {plan.had or 'no driver'} -> {plan.wanted}")
    if driver == VFIO_DRIVER:
        _name_siblings(chosen, machine)
    else:
        _name_translated(chosen, machine)


def _with_siblings(bdfs: tuple[Bdf, ...], machine: Machine) -> list[Bdf]:
    """The functions and all others of their groups, bridges left out; each once."""
    chosen = dict.fromkeys(bdfs)
    for bdf in bdfs:
        group = pci_sysfs.function(bdf, machine.sysfs).iommu_group
        members = [] if group is None else pci_sysfs.group_members(group, machine.sysfs)
        chosen |= dict.fromkeys(member.bdf for member in members if not member.is_bridge)
    return list(chosen)


def _refuse_if_in_use(plan: Plan, machine: Machine) -> None:
    used = in_use(plan.bdf, sysfs=machine.sysfs, proc=machine.proc) if plan.writes else []
    if used:
        raise Busy(
            f"the system uses it: {'; '.join(used)}",
            operation="bind",
            target=str(plan.bdf),
            hint="unmount it, take the interface down (ip link set NAME down), or insist: --force",
        )


def _tell(plan: Plan, machine: Machine) -> None:
    click.echo(f"# {plan.bdf}: {plan.had or 'no driver'} -> {plan.wanted or 'no driver'}")
    click.echo(f"# what it had is remembered in {machine.directory()}")
    for line in plan.lines():
        click.echo(line)


def _name_siblings(chosen: list[Bdf], machine: Machine) -> None:
    """Say which other functions still keep a group from being used, and what to type."""
    left = {
        other.bdf: other
        for bdf in chosen
        for other in blockers(pci_sysfs.function(bdf, machine.sysfs), machine.sysfs)
        if other.bdf not in chosen
    }
    if not left:
        return
    named = ", ".join(f"{bdf} ({other.driver})" for bdf, other in left.items())
    click.echo(f"the IOMMU group is not viable yet: {named} is in it and was not touched", err=True)
    movable = [str(bdf) for bdf, other in left.items() if not other.is_bridge]
    if movable:
        click.echo(f"next: sudo holdfast bind {' '.join(movable)}", err=True)


def _name_translated(chosen: list[Bdf], machine: Machine) -> None:
    """Say of which functions an IOMMU translates the addresses: without VFIO they are of no use."""
    for bdf in chosen:
        finding = untranslated(pci_sysfs.function(bdf, machine.sysfs))
        if finding.ok is False:
            click.echo(f"{bdf}: {finding.what}", err=True)
            click.echo(f"next: {finding.fix}", err=True)
