# SPDX-License-Identifier: Apache-2.0
"""Clients that share a function through its keeper: what they can do, and what they cannot."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import numpy as np
import numpy.typing as npt
import pytest

import holdfast
from holdfast.device import Device
from holdfast.errors import (
    BadTransfer,
    Busy,
    HoldfastError,
    NotSupported,
    RingFull,
    UsageError,
    WaitTimeout,
)
from holdfast.keeper.client import LeaseClient, close_all, expect
from holdfast.keeper.opening import connect
from holdfast.kernel import events, memfd, procfs
from holdfast.kernel.mapping import Mapping
from holdfast.mediated import Batch, MediatedEngine
from holdfast.torture.outside import settle
from holdfast.torture.stack import Stack
from holdfast.transfer import Transfer
from holdfast.values import CONFIG_REGION, Access, Target
from holdfast.wire import lease as wire
from holdfast.wire import rings
from holdfast.wire.rings import DEPTH, OVERRUN_TAG, RING_BYTES, Op, Status

pytestmark = pytest.mark.usefixtures("clean")
LONG = 15.0


def mediated(stack: Stack) -> Device:
    return holdfast.open(stack.target, access="mediated", timeout=LONG)


def engine(card: Device) -> MediatedEngine:
    assert isinstance(card.dma, MediatedEngine)
    return card.dma


def noise(nbytes: int, seed: int) -> npt.NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, nbytes, np.uint8)


def there_and_back(card: Device, address: int, nbytes: int, seed: int) -> None:
    source, back = card.alloc(nbytes), card.alloc(nbytes)
    source.array[:] = noise(nbytes, seed)
    card.dma.to_card(source, address).wait(LONG)
    card.dma.from_card(back, address).wait(LONG)
    assert np.array_equal(source.array, back.array)


def one(card: Device, *, op: Op = Op.TO_CARD, slab: int, offset: int = 0, nbytes: int = 64,
        address: int = 0) -> Transfer:  # fmt: skip
    """One record, whatever it says."""
    rows = rings.records(op, slab, [offset], nbytes, address)
    return engine(card).queue.post(Batch(op, rows, nbytes), [])


def lease_of(stack: Stack, card: Device) -> dict[str, object]:
    number = card.lease.number
    return next(dict(lease) for lease in stack.ps()["leases"] if lease["lease"] == number)


# -- data ------------------------------------------------------------------------------------------


def two_clients_get_their_own_data_back(stack: Stack) -> None:
    with mediated(stack) as first, mediated(stack) as second:
        for seed, nbytes in enumerate((1, 4096, 65537, (3 << 20) + 5)):
            for place, card in enumerate((first, second)):
                there_and_back(card, place * (8 << 20) + 17, nbytes, 2 * seed + place)


def test_each_client_gets_its_own_data_back(xdma: Stack) -> None:
    two_clients_get_their_own_data_back(xdma)


def test_memory_may_be_in_pieces(serve: Callable[..., Stack]) -> None:
    two_clients_get_their_own_data_back(serve("emu:xdma", "--arena", "64M"))


def test_many_pieces_of_one_buffer_are_one_batch(xdma: Stack) -> None:
    with mediated(xdma) as card:
        count, size = 600, 512
        host = card.alloc(count * size)
        host.array[:] = noise(count * size, 1)
        order = np.random.default_rng(2).permutation(count)
        queue = engine(card).queue
        lengths = np.full(count, size)
        out = engine(card).prepare_many(
            Op.TO_CARD, host, order * size, lengths, np.arange(count) * size
        )
        queue.post(out, [host]).wait(LONG)
        back = card.alloc(count * size)
        card.dma.from_card(back).wait(LONG)
        expected = host.array.reshape(count, size)[order].ravel()
        assert np.array_equal(back.array, expected)


def test_memory_of_the_process_is_bounced(xdma: Stack) -> None:
    with mediated(xdma) as card:
        source, back = np.arange(5000, dtype=np.int32), np.zeros(5000, np.int32)
        with card.pin(source) as out, card.pin(back) as into:
            assert (out.how, into.how) == ("bounced", "bounced")
            card.dma.to_card(out, 4096, offset=4).wait(LONG)
            card.dma.from_card(into, 4096, nbytes=19996).wait(LONG)
            with pytest.raises(NotSupported):
                _ = out.sg
        assert np.array_equal(back[:4999], source[1:])
        with card.pin(b"read only") as fixed, pytest.raises(BadTransfer):
            card.dma.from_card(fixed)


def test_more_than_the_ring_holds_is_refused_and_nothing_is_posted(xdma: Stack) -> None:
    with mediated(xdma) as card:
        host = card.alloc(64 * DEPTH)
        count = DEPTH + 1
        batch = engine(card).prepare_many(
            Op.TO_CARD, host, np.zeros(count), np.full(count, 8), np.zeros(count)
        )
        with pytest.raises(RingFull):
            engine(card).queue.post(batch, [host])
        assert engine(card).queue.in_flight == 0
        there_and_back(card, 0, 4096, 3)


# -- what a mediated lease is not ------------------------------------------------------------------


def test_a_mediated_lease_has_no_registers_channels_or_commands(xdma: Stack) -> None:
    with mediated(xdma) as card:
        assert not card.bars
        assert card.lease.channels == ()
        assert card.config.vendor == 0x10EE
        with pytest.raises(HoldfastError):
            card.config.store(4, 2, 0)
        with pytest.raises(NotSupported):
            card.command("channel_status")
        with pytest.raises(NotSupported):
            card.reset()
        client = card.lease
        assert isinstance(client, LeaseClient)
        with pytest.raises(NotSupported):
            client.region_read(1, 0, 4)
        with pytest.raises(NotSupported):
            client.region_write(1, 4, b"\0\0\0\0")
        assert client.region_read(CONFIG_REGION, 0, 2) == b"\xee\x10"


def test_direct_and_mediated_leases_exclude_each_other(serve: Callable[..., Stack]) -> None:
    stack = serve("emu:xdma?channels=2")
    with pytest.raises(UsageError):
        holdfast.open(stack.target, access="mediated", channels=1)
    with mediated(stack):
        for access in ("shared", "exclusive"):
            with pytest.raises(Busy):
                holdfast.open(stack.target, access=access)
        with holdfast.open(stack.target) as third:  # who does not say joins the others
            assert third.lease.access == "mediated"
    with holdfast.open(stack.target, access="shared", timeout=LONG):
        with pytest.raises(Busy):
            holdfast.open(stack.target, access="mediated")
    with mediated(stack) as card:
        there_and_back(card, 0, 4096, 4)


def test_clients_come_while_the_last_one_goes(xdma: Stack) -> None:
    def come_and_go(seed: int) -> None:
        for turn in range(8):
            with mediated(xdma) as card:
                there_and_back(card, seed << 20, 4096, seed + turn)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(come_and_go, range(2)))


def test_the_keeper_s_own_lease_names_the_keeper_and_leaves_no_descriptor(xdma: Stack) -> None:
    def descriptors() -> int:
        return len(procfs.open_descriptors(xdma.ps()["keeper"]))

    def living() -> int:
        return sum(lease["state"] != "released" for lease in xdma.ps()["leases"])

    with mediated(xdma):
        pass
    assert settle(living, goal=0, timeout=LONG) == 0
    before = descriptors()
    for _ in range(3):
        with mediated(xdma):
            told = xdma.ps()
            own = [lease for lease in told["leases"] if lease["pid"] == told["keeper"]]
            assert own[-1]["state"] == "alive"
        assert settle(living, goal=0, timeout=LONG) == 0
    assert settle(lambda: max(0, descriptors() - before), goal=0, timeout=LONG) == 0


def test_a_driver_that_cannot_post_for_others_says_so(serve: Callable[..., Stack]) -> None:
    edu = serve("emu:edu")
    with pytest.raises(NotSupported, match="cannot post"):
        holdfast.open(edu.target, access="mediated", timeout=LONG)


# -- checks ----------------------------------------------------------------------------------------


def test_what_is_not_the_lease_s_own_is_refused(xdma: Stack) -> None:
    with mediated(xdma) as owner, mediated(xdma) as thief:
        secret, own = owner.alloc(4096), thief.alloc(4096)
        secret.array[:] = 0x5C
        slab, at = secret.place
        mine = own.place[0]
        attempts: list[Callable[[], Transfer]] = [
            lambda: one(thief, slab=slab, offset=at),
            lambda: one(thief, op=Op.FROM_CARD, slab=slab, offset=at),
            lambda: one(thief, slab=mine, offset=1 << 40),
            lambda: one(thief, slab=mine, nbytes=0),
            lambda: one(thief, slab=mine, nbytes=(1 << 64) - 1),
            lambda: one(thief, slab=mine, address=64 << 20),
        ]
        for wrong in attempts:
            with pytest.raises(BadTransfer, match="refused"):
                wrong().wait(LONG)
        # Control memory of the keeper's own is nobody's.
        for number in range(slab):
            if number not in (slab, mine):
                with pytest.raises(BadTransfer):
                    one(thief, op=Op.FROM_CARD, slab=number).wait(LONG)
        assert (secret.array == 0x5C).all()
        there_and_back(owner, 0, 4096, 5)
        there_and_back(thief, 0, 4096, 6)


def test_a_refused_request_does_not_hold_up_its_neighbours(xdma: Stack) -> None:
    with mediated(xdma) as card:
        host, back = card.alloc(8192), card.alloc(8192)
        host.array[:] = noise(8192, 7)
        batch = engine(card).prepare_many(
            Op.TO_CARD, host, [0, 1 << 50, 4096], [4096, 8, 4096], [0, 0, 4096]
        )
        with pytest.raises(BadTransfer, match="request 1 of 3"):
            engine(card).queue.post(batch, [host]).wait(LONG)
        card.dma.from_card(back).wait(LONG)
        assert np.array_equal(host.array, back.array)


def test_memory_that_was_given_back_is_refused_and_what_comes_next_is_not(xdma: Stack) -> None:
    with mediated(xdma) as card:
        buffer = card.alloc(1 << 20)
        old = engine(card).prepare(Op.FROM_CARD, buffer)
        card.dma.to_card(buffer).wait(LONG)
        buffer.free()
        assert card.trim() > 0
        again = card.alloc(1 << 20)
        again.array[:] = 0x33
        with pytest.raises(BadTransfer, match="no longer"):
            engine(card).queue.post(old, []).wait(LONG)
        assert (again.array == 0x33).all()
        there_and_back(card, 0, 1 << 20, 8)


def test_the_card_s_memory_can_be_cut_into_windows(serve: Callable[..., Stack]) -> None:
    stack = serve("emu:xdma?memory=1M", "--card-windows", "2")
    with mediated(stack) as low, mediated(stack) as high:
        assert engine(low).card == (0, 512 << 10)
        assert engine(high).card == (512 << 10, 1 << 20)
        there_and_back(high, 512 << 10, 4096, 9)
        with pytest.raises(BadTransfer, match="card address"):
            high.dma.to_card(high.alloc(64), 0)
        with pytest.raises(BadTransfer, match="card's memory"):
            one(high, slab=high.alloc(64).place[0], address=0).wait(LONG)
        with pytest.raises(Busy, match="parts"):
            holdfast.open(stack.target, access="mediated")


# -- sharing ---------------------------------------------------------------------------------------


def test_a_flood_delays_another_client_by_a_window_only(serve: Callable[..., Stack]) -> None:
    # 256 MiB wait in the flood's ring: two seconds' worth. The window is 8 MiB, 1/16 s.
    stack = serve("emu:xdma?link_rate=128M")
    with mediated(stack) as flood, mediated(stack) as other:
        big, small = flood.alloc(1 << 20), other.alloc(4096)
        running = [flood.dma.to_card(big) for _ in range(256)]
        other.dma.to_card(small).wait(LONG)  # connections and caches are warm
        worst = 0
        for _ in range(8):
            before = sum(transfer.done for transfer in running)
            other.dma.to_card(small).wait(LONG)
            worst = max(worst, sum(transfer.done for transfer in running) - before)
        assert worst <= 12, "MiB that went before a request of 4 KiB"
        assert not running[-1].done


def test_two_clients_that_flood_get_equal_shares(serve: Callable[..., Stack]) -> None:
    stack = serve("emu:xdma?link_rate=64M")
    with mediated(stack) as first, mediated(stack) as second:
        large, small = first.alloc(1 << 20), second.alloc(64 << 10)
        pieces = [
            [first.dma.to_card(large) for _ in range(768)],
            [second.dma.to_card(small) for _ in range(1000)],
        ]

        def moved() -> list[int]:
            done = [sum(transfer.done for transfer in each) for each in pieces]
            return [done[0] << 20, done[1] << 16]

        before = moved()
        assert settle(lambda: int(moved()[1] < before[1] + (24 << 20)), goal=0, timeout=LONG) == 0
        shares = [now - then for now, then in zip(moved(), before, strict=True)]
        assert 0.5 < shares[0] / shares[1] < 2, shares


def test_a_quota_bounds_the_requests_in_flight(serve: Callable[..., Stack]) -> None:
    stack = serve("emu:xdma?link_rate=64K&link_chunk=4096", "--requests", "5")
    with mediated(stack) as card, mediated(stack) as other:
        host = card.alloc(4096)
        running = [card.dma.to_card(host) for _ in range(400)]
        seen = {lease_of(stack, card)["requests"] for _ in range(10)}
        assert max(int(str(count)) for count in seen) == 5
        other.dma.to_card(other.alloc(64)).wait(LONG)
        assert not running[-1].done
        with pytest.raises(WaitTimeout):
            running[-1].wait(0.001)
        with pytest.raises(Busy):  # a timeout cancels nothing
            card.lease.give_slab(card._slabs[0])
        for transfer in running:
            transfer.wait(LONG)


# -- scribbling ------------------------------------------------------------------------------------


class RawRings:
    """A mediated lease whose rings are written without any manners."""

    def __init__(self, stack: Stack) -> None:
        self.client = connect(Target.parse(stack.target))
        reply, self.fds = self.client.request(wire.Open(access=Access.MEDIATED))
        info = expect(reply, wire.Opened).rings
        assert info is not None
        self.bell, self.done = self.fds[info.submit], self.fds[info.done]
        self.ring_fd = self.fds[info.fd]
        self.mapping = Mapping(self.ring_fd, RING_BYTES)
        self.words = self.mapping.array.view(np.uint64)

    def close(self) -> None:
        self.mapping.close()
        close_all(self.fds)
        self.client.close()


def test_scribbling_over_the_rings_reaches_nobody_else(xdma: Stack) -> None:
    random = np.random.default_rng(11)
    hostile = RawRings(xdma)
    with mediated(xdma) as victim:
        guarded = victim.alloc(64 << 10)
        guarded.array[:] = 0x77
        slab = victim.alloc(64).place[0]
        reply, fds = hostile.client.request(wire.TakeSlab(nbytes=4096))
        close_all(fds)
        assert expect(reply, wire.SlabTaken).info.slab > slab
        end = rings._End(hostile.mapping.array.data)
        deadline = time.monotonic() + 1.5
        rounds = 0
        while time.monotonic() < deadline:
            rounds += 1
            kind = rounds % 4
            if kind == 0:
                hostile.words[:] = random.integers(0, 1 << 64, len(hostile.words), np.uint64)
            else:
                end._records[:, 1] = random.integers(0, 4, DEPTH)
                end._records[:, 2] = random.integers(0, slab + 3, DEPTH)
                end._records[:, 3:6] = random.choice(
                    np.array([0, 64, 4096, 1 << 30, (1 << 64) - 4096], np.uint64), (DEPTH, 3)
                )
                end._records[:, 6:] = 0
                end._words[0] = (end._words[0] + int(random.integers(1, DEPTH))) & ((1 << 64) - 1)
            if kind == 3:
                memfd.punch(hostile.ring_fd, 0, RING_BYTES)
            os.eventfd_write(hostile.bell, 1)
            if rounds % 64 == 0:
                there_and_back(victim, 1 << 20, 4096, rounds)
        assert rounds > 64
        assert (guarded.array == 0x77).all()
        there_and_back(victim, 1 << 20, 65536, 12)
    hostile.close()
    assert (
        settle(
            lambda: sum(lease["state"] != "released" for lease in xdma.ps()["leases"]),
            goal=0,
            timeout=LONG,
        )
        == 0
    )


def test_a_client_that_fills_its_bell_holds_up_nobody(xdma: Stack) -> None:
    hostile = RawRings(xdma)
    flags = fcntl.fcntl(hostile.done, fcntl.F_GETFL)
    fcntl.fcntl(hostile.done, fcntl.F_SETFL, flags & ~os.O_NONBLOCK)
    end = rings.ClientEnd(hostile.mapping.array.data)
    writer = os.open(f"/proc/self/fd/{hostile.done}", os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with suppress(BlockingIOError):
        while True:
            os.write(writer, bytes(4096))
    os.close(writer)
    for _ in range(3):
        end.submit(rings.records(Op.TO_CARD, 999, np.zeros(300), 64, 0))
        os.eventfd_write(hostile.bell, 1)
        with mediated(xdma) as victim:
            there_and_back(victim, 0, 4096, 13)
    assert end.reap() is not None
    hostile.close()


def test_an_overrun_drops_what_was_submitted_and_says_so(xdma: Stack) -> None:
    hostile = RawRings(xdma)
    end = rings.ClientEnd(hostile.mapping.array.data)
    end._words[0] = DEPTH + 1
    os.eventfd_write(hostile.bell, 1)
    assert events.wait(hostile.done, LONG)
    told = end.reap()
    assert told is not None
    assert told["tag"].tolist() == [OVERRUN_TAG]
    assert told["status"].tolist() == [Status.OVERRUN]
    end.submitted = DEPTH + 1
    rows = rings.records(Op.TO_CARD, 999, [0], 64, 0)
    end.submit(rows)
    os.eventfd_write(hostile.bell, 1)
    deadline = time.monotonic() + LONG
    while (again := end.reap()) is None and time.monotonic() < deadline:
        events.wait(hostile.done, 0.1)
    assert again is not None
    assert again["status"].tolist() == [Status.FOREIGN]
    hostile.close()
