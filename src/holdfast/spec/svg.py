# SPDX-License-Identifier: Apache-2.0
"""A trace as a sequence diagram: a line for each who acts, a band for each frame and descriptor.

Time runs down, a row for each step. To the left stands what happens; arrows go from who acts to
what that changes; bands have the colour of their owner. The last row is where it breaks.

A row is as high as its longest text, so nothing overlaps. The picture is one text without scripts
or anything from elsewhere, and the same for the same trace.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from html import escape
from typing import Final

from holdfast.spec.lettering import SIZE, clean, measured, wrap
from holdfast.spec.scene import ANOTHER, FREE, NOBODY, Lane, Moment, Scene, is_process, value
from holdfast.spec.story import broken, explained, headline, landed, verdict
from holdfast.spec.trace import Trace
from holdfast.spec.world import ACTIVE, Proc, Sw

_MARGIN: Final = 28
_TEXT: Final = 300
"""Width of the column that says what happens."""
_LIFE: Final = 82
_BAND: Final = 108
_GAP: Final = 12
_LINE: Final = 16
"""Height of a line of text."""
_SMALL: Final = 11
_INK, _FAINT, _RED, _PINK = "#22262b", "#8a929b", "#c4161c", "#fdebec"
_FONT: Final = "Inter, 'Helvetica Neue', Arial, 'DejaVu Sans', sans-serif"
_PROCESSES: Final = (
    ("#d9e8f8", "#2268b0"), ("#fde4cb", "#c2660a"), ("#d9f0de", "#2b8550"), ("#eadff6", "#7747ad"),
)  # fmt: skip
_OTHERS: Final = {
    FREE: ("#ffffff", "#aab1b8"), ANOTHER: ("#f8dbea", "#ab2f76"), NOBODY: ("#eceef0", "#7b838b"),
}  # fmt: skip
_ORDER: Final = ("another", "ghost", "driver", "keeper", "kernel", "device", "fabric")
"""Lifelines after those of the processes."""
_TO_CARD: Final = frozenset(
    {"post", "idle", "await_signals", "quiet", "flush_read", "stop", "stop_ack", "bme_off", "reset"}
)
"""Events that look at the card or tell it something."""
_DRAWN: Final = frozenset({"frame", "iova", "descriptor", "card", "lease", "mapping", "keeper"})
"""Kinds of lanes that have a band."""


def draw(trace: Trace) -> str:
    """The picture as SVG text."""
    return _Picture(trace).text()


def colours(owner: str) -> tuple[str, str]:
    """Fill and line of what belongs to somebody."""
    if is_process(owner):
        return _PROCESSES[int(owner[1:]) % len(_PROCESSES)]
    return _OTHERS.get(owner, _OTHERS[NOBODY])


@dataclass(frozen=True, slots=True)
class _Row:
    """A step: where its arrow is, and where the next row begins."""

    top: float
    arrow: float
    bottom: float
    label: Sequence[str]


class _Picture:
    """One drawing in the making."""

    def __init__(self, trace: Trace) -> None:
        self.trace = trace
        self.scene = scene = Scene(trace)
        self.out: list[str] = []
        self.count = len(trace.steps)
        self.actors = self._actors()
        self.bands = [lane for lane in scene.lanes if lane.kind in _DRAWN and _worth(lane)]
        self.left = _MARGIN + _TEXT + 44
        self.x = {name: self.left + _LIFE * (n + 0.5) for n, name in enumerate(self.actors)}
        start = self.left + _LIFE * len(self.actors) + _GAP
        for n, lane in enumerate(self.bands):
            self.x[lane.name] = start + (_BAND + _GAP) * n + _BAND / 2
        ends = start + (_BAND + _GAP) * len(self.bands) - _GAP
        self.width = max(ends + _MARGIN, 760.0)
        self.head = 96.0
        self.rows = self._rows()
        self.end = self.rows[-1].bottom if self.rows else self.head + 46

    def _actors(self) -> list[str]:
        scene = self.scene
        named = {scene.actor(at) for at in range(1, self.count + 1)}
        named |= {
            f"P{p}" for p in scene.processes if any(value(s, "proc", p) for s in scene.states)
        }
        if any(scene.owners(state, d) for state in scene.states for d in scene.descriptors):
            named.add("device")
        if any(value(state, "fab", d) for state in scene.states for d in scene.descriptors):
            named.add("fabric")
        processes = sorted(name for name in named if is_process(name))
        known = [name for name in _ORDER if name in named]
        return [*processes, *known, *sorted(named - {*processes, *known})]

    def _rows(self) -> list[_Row]:
        rows: list[_Row] = []
        starts = [wrap(_caption(lane, 0), _BAND - 18, _SMALL) for lane in self.bands]
        top = self.head + 34 + _LINE * max([1, *map(len, starts)])
        for at, step in enumerate(self.trace.steps, 1):
            last = at == self.count
            bold = 1.1 if last and self.trace.breaks else 1.0
            label = wrap(step.text, _TEXT / bold) or wrap(step.event, _TEXT)
            lines = [len(wrap(_caption(lane, at), _BAND - 18, _SMALL))
                     for lane in self.bands if _changes(lane, at)]  # fmt: skip
            height = 14 + _LINE * max([len(label), *lines]) + (12 if last else 0)
            rows.append(_Row(top, top + 15, top + height + 4, label))
            top += height + 4
        return rows

    # -- pieces ------------------------------------------------------------

    def text(self) -> str:
        self._title()
        self._shades()
        self._lives()
        for lane in self.bands:
            self._band(lane)
        for at in range(1, self.count + 1):
            self._step(at)
        height = self._verdict()
        size = f'width="{_n(self.width)}" height="{_n(height)}"'
        head = (
            f'<svg xmlns="http://www.w3.org/2000/svg" {size} '
            f'viewBox="0 0 {_n(self.width)} {_n(height)}" role="img" '
            f'font-family="{escape(_FONT)}" font-size="{SIZE}" fill="{_INK}">'
        )
        title = clean(headline(self.trace))
        said = f"<title>{title}</title>\n<desc>{clean(verdict(self.trace, self.scene))}</desc>"
        ground = f'<rect width="{_n(self.width)}" height="{_n(height)}" fill="#ffffff"/>'
        return "\n".join([head, said, _patterns(self._owners()), ground, *self.out, "</svg>\n"])

    def _owners(self) -> list[str]:
        return sorted({moment.owner for lane in self.bands for moment in lane.moments})

    def _write(self, x: float, y: float, text: str, *, size: float = SIZE, fill: str = "",
               anchor: str = "", bold: bool = False) -> None:  # fmt: skip
        more = f' font-size="{_n(size)}"' if size != SIZE else ""
        more += f' fill="{fill}"' if fill else ""
        more += f' text-anchor="{anchor}"' if anchor else ""
        more += ' font-weight="600"' if bold else ""
        self.out.append(f'<text x="{_n(x)}" y="{_n(y)}"{more}>{clean(text)}</text>')

    def _rect(self, x: float, y: float, w: float, h: float, fill: str, more: str = "") -> None:
        shape = f'x="{_n(x)}" y="{_n(y)}" width="{_n(w)}" height="{_n(h)}"'
        self.out.append(f'<rect {shape} fill="{fill}"{more and " " + more}/>')

    def _line(self, x: float, y: float, x2: float, y2: float, stroke: str, more: str = "") -> None:
        ends = f'x1="{_n(x)}" y1="{_n(y)}" x2="{_n(x2)}" y2="{_n(y2)}"'
        self.out.append(f'<line {ends} stroke="{stroke}"{more and " " + more}/>')

    def _title(self) -> None:
        for line in wrap(headline(self.trace), self.width - 2 * _MARGIN, 17)[:1]:
            self._write(_MARGIN, 40, line, size=17, bold=True)
        x = float(_MARGIN)
        owners = [owner for owner in self._owners() if owner != NOBODY]
        names = {ANOTHER: "an innocent process's", FREE: "free"}
        entries = [(names.get(owner, f"{owner}'s"), owner) for owner in owners]
        if any(moment.held for lane in self.bands for moment in lane.moments):
            entries += [("mapped, and held for DMA", "held"), ("only held for DMA", "only")]
        for name, owner in entries:
            fill, stroke = colours(owner)
            fill = f"url(#{_pattern(NOBODY)})" if owner == "only" else fill
            self._rect(x, 60, 18, 12, fill, f'stroke="{stroke}"')
            if owner in ("held", "only"):
                self._rect(x, 60, 5, 12, stroke)
            self._write(x + 25, 70.5, name, size=_SMALL, fill="#555d66")
            x += 25 + measured(name, _SMALL) + 18

    def _shades(self) -> None:
        for at, row in enumerate(self.rows, 1):
            broken = at == self.count and self.trace.breaks
            if broken or at % 2 == 0:
                fill = _PINK if broken else "#f7f8f9"
                self._rect(0, row.top, self.width, row.bottom - row.top, fill)

    def _lives(self) -> None:
        top = self.head
        for name in self.actors:
            x, (fill, stroke) = self.x[name], colours(name)
            process = is_process(name)
            if not process:
                fill, stroke = ("#f8dbea", "#ab2f76") if name == ANOTHER else ("#eef0f2", "#5b646d")
            self._rect(x - _LIFE / 2 + 5, top, _LIFE - 10, 26, fill, f'stroke="{stroke}" rx="4"')
            shown = wrap(name, _LIFE - 16)
            self._write(x, top + 17.5, shown[0] if shown else "?", anchor="middle", bold=True)
            self._line(x, top + 26, x, self.end, "#c3c9cf", 'stroke-dasharray="3 4"')
            if process:
                self._life(int(name[1:]), x, stroke)
        self._busy(
            "device",
            "#5b646d",
            lambda at: any(
                value(self.scene.states[at], "hw", d) in ACTIVE for d in self.scene.descriptors
            ),
        )
        self._busy(
            "fabric",
            "#d98e04",
            lambda at: any(value(self.scene.states[at], "fab", d) for d in self.scene.descriptors),
        )

    def _life(self, p: int, x: float, stroke: str) -> None:
        """A bar while the process lives, a thin one while it is on its way out."""
        proc = [value(state, "proc", p) for state in self.scene.states]
        for begin, end in self._spans(lambda at: proc[at] == Proc.ALIVE):
            self._rect(x - 3.5, begin, 7, end - begin, stroke, 'rx="1.5"')
        for begin, end in self._spans(lambda at: Proc.KILLED <= proc[at] <= Proc.ZOMBIE):
            self._rect(x - 1.5, begin, 3, end - begin, stroke, 'opacity="0.45"')

    def _busy(self, name: str, fill: str, when: Callable[[int], bool]) -> None:
        if name in self.x:
            for begin, end in self._spans(when):
                self._rect(self.x[name] - 3.5, begin, 7, end - begin, fill, 'rx="1.5"')

    def _spans(self, when: Callable[[int], bool]) -> Iterator[tuple[float, float]]:
        """Stretches of the time axis in which something is so."""
        begin: float | None = None
        for at in range(self.count + 1):
            here = self.rows[at - 1].arrow if at else self.head + 30
            if when(at) and begin is None:
                begin = here
            elif not when(at) and begin is not None:
                yield begin, here
                begin = None
        if begin is not None:
            yield begin, self.end

    def _band(self, lane: Lane) -> None:
        x = self.x[lane.name] - _BAND / 2
        self._write(x + _BAND / 2, self.head + 17.5, lane.name, anchor="middle", bold=True)
        starts = [0, *(at for at in range(1, self.count + 1) if _changes(lane, at))]
        for at, until in zip(starts, [*starts[1:], self.count + 1], strict=True):
            moment = lane.moments[at]
            top = self.rows[at - 1].arrow if at else self.head + 30
            bottom = self.rows[until - 1].arrow if until <= self.count else self.end
            self._piece(lane, moment, x, top, bottom)
            for n, line in enumerate(wrap(_caption(lane, at), _BAND - 18, _SMALL)):
                self._write(x + 12, top + 16 + _LINE * n, line, size=_SMALL)

    def _piece(self, lane: Lane, now: Moment, x: float, top: float, bottom: float) -> None:
        if not now.short:
            return
        fill, stroke = colours(now.owner)
        alone = now.held and lane.kind == "frame" and "held" in now.short.split(",")[0]
        if alone or "quarantine" in now.short:
            fill = f"url(#{_pattern(now.owner)})"
        if now.owner == FREE:
            more = f'stroke="{stroke}" stroke-dasharray="4 3"'
        else:
            more = f'stroke="{stroke}" stroke-width="0.8"'
        self._rect(x, top, _BAND, bottom - top, fill, more)
        if now.held:
            self._rect(x, top, 5, bottom - top, stroke)

    def _step(self, at: int) -> None:
        row = self.rows[at - 1]
        broken = at == self.count and bool(self.trace.breaks)
        ink = _RED if broken else _INK
        self._write(_MARGIN + 20, row.arrow + 4, str(at), fill=ink if broken else _FAINT,
                    anchor="end", bold=True)  # fmt: skip
        for n, line in enumerate(row.label):
            self._write(_MARGIN + 32, row.arrow + 4 + _LINE * n, line,
                        fill=_RED if broken else "", bold=broken)  # fmt: skip
        actor = self.scene.actor(at)
        x = self.x[actor]
        stroke = _RED if broken else "#3b434b"
        targets = [self.x[name] for name in self._targets(at, actor) if name in self.x]
        for target in targets:
            inset = _BAND / 2 if target > self.left + _LIFE * len(self.actors) else 4
            self._arrow(x, target - inset if target > x else target + inset, row.arrow, stroke,
                        2.2 if broken else 1.3)  # fmt: skip
        if self.trace.steps[at - 1].event == "kill":
            for sign in (-1, 1):
                self._line(x - 7, row.arrow - 7 * sign, x + 7, row.arrow + 7 * sign, _RED,
                           'stroke-width="2.4"')  # fmt: skip
        else:
            self.out.append(f'<circle cx="{_n(x)}" cy="{_n(row.arrow)}" r="4.2" fill="{stroke}"/>')
        if broken:
            self._hit(at, row)

    def _targets(self, at: int, actor: str) -> list[str]:
        """What the step is about: bands and lines to which an arrow goes."""
        scene, step = self.scene, self.trace.steps[at - 1]
        before, after = scene.states[at - 1], scene.states[at]
        frames = [lane.name for lane in scene.changed(at) if lane.kind == "frame"]
        if hit := landed(scene, at):
            return [f"frame {f}" for f in hit]
        if actor == "device":
            for d in scene.descriptors:
                if value(after, "fab", d) and not value(before, "fab", d):
                    return ["fabric"]
                if value(after, "sw", d) == Sw.SIGNALLED != value(before, "sw", d):
                    return scene.owners(after, d)
            if step.event == "dma_read":
                return [f"frame {f}" for f in scene.reached(before, step.args.get("d", 0))]
            return []
        if frames:
            return frames
        if step.event in _TO_CARD:
            return ["device"]
        if addresses := [lane.name for lane in scene.changed(at) if lane.kind == "iova"]:
            return addresses
        if any(lane.kind in ("card", "descriptor") for lane in scene.changed(at)):
            return ["device"]
        process = f"P{step.args.get('p', '')}"
        return [process] if actor == "kernel" else []

    def _arrow(self, x: float, to: float, y: float, stroke: str, wide: float) -> None:
        way = 1 if to > x else -1
        self._line(x, y, to - 7 * way, y, stroke, f'stroke-width="{wide}"')
        points = (
            f"{_n(to)},{_n(y)} {_n(to - 9 * way)},{_n(y - 4.5)} {_n(to - 9 * way)},{_n(y + 4.5)}"
        )
        self.out.append(f'<polygon points="{points}" fill="{stroke}"/>')

    def _hit(self, at: int, row: _Row) -> None:
        """A red frame around what was hit."""
        names = [f"frame {f}" for f in landed(self.scene, at)]
        names = names or [
            lane.name for lane in self.scene.changed(at) if lane.kind in ("frame", "iova")
        ]
        for name in names:
            if name in self.x:
                x = self.x[name] - _BAND / 2
                self._rect(x, row.arrow, _BAND, self.end - row.arrow, "none",
                           f'stroke="{_RED}" stroke-width="2.5"')  # fmt: skip
                if landed(self.scene, at):
                    self._write(x + 12, row.arrow + 17, "written to", size=_SMALL, fill=_RED,
                                bold=True)  # fmt: skip

    def _verdict(self) -> float:
        """The last words; the height of everything."""
        top = self.end + 22
        if not self.trace.breaks:
            return top
        inner = min(self.width - 2 * _MARGIN, 940.0)
        said = [(line, True) for line in wrap(f"{broken(self.trace)}.", (inner - 44) / 1.08, 13)]
        said += [(line, False) for line in wrap(" ".join(explained(self.scene)), inner - 44, 13)]
        height = 18 + 20 * len(said)
        self._rect(_MARGIN, top, inner, height, _PINK, 'rx="3"')
        self._rect(_MARGIN, top, 6, height, _RED, 'rx="2"')
        for n, (line, first) in enumerate(said):
            self._write(_MARGIN + 22, top + 23 + 20 * n, line, size=13, bold=first,
                        fill=_RED if first else "")  # fmt: skip
        return top + height + _MARGIN


def _n(number: float) -> str:
    return f"{number:.1f}".removesuffix(".0")


def _worth(lane: Lane) -> bool:
    """A band only for what changes; of the card only what is not in every story."""
    texts = {moment.text for moment in lane.moments}
    return len(texts) > (2 if lane.kind == "card" else 1)


def _changes(lane: Lane, at: int) -> bool:
    now, was = lane.moments[at], lane.moments[at - 1]
    return (now.short, now.owner) != (was.short, was.owner)


def _caption(lane: Lane, at: int) -> str:
    return lane.moments[at].short


def _pattern(owner: str) -> str:
    return f"held-{owner or 'nobody'}"


def _patterns(owners: Iterable[str]) -> str:
    """Hatchings for what is held while no process maps it."""
    drawn = []
    for owner in dict.fromkeys([*owners, NOBODY]):
        fill, stroke = colours(owner)
        drawn.append(
            f'<pattern id="{_pattern(owner)}" width="8" height="8" patternUnits="userSpaceOnUse" '
            f'patternTransform="rotate(45)"><rect width="8" height="8" fill="{fill}"/>'
            f'<rect width="2" height="8" fill="{stroke}" opacity="0.35"/></pattern>'
        )
    return f"<defs>{''.join(drawn)}</defs>"
