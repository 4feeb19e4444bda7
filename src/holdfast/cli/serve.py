# SPDX-License-Identifier: Apache-2.0
"""``holdfast serve TARGET``."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from holdfast import backends
from holdfast.cli.sizes import SIZE
from holdfast.dma.ledger import Quota
from holdfast.keeper.admission import AllowList
from holdfast.keeper.anchor_link import HEARTBEAT, SAFE_AFTER, Guard
from holdfast.keeper.deadlines import Deadlines
from holdfast.keeper.main import Service, run
from holdfast.keeper.server import Settings
from holdfast.values import Policy, Target

F = TypeVar("F", bound=Callable[..., Any])

USER_QUOTA = 4 << 30
USER_LEASES = 256
"""Bytes and leases of one user where several come in, unless others are given."""
LAB_VARIABLE = "HOLDFAST_LAB_GUEST"
"""Set in the lab's virtual machines, where a card may write wherever it likes."""


_BOUNDS = Deadlines()


def _seconds(name: str, default: float, what: str) -> Callable[[F], F]:
    """An option for one of the death protocol's bounds."""
    return click.option(
        name, type=float, default=default, show_default=True, metavar="SECONDS", help=what
    )


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
@click.option(
    "--buffers",
    type=click.IntRange(1),
    default=65536,
    show_default=True,
    help="slabs and pins per lease",
)
@click.option(
    "--requests",
    type=click.IntRange(1),
    default=1024,
    show_default=True,
    help="mediated requests in flight per lease",
)
@click.option(
    "--user-quota",
    type=SIZE,
    default=None,
    help="bytes per user, over all leases (with an allow-list 4G unless given, else no limit)",
)
@click.option(
    "--user-buffers",
    type=click.IntRange(1),
    default=None,
    help="slabs and pins per user, over all leases",
)
@click.option(
    "--user-leases",
    type=click.IntRange(1),
    default=None,
    help="leases per user (with an allow-list 256 unless given, else no limit)",
)
@click.option(
    "--allow-user",
    "users",
    multiple=True,
    metavar="NAME",
    help="let this user in, too; may be repeated",
)
@click.option(
    "--allow-group",
    "groups",
    multiple=True,
    metavar="NAME",
    help="let the members of this group in, too; may be repeated",
)
@click.option(
    "--socket",
    "socket_path",
    type=click.Path(path_type=Path),
    default=None,
    help="where to listen (clients: HOLDFAST_SOCKET); else in this user's private "
    "directory, or with an allow-list in /run/holdfast",
)
@click.option("--quarantine", type=SIZE, default="1G", show_default=True, help="admission bound")
@click.option(
    "--card-windows",
    type=click.IntRange(1, 2048),
    default=1,
    show_default=True,
    help="cut the card's memory into so many parts, one for each mediated lease",
)
@click.option("--idle", type=float, default=None, help="end after this many idle seconds")
@_seconds("--drain-deadline", _BOUNDS.drain, "for what a dead client posted to finish")
@_seconds("--stop-deadline", _BOUNDS.stop, "for one call of the driver, such as to stop")
@_seconds("--isolate-deadline", _BOUNDS.isolate, "to come to rest without bus mastering")
@_seconds("--reset-deadline", _BOUNDS.reset, "for a reset, and for setting up after it")
@_seconds("--unmap-deadline", _BOUNDS.unmap, "to undo every mapping of a dead lease")
@_seconds("--quarantine-period", _BOUNDS.quarantine, "to the first new look at a lease in it")
@_seconds("--quarantine-longest", _BOUNDS.quarantine_longest, "between two looks at most")
@click.option("--metrics-port", type=int, default=None, help="Prometheus metrics on loopback")
@click.option("--log", default="", help="append every step of every lease to this file")
@click.option(
    "--heartbeat",
    type=float,
    default=HEARTBEAT,
    show_default=True,
    help="seconds without a sign of life after which a keeper is killed and succeeded",
)
@click.option(
    "--safe-after",
    type=click.IntRange(min=1),
    default=SAFE_AFTER,
    show_default=True,
    help="crashes within ten seconds after which a keeper runs without a driver",
)
@click.option("--ready-fd", type=int, default=None, hidden=True)
@click.option("--standby-fd", type=int, default=None, hidden=True)
@click.option("--test-faults", default="", help="tests only: fault plan of the emulated function")
def command(
    target: str,
    policy: str,
    arena: int,
    quota: int,
    buffers: int,
    requests: int,
    user_quota: int | None,
    user_buffers: int | None,
    user_leases: int | None,
    users: tuple[str, ...],
    groups: tuple[str, ...],
    socket_path: Path | None,
    quarantine: int,
    card_windows: int,
    idle: float | None,
    drain_deadline: float,
    stop_deadline: float,
    isolate_deadline: float,
    reset_deadline: float,
    unmap_deadline: float,
    quarantine_period: float,
    quarantine_longest: float,
    metrics_port: int | None,
    log: str,
    heartbeat: float,
    safe_after: int,
    ready_fd: int | None,
    standby_fd: int | None,
    test_faults: str,
) -> None:
    parsed = Target.parse(target)
    if policy == Policy.RELEASE:
        if parsed.scheme != "emu" and LAB_VARIABLE not in os.environ:
            raise click.UsageError("--policy release is for emulated functions and the lab only")
        click.echo("NEGATIVE CONTROL: memory is released without proof of quiet", err=True)
    if (caution := backends.caution(parsed)) is not None:
        click.echo(f"CAUTION: {caution}", err=True)
    allow = AllowList.of(users, groups)
    if allow:
        if arena:
            raise click.UsageError(
                "--arena is one file that each client gets whole: not for users who distrust "
                "each other"
            )
        user_quota = USER_QUOTA if user_quota is None else user_quota
        user_leases = USER_LEASES if user_leases is None else user_leases
    deadlines = Deadlines(
        drain=drain_deadline,
        stop=stop_deadline,
        isolate=isolate_deadline,
        reset=reset_deadline,
        unmap=unmap_deadline,
        quarantine=quarantine_period,
        quarantine_longest=quarantine_longest,
    )
    run(
        Service(
            parsed,
            Settings(
                policy=Policy(policy),
                quota=quota,
                buffers=buffers,
                requests=requests,
                per_user=Quota(user_quota, user_buffers),
                user_leases=user_leases,
                allow=allow,
                quarantine_bound=quarantine,
                idle=idle,
                deadlines=deadlines,
                card_windows=card_windows,
            ),
            arena,
            test_faults,
            ready_fd,
            metrics_port,
            socket_path,
            lambda: click.echo(
                f"keeping {parsed}: open it from any process of "
                f"{'the users on the list' if allow else 'this user'}; Ctrl-C ends it"
            ),
            _again(),
            standby_fd,
            os.path.abspath(log) if log else "",
            Guard(heartbeat, safe_after),
        )
    )


def _again() -> tuple[str, ...]:
    """What starts this very service once more: see ``keeper.standby``."""
    arguments = iter(sys.orig_argv[1:])
    kept = []
    for argument in arguments:
        if argument in ("--ready-fd", "--standby-fd"):
            next(arguments)
        else:
            kept.append(argument)
    return (sys.executable, *kept)
