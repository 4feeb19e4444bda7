# SPDX-License-Identifier: Apache-2.0
"""What comes out of a guest's serial ports, in any pieces, and nonsense."""

from __future__ import annotations

import itertools
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast.errors import ProtocolError
from holdfast.lab import ports
from holdfast.lab.ports import Lines, Monitor, Question, Records

RESULTS = bytes(range(256)) * 5 + b"\nexit 9\n"
WHOLE = b"started\r\nexit 139\nresults %d\n" % len(RESULTS) + RESULTS + b"end\n"


@given(st.lists(st.integers(0, len(WHOLE) - 1), max_size=30))
def test_records_are_read_in_any_pieces(cuts: list[int]) -> None:
    records = Records()
    edges = [0, *sorted(cuts), len(WHOLE)]
    for begin, end in itertools.pairwise(edges):
        assert not records.ended
        records.feed(WHOLE[begin:end])
    assert records.complete
    assert (records.started, records.status, records.failed) == (True, 139, "")
    assert bytes(records.results) == RESULTS


def test_a_guest_that_gives_up_says_why() -> None:
    records = Records()
    records.feed(b"started\nfailed no driver takes f0\n")
    assert records.failed == "no driver takes f0"
    assert not records.complete


@pytest.mark.parametrize(
    "nonsense",
    [
        b"hello\n",
        b"exit 256\n",
        b"exit -1\n",
        b"exit\n",
        b"results 99999999999\n",
        b"results 5\nabcderesults 5\n",
        b"x" * (ports.LONGEST_LINE + 1),
        b"\n",
    ],
)
def test_nonsense_is_refused(nonsense: bytes) -> None:
    with pytest.raises(ProtocolError):
        Records().feed(nonsense)


@given(st.binary(max_size=300))
def test_any_bytes_are_records_or_refused(data: bytes) -> None:
    records = Records()
    try:
        records.feed(data)
    except ProtocolError:
        return
    assert len(records.results) <= ports.LARGEST_RESULTS


def test_lines_are_bounded() -> None:
    lines = Lines(10)
    assert list(lines.feed(b"one\r\ntw")) == [b"one"]
    assert list(lines.feed(b"o\n")) == [b"two"]
    with pytest.raises(ProtocolError):
        list(lines.feed(b"x" * 11))
    with pytest.raises(ProtocolError):
        list(Lines(10).feed(b"x" * 11 + b"\n"))


@pytest.mark.parametrize(
    "line", [b"", b"[]", b"{}", b'{"ask": 1, "id": "f0"}', b'{"ask": "unplug"}', b"\xff", b"{"]
)
def test_what_is_no_question_is_none(line: bytes) -> None:
    assert Question.parse(line) is None


def test_a_question() -> None:
    assert Question.parse(b'{"ask": "unplug", "id": "f0"}') == Question("unplug", "f0")


def test_replies_of_the_monitor_are_told_apart() -> None:
    monitor = Monitor()
    first = json.loads(monitor.command("device_del", {"id": "f0"}))
    second = json.loads(monitor.command("device_del", {"id": "f1"}))
    assert first["arguments"] == {"id": "f0"}
    told = [
        {"QMP": {"version": {}}},
        {"event": "DEVICE_DELETED", "data": {"device": "f0", "path": "/f0"}},
        {"event": "DEVICE_DELETED", "data": {"path": "/unnamed"}},
        {"id": second["id"], "error": {"class": "GenericError", "desc": "no hot-plug"}},
        {"id": first["id"], "return": {}},
        {"id": 99, "return": {}},
    ]
    data = b"".join(json.dumps(message).encode() + b"\r\n" for message in told)
    assert list(monitor.feed(data)) == [
        ("device_del", "f1", "no hot-plug"),
        ("device_del", "f0", ""),
    ]
    assert "f0" in monitor.deleted
