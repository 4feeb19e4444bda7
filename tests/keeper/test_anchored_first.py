# SPDX-License-Identifier: Apache-2.0
"""Nothing is written down or mapped before the anchor has acknowledged what keeps its pages."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest

from holdfast.errors import BadBuffer, HoldfastError
from holdfast.keeper.map_state import MapState
from holdfast.kernel import procfs

SIZE = 64 << 10

MakeBench = Callable[..., Any]


@dataclass
class Reluctant:
    """A ``Holder`` that acknowledges nothing while it refuses; looks on whenever it is asked."""

    look: Callable[[], None]
    refuses: bool = True
    names: list[str] = field(default_factory=list)

    def put(self, name: str, fds: Sequence[int] = (), note: object = None) -> None:
        self.names.append(name)
        self.look()
        if self.refuses:
            raise HoldfastError("no anchor", operation="anchor")

    def drop(self, name: str) -> None: ...

    def release(self, name: str) -> None: ...


@pytest.fixture
def it(bench: MakeBench) -> Any:
    made = bench()

    def look() -> None:
        assert made.journal.entries(made.lease.number) == ()
        assert made.function.mapped == {}

    made.desk.holder = Reluctant(look)
    return made


def test_a_slab_is_reserved_and_mapped_only_once_it_is_held(it: Any) -> None:
    with pytest.raises(HoldfastError, match="no anchor"):
        asyncio.run(it.desk.take_slab(it.lease, SIZE))
    assert it.desk.holder.names == ["slab/1"]
    it.desk.holder.look()
    assert it.host.source.held_bytes == 0
    it.desk.holder.refuses = False
    slab = asyncio.run(it.desk.take_slab(it.lease, SIZE))
    assert it.journal.entries(it.lease.number) == (slab.entry,)
    assert slab.entry.state is MapState.MAPPED


def test_own_memory_is_reserved_only_once_the_way_to_it_is_held(
    it: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(procfs, "is_memory_of", lambda *_: True)
    it.function.dma_map_memory = lambda iova, size, *_: it.function.mapped.update({iova: size})

    def send() -> None:
        asyncio.run(it.desk.accept_own_memory(it.lease, os.open("/dev/null", os.O_RDONLY)))

    def pin() -> Any:
        return asyncio.run(it.desk.pin(it.lease, 0x7F00_0000_0000, SIZE, writable=True))

    try:
        with pytest.raises(HoldfastError, match="no anchor"):
            send()
        with pytest.raises(BadBuffer):
            pin()
        it.desk.holder.look()
        it.desk.holder.refuses = False
        send()  # as a client does whose first pin failed
        assert pin().entry.state is MapState.MAPPED
        send()
        assert it.desk.holder.names == ["lease/7/memory"] * 2, "what is held is not put again"
    finally:
        os.close(it.lease.own_memory)
