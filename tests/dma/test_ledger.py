# SPDX-License-Identifier: Apache-2.0
"""Quotas are per lease and per user, and a refused charge changes nothing."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast.dma.ledger import Ledger, Quota
from holdfast.errors import QuotaExceeded, UsageError
from holdfast.values import LeaseId

ONE, TWO = LeaseId(1), LeaseId(2)


def test_bytes_are_counted_up_to_the_quota_of_each_lease() -> None:
    ledger = Ledger(quota=100, buffers=10)
    ledger.charge(ONE, 60)
    ledger.charge(TWO, 100)
    with pytest.raises(QuotaExceeded, match="41 bytes more than the 60 held"):
        ledger.charge(ONE, 41)
    ledger.charge(ONE, 40)
    assert (ledger.held_by(ONE), ledger.held_by(TWO)) == (100, 100)


def test_pieces_are_counted_too() -> None:
    ledger = Ledger(quota=100, buffers=2)
    ledger.charge(ONE, 1)
    ledger.charge(ONE, 1)
    with pytest.raises(QuotaExceeded, match="2 pieces"):
        ledger.charge(ONE, 1)
    ledger.discharge(ONE, 1)
    ledger.charge(ONE, 1)


def test_a_refused_first_charge_opens_no_account() -> None:
    ledger = Ledger(quota=100, buffers=2)
    with pytest.raises(QuotaExceeded):
        ledger.charge(ONE, 101)
    assert ledger.held_by(ONE) == 0
    with pytest.raises(UsageError):
        ledger.discharge(ONE, 1)


def test_what_is_not_held_cannot_be_discharged() -> None:
    ledger = Ledger(quota=100, buffers=2)
    ledger.charge(ONE, 10)
    with pytest.raises(UsageError):
        ledger.discharge(ONE, 11)
    with pytest.raises(UsageError):
        ledger.discharge(TWO, 1)
    ledger.discharge(ONE, 10)
    assert ledger.held_by(ONE) == 0


def test_a_user_has_one_account_over_all_leases() -> None:
    ledger = Ledger(quota=100, buffers=10, per_user=Quota(nbytes=150, buffers=3))
    ledger.charge(ONE, 100, user=7)
    with pytest.raises(QuotaExceeded, match="user 7: 51 bytes more than the 100 held"):
        ledger.charge(TWO, 51, user=7)
    ledger.charge(TWO, 51, user=8)  # somebody else's account
    ledger.charge(LeaseId(3), 50, user=7)
    assert (ledger.held_by_user(7), ledger.held_by_user(8)) == (150, 51)
    ledger.discharge(ONE, 100)
    ledger.charge(LeaseId(4), 1, user=7)
    ledger.charge(LeaseId(5), 1, user=7)
    with pytest.raises(QuotaExceeded, match="3 pieces"):
        ledger.charge(LeaseId(6), 1, user=7)
    assert ledger.held_by(LeaseId(6)) == 0


def test_what_is_adopted_counts_even_beyond_the_quota() -> None:
    ledger = Ledger(quota=10, buffers=1, per_user=Quota(nbytes=10))
    ledger.adopt(ONE, 50, user=7)
    with pytest.raises(QuotaExceeded):
        ledger.charge(TWO, 1, user=7)
    ledger.discharge(ONE, 50)
    ledger.charge(TWO, 1, user=7)


CHARGES = st.lists(st.tuples(st.integers(1, 4), st.integers(1, 40), st.booleans()), max_size=60)


@given(CHARGES)
def test_both_accounts_always_agree_with_a_plain_list(moves: list[tuple[int, int, bool]]) -> None:
    ledger = Ledger(quota=100, buffers=5, per_user=Quota(nbytes=150, buffers=8))
    held: list[tuple[int, int]] = []
    for lease, nbytes, give in moves:
        mine = [piece for piece in held if piece[0] == lease]
        if give and mine:
            ledger.discharge(LeaseId(lease), mine[0][1])
            held.remove(mine[0])
            continue
        users = [piece for piece in held if piece[0] % 2 == lease % 2]
        room = (
            sum(size for _, size in mine) + nbytes <= 100
            and len(mine) < 5
            and sum(size for _, size in users) + nbytes <= 150
            and len(users) < 8
        )
        try:
            ledger.charge(LeaseId(lease), nbytes, user=lease % 2)
        except QuotaExceeded:
            assert not room
        else:
            assert room
            held.append((lease, nbytes))
        for user in (0, 1):
            total = sum(size for who, size in held if who % 2 == user)
            assert ledger.held_by_user(user) == total
