# SPDX-License-Identifier: Apache-2.0
"""``holdfast spec conform``: whether keepers did what the specification says that keepers do."""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path

import click

from holdfast.errors import UsageError

LARGEST = 256 << 20
"""Bytes of a log that are read: some million lines."""
HINT = "give the file of `holdfast serve --log FILE`"


@click.command(
    "conform",
    short_help="check a keeper's log against the specification",
    help="Read a log of `holdfast serve --log LOG` ('-': standard input) and say which line, if "
    "any, no behaviour of the specification explains. Exit status 1 if there is one.",
)
@click.argument("log", metavar="LOG")
@click.option("--json", "as_json", is_flag=True)
def command(log: str, as_json: bool) -> None:
    from holdfast.spec import behaviour

    try:
        parsed = behaviour.parse(_lines(log))
    except ValueError as error:
        raise UsageError(
            f"not a keeper's log: {error}", operation="spec conform", target=log, hint=HINT
        ) from error
    found = behaviour.check(parsed)
    steps = sum(len(lines) for lines in parsed.leases.values())
    if as_json:
        told = {
            "leases": len(parsed.leases),
            "lines": steps,
            "strict": parsed.strict,
            "policies": dict(Counter(parsed.policies.values())),
            "drifts": [
                {"lease": each.lease, "step": each.number, "at_ns": each.line.at_ns,
                 "state": each.line.state, "event": each.line.event, "why": each.why}
                for each in found
            ],
        }  # fmt: skip
        click.echo(json.dumps(told, indent=2))
    else:
        for each in found:
            click.echo(f"{each}")
        verdict = (
            "all of it is explained" if not found else f"{len(found)} leases are NOT explained"
        )
        click.echo(f"{len(parsed.leases)} leases, {steps} lines: {verdict}")
    if found:
        sys.exit(1)


def _lines(log: str) -> list[str]:
    if log == "-":
        text = sys.stdin.buffer.read(LARGEST + 1)
    else:
        try:
            with Path(log).open("rb") as file:
                text = file.read(LARGEST + 1)
        except OSError as error:
            raise UsageError(
                f"{error.strerror}", operation="read a log", target=log, hint=HINT
            ) from error
    if len(text) > LARGEST:
        raise UsageError(
            f"longer than {LARGEST} bytes",
            operation="read a log",
            target=log,
            hint="give a part of it: whole lines, from a lease's beginning",
        )
    return text.decode("utf-8", errors="replace").splitlines()
