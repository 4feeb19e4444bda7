# SPDX-License-Identifier: Apache-2.0
"""The link's pace, and the grammar of fault plans."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast.emu.faults import FaultPlan, Span, armed
from holdfast.emu.link import CATCH_UP, Link
from holdfast.emu.local import ManualClock
from holdfast.emu.options import rate as read_rate
from holdfast.emu.options import seconds, size
from holdfast.errors import UsageError


def pump(link: Link, clock: ManualClock, total: int, lateness: float = 0.0) -> float:
    """Move ``total`` bytes, coming back ``lateness`` after each wait; the time it took."""
    start = clock.now
    while total:
        granted, wait = link.grant(total)
        total -= granted
        if wait:
            clock.advance(wait + lateness)
    return clock.now - start


def test_an_unlimited_link_grants_everything_at_once() -> None:
    assert Link().grant(1 << 40) == (1 << 40, 0.0)


@given(st.floats(0, 0.01), st.integers(1, 64))
def test_the_rate_holds_without_drift_however_late_the_engine_wakes(
    lateness: float, chunks: int
) -> None:
    clock = ManualClock()
    link = Link(1e6, chunk=1000, clock=clock)
    took = pump(link, clock, chunks * 1000, lateness)
    assert took == pytest.approx((chunks - 1) * 1e-3, abs=1e-3 + lateness)


def test_an_idle_link_saves_nothing_up() -> None:
    clock = ManualClock()
    link = Link(1e6, chunk=1000, clock=clock)
    pump(link, clock, 5000)
    clock.advance(100)
    assert pump(link, clock, 5000) == pytest.approx(4e-3, abs=1e-6)


def test_a_long_stall_is_not_made_good() -> None:
    clock = ManualClock()
    link = Link(1e6, chunk=1000, clock=clock)
    link.grant(1000)
    assert link.grant(1000)[0] == 0
    clock.advance(10)
    burst = 0
    while granted := link.grant(1000)[0]:
        burst += granted
    assert burst <= CATCH_UP * 1e6 + 2000


def test_nonsense_links_are_refused() -> None:
    for rate, latency in ((0.0, 0.0), (-1.0, 0.0), (None, -1.0)):
        with pytest.raises(UsageError):
            Link(rate, latency=latency)


def test_fault_plans_read_and_print() -> None:
    plan = FaultPlan.parse("wild, refuse-reset@3, hang@2-5")
    assert plan == FaultPlan(wild=Span(), refuse_reset=Span(3), hang=Span(2, 5))
    assert FaultPlan.parse(str(plan)) == plan
    assert FaultPlan.parse("") == FaultPlan()


@pytest.mark.parametrize(
    "text",
    ["nonsense", "wild@", "wild@x", "wild@-1", "wild@3-", "wild@3-2", "wild@1-2-3", "wild@٣"],
)
def test_nonsense_fault_plans_are_refused(text: str) -> None:
    with pytest.raises(UsageError):
        FaultPlan.parse(text)


def test_a_fault_holds_from_its_first_transfer_to_its_last() -> None:
    assert [armed(Span(3), n) for n in (2, 3, 4)] == [False, True, True]
    assert [armed(Span(3, 4), n) for n in (2, 3, 4, 5)] == [False, True, True, False]
    assert not armed(None, 100)


def test_option_texts_read_as_numbers() -> None:
    assert (size("64M"), size("4096"), size("0x10"), size("1.5K")) == (64 << 20, 4096, 16, 1536)
    assert (read_rate("none"), read_rate("0"), read_rate("2G")) == (None, None, float(2 << 30))
    assert seconds("0.1") == 0.1
    for read, text in ((size, "-1"), (size, "infG"), (seconds, "-1"), (seconds, "nan")):
        with pytest.raises(ValueError):  # noqa: PT011
            read(text)
