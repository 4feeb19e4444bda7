# SPDX-License-Identifier: Apache-2.0
"""``holdfast spec table``: every strategy on every machine."""

from __future__ import annotations

import multiprocessing
import os
import re
import signal
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Final

import click

from holdfast.cli.spec_common import EVERY, INTERRUPTED, Watch, known_key, strategies, to_json
from holdfast.cli.spec_search import TEXTS, USUAL
from holdfast.spec import table
from holdfast.spec.setting import BOUNDS, Iommu, Profile, Setting
from holdfast.spec.strategy import Strategy
from holdfast.spec.table import Verdict

_WIDTH: Final = 100
"""Columns where there is no terminal to ask."""


@click.command(
    "table",
    short_help="every strategy on every machine",
    help="Try every order of events with every strategy (or with those that are named) on every "
    "machine, and say what breaks. Exit status 1 if a verdict is not the expected one; 130 after "
    "Ctrl-C.",
)
@click.argument("keys", metavar="[STRATEGY]...", nargs=-1)
@click.option("--profile", "profiles", type=click.Choice([str(p) for p in Profile]), multiple=True)
@click.option("--iommu", "iommus", type=click.Choice([str(i) for i in Iommu]), multiple=True)
@click.option("--bounds", type=click.Choice(list(BOUNDS)), default=USUAL, show_default=True,
              help="how much there is of everything")  # fmt: skip
@click.option("--json", "as_json", is_flag=True)
def command(
    keys: tuple[str, ...],
    profiles: tuple[str, ...],
    iommus: tuple[str, ...],
    bounds: str,
    as_json: bool,
) -> None:
    cells = table.cells(
        [Profile(each) for each in profiles] or list(Profile),
        [Iommu(each) for each in iommus] or list(Iommu),
        [known_key(each) for each in keys] or list(strategies()),
    )
    if bounds != USUAL:
        cells = [(kind, replace(setting, bounds=BOUNDS[bounds])) for kind, setting in cells]
    with Watch() as watch:
        found = dict(_judged(cells, watch))
    verdicts = [found[at] for at in sorted(found)]
    wrong = list(_unexpected(verdicts)) if bounds == USUAL else []
    if as_json:
        told = {
            "bounds": bounds,
            "complete": len(verdicts) == len(cells),
            "verdicts": [verdict.to_json() for verdict in verdicts],
            "unexpected": wrong,
        }
        click.echo(to_json(told))
    else:
        _show(verdicts)
        for line in wrong:
            click.echo(f"NOT AS EXPECTED: {line}")
    if watch.interrupted:
        missing = len(cells) - len(verdicts)
        click.echo(f"INCOMPLETE: interrupted; {missing} of {len(cells)} are missing", err=True)
        sys.exit(INTERRUPTED)
    if wrong:
        sys.exit(1)


def _judged(
    cells: Sequence[tuple[type[Strategy], Setting]], watch: Watch
) -> Iterator[tuple[int, Verdict]]:
    """Each cell's number and verdict, in any order; as many as there are until an interrupt.

    On every processor there is: cells have nothing to do with each other. Those that take longest
    come first.
    """
    order = sorted(range(len(cells)), key=lambda at: (not cells[at][0].keeps, at))
    jobs = [(at, *cells[at]) for at in order]
    workers = min(os.cpu_count() or 1, len(jobs))
    if workers < 2:
        for at, kind, setting in jobs:
            watch.begin(f"{kind.key} on {setting}")
            verdict = table.judge(kind, setting, progress=watch)
            if watch.interrupted:
                return
            yield at, verdict
        return
    with multiprocessing.Pool(workers, signal.signal, (signal.SIGINT, signal.SIG_IGN)) as pool:
        results = pool.imap_unordered(_one, jobs)
        done = 0
        while done < len(jobs):
            watch.say(f"{done} of {len(jobs)} cells")
            if watch.interrupted:
                return
            try:
                yield results.next(timeout=EVERY)
                done += 1
            except multiprocessing.TimeoutError:
                continue


def _one(job: tuple[int, type[Strategy], Setting]) -> tuple[int, Verdict]:
    at, kind, setting = job
    return at, table.judge(kind, setting)


def _unexpected(verdicts: Sequence[Verdict]) -> Iterator[str]:
    """Verdicts that are not the known ones."""
    for verdict in verdicts:
        key, setting = verdict.strategy, verdict.setting
        expected = table.EXPECTED.get((key, setting.profile, setting.iommu))
        if verdict.text() != expected:
            yield f"{key} on Linux {setting}: {verdict.text()}, not {expected or 'known before'}"


def _show(verdicts: Sequence[Verdict]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    places = [
        (profile, iommu)
        for profile in Profile
        for iommu in Iommu
        if any(_place(verdict.setting) == (profile, iommu) for verdict in verdicts)
    ]
    drawn = Table(title="strategies, in every order of events", box=box.SIMPLE_HEAD)
    drawn.add_column("", no_wrap=True)
    for profile, iommu in places:
        drawn.add_column(f"{profile} {iommu}")
    known = strategies()
    letters = max((len(each.family) for each in known.values()), default=0)
    for key in dict.fromkeys(verdict.strategy for verdict in verdicts):
        family = known[key].family if key in known else ""
        cells = {_place(each.setting): each for each in verdicts if each.strategy == key}
        drawn.add_row(
            f"{family or '-':<{letters}} {key}",
            *(_cell(cells[place]) if place in cells else "[dim]-[/dim]" for place in places),
        )
    console = Console()
    if not console.is_terminal:
        console = Console(width=_WIDTH)
    console.print(drawn)
    for line in _legend(verdicts):
        click.echo(line)


def _place(setting: Setting) -> tuple[Profile, Iommu]:
    return setting.profile, setting.iommu


def _cell(verdict: Verdict) -> str:
    from rich.markup import escape

    said, _, hangs = verdict.text().partition("; may hang: ")
    text = said.removeprefix("breaks ").replace(", ", " ") + (f"\nhangs {hangs}" if hangs else "")
    colour = "red" if verdict.breaks else "yellow" if verdict.hangs else "green"
    return f"[{colour}]{escape(text)}[/{colour}]"


def _legend(verdicts: Sequence[Verdict]) -> Iterator[str]:
    """What the table's abbreviations mean: of those that are in it."""
    seen = set(re.findall(r"[SL]\d+[r']?", " ".join(verdict.text() for verdict in verdicts)))
    for name, text in TEXTS.items():
        if name in seen:
            yield f"{name:<4} {text}"
    if any(verdict.hangs for verdict in verdicts):
        yield "hangs: what should happen in the end need not, if the card does nothing"
