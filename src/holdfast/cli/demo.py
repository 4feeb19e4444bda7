# SPDX-License-Identifier: Apache-2.0
"""``holdfast demo``: kill processes in the middle of DMA, and see what becomes of the memory."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import click

from holdfast.errors import UsageError
from holdfast.torture import edu_campaign
from holdfast.torture.campaign import Outcome, run_policy
from holdfast.values import Policy, Target

ORDER = (Policy.RELEASE, Policy.DRAIN, Policy.REVOKE)
HITS = 0.8
"""The share of the kills that must hit a running transfer of the emulated card."""


@click.command(
    help="Kill processes in the middle of DMA transfers of an emulated card (or of an edu device, "
    "see --target), under each policy, and look into the memory of innocent processes. Exit status "
    "1 if drain or revoke corrupts, leaks or hangs anything, or if the negative control does not "
    "corrupt."
)
@click.option("--kills", type=click.IntRange(1), default=120, show_default=True, help="per policy")
@click.option("--seed", type=int, default=1, show_default=True, help="of every random choice")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="write the figures here")
@click.option("--policy", "only", type=click.Choice([str(p) for p in ORDER]), multiple=True)
@click.option(
    "--target",
    help="an edu device instead of the emulated card: emu:edu, pci:DDDD:BB:DD.F",
)
def command(
    kills: int, seed: int, json_file: Path | None, only: tuple[str, ...], target: str | None
) -> None:
    chosen = [policy for policy in ORDER if not only or policy in only]
    if target is not None:
        target = str(Target.parse(target))
        chosen = _possible(target, chosen)
    _introduce(kills, target, control=target is None or Policy.RELEASE in chosen)
    outcomes = []
    for policy in chosen:
        progress = _progress(policy, kills)
        if target is None:
            outcomes.append(run_policy(policy, kills, seed, progress))
        else:
            outcomes.append(edu_campaign.run_policy(policy, target, kills, seed, progress))
        _end_progress()
    told = {"seed": seed, "policies": [outcome.to_json() for outcome in outcomes]}
    if json_file is not None:
        json_file.write_text(json.dumps(told, indent=2) + "\n")
    _table(outcomes)
    for outcome in outcomes:
        click.echo(sentence(outcome))
    hits = HITS if target is None else edu_campaign.HITS
    problems = [problem for outcome in outcomes for problem in judge(outcome, hits)]
    for problem in problems:
        click.echo(f"FAILED: {problem}")
    if problems:
        sys.exit(1)
    if target is None or Policy.RELEASE in chosen:
        click.echo("\nAs it should be: only the negative control corrupts.")
    else:
        click.echo("\nAs it should be: nothing was corrupted.")


def _possible(target: str, chosen: list[Policy]) -> list[Policy]:
    """Leave out, and say so, the control that could show nothing on this target."""
    possible = edu_campaign.policies(target)
    if Policy.RELEASE in chosen and Policy.RELEASE not in possible:
        why = (
            "it would let the device\nwrite into memory of this machine. It runs in the lab only."
            if Target.parse(target).options.get("backend") == "uio"
            else "behind a strict IOMMU memory that was unmapped\ncannot be reached, even without "
            "the guard, so it would show nothing."
        )
        click.echo(f"The negative control 'release' is left out: {why}\n")
    left = [policy for policy in chosen if policy in possible]
    if not left:
        raise UsageError("no policy is left to run", operation="demo", target=target)
    return left


def _introduce(kills: int, target: str | None, *, control: bool) -> None:
    if target is None:
        card, victims = "an emulated card (emu:xdma)", "Victim processes take the freed frames"
    else:
        card, victims = f"{target} (edu)", "Victim processes take memory in its place"
    told = (
        f"{kills} client processes per policy are SIGKILLed while {card} "
        f"writes into their memory.\n{victims} and check every byte."
    )
    if control:
        told += (
            " The policy 'release'\nis the negative control: the same code, the release guard "
            "removed."
        )
    click.echo(f"{told}\n")


def _progress(policy: Policy, kills: int) -> Callable[[int], None]:
    live = sys.stderr.isatty()

    def show(done: int) -> None:
        if live:
            bar = "#" * (30 * done // kills)
            click.echo(f"\r{policy:<8} [{bar:<30}] {done}/{kills} kills", nl=False, err=True)
        elif done % max(1, kills // 4) == 0:
            click.echo(f"{policy:<8} {done}/{kills} kills", err=True)

    return show


def _end_progress() -> None:
    if sys.stderr.isatty():
        click.echo(err=True)


def judge(outcome: Outcome, hits: float = HITS) -> list[str]:
    """What is wrong with an outcome; empty if it is as it should be.

    ``hits`` is the share of the kills that must have hit a transfer.
    """
    problems = [f"{outcome.policy}: {drift}" for drift in outcome.drifted]
    if outcome.policy == Policy.RELEASE:
        if not outcome.corrupted:
            problems.append("the negative control did not corrupt anything")
        return problems
    problems += [
        f"{outcome.policy}: {name} = {getattr(outcome, name)}"
        for name in (
            "corrupted", "leaked_bytes", "leaked_fds", "hung_leases", "quarantined_bytes",
            "unaccounted_bytes",
        )
        if getattr(outcome, name)
    ]  # fmt: skip
    if outcome.mid_dma_kills < hits * outcome.kills:
        problems.append(f"{outcome.policy}: only {outcome.mid_dma_kills} kills hit a transfer")
    completed = outcome.completed_after_death
    if outcome.policy == Policy.DRAIN and completed < 0.9 * outcome.mid_dma_kills:
        problems.append(f"drain: only {completed} of {outcome.mid_dma_kills} transfers completed")
    return problems


def sentence(outcome: Outcome) -> str:
    """One plain sentence on what was seen."""
    if outcome.policy == Policy.RELEASE:
        return (
            f"release (negative control): memory given back without proof; {outcome.corrupted} of "
            f"{outcome.kills} innocent processes found foreign bytes in their memory "
            f"({outcome.corrupted_bytes} bytes)."
        )
    how = (
        f"{outcome.completed_after_death} of {outcome.mid_dma_kills} running transfers were "
        "completed after their process was dead"
        if outcome.policy == Policy.DRAIN
        else f"{outcome.mid_dma_kills} running transfers were stopped"
    )
    verdict = "nothing was corrupted, leaked or left hanging" if outcome.clean else "NOT CLEAN"
    return f"{outcome.policy}: {how}; {verdict}."


def _milliseconds(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.1f}" if value < 10 else f"{value:.0f}"


def _table(outcomes: list[Outcome]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title="what was seen from outside")
    table.add_column("", no_wrap=True)
    for outcome in outcomes:
        control = outcome.policy == Policy.RELEASE
        table.add_column(outcome.policy + (" (control)" if control else ""), justify="right")
    rows = [outcome.to_json() for outcome in outcomes]
    for name in rows[0]:
        if name == "policy":
            continue
        cells = []
        for row in rows:
            value = row[name]
            if isinstance(value, dict):
                value = "/".join(_milliseconds(v) for v in value.values())
            cells.append(str(value))
        label = f"{name} p50/p99/max" if name.endswith("_ms") else name
        table.add_row(label, *cells)
    Console().print(table)
