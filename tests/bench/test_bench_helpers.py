# SPDX-License-Identifier: Apache-2.0
"""The bench's own arithmetic, its data, and its peers; no stack is started here."""

from __future__ import annotations

import shutil
import socket
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from holdfast.bench.death import Deaths
from holdfast.bench.echo import echo, echo_server
from holdfast.bench.peer import CPeer
from holdfast.bench.result import Goal, Result, percentile, ratios, rounded, times
from holdfast.bench.rounds import run_rounds
from holdfast.bench.traffic import LONGEST, SLOT, Pieces, Source, same
from holdfast.cli.bench import spread, verdict
from holdfast.errors import HoldfastError

NEEDS_CC = pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")


def a_result(value: float = 1.0, ratio: float | None = 0.5, goals: tuple[Goal, ...] = ()) -> Result:
    return Result("figure", value, "us", ratio, "peer", goals)


def test_a_goal_is_judged_on_the_figure_it_is_about() -> None:
    assert a_result(ratio=0.9, goals=(Goal(0.9),)).met is True
    assert a_result(ratio=0.89, goals=(Goal(0.9),)).met is False
    assert a_result(6.0, goals=(Goal(6.0, "value", at_most=True),)).met is True
    assert a_result(6.1, goals=(Goal(6.0, "value", at_most=True),)).met is False


def test_every_goal_must_be_met() -> None:
    both = (Goal(6.0, "value", at_most=True), Goal(0.2))
    assert a_result(5.0, 0.1, both).met is False
    assert a_result(5.0, 0.3, both).met is True


def test_a_goal_without_a_peer_is_not_judged() -> None:
    assert a_result(ratio=None, goals=(Goal(0.9),)).met is None
    assert a_result(5.0, None, (Goal(6.0, "value", at_most=True), Goal(0.2))).met is True


def test_a_result_in_json_has_the_published_names() -> None:
    told = a_result(1.23456, goals=(Goal(6.0, "value", at_most=True), Goal(0.2))).to_json()
    names = ["name", "value", "unit", "ratio", "peer", "goal", "met", "verified", "detail"]
    assert list(told) == names
    assert told["value"] == 1.235
    assert told["goal"] == "<= 6 us, ratio >= 0.2"
    assert a_result().to_json()["goal"] is None


@given(st.lists(st.floats(-1e6, 1e6), min_size=1), st.floats(0, 1))
def test_a_percentile_is_a_value_that_was_seen(values: list[float], fraction: float) -> None:
    found = percentile(values, fraction)
    assert found in values
    assert percentile(values, 0.0) == min(values)
    assert percentile(values, 1.0) == max(values)
    assert min(values) <= found <= max(values)


def test_spreads_have_median_and_extremes() -> None:
    assert times([3.0, 1.0, 2.0], 10.0) == {"p50": 20.0, "p99": 30.0, "max": 30.0, "n": 3}
    assert ratios([0.5, 0.75, 1.0]) == {"median": 0.75, "min": 0.5, "max": 1.0, "rounds": 3}
    assert rounded(123456.0) == 123500.0


def test_wrong_data_outweighs_a_goal_that_is_met() -> None:
    goals = (Goal(0.1),)
    assert verdict(a_result(goals=goals)) == "met"
    assert verdict(a_result(ratio=0.05, goals=goals)) == "below goal"
    assert verdict(a_result()) == ""
    assert verdict(Result("f", 1.0, "us", 1.0, "p", goals, verified=False)) == "WRONG DATA"


def test_the_table_shows_the_spread_that_there_is() -> None:
    told = {"ratio": ratios([0.5, 1.0])}
    assert spread(Result("f", 1.0, "us", 1.0, "p", detail=told)) == "0.5..1"
    assert spread(Result("f", 1.0, "us", 1.0, "p", detail={"us": times([1.0])})) == "p50 1 p99 1"
    assert spread(a_result()) == ""


# -- data -----------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 64), st.integers(0, 1 << 32))
def test_pieces_fill_the_bytes_exactly_and_do_not_overlap(pages: int, seed: int) -> None:
    nbytes = pages * 8192
    pieces = Pieces(nbytes, seed)
    assert int(pieces.lengths.sum()) == nbytes
    assert 0 < int(pieces.lengths.min()) <= int(pieces.lengths.max()) <= LONGEST
    order = np.argsort(pieces.host)
    ends = (pieces.host + pieces.lengths)[order]
    assert (ends[:-1] <= pieces.host[order][1:]).all()
    assert int(ends[-1]) <= pieces.host_bytes == len(pieces) * SLOT
    assert int(pieces.card[0]) == 0
    assert (np.diff(pieces.card) == pieces.lengths[:-1]).all()


def test_scattered_bytes_lie_where_the_pieces_say() -> None:
    pieces = Pieces(1 << 16, seed=5)
    packed = Source(1 << 16, seed=6).data
    image = np.zeros(pieces.host_bytes, np.uint8)
    pieces.scatter(packed, image)
    at, size = int(pieces.host[3]), int(pieces.lengths[3])
    start = int(pieces.card[3])
    assert (image[at : at + size] == packed[start : start + size]).all()


def test_each_round_has_data_of_its_own() -> None:
    source = Source(4096, seed=1)
    before = source.data.copy()
    source.refresh()
    assert not same(before, source.data)
    changed = source.data.copy()
    assert same(changed, source.data)
    changed[4095] ^= 1
    assert not same(changed, source.data)


# -- rounds ---------------------------------------------------------------------------------------


class Copies:
    """Two contenders that copy; the second one can be made to lose a byte, once."""

    nbytes = 4096

    def __init__(self, lose_in_round: int | None = None) -> None:
        self._source = Source(self.nbytes, seed=7)
        self._into = np.zeros(self.nbytes, np.uint8)
        self._lose = lose_in_round
        self._round = -1
        self.order: list[str] = []

    def refresh(self) -> None:
        self._round += 1
        self._source.refresh()

    def clear(self) -> None:
        self._into[:] = 0

    def contenders(self) -> Mapping[str, Callable[[], None]]:
        return {"good": lambda: self._copy("good"), "other": lambda: self._copy("other")}

    def _copy(self, name: str) -> None:
        self.order.append(name)
        np.copyto(self._into, self._source.data)
        if name == "other" and self._round == self._lose:
            self._into[17] ^= 0x80

    def verify(self, contender: str) -> bool:
        return same(self._into, self._source.data)


def test_contenders_take_turns_and_the_first_round_is_not_counted() -> None:
    work = Copies()
    timings = run_rounds(work, 3)
    assert work.order == ["good", "other", "other", "good"] * 2
    assert timings.verified
    assert len(timings.rates("good")) == len(timings.ratio("good", "other")) == 3


@pytest.mark.parametrize("number", [0, 1, 3])
def test_one_wrong_byte_in_one_round_fails_the_verification(number: int) -> None:
    assert not run_rounds(Copies(lose_in_round=number), 3).verified


# -- peers ----------------------------------------------------------------------------------------


def test_without_a_compiler_there_is_no_peer() -> None:
    pieces = Pieces(1 << 16, seed=8)
    with CPeer("no-such-compiler") as peer:
        assert not peer.available
        assert peer.posts(32, 10, 1) is None
        assert peer.copy_pieces(pieces.host, pieces.lengths, pieces.host_bytes, True) is None


@NEEDS_CC
def test_the_c_peer_times_every_post_and_leaves_nothing_behind() -> None:
    with CPeer() as peer:
        told = peer.posts(256, 30, 3)
        assert told is not None
        assert told.shape == (30,)
        assert (told > 0).all()
        assert peer._process is not None
        pid, directory = peer._process.pid, peer._directory
    assert not Path(f"/proc/{pid}").exists()
    assert not Path(directory).exists()


@NEEDS_CC
@pytest.mark.parametrize("to_card", [True, False])
def test_the_c_peer_copies_pieces(to_card: bool) -> None:
    pieces = Pieces(1 << 20, seed=9)
    with CPeer() as peer:
        taken = peer.copy_pieces(pieces.host, pieces.lengths, pieces.host_bytes, to_card)
    assert taken is not None
    assert 0 < taken < 10


@NEEDS_CC
def test_a_piece_outside_the_memory_ends_the_c_peer() -> None:
    one = np.array([4096], np.uint64)
    with CPeer() as peer, pytest.raises(HoldfastError, match="C peer ended"):
        peer.copy_pieces(one, one, 4096, True)


def test_an_echo_process_answers_and_ends() -> None:
    with echo() as sock:
        for text in (b"one", b"two"):
            sock.send(text)
            assert sock.recv(64) == text


def test_an_echo_server_takes_one_connection_after_the_other(tmp_path: Path) -> None:
    with echo_server(str(tmp_path)) as path:
        for text in (b"one", b"two"):
            with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
                sock.connect(path)
                sock.send(text)
                assert sock.recv(64) == text
    assert not list(tmp_path.iterdir())


# -- deaths ---------------------------------------------------------------------------------------


def test_times_of_a_death_come_from_the_keepers_log() -> None:
    log = [
        ["alive", 5, "granted"],
        ["frozen", 130, "hung up"],
        ["draining", 140, ""],
        ["quiet", 200, "idle"],
        ["quiet", 250, "a note in the same state"],
        ["released", 1000, "4096 bytes"],
    ]
    deaths = Deaths()
    deaths.add(100, 120, {"lease": 1, "log": log, "punch_ns": 300})
    assert deaths.bare == [20]
    assert deaths.detected == [30]
    assert deaths.later == [10]
    assert deaths.quiet == [100]
    assert deaths.returned == [500]
    assert deaths.punched == [300]


def test_a_lease_that_was_never_released_is_no_figure() -> None:
    with pytest.raises(HoldfastError, match="never was quiet"):
        Deaths().add(0, 1, {"lease": 7, "log": [["frozen", 5, ""]], "punch_ns": 0})
