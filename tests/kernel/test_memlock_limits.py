# SPDX-License-Identifier: Apache-2.0
"""RLIMIT_MEMLOCK is looked at before anything is pinned."""

from __future__ import annotations

import errno
import mmap
import os
import resource

import pytest

from holdfast.errors import BadBuffer, HoldfastError, NotSupported, OutOfMemory, ResourceError
from holdfast.kernel import dma_pin, limits
from holdfast.kernel.limits import Charge

LIMIT = 64 << 10


@pytest.fixture(autouse=True)
def ask_again() -> None:
    """What an earlier test pretended is not remembered."""
    limits._exempt_as.cache_clear()


@pytest.fixture
def limited(monkeypatch: pytest.MonkeyPatch) -> None:
    """A limit of 64 KiB, 16 KiB of them used, and no capability."""
    monkeypatch.setattr(resource, "getrlimit", lambda _: (LIMIT, LIMIT))
    monkeypatch.setattr(limits, "exempt", lambda: False)
    monkeypatch.setattr(limits, "pinned", lambda _: 16 << 10)


@pytest.mark.usefixtures("limited")
def test_what_fits_is_let_through_and_what_does_not_is_named_in_numbers() -> None:
    limits.require_lockable(48 << 10, Charge.MM, operation="dma_map", target="pci:x")
    with pytest.raises(OutOfMemory) as refused:
        limits.require_lockable((48 << 10) + 1, Charge.USER, operation="dma_map", target="pci:x")
    error = refused.value
    assert error.errno == errno.ENOMEM
    assert error.target == "pci:x"
    for part in (str(LIMIT), str(16 << 10), str((48 << 10) + 1), "VmPin"):
        assert part in error.what
    assert f"prlimit --pid {os.getpid()} --memlock={LIMIT + 1}:{LIMIT + 1}" in error.hint


@pytest.mark.usefixtures("limited")
def test_a_soft_limit_below_the_hard_one_is_the_users_own_to_raise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for hard in (resource.RLIM_INFINITY, 1 << 30):
        monkeypatch.setattr(resource, "getrlimit", lambda _, hard=hard: (LIMIT, hard))
        with pytest.raises(OutOfMemory, match="RLIMIT_MEMLOCK") as refused:
            limits.require_lockable(LIMIT, Charge.MM, operation="dma_map")
        assert "ulimit -S -l 80" in refused.value.hint


def test_who_has_no_limit_is_not_asked_further(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "pinned", pytest.fail)
    monkeypatch.setattr(resource, "getrlimit", lambda _: (resource.RLIM_INFINITY,) * 2)
    assert limits.memlock(Charge.MM) is None
    monkeypatch.setattr(resource, "getrlimit", lambda _: (0, 0))
    monkeypatch.setattr(limits, "exempt", lambda: True)
    assert limits.memlock(Charge.MM) is None


def test_locked_memory_is_counted_as_the_kernel_counts_it() -> None:
    before = limits.pinned(Charge.MM)
    with mmap.mmap(-1, 1 << 16) as block:
        if lock(block):
            assert limits.pinned(Charge.MM) == before + (1 << 16)
    assert limits.pinned(Charge.MM) == before


def lock(block: mmap.mmap) -> bool:
    """mlock(2) it; False where even 64 KiB are too much."""
    import ctypes

    address = ctypes.addressof(ctypes.c_char.from_buffer(block))
    failed: int = ctypes.CDLL(None).mlock(ctypes.c_void_p(address), ctypes.c_size_t(len(block)))
    return not failed


def test_an_ordinary_user_is_not_exempt() -> None:
    read_end, write_end = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            if os.geteuid() == 0:
                os.seteuid(12345)
            os.write(write_end, b"yes" if limits.exempt() else b"no")
        finally:
            os._exit(0)
    os.close(write_end)
    said = os.read(read_end, 8)
    os.close(read_end)
    os.waitpid(pid, 0)
    assert said == b"no"


# -- pins in place ------------------------------------------------------------


@pytest.mark.parametrize(
    ("address", "size", "iova"),
    [(4096, 0, 0), (4097, 4096, 0), (4096, 4095, 0), (4096, 4096, 512), (4096, -4096, 0)],
)
def test_only_whole_pages_are_pinned(address: int, size: int, iova: int) -> None:
    with pytest.raises(BadBuffer):
        dma_pin.map_own("type1", -1, 0, address, size, iova, True)


@pytest.mark.usefixtures("limited")
@pytest.mark.parametrize("kind", ["type1", "iommufd"])
def test_the_limit_is_checked_before_the_kernel_is_asked(kind: str) -> None:
    with pytest.raises(OutOfMemory, match="RLIMIT_MEMLOCK is"):
        dma_pin.map_own(kind, -1, 0, 4096, 1 << 20, 0, True)


def test_a_kind_that_nobody_knows_is_refused() -> None:
    with pytest.raises(NotSupported):
        dma_pin.map_own("spapr", -1, 0, 4096, 4096, 0, True)
    with pytest.raises(NotSupported):
        dma_pin.unmap_own("spapr", -1, 0, 0, 4096)


@pytest.mark.parametrize(
    ("number", "kind", "words"),
    [
        (errno.ENOSPC, ResourceError, "dma_entry_limit"),
        (errno.ENOMEM, OutOfMemory, "RLIMIT_MEMLOCK"),
        (errno.EEXIST, HoldfastError, "already"),
        (errno.EADDRINUSE, HoldfastError, "already"),
        (errno.EFAULT, BadBuffer, "cannot be pinned"),
        (errno.EINVAL, HoldfastError, "outside the IOVAs"),
    ],
)
def test_an_errno_of_a_map_is_put_into_words(
    number: int, kind: type[HoldfastError], words: str
) -> None:
    raw = (OutOfMemory if number == errno.ENOMEM else HoldfastError)("no", errno=number)
    error = dma_pin.explained(raw, 0x1000, 4096)
    assert isinstance(error, kind)
    assert error.errno == number
    assert words in str(error)
