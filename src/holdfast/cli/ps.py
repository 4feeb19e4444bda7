# SPDX-License-Identifier: Apache-2.0
"""``holdfast ps``."""

from __future__ import annotations

import json
from typing import Any

import click

from holdfast.errors import HoldfastError
from holdfast.keeper import embedded
from holdfast.keeper.client import LeaseClient
from holdfast.kernel import packets, procfs
from holdfast.values import Target


def ask(path: str) -> dict[str, Any]:
    """Everything one keeper tells of its leases."""
    client = LeaseClient(packets.connect(path, 5.0), Target("emu", "?"))
    try:
        client.greet()
        return client.ps_all()
    finally:
        client.close()


@click.command(help="Show leases: who holds what, and why memory is still held.")
@click.option("--json", "as_json", is_flag=True, help="machine-readable")
@click.option("--all", "every", is_flag=True, help="also leases that have ended")
def command(as_json: bool, every: bool) -> None:
    keepers = []
    for path in embedded.sockets():
        try:
            keepers.append(ask(str(path)))
        except (OSError, HoldfastError) as error:
            click.echo(f"{path}: {error}", err=True)
    if not every:
        for keeper in keepers:
            keeper["leases"] = [lease for lease in keeper["leases"] if lease["state"] != "released"]
    if as_json:
        click.echo(json.dumps(keepers))
        return
    if not keepers:
        click.echo("no keeper is running for this user")
    for keeper in keepers:
        _show(keeper)


def _show(keeper: dict[str, Any]) -> None:
    click.echo(
        f"{keeper['target']}  keeper {keeper['keeper']}  driver {keeper['driver']}  "
        f"policy {keeper['policy']}  quarantined {keeper['quarantined_bytes']} bytes"
    )
    for lease in keeper["leases"]:
        why = lease["log"][-1][2] if lease["log"] else ""
        signs = "+".join(
            name
            for name, seen in (("dead", lease["process_dead"]), ("hung up", lease["hung_up"]))
            if seen
        )
        click.echo(
            f"  lease {lease['lease']:<5} pid {lease['pid']:<8} {lease['state']:<11} "
            f"{lease['bytes']:>12} bytes  channels {lease['channels']}  {signs or 'alive'}  {why}"
        )
        if lease["process_dead"] and not lease["hung_up"]:
            holders = procfs.socket_holders(lease["lifeline"])
            click.echo(f"      its process is dead; pid {holders or 'unknown'} holds its socket")
        if lease["withheld"] and lease["state"] != "released":
            click.echo(f"      held because not observed: {'; '.join(lease['withheld'])}")
