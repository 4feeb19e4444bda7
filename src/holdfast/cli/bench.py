# SPDX-License-Identifier: Apache-2.0
"""``holdfast bench``: each figure against a limit or a peer of the same run."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import click

from holdfast.bench import hardware
from holdfast.bench.result import Result, rounded
from holdfast.bench.runner import FIGURES, run_benches
from holdfast.errors import UsageError


@click.command(
    help="Measure an emulated card (or a real function, see --target), and say for each figure "
    "how far it is from a limit or a peer that was measured in the same run. A ratio of 1 is as "
    "good as the peer, more is better. Exit status 1 if moved data was wrong; a missed goal is "
    "only shown."
)
@click.option(
    "--only",
    type=click.Choice([*FIGURES, *(name for name in hardware.FIGURES if name not in FIGURES)]),
    multiple=True,
    help="may be repeated",
)
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="write the figures here")
@click.option("--quick", is_flag=True, help="small and rough: to see that it works")
@click.option(
    "--target",
    help="an edu device behind an IOMMU, pci:DDDD:BB:DD.F, and the figures that only the real "
    f"thing has: {', '.join(hardware.FIGURES)}; for root",
)
def command(only: tuple[str, ...], json_file: Path | None, quick: bool, target: str | None) -> None:
    known = hardware.FIGURES if target is not None else tuple(FIGURES)
    if foreign := [name for name in only if name not in known]:
        raise UsageError(
            f"no such figure here: {', '.join(foreign)}",
            operation="bench",
            target=target or "",
            hint=f"there are {', '.join(known)}",
        )

    def say(name: str) -> None:
        click.echo(f"{name} ...", err=True)

    if target is None:
        results = run_benches(only, quick=quick, say=say)
    else:
        results = hardware.run_hardware(target, only, quick=quick, say=say)
    wrong = [result.name for result in results if result.verified is False]
    told = {
        "quick": quick,
        "verified": not wrong,
        "results": [result.to_json() for result in results],
    }
    if json_file is not None:
        json_file.write_text(json.dumps(told, indent=2) + "\n")
    _table(results)
    if wrong:
        click.echo(f"FAILED: wrong data in {', '.join(wrong)}")
        sys.exit(1)


def _table(results: list[Result]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(title="ratio 1: as good as the peer; more is better", box=box.SIMPLE_HEAD)
    table.add_column("figure", no_wrap=True)
    for name in ("value", "ratio", "spread"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("goal", no_wrap=True)
    for result in results:
        table.add_row(
            result.name,
            f"{rounded(result.value):g} {result.unit}",
            "-" if result.ratio is None else f"{result.ratio:.2g}",
            spread(result),
            verdict(result),
        )
    # A pipe has no width of its own; the default of 80 would cut the names of the figures.
    Console(width=None if sys.stdout.isatty() else 100).print(table)
    for result in results:
        goals = ", ".join(goal.text(result.unit) for goal in result.goals)
        click.echo(f"{result.name}: against {result.peer}" + (f"; goal {goals}" if goals else ""))


def spread(result: Result) -> str:
    """The extremes of the rounds' ratios, or median and p99 of the times."""
    detail = result.detail
    if isinstance(found := detail.get("ratio"), dict):
        return f"{found['min']:.2g}..{found['max']:.2g}"
    for found in detail.values():
        if isinstance(found, dict) and "p99" in found:
            return f"p50 {found['p50']:.2g} p99 {found['p99']:.2g}"
    return ""


def verdict(result: Result) -> str:
    """One or two words: wrong data outweighs everything else."""
    if result.verified is False:
        return "WRONG DATA"
    if result.met is None:
        return ""
    return "met" if result.met else "below goal"
