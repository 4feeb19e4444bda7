# SPDX-License-Identifier: Apache-2.0
"""``holdfast run TARGET -- CMD...``."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import click

from holdfast.errors import HoldfastError
from holdfast.keeper.run import Outcome, Run
from holdfast.kernel import process
from holdfast.values import Target

GAVE_UP = 124
"""As timeout(1) says that time was up."""
FAILED = 125
NOT_EXECUTABLE = 126
NOT_FOUND = 127
"""As env(1), nice(1) and timeout(1)."""


@click.command(
    help="Run a command that uses TARGET, and report its exit only after every lease of it, and of "
    "the processes it started, has been released. The exit is the command's own; killed by a "
    "signal, this process dies by the same one. Further statuses: 124 gave up waiting (--patience, "
    "Ctrl-\\, or the keeper is gone) · 125 nothing was run · 126 the command cannot be executed · "
    "127 there is none. A second Ctrl-C within 2 seconds kills the command.",
    context_settings={"allow_interspersed_args": False},
)
@click.option(
    "--patience",
    type=click.FloatRange(0),
    default=None,
    metavar="SECONDS",
    help="give up waiting for leases so long after the command's end; default: never",
)
@click.option(
    "--json",
    "json_file",
    type=click.Path(path_type=Path, allow_dash=True),
    help="write here what was waited for ('-': standard error)",
)
@click.argument("target")
@click.argument("cmd", nargs=-1, type=click.UNPROCESSED, required=True)
def command(
    patience: float | None, json_file: Path | None, target: str, cmd: tuple[str, ...]
) -> None:
    if cmd[0] == "--":  # Click leaves it there once it has seen the target
        cmd = cmd[1:]
    if not cmd:
        raise click.UsageError("no command: holdfast run TARGET -- CMD ...")
    try:
        run = Run(Target.parse(target), cmd, patience=patience, say=_say)
        outcome = run.carry_out()
    except FileNotFoundError:
        _say(f"{cmd[0]}: command not found")
        sys.exit(NOT_FOUND)
    except PermissionError as error:
        _say(str(error) if isinstance(error, HoldfastError) else f"{cmd[0]}: permission denied")
        sys.exit(FAILED if isinstance(error, HoldfastError) else NOT_EXECUTABLE)
    except HoldfastError as error:
        _say(str(error))
        sys.exit(FAILED)
    _report(outcome, json_file)
    if outcome.gave_up:
        how = f"status {outcome.exit}" if outcome.exit >= 0 else f"signal {-outcome.exit}"
        _say(f"gave up waiting ({outcome.gave_up}); the command itself ended with {how}")
        sys.exit(GAVE_UP)
    if outcome.exit < 0:
        sys.stdout.flush()
        process.die_of(-outcome.exit)
        sys.exit(128 - outcome.exit)
    sys.exit(outcome.exit)


def _report(outcome: Outcome, json_file: Path | None) -> None:
    if json_file is None:
        return
    text = json.dumps(outcome.to_json(), indent=2)
    if str(json_file) == "-":
        click.echo(text, err=True)
    else:
        json_file.write_text(text + "\n")


def _say(text: str) -> None:
    click.echo(f"holdfast run: {text}", err=True)
