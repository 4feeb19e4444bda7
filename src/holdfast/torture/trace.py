# SPDX-License-Identifier: Apache-2.0
"""A campaign as trace events, for ui.perfetto.dev and Chrome's tracing page.

The Trace Event Format's JSON: complete events ("X") with a start and a length in microseconds, and
instants ("i"), each on a process and a thread. Here a *process* is a stack, a *thread* one of its
lanes, and beside every lane a second one for what its keeper says of the dead client's lease.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from holdfast.torture.tally import killed_at
from holdfast.torture.unit import Found

Event = dict[str, Any]
KEEPER_THREAD = 100
"""Number of the thread for the keepers themselves; lanes are below, their leases above."""


def events(found: Iterable[Found]) -> Iterator[Event]:
    """Trace events of all units, with their names first."""
    for unit in found:
        yield from _names(unit)
        leases = {lease["lease"]: lease for lease in unit.leases}
        for record in unit.records:
            yield from _case(unit, record)
            lease = leases.get(record["lease"])
            if lease is not None:
                yield from _lease(unit, record, lease)
        for entry in unit.happened:
            yield _instant(unit, KEEPER_THREAD, entry["what"], entry["at_ns"], entry)


def _names(unit: Found) -> Iterator[Event]:
    name = f"unit {unit.number}: {unit.policy} {unit.memory} {unit.access} {unit.faults}"
    yield _meta(unit, "process_name", 0, name)
    for lane in sorted({record["lane"] for record in unit.records}):
        yield _meta(unit, "thread_name", lane, f"lane {lane}")
        yield _meta(unit, "thread_name", KEEPER_THREAD + 1 + lane, f"lane {lane}: leases")
    yield _meta(unit, "thread_name", KEEPER_THREAD, "keeper")


def _meta(unit: Found, what: str, thread: int, name: str) -> Event:
    return {"name": what, "ph": "M", "pid": unit.number, "tid": thread, "args": {"name": name}}


def _case(unit: Found, record: dict[str, Any]) -> Iterator[Event]:
    told = {name: record[name] for name in ("line", "pid", "lease", "error", "foreign", "missed")}
    parts = [
        ("client", record["started_ns"], record["ended_ns"]),
        ("release", record["ended_ns"], record["released_ns"]),
        ("victim", record["released_ns"] or record["ended_ns"], record["judged_ns"]),
    ]
    for name, begin, end in parts:
        if begin and end:
            what = f"case {record['case']}" if name == "client" else name
            yield _complete(unit, record["lane"], what, begin, end, told)
    for hit in record["hits"]:
        what = f"{'+'.join(hit['killed'])} at {hit['step']}"
        yield _instant(unit, record["lane"], what, hit["at_ns"], hit)


def _lease(unit: Found, record: dict[str, Any], lease: dict[str, Any]) -> Iterator[Event]:
    """Each state until the next one, from the kill on."""
    log = lease["log"]
    for (state, at, why), following in zip(log, [*log[1:], None], strict=True):
        begin = max(at, killed_at(record) or at) if state == "alive" else at
        end = following[1] if following else begin
        if end > begin:
            thread = KEEPER_THREAD + 1 + record["lane"]
            yield _complete(unit, thread, state, begin, end, {"why": why, "lease": lease["lease"]})


def _complete(
    unit: Found, thread: int, name: str, begin: int, end: int, told: dict[str, Any]
) -> Event:
    return {
        "name": name, "ph": "X", "pid": unit.number, "tid": thread, "ts": begin / 1e3,
        "dur": (end - begin) / 1e3, "args": told,
    }  # fmt: skip


def _instant(unit: Found, thread: int, name: str, at: int, told: dict[str, Any]) -> Event:
    return {
        "name": name, "ph": "i", "s": "t", "pid": unit.number, "tid": thread, "ts": at / 1e3,
        "args": told,
    }  # fmt: skip
