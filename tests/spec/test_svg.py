# SPDX-License-Identifier: Apache-2.0
"""A counterexample as a sequence diagram: whole, legible, harmless."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import cache
from xml.etree import ElementTree as ET

import pytest

from holdfast.spec.explore import explore
from holdfast.spec.lettering import SIZE, measured, wrap
from holdfast.spec.model import StrategyModel
from holdfast.spec.setting import BOUNDS, Iommu, Profile, Setting
from holdfast.spec.strategies import SIMPLE
from holdfast.spec.svg import draw
from holdfast.spec.trace import Step, Trace, tell

VICTIM = "S1 with a victim"
SVG = "{http://www.w3.org/2000/svg}"
RED = "#c4161c"


@cache
def trace_of(key: str, iommu: Iommu) -> Trace:
    kind = next(each for each in SIMPLE if each.key == key)
    setting = Setting(Profile.NEW, iommu, BOUNDS["table"])
    found = explore(StrategyModel(kind, setting), until=frozenset({VICTIM}))
    return tell(found, VICTIM, strategy=kind.key, profile="7.x", iommu=iommu, bounds="table")


every_story = pytest.mark.parametrize(
    ("key", "iommu"),
    [
        ("mlock", Iommu.NONE),
        ("reference-timed", Iommu.NONE),
        ("reference-timed", Iommu.LAZY),
        ("unmap-default", Iommu.STRICT),
    ],
)


@dataclass
class Box:
    text: str
    left: float
    top: float
    right: float
    bottom: float

    def meets(self, other: Box) -> bool:
        across = self.left < other.right and other.left < self.right
        return across and self.top < other.bottom and other.top < self.bottom


def boxes(svg: str) -> list[Box]:
    """Where texts are, by the widths that the picture itself goes by."""
    found = []
    for element in ET.fromstring(svg).iter(f"{SVG}text"):
        text, size = element.text or "", float(element.get("font-size", SIZE))
        x, y, width = float(element.get("x", 0)), float(element.get("y", 0)), measured(text, size)
        left = x - {"middle": width / 2, "end": width}.get(element.get("text-anchor", ""), 0)
        found.append(Box(text, left, y - 0.75 * size, left + width, y + 0.2 * size))
    return found


@every_story
def test_it_is_xml_and_has_every_step(key: str, iommu: Iommu) -> None:
    trace = trace_of(key, iommu)
    texts = [element.text for element in ET.fromstring(draw(trace)).iter(f"{SVG}text")]
    told = " ".join(text for text in texts if text)
    for at, step in enumerate(trace.steps, 1):
        assert str(at) in texts
        assert step.text in told
    assert {"P0", "P1", "device", "fabric", "frame 0", "descriptor 0", "FREE"} <= set(texts)


@every_story
def test_no_text_lies_over_another_or_outside(key: str, iommu: Iommu) -> None:
    svg = draw(trace_of(key, iommu))
    root = ET.fromstring(svg)
    wide, high = float(root.get("width", 0)), float(root.get("height", 0))
    placed = boxes(svg)
    for box in placed:
        assert box.left >= 0
        assert box.right <= wide, box.text
        assert box.bottom <= high, box.text
    for one, other in itertools.combinations(placed, 2):
        assert not one.meets(other), (one.text, other.text)


def test_the_breach_is_red_and_only_that() -> None:
    trace = trace_of("reference-timed", Iommu.NONE)
    root = ET.fromstring(draw(trace))
    red = [e.text for e in root.iter(f"{SVG}text") if e.get("fill") == RED]
    assert red[:3] == ["15", "a write of descriptor 0 arrives in memory", "written to"]
    assert (red[3] or "").startswith(f"{VICTIM} is broken")
    unbroken = Trace(trace.strategy, "7.x", "none", "table", "", trace.start, trace.steps[:3])
    assert RED not in draw(unbroken)


def test_what_a_file_says_is_escaped() -> None:
    nasty = '<script>alert(1)</script> & "quotes" \' \x00\x1b\ud800\uffff ]]>'
    step = Step("<b>", nasty, nasty, {"p": 0}, {"lease[0]": 99, nasty: 1})
    svg = draw(Trace(nasty, nasty, nasty, "table", nasty, {}, [step]))
    root = ET.fromstring(svg)
    names = {element.tag.removeprefix(SVG) for element in root.iter()}
    assert names <= {"svg", "title", "desc", "defs", "pattern", "rect", "text", "line", "circle",
                     "polygon"}  # fmt: skip
    assert "<script" not in svg
    assert any("<script>" in (element.text or "") for element in root.iter(f"{SVG}title"))
    svg.encode()


def test_it_is_the_same_each_time_and_from_a_file() -> None:
    trace = trace_of("reference-timed", Iommu.LAZY)
    assert draw(trace) == draw(Trace.from_json(trace.to_json()))


def test_it_needs_nothing_from_elsewhere() -> None:
    svg = draw(trace_of("mlock", Iommu.NONE)).replace("http://www.w3.org/2000/svg", "")
    for word in ("http", "href", "<style", "<image", "@import", "<script"):
        assert word not in svg


def test_a_story_without_steps_is_drawn() -> None:
    ET.fromstring(draw(Trace("mine", "7.x", "none", "table", "S7")))


def test_wrapped_lines_are_no_wider_and_lose_nothing() -> None:
    for text in ("one two three four five six", "word" * 40, "a " + "m" * 50 + " b", ""):
        lines = wrap(text, 60)
        assert all(measured(line) <= 60 for line in lines)
        assert "".join(lines).replace(" ", "") == text.replace(" ", "")
