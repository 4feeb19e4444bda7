# SPDX-License-Identifier: Apache-2.0
"""A short slice of ``make fuzz``: damaged frames for every decoder and for a keeper."""

from __future__ import annotations

import os
import random
from collections.abc import Callable

import numpy as np
import pytest

import holdfast
from holdfast.kernel import procfs
from holdfast.torture import fuzz
from holdfast.torture.outside import settle
from holdfast.torture.stack import Stack

pytestmark = pytest.mark.usefixtures("clean")
LONG = 20.0
SEED = int(os.environ.get("HOLDFAST_FUZZ_SEED", "1"))


def test_decoders_refuse_by_their_own_error_or_take_and_never_grow() -> None:
    *_, tally = fuzz.fuzz_decoders(SEED, 8_000)
    assert tally.frames == 8_000
    assert len(tally.by_target) == 4
    assert 0.05 < tally.taken / tally.frames < 0.95, "frames must be neither all bad nor all good"


def test_what_is_sent_follows_from_the_seed() -> None:
    def frames(seed: int) -> list[bytes]:
        dice = random.Random(seed)
        return [fuzz.vfio_frame(dice) for _ in range(100)]

    assert frames(1) == frames(1)
    assert frames(1) != frames(2)


def test_a_decoder_that_breaks_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def breaks(packet: bytes) -> object:
        raise IndexError(len(packet))

    monkeypatch.setattr("holdfast.wire.lease.decode_request", breaks)
    with pytest.raises(fuzz.Found, match="IndexError"):
        list(fuzz.fuzz_decoders(SEED, 100))


def test_a_keeper_stands_it_and_serves_on(serve: Callable[..., Stack]) -> None:
    stack = serve("emu:xdma?memory=1M&channels=4")
    with holdfast.open(stack.target, access="shared", channels=1) as card:
        source, back = card.alloc(4096), card.alloc(4096)
        source.array[:] = np.arange(4096) % 251
        keeper = stack.keeper_pid
        before = len(procfs.open_descriptors(keeper))
        for number, _ in enumerate(fuzz.fuzz_keeper(stack.target, SEED, 300)):
            if number % 5 == 0:
                card.dma.to_card(source).wait(LONG)
                card.dma.from_card(back).wait(LONG)
                assert np.array_equal(source.array, back.array)

        def others() -> int:
            return sum(lease["state"] != "released" and lease["lease"] != card.lease.number
                       for lease in stack.ps()["leases"])  # fmt: skip

        assert settle(others, goal=0, timeout=LONG) == 0
        told = stack.ps()
        assert (told["unaccounted_bytes"], told["quarantined_bytes"]) == (0, 0)
        assert told["keeper"] == keeper, "it was killed and replaced"

        def descriptors() -> int:
            return len(procfs.open_descriptors(keeper))

        assert settle(descriptors, goal=before, timeout=LONG) <= before
