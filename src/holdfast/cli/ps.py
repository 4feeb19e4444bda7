# SPDX-License-Identifier: Apache-2.0
"""``holdfast ps``."""

from __future__ import annotations

import json
from typing import Any

import click

from holdfast.errors import HoldfastError, UsageError
from holdfast.keeper import embedded
from holdfast.keeper.client import LeaseClient
from holdfast.kernel import packets, procfs
from holdfast.values import Target

STILL_HELD = 1
"""Exit code of ``--retry`` if the lease's memory is still held."""


def ask(path: str) -> dict[str, Any]:
    """Everything one keeper tells of its leases."""
    client = _greet(path)
    try:
        return client.ps_all()
    finally:
        client.close()


def _greet(path: str) -> LeaseClient:
    client = LeaseClient(packets.connect(path, 5.0), Target("emu", "?"))
    try:
        client.greet()
    except BaseException:
        client.close()
        raise
    return client


def _keepers() -> dict[str, dict[str, Any]]:
    """What every keeper of this user tells, by its socket."""
    found = {}
    for path in embedded.sockets():
        try:
            found[str(path)] = ask(str(path))
        except (OSError, HoldfastError) as error:
            click.echo(f"{path}: {error}", err=True)
    return found


@click.command(help="Show leases: who holds what, and why memory is still held.")
@click.option("--json", "as_json", is_flag=True, help="machine-readable")
@click.option("--all", "every", is_flag=True, help="also leases that have ended")
@click.option(
    "--retry",
    "number",
    type=click.IntRange(min=1),
    metavar="LEASE",
    help="have a lease in quarantine looked at now; exit code 1 if it is held on",
)
@click.option("--target", help="whose lease --retry means, if several keepers have one")
@click.option(
    "--force", is_flag=True, help="with --retry: reset, though others lose what is in flight"
)
def command(
    as_json: bool, every: bool, number: int | None, target: str | None, force: bool
) -> None:
    if number is not None:
        raise SystemExit(_retry(number, target, force, as_json))
    if target is not None or force:
        raise click.UsageError("--target and --force go with --retry")
    keepers = list(_keepers().values())
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


# -- another look ------------------------------------------------------------


def _retry(number: int, target: str | None, force: bool, as_json: bool) -> int:
    """Ask the keeper that has the lease; the exit code."""
    client = _greet(_keeper_of(number, target))
    try:
        told = client.retry(number, force=force)
    finally:
        client.close()
    if as_json:
        click.echo(json.dumps(told))
    else:
        click.echo(f"lease {told['lease']}: {told['state']}: {told['why']}")
    return 0 if told["state"] == "released" else STILL_HELD


def _keeper_of(number: int, target: str | None) -> str:
    """The socket of the one keeper in which this lease is in quarantine."""
    if target is not None:
        return str(embedded.socket_path(Target.parse(target)))
    found = {
        path: keeper["target"]
        for path, keeper in _keepers().items()
        if any(lease["lease"] == number and lease["quarantine"] for lease in keeper["leases"])
    }
    if len(found) != 1:
        raise UsageError(
            f"lease {number} is in quarantine at {len(found)} keepers",
            operation="retry",
            target=", ".join(sorted(found.values())),
            hint="say which with --target" if found else "see holdfast ps",
        )
    return next(iter(found))


# -- for people ------------------------------------------------------------


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
        if lease["quarantine"] is not None:
            _show_quarantine(lease, lease["quarantine"])
        if lease["withheld"] and lease["state"] != "released":
            click.echo(f"      held because not observed: {'; '.join(lease['withheld'])}")


def _show_quarantine(lease: dict[str, Any], held: dict[str, Any]) -> None:
    command = f" ({lease['command']})" if lease["command"] else ""
    click.echo(
        f"      {held['bytes']} bytes of process {lease['pid']}{command} in quarantine since "
        f"{held['since']}, for {_duration(held['seconds'])}: {held['why']}"
    )
    if held["looks"]:
        click.echo(
            f"      looked at {held['looks']} times since: {held['last_look']}; "
            f"again every {_duration(held['next_look_s'])}"
        )


def _duration(seconds: float) -> str:
    """Such as 0.4 s, 59 s, 3 min 20 s, 5 h 3 min, 2 d 7 h."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    left = int(seconds)
    units = ((86_400, "d"), (3600, "h"), (60, "min"), (1, "s"))
    for place, (size, name) in enumerate(units):
        if left >= size:
            text = f"{left // size} {name}"
            if place + 1 < len(units) and (rest := left % size // units[place + 1][0]):
                text += f" {rest} {units[place + 1][1]}"
            return text
    return f"{seconds:.1f} s"
