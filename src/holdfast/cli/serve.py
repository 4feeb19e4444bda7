# SPDX-License-Identifier: Apache-2.0
"""``holdfast serve TARGET``."""

from __future__ import annotations

import os

import click

from holdfast import backends
from holdfast.cli.sizes import SIZE
from holdfast.keeper.main import Service, run
from holdfast.keeper.quiesce import Deadlines
from holdfast.keeper.server import Settings
from holdfast.values import Policy, Target
from holdfast.wire.rings import DEPTH

LAB_VARIABLE = "HOLDFAST_LAB_GUEST"
"""Set in the lab's virtual machines, where a card may write wherever it likes."""


@click.command(help="Keep a function: hand out leases, outlive their holders.")
@click.argument("target")
@click.option(
    "--policy",
    type=click.Choice([str(policy) for policy in Policy]),
    default=str(Policy.DRAIN),
    show_default=True,
    help="what to do first with a dead client's transfers; 'release' is the negative control "
    "that gives memory back without proof (emulated functions and the lab only)",
)
@click.option("--arena", type=SIZE, default=0, help="serve all memory from one arena of this size")
@click.option("--quota", type=SIZE, default="1G", show_default=True, help="bytes per lease")
@click.option("--quarantine", type=SIZE, default="1G", show_default=True, help="admission bound")
@click.option(
    "--requests",
    type=click.IntRange(1, DEPTH),
    default=DEPTH,
    show_default=True,
    help="requests in flight per mediated lease",
)
@click.option(
    "--card-windows",
    type=click.IntRange(1, 2048),
    default=1,
    show_default=True,
    help="cut the card's memory into so many parts, one for each mediated lease",
)
@click.option("--idle", type=float, default=None, help="end after this many idle seconds")
@click.option("--drain-deadline", type=float, default=10.0, show_default=True)
@click.option("--stop-deadline", type=float, default=2.0, show_default=True)
@click.option("--isolate-deadline", type=float, default=1.0, show_default=True)
@click.option("--reset-deadline", type=float, default=5.0, show_default=True)
@click.option("--metrics-port", type=int, default=None, help="Prometheus metrics on loopback")
@click.option("--ready-fd", type=int, default=None, hidden=True)
@click.option("--test-faults", default="", help="tests only: fault plan of the emulated function")
def command(
    target: str,
    policy: str,
    arena: int,
    quota: int,
    quarantine: int,
    requests: int,
    card_windows: int,
    idle: float | None,
    drain_deadline: float,
    stop_deadline: float,
    isolate_deadline: float,
    reset_deadline: float,
    metrics_port: int | None,
    ready_fd: int | None,
    test_faults: str,
) -> None:
    parsed = Target.parse(target)
    if policy == Policy.RELEASE:
        if parsed.scheme != "emu" and LAB_VARIABLE not in os.environ:
            raise click.UsageError("--policy release is for emulated functions and the lab only")
        click.echo("NEGATIVE CONTROL: memory is released without proof of quiet", err=True)
    if (caution := backends.caution(parsed)) is not None:
        click.echo(f"CAUTION: {caution}", err=True)
    deadlines = Deadlines(drain_deadline, stop_deadline, isolate_deadline, reset_deadline)
    run(
        Service(
            parsed,
            Settings(
                policy=Policy(policy),
                quota=quota,
                quarantine_bound=quarantine,
                idle=idle,
                deadlines=deadlines,
                requests=requests,
                card_windows=card_windows,
            ),
            arena,
            test_faults,
            ready_fd,
            metrics_port,
            lambda: click.echo(
                f"keeping {parsed}: open it from any process of this user; Ctrl-C ends it"
            ),
        )
    )
