# SPDX-License-Identifier: Apache-2.0
"""The report of a campaign: one HTML file that needs nothing else, and a trace beside it.

Pictures are inline SVG and there is no script, so that the file can be mailed, archived and opened
anywhere. Everything that comes from a run (errors, lines, names) is escaped.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise
from pathlib import Path
from typing import Any

from holdfast.steps import STEPS
from holdfast.torture.run import Campaign
from holdfast.torture.tally import Tally, killed_at, states_of
from holdfast.torture.trace import events
from holdfast.torture.unit import Found

SLOWEST = 12
"""Timelines of the slowest cases; failing ones come on top."""
MOST_FAILING = 40
KILLS_SHOWN = 5000
"""Most rows of the list of kills; the trace has all."""
WIDTH = 900
_COLOURS = {
    "client": "#5b8def", "alive": "#5b8def", "frozen": "#9aa5b1", "draining": "#f0b429",
    "stopping": "#f7823b", "isolating": "#e66a2c", "resetting": "#ba2525", "quiet": "#3ebd93",
    "unmapped": "#2bb0ed", "released": "#0c6b58", "quarantine": "#8719e0", "victim": "#c3cfd9",
}  # fmt: skip
_STYLE = """
body{font:14px/1.45 system-ui,sans-serif;margin:2em auto;max-width:1000px;color:#1f2933}
table{border-collapse:collapse;margin:1em 0}td,th{padding:.2em .7em;border-bottom:1px solid #e4e7eb}
td{text-align:right}td:first-child,th:first-child{text-align:left}code{background:#f5f7fa}
.bad{color:#ba2525;font-weight:600}.good{color:#0c6b58;font-weight:600}
details{margin:1em 0}svg{display:block;margin:.3em 0}svg text{font:11px system-ui,sans-serif}
"""


def write(campaign: Campaign, directory: Path) -> None:
    """Write ``index.html``, ``trace.json`` and ``figures.json`` into a directory, made if missing.

    Raises OSError.
    """
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "index.html").write_text(html(campaign), encoding="utf-8")
    every = [*campaign.found, *([campaign.control_found] if campaign.control_found else [])]
    trace = {"traceEvents": list(events(every)), "displayTimeUnit": "ms"}
    (directory / "trace.json").write_text(json.dumps(trace), encoding="utf-8")
    figures = json.dumps(campaign.to_json(), indent=2)
    (directory / "figures.json").write_text(figures + "\n", encoding="utf-8")


def html(campaign: Campaign) -> str:
    """The whole page."""
    told = [*campaign.tallies, *([campaign.control] if campaign.control else [])]
    parts = [
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>",
        f"<title>holdfast torture {escape(campaign.target)}</title><style>{_STYLE}</style></head>",
        _title(campaign),
        _verdict(campaign),
        "<h2>Figures</h2>",
        _figures(told),
        "<h2>Steps</h2><p>How often each step was armed and reached, and who died there.</p>",
        *(_steps(one) for one in campaign.tallies),
        "<h2>Latencies</h2>",
        *(_latencies(one) for one in campaign.tallies),
        "<h2>Timelines</h2>",
        _legend(),
        _timelines(campaign),
        "<h2>What was killed when</h2>",
        _kills(campaign.found),
        "</body></html>",
    ]
    return "\n".join(parts)


def _title(campaign: Campaign) -> str:
    return (
        f"<body><h1>holdfast torture</h1><p><code>{escape(campaign.target)}</code>, "
        f"seed {campaign.seed}, {campaign.seconds:.0f} s on {len(campaign.found)} stacks</p>"
    )


def _verdict(campaign: Campaign) -> str:
    problems = campaign.problems
    if not problems:
        return "<p class='good'>Nothing was corrupted, leaked or left hanging.</p>"
    rows = [
        f"<li>unit {it.unit}{'' if it.case is None else f', case {it.case}'}: {escape(it.what)}"
        + (f"<br><code>{escape(it.line[:2000])}</code>" if it.line else "")
        + "</li>"
        for it in problems[:MOST_FAILING]
    ]
    shrunk = [
        f"<li>unit {one['unit']}, in {one['runs']} runs: <code>{escape(one['line'])}</code></li>"
        for one in campaign.shrunk
    ]
    smaller = f"<p>Shrunk to:</p><ul>{''.join(shrunk)}</ul>" if shrunk else ""
    return f"<p class='bad'>{len(problems)} problems</p><ul>{''.join(rows)}</ul>{smaller}"


def _table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    first = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(str(cell))}</td>" for cell in row) + "</tr>" for row in rows
    )
    return f"<table><tr>{first}</tr>{body}</table>"


def _figures(told: Sequence[Tally]) -> str:
    rows = [one.to_json() for one in told]
    names = [name for name in rows[0] if name not in ("policy", "steps", "problems", "sigkills")]
    head = ["", *(one.policy for one in told)]
    lines: list[list[object]] = [[name, *(_cell(row[name]) for row in rows)] for name in names]
    for role, counts in rows[0]["sigkills"].items():
        every = [counts, *(row["sigkills"][role] for row in rows[1:])]
        lines.append([f"{role}s killed", *every])
    return _table(head, lines)


def _cell(value: object) -> object:
    if isinstance(value, dict):
        return " / ".join("-" if v is None else f"{v:.1f}" for v in value.values())
    return value


def _steps(told: Tally) -> str:
    rows = []
    for name in [*STEPS, *sorted(set(told.steps) - set(STEPS))]:
        count = told.steps.get(name)
        if count is not None:
            died = ", ".join(f"{who} {n}" for who, n in sorted(count.killed.items()))
            rows.append((name, STEPS.get(name, "a random moment"), count.armed, count.hit, died))
    head = ("step", "what is true there", "armed", "reached", "died")
    return f"<h3>{escape(told.policy)}</h3>{_table(head, rows)}"


# -- pictures ------------------------------------------------------------


def _latencies(told: Tally) -> str:
    charts = [
        ("kill to detected", told.kill_to_detected_ms),
        ("kill to quiet", told.outcome.kill_to_quiet_ms),
        ("quiet to released", told.outcome.quiet_to_released_ms),
        ("keeper killed to its successor", told.keeper_back_ms),
    ]
    drawn = [histogram(f"{name}, {told.policy}", values) for name, values in charts if values]
    return "".join(drawn)


def histogram(title: str, values: Sequence[float], bins: int = 48) -> str:
    """Counts by time on a logarithmic axis, as SVG. ``values`` in milliseconds."""
    import numpy as np

    clipped = np.maximum(np.asarray(values, float), 1e-3)
    low, high = float(clipped.min()), float(clipped.max())
    edges = np.geomspace(low, max(high, low * 1.001), bins + 1)
    counts = np.histogram(clipped, edges)[0]
    top, wide, tall = max(1, int(counts.max())), WIDTH / bins, 110
    bars = "".join(
        f"<rect x='{at * wide:.1f}' y='{20 + tall * (1 - count / top):.1f}' "
        f"width='{wide - 1:.1f}' height='{tall * count / top:.1f}' fill='#5b8def'/>"
        for at, count in enumerate(counts.tolist())
        if count
    )
    marks = "".join(
        f"<text x='{x * WIDTH:.0f}' y='{tall + 36}' text-anchor='{anchor}'>{at:.2g} ms</text>"
        for x, at, anchor in (
            (0.0, low, "start"),
            (0.5, float(np.sqrt(low * high)), "middle"),
            (1.0, high, "end"),
        )
    )
    p50, p99 = np.percentile(clipped, [50, 99])
    return (
        f"<svg width='{WIDTH}' height='{tall + 42}' role='img'><text x='0' y='13'>{escape(title)}: "
        f"{len(values)} kills, p50 {p50:.1f} ms, p99 {p99:.1f} ms, max {high:.1f} ms</text>"
        f"{bars}{marks}</svg>"
    )


@dataclass(frozen=True, slots=True)
class Line:
    """One case as a timeline: spans in nanoseconds, and instants."""

    title: str
    spans: list[tuple[str, int, int]]
    marks: list[tuple[str, int]]

    @property
    def length(self) -> int:
        return max(end for _, _, end in self.spans) - min(begin for _, begin, _ in self.spans)


def line_of(unit: Found, record: dict[str, Any], lease: dict[str, Any] | None) -> Line | None:
    """The timeline of a case; None if it never began."""
    begin = record["started_ns"]
    end = record["ended_ns"] or record["judged_ns"]
    if not begin or not end:
        return None
    spans = [("client", begin, max(end, begin + 1))]
    log = lease["log"] if lease is not None else []
    spans += [
        (state, at, following[1])
        for (state, at, _), following in pairwise(log)
        if state != "alive" and following[1] > at
    ]
    released = record["released_ns"]
    if released and record["judged_ns"] > released:
        spans.append(("victim", released, record["judged_ns"]))
    marks = [(f"{'+'.join(hit['killed'])} †", hit["at_ns"]) for hit in record["hits"]]
    title = f"unit {unit.number}, case {record['case']}: {record['line']}"
    return Line(title, spans, marks)


def draw(line: Line) -> str:
    """A timeline as SVG."""
    first = min([begin for _, begin, _ in line.spans] + [at for _, at in line.marks])
    last = max([end for _, _, end in line.spans] + [at for _, at in line.marks])
    scale = WIDTH / max(1, last - first)
    boxes = "".join(
        f"<rect x='{(begin - first) * scale:.1f}' y='{20 if name != 'victim' else 38}' "
        f"width='{max(1.0, (end - begin) * scale):.1f}' height='15' "
        f"fill='{_COLOURS.get(name, '#9aa5b1')}'><title>{escape(name)} "
        f"{(end - begin) / 1e6:.2f} ms</title></rect>"
        for name, begin, end in line.spans
    )
    marks = "".join(
        f"<line x1='{(at - first) * scale:.1f}' x2='{(at - first) * scale:.1f}' y1='16' y2='56' "
        f"stroke='#ba2525'><title>{escape(name)} at {(at - first) / 1e6:.2f} ms</title></line>"
        for name, at in line.marks
    )
    return (
        f"<svg width='{WIDTH}' height='60' role='img'><text x='0' y='12'>{escape(line.title)} "
        f"({(last - first) / 1e6:.1f} ms)</text>{boxes}{marks}</svg>"
    )


def _legend() -> str:
    cells = "".join(
        f"<span style='color:{colour}'>&#9632;</span> {name} &nbsp;"
        for name, colour in _COLOURS.items()
        if name != "alive"
    )
    return f"<p>{cells} <span style='color:#ba2525'>|</span> somebody is killed</p>"


def _timelines(campaign: Campaign) -> str:
    failing = {(it.unit, it.case) for it in campaign.problems if it.case is not None}
    bad, good = [], []
    for unit in campaign.found:
        leases = {lease["lease"]: lease for lease in unit.leases}
        for record in unit.records:
            lease = leases.get(record["lease"])
            line = line_of(unit, record, lease)
            if line is None:
                continue
            if (unit.number, record["case"]) in failing:
                bad.append(line)
            elif lease is not None and killed_at(record):
                took = states_of(lease).get("released", record["released_ns"]) - killed_at(record)
                good.append((took, line))
    good.sort(key=lambda pair: -pair[0])
    parts = [f"<h3>Failing cases ({len(bad)})</h3>"] if bad else []
    parts += [draw(line) for line in bad[:MOST_FAILING]]
    parts.append("<h3>The slowest from kill to release</h3>")
    parts += [draw(line) for _, line in good[:SLOWEST]]
    return "".join(parts)


def _kills(found: Sequence[Found]) -> str:
    start = min((unit.started_ns for unit in found), default=0)
    rows = sorted(
        ((hit["at_ns"] - start) / 1e9, unit.number, record["case"], "+".join(hit["killed"]),
         hit["step"], hit["by"])
        for unit in found
        for record in unit.records
        for hit in record["hits"]
    )  # fmt: skip
    head = ("seconds", "unit", "case", "killed", "at", "by process")
    shown = [(f"{at:.3f}", *rest) for at, *rest in rows[:KILLS_SHOWN]]
    return f"<details><summary>{len(rows)} kills</summary>{_table(head, shown)}</details>"
