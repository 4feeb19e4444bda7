# SPDX-License-Identifier: Apache-2.0
"""An anchor that holds thousands of descriptors: nobody waits in vain, and none is left behind."""

from __future__ import annotations

import os
import signal
import socket
import sys
from collections.abc import Iterator

import pytest

from holdfast.keeper.anchor_link import AnchorLink, Guard
from holdfast.kernel import events, procfs
from holdfast.kernel.limits import allow_open_files
from holdfast.torture.outside import settle

pytestmark = pytest.mark.usefixtures("clean")
MANY = 2000


@pytest.fixture
def link() -> Iterator[AnchorLink]:
    """A keeper's end, with an anchor of its own; the standby is nobody."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours:
        link = AnchorLink.start(theirs, [sys.executable, "-c", "pass"], Guard())
        yield link
        link.end()


def held(link: AnchorLink) -> int:
    return len(procfs.open_descriptors(link.pid))


def test_thousands_can_be_dropped_in_a_row_without_an_answer_in_between(link: AnchorLink) -> None:
    assert allow_open_files(2 * MANY) >= 2 * MANY
    fd = events.make()
    before = held(link)
    for number in range(MANY):
        link.put(f"thing/{number}", [fd], {"number": number})
    assert held(link) == before + MANY
    # More than both directions of a socket pair can take: answers that nobody reads would stop the
    # anchor, and with it whoever drops.
    for number in range(MANY):
        link.drop(f"thing/{number}")
    link.put("last", [fd])
    assert settle(lambda: held(link), goal=before + 1, timeout=5.0) == before + 1
    assert set(link.items("thing/")) == set()
    link.release("last")
    assert held(link) == before
    os.close(fd)


def test_another_anchor_gets_thousands_before_anybody_goes_on(link: AnchorLink) -> None:
    assert allow_open_files(2 * MANY) >= 2 * MANY
    fd = events.make()
    for number in range(MANY):
        link.put(f"thing/{number}", [fd], number)
    count, first = held(link), link.pid
    os.kill(first, signal.SIGKILL)
    link.put("one more", [fd])
    assert link.pid != first
    assert held(link) == count + 1
    assert link.items("thing/").keys() == {f"thing/{number}" for number in range(MANY)}
    os.close(fd)
