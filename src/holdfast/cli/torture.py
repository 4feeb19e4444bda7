# SPDX-License-Identifier: Apache-2.0
"""``holdfast torture``: kill everybody at every named step, and look from outside."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import click

from holdfast.errors import UsageError
from holdfast.steps import ROLES
from holdfast.torture.plan import Wanted, can_die, plan
from holdfast.torture.pool import LOCAL, compiled_once, executor_of
from holdfast.torture.run import (
    CONTROL_KILLS,
    Campaign,
    driver_of,
    ready,
    run_campaign,
    run_units,
    shrink_failures,
)
from holdfast.torture.schedule import Unit
from holdfast.torture.tally import Tally
from holdfast.values import Policy, Target

SHOWN = 10
"""Problems that are printed; the report has all."""


@click.command(
    help="Kill clients, keepers, anchors and the emulated function at every named step, alone and "
    "in pairs, with device faults mixed in, and look from outside at what is left. The seed fixes "
    "the schedule; each failure prints a line that replays it. Exit status 1 if anything was "
    "corrupted, leaked or left hanging, or if the negative control was not found corrupt."
)
@click.argument("target")
@click.option("--kills", type=click.IntRange(1), default=500, show_default=True,
              help="cases, each with one process killed or more")  # fmt: skip
@click.option("--seed", type=int, default=1, show_default=True, help="of the whole schedule")
@click.option("--policy", type=click.Choice([str(policy) for policy in Policy]),
              help="only this one; 'release' is the negative control and corrupts")  # fmt: skip
@click.option("--steps", default="*", show_default=True, help="only steps that match this GLOB")
@click.option("--faults", default="mixed", show_default=True,
              help="none, mixed, or one fault plan for every stack")  # fmt: skip
@click.option("--actors", help=f"who may be killed, of {','.join(ROLES)}")
@click.option("--pairs/--no-pairs", default=True, show_default=True, help="also two at once")
@click.option("--control/--no-control", default=True, show_default=True,
              help="run a short negative control beside it")  # fmt: skip
@click.option("--executor", "where", default=LOCAL, show_default=True,
              help="local, or dask:ADDRESS")  # fmt: skip
@click.option(
    "--workers", type=click.IntRange(1), help="stacks at a time  [default: processors + 2]"
)
@click.option("--report", type=click.Path(file_okay=False, path_type=Path),
              help="write an HTML report and a Perfetto trace into this directory")  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="print the figures as JSON")
@click.option("--replay", help="run this printed line instead of a campaign")
@click.option("--plan", "only_plan", is_flag=True, help="print the schedule and run nothing")
@click.option("--no-shrink", is_flag=True, help="do not look for a smaller failing schedule")
def command(
    target: str,
    kills: int,
    seed: int,
    policy: str | None,
    steps: str,
    faults: str,
    actors: str | None,
    pairs: bool,
    control: bool,
    where: str,
    workers: int | None,
    report: Path | None,
    as_json: bool,
    replay: str | None,
    only_plan: bool,
    no_shrink: bool,
) -> None:
    target = ready(target)
    driver = driver_of(target)
    policies = (Policy(policy),) if policy else (Policy.DRAIN, Policy.REVOKE)
    if policy == Policy.RELEASE:
        _require_harmless(target)
        control = False
    wanted = Wanted(
        target, driver, kills, seed, policies, steps, faults, _actors(actors, target), pairs
    )
    if only_plan:
        for unit in plan(wanted):
            click.echo(str(unit))
        return
    with compiled_once(), executor_of(where, workers) as executor:
        if replay is not None:
            units = [Unit.parse(target, replay, 1)]
            with _progress(len(units[0].cases)) as progress:
                campaign = run_units(target, driver, seed, units, executor, progress)
        else:
            with _progress(kills + (CONTROL_KILLS if control else 0)) as progress:
                campaign = run_campaign(wanted, executor, progress, with_control=control)
    if campaign.problems and not no_shrink and policy != Policy.RELEASE and replay is None:
        shrink_failures(campaign, driver, lambda unit: click.echo(f"shrinking: {unit}", err=True))
    if report is not None:
        from holdfast.torture.report import write

        write(campaign, report)
        click.echo(f"report: {report / 'index.html'}, trace: {report / 'trace.json'}", err=True)
    if as_json:
        click.echo(json.dumps(campaign.to_json(), indent=2))
    else:
        _show(campaign)
    if campaign.problems:
        sys.exit(1)


def _actors(text: str | None, target: str) -> frozenset[str]:
    possible = can_die(Target.parse(target))
    if text is None:
        return possible
    chosen = frozenset(filter(None, text.split(",")))
    if not chosen or not chosen <= frozenset(ROLES):
        raise UsageError(f"{text!r} is not some of {', '.join(ROLES)}", operation="torture")
    if not chosen <= possible:
        raise UsageError(
            f"{', '.join(sorted(chosen - possible))} cannot be killed on this target",
            operation="torture",
            target=target,
            hint=f"these can: {', '.join(sorted(possible))}",
        )
    return chosen


def _require_harmless(target: str) -> None:
    if Target.parse(target).scheme != "emu":
        raise UsageError("--policy release is for emulated functions only", operation="torture",
                         target=target)  # fmt: skip


@contextmanager
def _progress(total: int) -> Iterator[Callable[[int], None]]:
    """A bar on a terminal, a line now and then elsewhere."""
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import Progress

        with Progress(console=Console(stderr=True)) as bar:
            task = bar.add_task("cases", total=total)
            yield lambda count: bar.advance(task, count)
        return
    done = 0

    def show(count: int) -> None:
        nonlocal done
        before, done = done, done + count
        if done * 10 // total > before * 10 // total:
            click.echo(f"{done} of {total} cases", err=True)

    yield show


_ROWS = (
    "cases", "kills", "mid_dma_kills", "corrupted", "leaked_bytes", "leaked_fds", "hung_leases",
    "quarantined_bytes", "unaccounted_bytes", "left_processes", "client_errors", "survivor_rounds",
    "survivor_errors", "completed_after_death", "fresh", "faulty_cases", "missed", "successions",
)  # fmt: skip
_TIMES = ("kill_to_detected_ms", "kill_to_quiet_ms", "quiet_to_released_ms", "keeper_back_ms")


def _show(campaign: Campaign) -> None:
    from rich.console import Console
    from rich.table import Table

    told = [*campaign.tallies, *([campaign.control] if campaign.control else [])]
    table = Table(title=f"{campaign.target}, seed {campaign.seed}: what was seen from outside")
    table.add_column("", no_wrap=True)
    for one in told:
        table.add_column(
            one.policy + (" (control)" if one.policy == Policy.RELEASE else ""), justify="right"
        )
    rows = [one.to_json() for one in told]
    for name in _ROWS:
        table.add_row(name, *[str(row[name]) for row in rows])
    for role in ROLES:
        table.add_row(f"{role}s killed", *[str(row["sigkills"][role]) for row in rows])
    for name in _TIMES:
        table.add_row(f"{name} p50/p99/max", *[_times(row[name]) for row in rows])
    Console().print(table)
    for problem in campaign.problems[:SHOWN]:
        click.echo(f"FAILED: {problem.what}")
        if problem.line:
            click.echo(f"  replay: holdfast torture '{campaign.target}' --replay '{problem.line}'")
    if len(campaign.problems) > SHOWN:
        click.echo(f"... and {len(campaign.problems) - SHOWN} more")
    for one_shrunk in campaign.shrunk:
        click.echo(f"unit {one_shrunk['unit']}, shrunk in {one_shrunk['runs']} runs:")
        click.echo(
            f"  replay: holdfast torture '{campaign.target}' --replay '{one_shrunk['line']}'"
        )
    click.echo(_sentence(campaign, told))


def _times(values: dict[str, float | None]) -> str:
    return "/".join("-" if value is None else f"{value:.1f}" for value in values.values())


def _sentence(campaign: Campaign, told: list[Tally]) -> str:
    killed = sum(sum(one.sigkills.values()) for one in told)
    verdict = "FAILED" if campaign.problems else "As it should be"
    return f"{verdict}: {killed} processes were killed in {campaign.seconds:.0f} s."
