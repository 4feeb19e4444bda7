# SPDX-License-Identifier: Apache-2.0
"""Draw the death protocol from the tables that the keeper runs on.

``python docs/draw_states.py`` writes ``docs/death-protocol-states.md``, which
``death-protocol.md`` includes. A test fails if the file is not what this script would write.
"""

from collections.abc import Iterable
from pathlib import Path

from holdfast.keeper.state import FIRST_MEASURE, RELEASE_GATE, TABLE, Fact, Row, State
from holdfast.values import Policy

FRAGMENT = Path(__file__).with_name("death-protocol-states.md")

LADDER = (
    State.ALIVE,
    State.FROZEN,
    State.DRAINING,
    State.STOPPING,
    State.ISOLATING,
    State.RESETTING,
    State.QUARANTINE,
    State.UNMAPPED,
    State.QUIET,
    State.RELEASED,
)
"""Top to bottom. An edge to the next state is drawn downwards, every other one sideways."""
assert set(LADDER) == set(State)


def facts(needs: Iterable[Fact]) -> str:
    return "; ".join(sorted(needs)) or "-"


def diagram() -> list[str]:
    lines: list[str] = []
    for place, state in enumerate(LADDER):
        below = LADDER[place + 1] if place + 1 < len(LADDER) else None
        rows = [row for row in TABLE if row.source is state]
        down = [row for row in rows if row.target is below]
        bar = "│" if down else " "
        lines.append(state.upper())
        lines += [f"  {bar} {_side(row)}" for row in rows if row.target is not below]
        lines += [f"  │ {row.event}{_mark(row)}" for row in down]
        lines.append("  ▼" if down else "")
    return lines[:-1]


def _side(row: Row) -> str:
    head = f"├─ {row.event}{_mark(row)} "
    return f"{head:─<44}▶ {row.target.upper()}"


def _mark(row: Row) -> str:
    return " *" if row.needs else ""


def table() -> list[str]:
    lines = ["| in | on | go to | only if observed |", "|---|---|---|---|"]
    lines += [
        f"| {row.source} | {row.event} | {row.target} | {facts(row.needs)} |" for row in TABLE
    ]
    return lines


def gates() -> list[str]:
    lines: list[str] = []
    for gate in dict.fromkeys(RELEASE_GATE.values()):
        policies = [policy for policy in Policy if RELEASE_GATE[policy] == gate]
        firsts = [f"`{policy}` (first measure: {FIRST_MEASURE[policy]})" for policy in policies]
        lines += [f"Under {' and '.join(firsts)}, all of one of these:", ""]
        lines += [f"* {facts(way) if way else '**no condition at all**'}" for way in gate.ways]
        lines.append("")
    return lines[:-1]


def render() -> str:
    """The whole fragment, as Markdown."""
    return "\n".join(
        [
            "<!-- Written by docs/draw_states.py from holdfast.keeper.state. Do not edit. -->",
            "",
            "```text",
            *diagram(),
            "```",
            "",
            "An asterisk marks an edge that needs an observation. All edges, and what they need:",
            "",
            *table(),
            "",
            "The release gate: what must have been observed before an edge to `released` is taken.",
            "",
            *gates(),
            "",
        ]
    )


if __name__ == "__main__":
    FRAGMENT.write_text(render())
