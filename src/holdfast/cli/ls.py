# SPDX-License-Identifier: Apache-2.0
"""``holdfast ls``: the machine's PCI functions, and the target to write for each."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import click

from holdfast.cli.pci_common import keepers, table, this_machine
from holdfast.kernel import pci_sysfs
from holdfast.kernel.pci_binding import UIO_DRIVER, Machine
from holdfast.kernel.pci_holders import Holder, HolderScan
from holdfast.kernel.pci_names import PciNames
from holdfast.kernel.pci_sysfs import PciFunction


@dataclass(frozen=True, slots=True)
class Row:
    """One function as it is shown."""

    function: PciFunction
    vendor: str
    device: str
    kind: str
    holders: list[Holder]
    keeper: str

    @property
    def target(self) -> str:
        """What to give to ``holdfast.open``."""
        uio = "?backend=uio" if self.function.driver == UIO_DRIVER else ""
        return f"pci:{self.function.bdf}{uio}"

    def held(self) -> str:
        """Who has it, in a few words."""
        if self.keeper:
            return self.keeper
        return ", ".join(
            f"{'' if h.certain else 'perhaps '}pid {h.pid} ({h.command})" for h in self.holders
        )

    def to_json(self) -> dict[str, Any]:
        """Numbers as numbers, names beside them."""
        function = self.function
        return {
            "target": self.target,
            "bdf": str(function.bdf),
            "vendor": function.vendor,
            "device": function.device,
            "subsystem_vendor": function.subsystem_vendor,
            "subsystem_device": function.subsystem_device,
            "class": function.class_code,
            "vendor_name": self.vendor,
            "device_name": self.device,
            "class_name": self.kind,
            "driver": function.driver,
            "iommu_group": function.iommu_group,
            "iommu_type": function.iommu_type,
            "reset_methods": list(function.reset_methods),
            "keeper": self.keeper or None,
            "holders": [
                {"pid": h.pid, "command": h.command, "how": h.how, "certain": h.certain}
                for h in self.holders
            ],
        }


def rows(every: bool, machine: Machine) -> list[Row]:
    """What there is: without ``every``, no bridges."""
    names, kept = PciNames(), keepers()
    scan = HolderScan(sysfs=machine.sysfs, dev=machine.dev, proc=machine.proc)
    found = []
    for function in pci_sysfs.functions(machine.sysfs):
        if function.is_bridge and not every:
            continue
        holders = scan.of(function)
        found.append(
            Row(
                function,
                names.vendor(function.vendor),
                names.device(function.vendor, function.device),
                names.of_class(function.class_code),
                holders,
                next((kept[h.pid] for h in holders if h.pid in kept), ""),
            )
        )
    return found


@click.command(
    help="List the PCI functions of this machine: what they are, which driver has them, their "
    "IOMMU group and its type, how they can be reset, who holds them, and the target to write."
)
@click.option("--all", "every", is_flag=True, help="bridges, too")
@click.option("--json", "as_json", is_flag=True, help="machine-readable")
def command(every: bool, as_json: bool) -> None:
    found = rows(every, this_machine())
    if as_json:
        click.echo(json.dumps([row.to_json() for row in found]))
        return
    if not found:
        click.echo("no PCI functions" if every else "no PCI functions but bridges, if any (--all)")
        return
    head = ["target", "ids", "what", "driver", "IOMMU group", "reset", "held by"]
    click.echo(table([head, *map(_cells, found)]))


def _cells(row: Row) -> list[str]:
    function = row.function
    ids = f"{function.vendor:04x}:{function.device:04x}"
    named = f"{row.kind}: {row.vendor} {row.device}"
    unknown = row.vendor == f"{function.vendor:04x}"
    group = f"{function.iommu_group} ({function.iommu_type or 'type unknown'})"
    return [
        row.target,
        ids,
        row.kind if unknown else named,
        function.driver or "-",
        "-" if function.iommu_group is None else group,
        " ".join(function.reset_methods) or "-",
        row.held() or "-",
    ]
