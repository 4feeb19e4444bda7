# SPDX-License-Identifier: Apache-2.0
"""Quotas are per lease, and a refused charge changes nothing."""

from __future__ import annotations

import pytest

from holdfast.dma.ledger import Holding, Ledger
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


def test_totals_say_why_memory_is_held() -> None:
    ledger = Ledger(quota=100, buffers=9)
    ledger.charge(ONE, 10)
    ledger.charge(TWO, 20)
    ledger.move(ONE, Holding.DRAINING)
    ledger.move(LeaseId(3), Holding.QUARANTINED)
    assert [ledger.total(holding) for holding in Holding] == [20, 10, 0]
    ledger.move(ONE, Holding.QUARANTINED)
    assert [ledger.total(holding) for holding in Holding] == [20, 0, 10]
    ledger.discharge(ONE, 10)
    assert [ledger.total(holding) for holding in Holding] == [20, 0, 0]
