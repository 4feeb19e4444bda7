# SPDX-License-Identifier: Apache-2.0
"""The soft limit of open files is raised as far as it may be, and never lowered."""

from __future__ import annotations

import resource
import subprocess
import sys

import pytest

from holdfast.kernel.limits import allow_open_files

PROGRAM = """
import resource, sys
from holdfast.kernel.limits import allow_open_files
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 256))
wanted = [int(word) if word != "-" else None for word in sys.argv[1:]]
print(*(allow_open_files(one) for one in wanted), *resource.getrlimit(resource.RLIMIT_NOFILE))
"""


def told(*wanted: str) -> list[int]:
    """What a process with limits of 64 and 256 gets, call by call, and its limits behind that."""
    ran = subprocess.run(
        [sys.executable, "-c", PROGRAM, *wanted], check=True, capture_output=True, text=True
    )
    return [int(word) for word in ran.stdout.split()]


def test_what_is_wanted_is_allowed_up_to_the_hard_limit() -> None:
    assert told("100", "300") == [100, 256, 256, 256]


def test_less_than_there_is_changes_nothing() -> None:
    assert told("10", "64", "200", "100") == [64, 64, 200, 200, 200, 256]


def test_without_a_number_all_that_may_be_had_is_taken() -> None:
    assert told("-") == [256, 256, 256]


def test_an_unlimited_hard_limit_that_the_kernel_does_not_give_leaves_things_as_they_were(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refused(_: int, __: tuple[int, int]) -> None:
        raise ValueError("not allowed to raise maximum limit")

    monkeypatch.setattr(resource, "getrlimit", lambda _: (1024, resource.RLIM_INFINITY))
    monkeypatch.setattr(resource, "setrlimit", refused)
    assert allow_open_files() == 1024
    monkeypatch.setattr(resource, "getrlimit", lambda _: (resource.RLIM_INFINITY,) * 2)
    assert allow_open_files(5000) == sys.maxsize
