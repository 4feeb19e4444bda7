# SPDX-License-Identifier: Apache-2.0
"""What every backend has to keep, as tests.

Subclass :class:`BackendConformance` in a test file and give it a fixture named ``backend``::

    class TestMyBackend(BackendConformance):
        @pytest.fixture
        def backend(self) -> Iterator[FunctionBackend]:
            backend = MyBackend(...)
            yield backend
            backend.close()

The function behind it needs configuration space, and is changed by the tests: it is reset if it
can be, its command register is written, memory is mapped. It does no DMA of its own here. Each test
gets a fresh backend; the suite needs pytest.
"""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Iterator
from itertools import pairwise

import pytest

from holdfast.contracts import FunctionBackend
from holdfast.dma.slab import SlabSource
from holdfast.errors import (
    BadAccess,
    Closed,
    DeviceGone,
    HoldfastError,
    NotSupported,
    RemoteError,
    SystemFailure,
    UsageError,
)
from holdfast.kernel import events, memfd
from holdfast.values import CONFIG_REGION, Iova, IrqIndex, Perm

IOVA = Iova(0x10_0000)
SIZE = 0x4000
_COMMAND = 4
_BUS_MASTER = 4


class Bytes:
    """Memory without a descriptor, for ``dma_map_memory``."""

    def __init__(self, size: int) -> None:
        self.content = bytearray(size)

    def read(self, offset: int, count: int) -> bytes:
        return bytes(self.content[offset : offset + count])

    def write(self, offset: int, data: memoryview) -> None:
        self.content[offset : offset + len(data)] = data


def descriptors() -> int:
    """How many descriptors this process has open."""
    return len(os.listdir("/proc/self/fd"))


class BackendConformance:
    """Tests of ``contracts.FunctionBackend``. Subclasses provide the fixture ``backend``."""

    @pytest.fixture
    def backend(self) -> Iterator[FunctionBackend]:
        """A fresh backend, closed after the test. Override it."""
        raise NotImplementedError

    @pytest.fixture
    def memory(self, backend: FunctionBackend) -> Iterator[int]:
        """A sealed file of ``2 * SIZE`` bytes, for backends that map files."""
        if backend.memory() is not None:
            pytest.skip("without translation nothing is mapped: see the tests of fixed memory")
        fd = memfd.create("conformance", 2 * SIZE)
        yield fd
        os.close(fd)

    # -- configuration space and regions -----------------------------------------------------------

    def test_configuration_space_is_there_and_names_a_vendor(
        self, backend: FunctionBackend
    ) -> None:
        assert backend.regions[CONFIG_REGION].size in (256, 4096)
        assert backend.region_read(CONFIG_REGION, 0, 2) not in (b"\0\0", b"\xff\xff")

    def test_configuration_space_reads_the_same_in_every_width(
        self, backend: FunctionBackend
    ) -> None:
        whole = backend.region_read(CONFIG_REGION, 0, 64)
        for width in (1, 2, 4):
            pieces = [
                backend.region_read(CONFIG_REGION, offset, width) for offset in range(0, 64, width)
            ]
            assert b"".join(pieces) == whole

    def test_bus_mastering_can_be_turned_on_and_off(self, backend: FunctionBackend) -> None:
        word = int.from_bytes(backend.region_read(CONFIG_REGION, _COMMAND, 2), "little")
        for value in (word | _BUS_MASTER, word & ~_BUS_MASTER):
            backend.region_write(CONFIG_REGION, _COMMAND, value.to_bytes(2, "little"))
            seen = int.from_bytes(backend.region_read(CONFIG_REGION, _COMMAND, 2), "little")
            assert seen & _BUS_MASTER == value & _BUS_MASTER

    def test_regions_are_listed_by_their_index(self, backend: FunctionBackend) -> None:
        assert [region.index for region in backend.regions] == list(range(len(backend.regions)))
        assert len(backend.regions) > CONFIG_REGION

    def test_accesses_outside_a_region_are_refused_before_they_are_sent(
        self, backend: FunctionBackend
    ) -> None:
        for region in backend.regions:
            for offset, count in ((region.size, 1), (-1, 1), (0, region.size + 1), (0, 0)):
                with pytest.raises(BadAccess):
                    backend.region_read(region.index, offset, count)
            with pytest.raises(BadAccess):
                backend.region_write(region.index, region.size, b"x")
        with pytest.raises(BadAccess):
            backend.region_read(len(backend.regions), 0, 1)

    def test_mappable_areas_are_whole_pages_inside_a_region_with_a_descriptor(
        self, backend: FunctionBackend
    ) -> None:
        for region in backend.regions:
            mapped = backend.region_map(region.index)
            assert (mapped is not None) == bool(region.areas)
            for area in region.areas:
                assert area.offset % 4096 == 0
                assert area.size % 4096 == 0
                assert 0 < area.size <= region.size - area.offset

    # -- interrupts --------------------------------------------------------------------------------

    def test_interrupt_types_are_listed_by_their_index(self, backend: FunctionBackend) -> None:
        assert [info.index for info in backend.irqs] == list(IrqIndex)
        assert all(info.count >= 0 for info in backend.irqs)

    def test_every_vector_can_be_wired_rewired_and_disabled(self, backend: FunctionBackend) -> None:
        for info in backend.irqs:
            if not (info.count and info.eventfd):
                continue
            fds = [events.make() for _ in range(info.count)]
            try:
                backend.set_irqs(info.index, 0, fds)
                backend.set_irqs(info.index, info.count - 1, fds[-1:])
                backend.set_irqs(info.index, 0, [])
            finally:
                for fd in fds:
                    os.close(fd)

    def test_a_vector_that_does_not_exist_cannot_be_wired(self, backend: FunctionBackend) -> None:
        fd = events.make()
        try:
            for info in backend.irqs:
                with pytest.raises(HoldfastError):
                    backend.set_irqs(info.index, info.count, [fd])
        finally:
            os.close(fd)

    # -- DMA ---------------------------------------------------------------------------------------

    def test_an_unmap_gives_back_exactly_what_was_mapped(
        self, backend: FunctionBackend, memory: int
    ) -> None:
        for perm in (Perm.READ, Perm.WRITE, Perm.RW):
            backend.dma_map(IOVA, SIZE, perm, memory, SIZE)
            assert backend.dma_unmap(IOVA, SIZE) == SIZE

    def test_an_unmapped_range_can_be_mapped_again(
        self, backend: FunctionBackend, memory: int
    ) -> None:
        for _ in range(3):
            backend.dma_map(IOVA, SIZE, Perm.RW, memory, 0)
            backend.dma_map(IOVA + SIZE, SIZE, Perm.RW, memory, SIZE)
            assert backend.dma_unmap(IOVA + SIZE, SIZE) == SIZE
            assert backend.dma_unmap(IOVA, SIZE) == SIZE

    def test_overlapping_maps_are_refused_and_change_nothing(
        self, backend: FunctionBackend, memory: int
    ) -> None:
        backend.dma_map(IOVA, SIZE, Perm.RW, memory, 0)
        for start in (IOVA, IOVA + SIZE - 0x1000, IOVA - SIZE + 0x1000):
            with pytest.raises(HoldfastError):
                backend.dma_map(Iova(start), SIZE, Perm.RW, memory, 0)
        assert backend.dma_unmap(IOVA, SIZE) == SIZE

    def test_unmapping_what_is_not_mapped_takes_nothing(
        self, backend: FunctionBackend, memory: int
    ) -> None:
        assert self._unmapped(backend, IOVA, SIZE) == 0
        backend.dma_map(IOVA, SIZE, Perm.RW, memory, 0)
        assert backend.dma_unmap(IOVA, SIZE) == SIZE
        assert self._unmapped(backend, IOVA, SIZE) == 0

    def test_a_mapping_cannot_be_unmapped_in_part(
        self, backend: FunctionBackend, memory: int
    ) -> None:
        backend.dma_map(IOVA, SIZE, Perm.RW, memory, 0)
        assert self._unmapped(backend, IOVA, SIZE // 2) == 0
        assert self._unmapped(backend, IOVA + SIZE // 2, SIZE // 2) == 0
        assert backend.dma_unmap(IOVA, SIZE) == SIZE

    def test_many_unmaps_have_an_outcome_each(self, backend: FunctionBackend, memory: int) -> None:
        """In their order, and those that find nothing do not keep the others from it."""
        places = [Iova(IOVA + 2 * SIZE * number) for number in range(70)]
        for place in places:
            backend.dma_map(place, SIZE, Perm.RW, memory, 0)
        wanted = [(place, SIZE) for place in places]
        nothing = (Iova(IOVA + SIZE), SIZE)
        assert backend.dma_unmap_many([]) == []
        outcomes = backend.dma_unmap_many([*wanted[:35], nothing, *wanted[35:]])
        assert outcomes[:35] + outcomes[36:] == [SIZE] * 70
        assert outcomes[35] == 0 or isinstance(outcomes[35], HoldfastError)
        assert self._unmapped(backend, IOVA, SIZE) == 0
        backend.dma_map(IOVA, SIZE, Perm.RW, memory, 0)
        assert backend.dma_unmap(IOVA, SIZE) == SIZE

    def test_an_empty_range_cannot_be_mapped(self, backend: FunctionBackend, memory: int) -> None:
        with pytest.raises(HoldfastError):
            backend.dma_map(IOVA, 0, Perm.RW, memory, 0)

    def test_memory_without_a_descriptor_is_mapped_and_unmapped_alike(
        self, backend: FunctionBackend
    ) -> None:
        try:
            backend.dma_map_memory(IOVA, SIZE, Perm.RW, Bytes(SIZE))
        except NotSupported:
            pytest.skip("this backend maps files only")
        assert backend.dma_unmap(IOVA, SIZE) == SIZE
        assert self._unmapped(backend, IOVA, SIZE) == 0

    def test_a_mapping_keeps_no_duplicate_of_the_descriptor(
        self, backend: FunctionBackend, memory: int
    ) -> None:
        before = descriptors()
        backend.dma_map(IOVA, SIZE, Perm.RW, memory, 0)
        assert descriptors() == before
        backend.dma_unmap(IOVA, SIZE)

    def test_a_duplicate_of_the_file_may_be_closed_while_it_is_mapped(
        self, backend: FunctionBackend, memory: int
    ) -> None:
        duplicate = os.dup(memory)
        backend.dma_map(IOVA, SIZE, Perm.RW, duplicate, 0)
        os.close(duplicate)
        assert backend.dma_unmap(IOVA, SIZE) == SIZE

    # -- memory at fixed addresses, in the place of maps -------------------------------------------

    @pytest.fixture
    def fixed(self, backend: FunctionBackend) -> SlabSource:
        """The memory of a backend without translation."""
        source = backend.memory()
        if source is None:
            pytest.skip("this backend maps: see the tests of DMA")
        return source

    def test_fixed_memory_has_an_address_of_its_own_for_every_extent(
        self, fixed: SlabSource
    ) -> None:
        taken = [fixed.take(SIZE), fixed.take(3 * fixed.granule)]
        assert fixed.held_bytes == sum(memory.size for memory in taken)
        used: list[tuple[int, int]] = []
        for memory in taken:
            assert memory.size % fixed.granule == 0
            assert memory.addresses is not None
            offset = 0
            for address, (at, size) in zip(memory.addresses, memory.extents, strict=True):
                assert at == offset, "extents tile the file in order"
                assert address > 0
                used.append((address, address + size))
                offset += size
        used.sort()
        assert all(end <= start for (_, end), (start, _) in pairwise(used))
        for memory in taken:
            fixed.recycle(memory)
        assert fixed.held_bytes == 0

    def test_fixed_memory_is_zeroed_whoever_had_it_before(self, fixed: SlabSource) -> None:
        for _ in range(2):
            memory = fixed.take(SIZE)
            with mmap.mmap(memory.fd, memory.size) as view:
                assert not any(view[:SIZE])
                view[:SIZE] = b"\xa5" * SIZE
            fixed.punch(memory)
            fixed.recycle(memory)
            with pytest.raises(UsageError):
                fixed.recycle(memory)

    def test_without_translation_a_map_is_refused_and_an_unmap_takes_nothing(
        self, backend: FunctionBackend, fixed: SlabSource
    ) -> None:
        fd = memfd.create("conformance", SIZE)
        try:
            with pytest.raises(NotSupported):
                backend.dma_map(IOVA, SIZE, Perm.RW, fd, 0)
        finally:
            os.close(fd)
        assert self._unmapped(backend, IOVA, SIZE) == 0
        assert not backend.promises.strict_unmap
        assert backend.dma_context() is None
        assert all(backend.region_map(region.index) is None for region in backend.regions)

    # -- doorbells, reset, close -------------------------------------------------------------------

    def test_doorbells_are_inside_their_region_and_owned_by_the_caller(
        self, backend: FunctionBackend
    ) -> None:
        before = descriptors()
        for region in backend.regions:
            bells = backend.doorbells(region.index)
            assert len({bell.fd for bell in bells}) == len(bells)
            for bell in bells:
                assert 0 <= bell.info.offset <= region.size - bell.info.size
                os.close(bell.fd)
        assert descriptors() == before

    def test_a_promised_reset_is_acknowledged(self, backend: FunctionBackend) -> None:
        if not backend.promises.reset:
            pytest.skip("this function has no reset")
        backend.reset()
        assert backend.region_read(CONFIG_REGION, 0, 2) not in (b"\0\0", b"\xff\xff")

    def test_a_reset_leaves_mappings_in_place(self, backend: FunctionBackend, memory: int) -> None:
        if not backend.promises.reset:
            pytest.skip("this function has no reset")
        backend.dma_map(IOVA, SIZE, Perm.RW, memory, 0)
        backend.reset()
        assert backend.dma_unmap(IOVA, SIZE) == SIZE

    def test_closing_twice_is_harmless_and_later_calls_say_so(
        self, backend: FunctionBackend
    ) -> None:
        called: list[int] = []
        backend.on_gone = lambda: called.append(1)
        backend.close()
        backend.close()
        with pytest.raises((Closed, DeviceGone)):
            backend.region_read(CONFIG_REGION, 0, 2)
        assert not called, "on_gone is for functions that leave, not for close"

    @staticmethod
    def _unmapped(backend: FunctionBackend, iova: int, size: int) -> int:
        """Bytes unmapped; a refusal with ENOENT, or with EINVAL by the system, counts as none.

        VFIO type1 answers EINVAL to a range that cuts a mapping in two (``vfio_dma_do_unmap``).
        """
        try:
            return backend.dma_unmap(Iova(iova), size)
        except (RemoteError, SystemFailure) as error:
            if error.errno != errno.ENOENT and not (
                isinstance(error, SystemFailure) and error.errno == errno.EINVAL
            ):
                raise
            return 0
