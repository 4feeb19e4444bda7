# SPDX-License-Identifier: Apache-2.0
"""What readers want to know of a state: whose each frame is, what the card does, what leads where.

A trace holds every variable by name. This reads them as *lanes*: one for each frame, descriptor,
IOVA, lease and so on that occurs in a story, with a sentence for each moment. Stories print what
changed in a lane, pictures draw it as a band. A variable that no lane knows has one of its own, so
that models may grow.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from holdfast.spec.trace import Step, Trace
from holdfast.spec.world import (
    ACTIVE,
    FACTS,
    LEASE_STATES,
    MAP_STATES,
    Dom,
    Eng,
    Hw,
    Iova,
    Kept,
    Know,
    Sw,
)

State = Mapping[str, int]

FREE: Final = "free"
ANOTHER: Final = "another"
NOBODY: Final = ""
"""Owners of lanes, besides processes (``P0``)."""

_AXES: Final = {
    "ref": "F", "other": "F", "reserved": "F", "locked": "F", "map": "PF", "hold": "PF",
    "address": "PF", "quarantined": "PF", "target": "DF", "owner": "DP", "hw": "D", "sw": "D",
    "fab": "D", "fresh": "D", "reading": "D", "named": "DI", "pte": "IF", "tlb": "IF",
    "cached": "IF", "iova": "I", "iova_of": "PI", "proc": "P", "file": "P", "window": "P",
    "know": "P", "live": "P", "touched": "P", "charged": "P", "ghost": "P", "script": "P",
    "kin": "PP", "bme": "", "eng": "", "lies": "", "dom": "", "kills": "", "forks": "",
    "lease": "P", "mapping": "P", "fact": "PT", "keeper": "", "crashes": "", "anchored": "P",
    "isolated": "P", "tried": "P", "late": "P",
}  # fmt: skip
_ARGUMENTS: Final = {"p": "P", "q": "P", "f": "F", "g": "F", "d": "D", "i": "I"}
_NAME: Final = re.compile(r"([^\[\]]+)\[(\d{1,6}(?:, \d{1,6})*)\]", re.ASCII)
_PROCESS: Final = re.compile(r"P\d{1,6}", re.ASCII)

_HW: Final[dict[int, str]] = {
    Hw.POSTED: "posted", Hw.FETCHED: "fetched by the card",
    Hw.INFLIGHT: "first write sent", Hw.WRITTEN: "last write sent", Hw.ABORTED: "aborted",
}  # fmt: skip
_ENG: Final[dict[int, str]] = {
    Eng.RUN: "runs", Eng.STOPPING: "is stopping", Eng.QUIET: "has stopped",
    Eng.HUNG_SILENT: "hangs silently", Eng.HUNG_WILD: "is wild",
    Eng.GONE: "is gone",
}  # fmt: skip
_DOM: Final[dict[int, str]] = {Dom.USER: "", Dom.BLOCK: "cut off", Dom.DEFAULT: "identity domain"}
_KNOW: Final[dict[int, str | None]] = {
    Know.UNKNOWN: "nothing is known of the card",
    Know.QUIET_ACK: "the card is believed at rest",
    Know.RESET_ACK: "the card is believed reset",
}
_KEPT: Final[dict[int, str | None]] = {
    Kept.UP: "runs", Kept.DOWN: "is dead", Kept.AGAIN: "a successor runs", Kept.LOST: "is lost",
}  # fmt: skip


def split(name: str) -> tuple[str, tuple[int, ...]]:
    """``map[0, 1]`` as ``("map", (0, 1))``; a name of another form as itself."""
    found = _NAME.fullmatch(name)
    if found is None:
        return name, ()
    return found[1], tuple(map(int, found[2].split(",")))


def is_process(name: str) -> bool:
    """Whether an actor or owner is one of the processes: P0, P1."""
    return _PROCESS.fullmatch(name) is not None


def value(state: State, name: str, *index: int) -> int:
    """A variable; 0 if the state does not have it."""
    return state.get(f"{name}{list(index)}" if index else name, 0)


@dataclass(frozen=True, slots=True)
class Moment:
    """What there is to say of a lane at one time."""

    text: str
    short: str
    """The same for a narrow column."""
    owner: str = NOBODY
    """Whose it is: ``P0``, :data:`ANOTHER`, :data:`FREE`, or nobody's in particular."""
    held: bool = False
    """It is kept for DMA, whatever becomes of its process."""


@dataclass(frozen=True, slots=True)
class Lane:
    """One thing that lasts through the story, and what it is at each moment (0: the start)."""

    name: str
    kind: str
    moments: Sequence[Moment]

    def changes(self, at: int) -> bool:
        """Whether the step with this number (from 1) changed it."""
        return self.moments[at].text != self.moments[at - 1].text


class Scene:
    """A trace with everything that occurs in it. Immutable."""

    def __init__(self, trace: Trace) -> None:
        self.trace = trace
        self.states: list[State] = [trace.start, *(step.after for step in trace.steps)]
        seen: dict[str, set[int]] = {axis: set() for axis in "PFDIT"}
        self._unknown: list[str] = []
        for name in sorted({name for state in self.states for name in state}):
            base, index = split(name)
            axes = _AXES.get(base)
            if axes is None or len(axes) != len(index):
                self._unknown.append(name)
                continue
            for axis, at in zip(axes, index, strict=True):
                seen[axis].add(at)
        for step in trace.steps:
            for name, at in step.args.items():
                if name in _ARGUMENTS:
                    seen[_ARGUMENTS[name]].add(at)
        self.processes, self.frames, self.descriptors, self.iovas = (
            sorted(seen[axis]) for axis in "PFDI"
        )
        self.facts = sorted(seen["T"])
        self.translated = trace.iommu != "none"
        self.lanes = tuple(self._lanes())

    def changed(self, at: int) -> list[Lane]:
        """Lanes that the step with this number (from 1) changed."""
        return [lane for lane in self.lanes if lane.changes(at)]

    def lane(self, name: str) -> Lane:
        """One of the lanes. LookupError if the story has none of this name."""
        for lane in self.lanes:
            if lane.name == name:
                return lane
        raise LookupError(name)

    def actor(self, at: int) -> str:
        """Who took the step with this number (from 1), by name if the model said only "process"."""
        step: Step = self.trace.steps[at - 1]
        if step.actor == "process" and "d" in step.args:
            owners = self.owners(self.states[at], step.args["d"])
            return owners[0] if owners else step.actor
        return step.actor

    # -- what is true in a state ------------------------------------------------------------

    def owners(self, s: State, d: int) -> list[str]:
        """For whom a descriptor was posted."""
        return [f"P{p}" for p in self.processes if value(s, "owner", d, p)]

    def targets(self, s: State, d: int) -> list[int]:
        """Frames that a descriptor was meant for."""
        return [f for f in self.frames if value(s, "target", d, f)]

    def may_access(self, s: State, d: int) -> bool:
        """There is or may come an access for this descriptor (``World.may_access``)."""
        hw, eng = value(s, "hw", d), value(s, "eng")
        wild = eng == Eng.HUNG_WILD
        working = hw in ACTIVE or (wild and hw == Hw.WRITTEN)
        engine = eng in (Eng.RUN, Eng.STOPPING, Eng.HUNG_WILD) and value(s, "bme")
        return bool((engine and working) or value(s, "fab", d))

    def reached(self, s: State, d: int) -> list[int]:
        """Frames that an access for this descriptor would go to (``World.reaches``)."""
        if not self.translated:
            return self.targets(s, d)
        if value(s, "dom") == Dom.DEFAULT:
            return list(self.frames)
        if value(s, "dom") != Dom.USER:
            return []
        named = [i for i in self.iovas if value(s, "named", d, i)]
        return sorted({f for i in named for f in self._entry(s, i)})

    def _entry(self, s: State, i: int) -> list[int]:
        for table in ("cached", "tlb", "pte"):
            if frames := [f for f in self.frames if value(s, table, i, f)]:
                return frames
        return []

    # -- lanes ------------------------------------------------------------

    def _lanes(self) -> Iterator[Lane]:
        for f in self.frames:
            yield Lane(f"frame {f}", "frame", [self.frame(s, f) for s in self.states])
        for i in self.iovas:
            yield Lane(f"IOVA {i}", "iova", [self._iova(s, i) for s in self.states])
        for d in self.descriptors:
            yield Lane(
                f"descriptor {d}", "descriptor", [self.descriptor(s, d) for s in self.states]
            )
        yield Lane("card", "card", [self._card(s) for s in self.states])
        for p in self.processes:
            for name, kind, texts in (
                (f"belief for P{p}", "know", _KNOW),
                (f"lease of P{p}", "lease", dict(enumerate(LEASE_STATES))),
                (f"mapping of P{p}", "mapping", _map_names()),
            ):
                if any(value(s, kind, p) for s in self.states):
                    numbers = [value(s, kind, p) for s in self.states]
                    yield Lane(name, kind, [_named(texts, number, f"P{p}") for number in numbers])
            if self.facts:
                yield Lane(f"facts of P{p}", "fact", [self._facts(s, p) for s in self.states])
        if any("keeper" in state for state in self.states):
            kept = [_named(_KEPT, value(s, "keeper"), NOBODY) for s in self.states]
            yield Lane("keeper", "keeper", kept)
        for name in self._unknown:
            numbers = [s.get(name, 0) for s in self.states]
            yield Lane(name, "unknown", [Moment(str(n), str(n)) for n in numbers])

    def frame(self, s: State, f: int) -> Moment:
        """Whose a frame is."""
        mapped = [f"P{p}" for p in self.processes if value(s, "map", p, f)]
        held = [f"P{p}" for p in self.processes if value(s, "hold", p, f)]
        kept = [f"P{p}" for p in self.processes if value(s, "quarantined", p, f)]
        names = " and ".join(mapped)
        if not value(s, "ref", f):
            if mapped or held:
                who = names or " and ".join(held)
                return Moment(f"FREE, though {who} uses it", f"FREE ({who} uses it)", FREE)
            return Moment("FREE", "FREE", FREE)
        if kept:
            return Moment(f"in quarantine for {kept[0]}", f"quarantine {kept[0]}", kept[0], True)
        if value(s, "other", f):
            also = "".join(f", though {who} uses it" for who in dict.fromkeys([*mapped, *held]))
            return Moment(f"an innocent process's{also}", f"another's{also}", ANOTHER)
        if not mapped and not held:
            how = "reserved, nobody maps it" if value(s, "reserved", f) else "in use"
            return Moment(how, how.partition(",")[0], NOBODY)
        if not mapped:
            who = " and ".join(held)
            return Moment(f"held for {who}'s DMA", f"held for {who}", held[0], True)
        owner, marks = mapped[0], []
        if held:
            marks.append("held for DMA" if held == mapped else f"held for {' and '.join(held)}")
        if value(s, "locked", f) and any(value(s, "address", int(who[1:]), f) for who in mapped):
            marks.append("locked")
        if value(s, "reserved", f):
            marks.append("reserved")
        noun = "buffer" if len(mapped) == 1 else "page (shared)"
        short = ", ".join([names, *("held" if mark == "held for DMA" else mark for mark in marks)])
        return Moment(", ".join([f"{names}'s {noun}", *marks]), short, owner, bool(held))

    def descriptor(self, s: State, d: int) -> Moment:
        """How far card and software are with a descriptor."""
        hw, sw = value(s, "hw", d), value(s, "sw", d)
        owners = self.owners(s, d)
        if not owners:
            return Moment("unused", "")
        known = "forgotten by the card" if hw == Hw.NONE else _HW.get(hw, f"state {hw}")
        parts, short = [known], [known.removesuffix(" by the card")]
        if value(s, "fab", d):
            parts.append("a write is on its way")
            short.append("write on its way")
        if sw == Sw.SIGNALLED:
            parts.append("completion signalled")
            short.append("signalled")
        elif sw == Sw.REAPED:
            parts.append("completion seen")
            short.append("seen")
        if self.stale(s, d):
            short.append("stale")
        kind = "a read for" if value(s, "reading", d) else "for"
        aim = "".join(f", {kind} frame {f}" for f in self.targets(s, d))
        if hw == Hw.POSTED and sw == Sw.PENDING:
            parts[0] += f" for {' and '.join(owners)}{aim.replace(', for', ', to write to')}"
        return Moment("; ".join(parts), ", ".join(short), owners[0])

    def stale(self, s: State, d: int) -> bool:
        """Its frame was given back since, and the card or the fabric may not know."""
        over = value(s, "hw", d) in (Hw.NONE, Hw.ABORTED) and not value(s, "fab", d)
        return not value(s, "fresh", d) and bool(self.targets(s, d)) and not over

    def _iova(self, s: State, i: int) -> Moment:
        state = value(s, "iova", i)
        owner = self._tenant(s, i)
        tables = {
            name: [f for f in self.frames if value(s, table, i, f)]
            for name, table in (("", "pte"), ("IOTLB", "tlb"), ("card's cache", "cached"))
        }
        parts = [f"-> frame {f}" for f in tables[""]]
        for name in ("IOTLB", "card's cache"):
            parts += [f"{name} still -> frame {f}" for f in tables[name] if f not in tables[""]]
        short = ", ".join(parts).replace("->", "\u2192")
        if not tables[""]:
            parts.insert(0, "retired" if state == Iova.RETIRED else "unmapped")
            if state == Iova.RETIRED:
                short = f"retired, {short}" if short else "retired"
        return Moment(", ".join(parts), short, owner if short != "retired" else NOBODY)

    def _tenant(self, s: State, i: int) -> str:
        """Whose an address is: if two had it one after the other, whose frame it leads to."""
        having = [p for p in self.processes if value(s, "iova_of", p, i)]
        for p in having:
            if any(value(s, "pte", i, f) and value(s, "address", p, f) for f in self.frames):
                return f"P{p}"
        return f"P{having[0]}" if having else NOBODY

    def _card(self, s: State) -> Moment:
        eng = value(s, "eng")
        parts = [_ENG.get(eng, f"state {eng}")]
        parts.append(f"bus master {'on' if value(s, 'bme') else 'off'}")
        dom = value(s, "dom")
        if name := _DOM.get(dom, f"domain {dom}"):
            parts.append(name)
        if value(s, "lies"):
            parts.append("its resets do not stop DMA")
        return Moment(", ".join(parts), ", ".join(parts))

    def _facts(self, s: State, p: int) -> Moment:
        known = [
            str(FACTS[k]) if k < len(FACTS) else f"fact {k}"
            for k in self.facts
            if value(s, "fact", p, k)
        ]
        return Moment("; ".join(known) or "none", str(len(known)), f"P{p}")


def _map_names() -> dict[int, str | None]:
    return {n: None if each is None else each.name.lower() for n, each in enumerate(MAP_STATES)}


def _named(texts: Mapping[int, str | None], number: int, owner: str) -> Moment:
    """A numbered state by its name; numbers that have none yet as they are."""
    text = texts.get(number, f"state {number}")
    return Moment("none" if text is None else str(text), str(text or ""), owner if text else "")
