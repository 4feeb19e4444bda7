# SPDX-License-Identifier: Apache-2.0
"""Keeper and client killed together without an IOMMU: nothing stops the card, nothing is lost.

Runs inside a lab guest without an IOMMU, with an edu bound to uio_pci_generic and huge pages.
"""

from __future__ import annotations

import mmap
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import holdfast
from holdfast.device import Device
from holdfast.errors import NotSupported
from holdfast.keeper import embedded
from holdfast.keeper.opening import connect
from holdfast.kernel import hugetlb, pci_sysfs
from holdfast.regs import edu
from holdfast.torture import actors
from holdfast.torture.outside import settle
from holdfast.torture.stack import kill_tree
from holdfast.values import Bdf, Target

pytestmark = pytest.mark.guest

PATIENCE = 60.0
WINDOW = 0.5
"""Seconds after which edu has written whatever it was told to; its own time is 0.1."""
FOREIGN = 0xA5
MINE = 0x3C


@pytest.fixture(scope="module")
def bdf() -> Bdf:
    for found in pci_sysfs.functions():
        if (found.vendor, found.device) == (edu.VENDOR, edu.DEVICE) and not found.translated:
            return found.bdf
    pytest.skip("no edu without an IOMMU")


@pytest.fixture
def target(bdf: Bdf, monkeypatch: pytest.MonkeyPatch, forked_keepers: list[Any]) -> Iterator[str]:
    directory = tempfile.mkdtemp(prefix="holdfast-")
    monkeypatch.setenv(embedded.RUNTIME_VARIABLE, directory)
    monkeypatch.setenv(embedded.IDLE_VARIABLE, "0.5")
    yield f"pci:{bdf}?backend=uio&dma_bits=40"
    for keeper in forked_keepers:
        keeper.terminate()
        keeper.wait()
    shutil.rmtree(directory)


def open_it(target: str) -> Device:
    return holdfast.open(target, timeout=PATIENCE)


def fill_card(target: str) -> None:
    with open_it(target) as card:
        source = card.alloc(2048)
        source.array[:] = FOREIGN
        card.dma.to_card(source).wait(PATIENCE)


def files_of(bdf: Bdf) -> list[Path]:
    """Memory of keepers of this function, alive or dead."""
    return [path for path in hugetlb.mount_point().rglob("*") if str(bdf) in path.name]


def ended(target: str) -> None:
    """Wait until no keeper holds the function any more."""
    path = embedded.socket_path(Target.parse(target))
    assert settle(lambda: int(path.exists()), goal=0, timeout=PATIENCE) == 0


def test_memory_outlives_keeper_and_client_until_the_next_keeper_has_seen_the_card_quiet(
    target: str, bdf: Bdf
) -> None:
    fill_card(target)
    ended(target)
    assert not files_of(bdf)
    before = hugetlb.pool().free

    def client(_: int, writing: int) -> None:
        card = open_it(target)
        buffer = card.alloc(3 << 20)
        lent = connect(Target.parse(target))
        card.dma.from_card(card.alloc(2048))
        os.write(writing, int(lent.ps()["standby"]).to_bytes(8, "little"))
        assert buffer.nbytes
        signal.pause()

    child = actors.spawn(client)
    standby = int.from_bytes(child.read(8, PATIENCE), "little")
    assert standby
    kill_tree(standby)  # and so the keeper and its anchor: none is left to succeed it
    child.kill()
    child.reap()

    left = files_of(bdf)
    assert left
    assert hugetlb.pool().free < before
    # Whoever takes every page that is free now finds nothing of the card's in it.
    pages = hugetlb.pool().free
    with mmap.mmap(-1, pages * hugetlb.HUGE_PAGE, mmap.MAP_SHARED | 0x40000) as own:
        victim = np.frombuffer(own, np.uint8)
        victim[:] = MINE
        time.sleep(WINDOW)
        assert int((victim != MINE).sum()) == 0
        del victim

    with open_it(target) as card:
        asking = connect(Target.parse(target))
        found = [lease for lease in asking.ps_all()["leases"] if lease["pid"] == 0]
        asking.close()
        assert [lease["state"] for lease in found] == ["released"], found
        assert "left behind" in str(found[0]["log"])
        assert not set(left) & set(files_of(bdf))
        source, into = card.alloc(2048), card.alloc(2048)
        source.array[:] = MINE
        card.dma.to_card(source).wait(PATIENCE)
        card.dma.from_card(into).wait(PATIENCE)
        assert (into.array == MINE).all()
    ended(target)
    assert settle(lambda: before - hugetlb.pool().free, goal=0, timeout=PATIENCE) == 0
    assert not files_of(bdf)


def test_what_a_process_has_itself_is_not_pinned_where_nothing_would_hold_it(target: str) -> None:
    with open_it(target) as card, pytest.raises(NotSupported, match="without an IOMMU"):
        card.pin(np.zeros(4096, np.uint8))


def test_registers_are_never_mapped_into_a_client(target: str) -> None:
    with open_it(target) as card:
        assert card.bars[edu.BAR].areas == ()
        assert card.bars[edu.BAR].read(edu.IDENTIFICATION) & 0xFF == 0xED
