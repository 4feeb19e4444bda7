# SPDX-License-Identifier: Apache-2.0
"""``holdfast spec``: which ways of holding DMA memory are safe, by trying every order of events."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from typing import Final

import click

from holdfast.cli.spec_common import (
    INTERRUPTED,
    Watch,
    find,
    happened,
    number,
    places,
    read_trace,
    show_story,
    strategies,
    to_json,
    write_text,
)
from holdfast.cli.spec_search import TEXTS, USUAL, Found, machine, require_known, search
from holdfast.spec import story
from holdfast.spec.setting import BOUNDS, Iommu, Profile

_ELSEWHERE: Final[dict[str, str]] = {"conform": "spec_conform", "table": "spec_table"}
"""Commands of this group with a module of their own."""


class _Group(click.Group):
    """The commands below, and those of their own modules, loaded when they are used."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted([*super().list_commands(ctx), *_ELSEWHERE])

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name in _ELSEWHERE:
            module = importlib.import_module(f"holdfast.cli.{_ELSEWHERE[cmd_name]}")
            command = module.command
            return command if isinstance(command, click.Command) else None
        return super().get_command(ctx, cmd_name)


@click.group(
    cls=_Group,
    help="Ways of holding memory that a card writes to, in every order of events: which are safe, "
    "and the shortest story in which one is not.",
)
def command() -> None:
    """Entry of the group."""


def _where(function: Callable[..., None]) -> Callable[..., None]:
    """The options that say on what machine."""
    for option in reversed((
        click.option("--profile", type=click.Choice([str(p) for p in Profile]),
                     help="of the kernel  [default: 7.x, or the only one it exists on]"),
        click.option("--iommu", type=click.Choice([str(i) for i in Iommu]),
                     help="[default: none, or the first it exists on]"),
        click.option("--bounds", type=click.Choice(list(BOUNDS)), default=USUAL,
                     show_default=True, help="how much there is of everything"),
        click.option("--limit", type=click.IntRange(1), help="stop after so many states"),
    )):  # fmt: skip
        function = option(function)
    return function


@command.command(
    "list",
    short_help="the strategies that are known",
    help="List the strategies that are known, and where each exists.",
)
@click.option("--json", "as_json", is_flag=True)
def list_command(as_json: bool) -> None:
    known = strategies()
    if as_json:
        rows = [
            {"key": key, "family": each.family, "title": each.title, "exists_on": places(each)}
            for key, each in known.items()
        ]
        click.echo(to_json(rows))
        return
    letters = max((len(each.family) for each in known.values()), default=0)
    wide = max(map(len, known), default=0)
    for key, each in known.items():
        click.echo(f"{each.family or '-':<{letters}}  {key:<{wide}}  {each.title}")
        click.echo(f"{'':{letters + wide + 4}}on {'; '.join(places(each))}")


@command.command(
    "check",
    short_help="try every order of events with one strategy, and tell what breaks",
    help="Try every order of events with one STRATEGY (a key of 'spec list', or FILE.py:Class), "
    "and tell the shortest story in which something breaks. Exit status 1 if anything does, or may "
    "hang for ever; 130 after Ctrl-C, which ends with what was found so far.",
)
@click.argument("strategy")
@_where
@click.option("--invariant", help="look at this one only, and tell its story (S1, S3, ...)")
@click.option("--json", "as_json", is_flag=True)
def check_command(
    strategy: str,
    profile: str | None,
    iommu: str | None,
    bounds: str,
    limit: int | None,
    invariant: str | None,
    as_json: bool,
) -> None:
    kind = find(strategy)
    setting = machine(kind, profile, iommu, bounds)
    require_known(invariant)
    with Watch() as watch:
        found = search(kind, setting, bounds, watch, limit=limit, invariant=invariant)
    if as_json:
        click.echo(to_json(found.to_json()))
    else:
        _say(found, interrupted=watch.interrupted)
        if found.trace is not None:
            click.echo()
            show_story(found.trace)
    if watch.interrupted:
        sys.exit(INTERRUPTED)
    if found.breaks or found.hangs:
        sys.exit(1)


def _say(found: Found, *, interrupted: bool) -> None:
    click.echo(f"{found.strategy.key}: {found.strategy.title}")
    click.echo(f"on Linux {found.setting}, in the bounds '{found.bounds}'")
    click.echo(
        f"{number(found.states)} states in {found.levels} levels, "
        f"{number(found.steps)} steps taken, {found.seconds:.1f} s"
    )
    for name, steps in found.breaks.items():
        text = TEXTS.get(story.base(name), "")
        click.echo(click.style(f"BREAKS {name} in {steps} steps: {text}", fg="red"))
    for name in found.hangs:
        click.echo(click.style(f"MAY HANG, {name}: {TEXTS.get(name, '')}", fg="yellow"))
    if not found.complete:
        why = "interrupted" if interrupted else "the limit of states was met"
        click.echo(f"INCOMPLETE: {why}; what was not reached may break more")
    elif not found.breaks and not (found.hangs and found.invariant):
        what = found.invariant or "every invariant"
        click.echo(click.style(f"HOLDS: {what} in every state that can be reached", fg="green"))


@command.command(
    "trace",
    short_help="write the shortest story of a breach: JSON, or a sequence diagram",
    help="Write the shortest story in which STRATEGY breaks something: as JSON for 'spec replay', "
    "as a sequence diagram. Exit status 1 if nothing breaks, so that there is no story.",
)
@click.argument("strategy")
@_where
@click.option("--invariant", help="the one to break  [default: the gravest that can be]")
@click.option("--json", "json_file", metavar="FILE|-", help="[default: -, without --svg]")
@click.option("--svg", "svg_file", metavar="FILE|-", help="draw it")
def trace_command(
    strategy: str,
    profile: str | None,
    iommu: str | None,
    bounds: str,
    limit: int | None,
    invariant: str | None,
    json_file: str | None,
    svg_file: str | None,
) -> None:
    kind = find(strategy)
    setting = machine(kind, profile, iommu, bounds)
    require_known(invariant)
    with Watch() as watch:
        found = search(kind, setting, bounds, watch, limit=limit, invariant=invariant)
    trace = found.trace
    if trace is not None:
        if json_file is not None or svg_file is None:
            write_text(json_file or "-", to_json(trace.to_json()))
        if svg_file is not None:
            from holdfast.spec.svg import draw

            write_text(svg_file, draw(trace))
    if watch.interrupted:
        click.echo("holdfast: interrupted; there may be more to find", err=True)
        sys.exit(INTERRUPTED)
    if trace is None:
        what = invariant or "any invariant"
        more = "" if found.complete else " within this limit"
        click.echo(f"holdfast: {kind.key} on Linux {setting} does not break {what}{more}", err=True)
        sys.exit(1)


@command.command(
    "replay",
    short_help="carry a story out with real memory and a card",
    help="Carry a story out with real memory and a card: TRACE as 'spec trace' writes it ('-': "
    "standard input), on TARGET. Exit status 0 if what happens agrees with the story, else 1: also "
    "if the story ends before anything can be seen in memory.",
)
@click.argument("trace")
@click.argument("target")
@click.option("--json", "as_json", is_flag=True)
def replay_command(trace: str, target: str, as_json: bool) -> None:
    from holdfast import replay

    told = read_trace(trace)
    outcome = replay.run(told, target)
    if as_json:
        click.echo(to_json(outcome.to_json()))
    else:
        for line in happened(outcome, told):
            click.echo(line)
    if not outcome.agrees:
        sys.exit(1)
