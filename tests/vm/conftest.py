# SPDX-License-Identifier: Apache-2.0
"""Tests in ``guest`` run inside a lab guest, which test_guests.py boots; never on the host."""

from __future__ import annotations

import os
from collections.abc import Generator

import pytest

collect_ignore = [] if os.environ.get("HOLDFAST_LAB_GUEST") == "1" else ["guest"]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Where there is no lab, say so in one line: pytest folds skips of one place and reason."""
    report = yield
    if report.skipped and isinstance(report.longrepr, tuple) and item.get_closest_marker("lab"):
        _, _, reason = report.longrepr
        report.longrepr = (str(item.path), 1, reason)
    return report
