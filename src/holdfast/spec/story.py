# SPDX-License-Identifier: Apache-2.0
"""A trace as a story for a terminal: numbered steps, what each changed, and what broke at the end.

The text of a step says who did what. Below it stands what a reader would have to keep in mind
otherwise: whose each frame is now, how far the card is, what a translation leads to.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

from holdfast.spec import invariants, liveness
from holdfast.spec.scene import FREE, Lane, Scene, State, value
from holdfast.spec.trace import Trace
from holdfast.spec.world import ACTIVE, Eng, Hw, Know

WIDTH: Final = 96
TEXTS: Final = {**invariants.TEXTS, **liveness.TEXTS}
_ACTOR: Final = 8
"""Columns for the name of who acts."""
_ARROWS: Final = frozenset({"frame", "iova", "card", "lease", "mapping", "keeper", "unknown"})
"""Lanes of which the story says what they were before."""
_VICTIM: Final = " with a victim"


@dataclass(frozen=True, slots=True)
class Line:
    """A piece of the story. ``kind``: head, step, frame, note, breach, or empty between them."""

    kind: str
    text: str


def render(trace: Trace, width: int = WIDTH) -> str:
    """The whole story as text; ends with a newline."""
    return "".join(f"{line.text}\n" for line in lines(trace, width))


def lines(trace: Trace, width: int = WIDTH) -> Iterator[Line]:
    """The story line by line, so that a terminal may colour it."""
    scene = Scene(trace)
    for text in textwrap.wrap(headline(trace), width):
        yield Line("head", text)
    yield Line("", "")
    yield from _beginning(scene, width)
    digits = len(str(len(trace.steps)))
    indent = " " * (digits + _ACTOR + 3)
    for at, step in enumerate(trace.steps, 1):
        first = f"{at:>{digits}}. {scene.actor(at):<{_ACTOR}} "
        for text in textwrap.wrap(step.text, width, initial_indent=first, subsequent_indent=indent):
            yield Line("step", text)
        for kind, note in _notes(scene, at):
            for text in _wrapped(note, width, f"{indent}  "):
                yield Line(kind, text)
    if trace.breaks:
        yield Line("", "")
        for text in textwrap.wrap(verdict(trace, scene), width):
            yield Line("breach", text)


def headline(trace: Trace) -> str:
    """What the story is about, in a sentence."""
    where = f"{trace.strategy} on Linux {trace.profile}, IOMMU {trace.iommu}"
    count = len(trace.steps)
    steps = f"{count} step{'' if count == 1 else 's'}"
    if trace.breaks in liveness.TEXTS:
        return f"{where}: {trace.breaks}, waiting for ever after {steps}"
    return f"{where}: {trace.breaks} broken in {steps}" if trace.breaks else f"{where}: {steps}"


def base(invariant: str) -> str:
    """The invariant without what is said of the circumstances: ``S1 with a victim`` is S1."""
    return invariant.partition(" ")[0]


def verdict(trace: Trace, scene: Scene | None = None) -> str:
    """What broke, in plain words, and whose page was hit. Empty if nothing did."""
    if not trace.breaks:
        return ""
    return " ".join([f"{broken(trace)}.", *explained(scene or Scene(trace))])


def broken(trace: Trace) -> str:
    """The invariant that the story breaks, with what it says."""
    rule = TEXTS.get(base(trace.breaks), "")
    return f"{trace.breaks} is broken{f': {rule}' if rule else ''}"


def explained(scene: Scene) -> list[str]:
    """How the last step broke it, in sentences; none for an invariant that is not known here."""
    explain = _EXPLAINED.get(base(scene.trace.breaks))
    return explain(scene) if explain is not None and scene.trace.steps else []


def _beginning(scene: Scene, width: int) -> Iterator[Line]:
    """What is not as one would take for granted before anything has happened."""
    said = False
    for lane in scene.lanes:
        if lane.kind == "card" and value(scene.states[0], "lies"):
            said = True
            for text in _wrapped("A reset of this card is acknowledged and stops nothing.", width):
                yield Line("note", text)
        if lane.kind == "frame" and lane.moments[0].owner != FREE:
            said = True
            yield Line("frame", f"{lane.name} is {lane.moments[0].text} at the start.")
    if said:
        yield Line("", "")


def _wrapped(text: str, width: int, indent: str = "") -> list[str]:
    return textwrap.wrap(text, width, initial_indent=indent, subsequent_indent=f"{indent}  ")


def _notes(scene: Scene, at: int) -> Iterator[tuple[str, str]]:
    """What a reader should know after a step: kind and text of each line."""
    before, after = scene.states[at - 1], scene.states[at]
    for lane in scene.changed(at):
        yield "frame" if lane.kind == "frame" else "note", _change(lane, at)
    for d in scene.descriptors:
        if scene.stale(after, d) and not scene.stale(before, d):
            frames = " and ".join(f"frame {f}" for f in scene.targets(after, d))
            yield "note", f"descriptor {d} still names {frames}, which was given back"
    for f in landed(scene, at):
        yield "frame", f"frame {f}, {scene.frame(after, f).text}, is written to"


def landed(scene: Scene, at: int) -> list[int]:
    """Frames into which the step with this number (from 1) wrote, or may have written."""
    before, after = scene.states[at - 1], scene.states[at]
    return [
        f
        for d in scene.descriptors
        if value(before, "fab", d) and not value(after, "fab", d)
        for f in scene.reached(before, d)
    ]


def _change(lane: Lane, at: int) -> str:
    now, was = lane.moments[at].text, lane.moments[at - 1].text
    if lane.kind == "fact":  # facts are only ever added, or all forgotten
        known = set(was.split("; "))
        new = [each for each in now.split("; ") if each not in known]
        return f"{lane.name}: {'; '.join(new)}"
    if lane.kind not in _ARROWS:
        return f"{lane.name}: {now}"
    if lane.kind == "iova":
        return f"{lane.name}: {now}  (was: {was})"
    return f"{lane.name}: {was} -> {now}"


# -- what broke ------------------------------------------------------------


def _of(scene: Scene, s: State, d: int) -> str:
    owners = " and ".join(scene.owners(s, d)) or "nobody"
    return f"descriptor {d} of {owners}"


def _access(scene: Scene) -> list[str]:
    """S1, S1r: the last step is an access. Whose page was hit?"""
    step, before, after = scene.trace.steps[-1], scene.states[-2], scene.states[-1]
    d = step.args.get("d")
    if d is None:
        return []
    what = "read" if base(scene.trace.breaks) == "S1r" else "write"
    meant = scene.targets(before, d)
    fresh = value(before, "fresh", d)
    said = []
    for f in scene.reached(before, d):
        if value(before, "ref", f) and f in meant and fresh:
            continue
        aim = " and ".join(f"frame {g}" for g in meant)
        was = f"for {aim}, which was given back since" if f in meant and not fresh else f"for {aim}"
        said.append(f"The {what} of {_of(scene, before, d)} was meant {was}.")
        now = scene.frame(after, f)
        owner = now.owner
        where = f"It went to frame {f}" if what == "write" else f"It came from frame {f}"
        if owner == FREE:
            tail = (
                "which is free: whoever is given it next may find foreign bytes in it"
                if what == "write"
                else "which is free: what its last owner left there is disclosed"
            )
        elif owner in scene.owners(before, d):
            tail = f"which is now {now.text}, but not the page any more that was registered"
        else:
            who = "an innocent process" if owner == "another" else owner or "somebody else"
            harm = "has foreign bytes in its memory" if what == "write" else "is read by others"
            tail = (
                f"which is now {now.text}. {_capital(who)}, who has nothing to do with it, {harm}"
            )
        said.append(f"{where}, {tail}.")
    return said[:4]


def _dangling(scene: Scene) -> list[str]:
    """S2, S4: something of the card leads to a frame that went."""
    s = scene.states[-1]
    for d in scene.descriptors:
        if not scene.may_access(s, d):
            continue
        for f in scene.reached(s, d):
            if not value(s, "ref", f) or (f in scene.targets(s, d) and not value(s, "fresh", d)):
                way = "has a write on its way" if value(s, "fab", d) else "is not done"
                who = _capital(_of(scene, s, d))
                now = scene.frame(s, f).text
                return [f"{who} {way} and leads to frame {f}, which is now {now}."]
    return []


def _let_go(scene: Scene) -> list[str]:
    """S3: pages were let go too early."""
    before, after = scene.states[-2], scene.states[-1]
    said = []
    for p in scene.processes:
        gone = [f for f in scene.frames
                if value(before, "hold", p, f) and not value(after, "hold", p, f)]  # fmt: skip
        if not gone:
            continue
        pages = " and ".join(f"frame {f}" for f in gone)
        if not value(before, "know", p):
            why = "nothing had shown that the card was done with it"
        elif any(value(before, "fab", d) for d in scene.descriptors):
            why = "a write was still on its way"
        else:
            why = "a translation still led there"
        said.append(f"{_capital(pages)} was held for P{p} and was let go, and {why}.")
    return said


def _remapped(scene: Scene) -> list[str]:
    """S4': an address leads elsewhere while a descriptor names it."""
    step, s = scene.trace.steps[-1], scene.states[-1]
    i, f = step.args.get("i"), step.args.get("f")
    for d in scene.descriptors:
        meant = scene.targets(s, d)
        if i is not None and value(s, "named", d, i) and f not in meant and meant:
            said = f"IOVA {i} leads to frame {f} now; {_of(scene, s, d)} names it too, meant frame"
            return [f"{said} {meant[0]}, and may still be carried out."]
    return []


def _lost(scene: Scene) -> list[str]:
    """S5: the data went to a page that is not the process's any more."""
    before, s = scene.states[-2], scene.states[-1]
    d = scene.trace.steps[-1].args.get("d")
    if d is None:
        return []
    for p in scene.processes:
        for f in scene.reached(before, d):
            if value(before, "owner", d, p) and not value(s, "map", p, f):
                now = [g for g in scene.frames if value(s, "map", p, g)]
                page = f"its page is frame {now[0]} now" if now else "it has no page there now"
                return [f"The card wrote to frame {f} for P{p}, but {page}: the data is lost."]
    return []


def _miscounted(scene: Scene) -> list[str]:
    """S6."""
    s = scene.states[-1]
    for f in scene.frames:
        users = value(s, "other", f) + sum(
            value(s, "map", p, f) + value(s, "hold", p, f) for p in scene.processes
        )
        if value(s, "ref", f) < users and not value(s, "reserved", f):
            return [f"Frame {f} is counted {value(s, 'ref', f)} times, and {users} count on it."]
    return []


def _left_over(scene: Scene) -> list[str]:
    """S7, S9: something that should be over is not."""
    s = scene.states[-1]
    said = []
    for d in scene.descriptors:
        hw = value(s, "hw", d)
        wild = value(s, "eng") == Eng.HUNG_WILD and hw == Hw.WRITTEN
        if hw in ACTIVE or wild or value(s, "fab", d):
            owners = scene.owners(s, d)
            believed = [p for p in scene.processes
                        if f"P{p}" in owners and value(s, "know", p) == Know.QUIET_ACK]  # fmt: skip
            if base(scene.trace.breaks) == "S9" and not believed:
                continue
            moment = scene.descriptor(s, d).short
            said.append(f"{_capital(_of(scene, s, d))} is not over: {moment}.")
    return said


def _uncharged(scene: Scene) -> list[str]:
    """S11."""
    s = scene.states[-1]
    return [
        f"Frame {f} is held for P{p}, and no process is charged for it."
        for p in scene.processes
        for f in scene.frames
        if value(s, "hold", p, f) and not value(s, "charged", p)
    ]


def _endless(scene: Scene) -> list[str]:
    """L1 to L6: nothing obliges anybody to go on from here."""
    s = scene.states[-1]
    said = [
        f"Frame {f} is {now.text}."
        for f in scene.frames
        if (now := scene.frame(s, f)).held and not value(s, "map", int(now.owner[1:]), f)
    ]
    if value(s, "eng"):
        said.append(f"The card {scene.lane('card').moments[-1].text.partition(',')[0]}.")
    return [*said, "Nothing that is bound to happen leads on from here."]


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


_EXPLAINED: Final[dict[str, Callable[[Scene], list[str]]]] = {
    "S1": _access, "S1r": _access, "S2": _dangling, "S3": _let_go, "S4": _dangling,
    "S4'": _remapped, "S5": _lost, "S6": _miscounted, "S7": _left_over, "S9": _left_over,
    "S11": _uncharged, **dict.fromkeys(liveness.TEXTS, _endless),
}  # fmt: skip
