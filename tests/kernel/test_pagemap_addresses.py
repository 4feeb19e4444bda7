# SPDX-License-Identifier: Apache-2.0
"""Physical addresses: the kernel's entries are checked, one by one, before they are believed."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast.errors import BadBuffer, HoldfastError, NoPermission, SystemFailure
from holdfast.kernel import memfd, pagemap
from holdfast.kernel.mapping import Mapping

PAGE = 4096
PRESENT = 1 << 63
SWAPPED = 1 << 62
SOFT_DIRTY = 1 << 55


def entries(*values: int) -> npt.NDArray[np.uint64]:
    return np.array(values, np.uint64)


def translate(found: npt.NDArray[np.uint64], page: int = PAGE) -> list[int]:
    """``physical`` over entries that are given."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pagemap, "_entries", lambda *_: found)
        size = len(found) * PAGE
        return [int(at) for at in pagemap.physical(0, size, page)]


@pytest.fixture
def mapping() -> Mapping:
    fd = memfd.create("mapped", 64 * PAGE)
    mapping = Mapping(fd, 64 * PAGE)
    os.close(fd)
    return mapping


def test_every_page_that_is_there_has_an_address_of_its_own(mapping: Mapping) -> None:
    mapping.array[:] = 1
    try:
        found = pagemap.physical(mapping.address, mapping.size)
    except NoPermission as error:
        pytest.skip(error.what)
    assert found.shape == (64,)
    assert found.dtype == np.uint64
    assert len(set(found.tolist())) == 64
    assert not (found % np.uint64(PAGE)).any()
    part = pagemap.physical(mapping.address + 3 * PAGE, 2 * PAGE)
    assert part.tolist() == found[3:5].tolist()


def test_a_page_that_was_never_touched_has_no_address(mapping: Mapping) -> None:
    mapping.array[: 5 * PAGE] = 1
    with pytest.raises(BadBuffer, match="not in memory"):
        pagemap.physical(mapping.address, 6 * PAGE)


def test_a_frame_number_of_zero_is_a_missing_privilege_and_no_address() -> None:
    with pytest.raises(NoPermission, match="frame number 0") as caught:
        translate(entries(PRESENT | 7, PRESENT | SOFT_DIRTY))
    assert "cap_sys_admin" in caught.value.hint


def test_a_swapped_page_has_no_address() -> None:
    with pytest.raises(BadBuffer):
        translate(entries(PRESENT | 7, PRESENT | SWAPPED | 8))


@given(st.lists(st.integers(1, (1 << 52) - 1), min_size=1, max_size=50))
def test_flags_are_no_part_of_the_address(numbers: list[int]) -> None:
    found = translate(entries(*(PRESENT | SOFT_DIRTY | 1 << 61 | n for n in numbers)))
    assert found == [n * PAGE for n in numbers]


@given(st.integers(1, 5), st.data())
def test_huge_pages_have_one_address_each(pages: int, data: st.DataObject) -> None:
    first = data.draw(st.lists(st.integers(1, 1 << 40), min_size=pages, max_size=pages))
    numbers = np.concatenate([np.arange(8, dtype=np.uint64) + np.uint64(n) for n in first])
    present = np.uint64(PRESENT)
    assert translate(numbers | present, 8 * PAGE) == [n * PAGE for n in first]
    place = data.draw(st.integers(0, len(numbers) - 1))
    numbers[place] += np.uint64(1 << 41)
    with pytest.raises(BadBuffer, match="does not consist of pages"):
        translate(numbers | present, 8 * PAGE)


@pytest.mark.parametrize(
    ("address", "size", "page"),
    [
        (1, PAGE, PAGE),
        (0, 1, PAGE),
        (0, 0, PAGE),
        (0, -PAGE, PAGE),
        (0, PAGE, 2048),
        (0, 3 * PAGE, 2 * PAGE),
        (PAGE, 2 * PAGE, 2 * PAGE),
        (0, 5000, 5000),
    ],
)
def test_ranges_are_whole_pages(address: int, size: int, page: int) -> None:
    with pytest.raises(BadBuffer, match="no whole pages"):
        pagemap.physical(address, size, page)


def test_addresses_beyond_the_end_of_user_memory_are_an_error() -> None:
    with pytest.raises(HoldfastError):
        pagemap.physical(1 << 47, PAGE)


@pytest.mark.parametrize(
    ("error", "kind"), [(PermissionError(1, "no"), NoPermission), (OSError(5, "io"), SystemFailure)]
)
def test_a_map_that_cannot_be_opened_is_explained(
    monkeypatch: pytest.MonkeyPatch, error: OSError, kind: type[HoldfastError]
) -> None:
    def fail(path: str, flags: int) -> int:
        assert Path(path).name == "pagemap"
        raise error

    monkeypatch.setattr(os, "open", fail)
    with pytest.raises(kind):
        pagemap.physical(0, PAGE)
