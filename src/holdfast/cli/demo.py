# SPDX-License-Identifier: Apache-2.0
"""``holdfast demo``: kill processes in the middle of DMA, and see what becomes of the memory."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import click

from holdfast.torture.campaign import Outcome, run_policy
from holdfast.values import Policy

ORDER = (Policy.RELEASE, Policy.DRAIN, Policy.REVOKE)


@click.command(
    help="Kill processes in the middle of DMA transfers of an emulated card, under each policy, "
    "and look into the memory of innocent processes. Exit status 1 if drain or revoke corrupts, "
    "leaks or hangs anything, or if the negative control does not corrupt."
)
@click.option("--kills", type=click.IntRange(1), default=120, show_default=True, help="per policy")
@click.option("--seed", type=int, default=1, show_default=True, help="of every random choice")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="write the figures here")
@click.option("--policy", "only", type=click.Choice([str(p) for p in ORDER]), multiple=True)
def command(kills: int, seed: int, json_file: Path | None, only: tuple[str, ...]) -> None:
    chosen = [policy for policy in ORDER if not only or policy in only]
    click.echo(
        f"{kills} client processes per policy are SIGKILLed while an emulated card (emu:xdma) "
        "writes into their memory.\nVictim processes take the freed frames and check every byte. "
        "The policy 'release'\nis the negative control: the same code, the release guard removed.\n"
    )
    outcomes = []
    for policy in chosen:
        outcomes.append(run_policy(policy, kills, seed, _progress(policy, kills)))
        _end_progress()
    told = {"seed": seed, "policies": [outcome.to_json() for outcome in outcomes]}
    if json_file is not None:
        json_file.write_text(json.dumps(told, indent=2) + "\n")
    _table(outcomes)
    for outcome in outcomes:
        click.echo(sentence(outcome))
    problems = [problem for outcome in outcomes for problem in judge(outcome)]
    for problem in problems:
        click.echo(f"FAILED: {problem}")
    if problems:
        sys.exit(1)
    click.echo("\nAs it should be: only the negative control corrupts.")


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


def judge(outcome: Outcome) -> list[str]:
    """What is wrong with an outcome; empty if it is as it should be."""
    if outcome.policy == Policy.RELEASE:
        return [] if outcome.corrupted else ["the negative control did not corrupt anything"]
    problems = [
        f"{outcome.policy}: {name} = {getattr(outcome, name)}"
        for name in (
            "corrupted", "leaked_bytes", "leaked_fds", "hung_leases", "quarantined_bytes",
            "unaccounted_bytes",
        )
        if getattr(outcome, name)
    ]  # fmt: skip
    if outcome.mid_dma_kills < 0.8 * outcome.kills:
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
