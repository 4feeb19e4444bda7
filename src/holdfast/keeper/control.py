# SPDX-License-Identifier: Apache-2.0
"""Control memory (rings) as the keeper writes it: never through pages that can go away.

Facts. Rings lie in memory that the client has, too. A memfd is sealed, so it cannot become shorter;
a file on hugetlbfs takes no seals (fs/hugetlbfs/inode.c), and its client can truncate it at any
time. Who touches a mapping behind the new end is killed by SIGBUS, and a keeper must not be.

Choice. What is sealed is mapped and written in place. Anything else is prepared in private memory,
and copied by the kernel, which answers with an error where a load would be a signal.

Cost. A second copy of some 100 KiB per grant, and only without an IOMMU.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from holdfast.dma.sg import SgList
from holdfast.dma.slab import SlabMemory
from holdfast.driver import ControlMemory
from holdfast.errors import BadBuffer
from holdfast.kernel import memfd, procfs
from holdfast.kernel.mapping import Mapping


@contextmanager
def writable(memory: SlabMemory, sg: SgList) -> Iterator[ControlMemory]:
    """A slab as control memory, zeroed where it is new; nothing of it is mapped afterwards.

    Raises BadBuffer, here or from ``flush``, if the client took the pages away.
    """
    mapping = Mapping.extents(memory.fd, memory.extents)
    try:
        if _keeps_its_size(memory):
            yield ControlMemory(mapping.array.data, sg)
        else:
            private = bytearray(mapping.size)
            address = mapping.address
            yield ControlMemory(
                memoryview(private), sg, lambda: procfs.copy_to_own(address, private)
            )
    finally:
        mapping.close()


def _keeps_its_size(memory: SlabMemory) -> bool:
    try:
        memfd.require_sealed(memory.fd, max(at + size for at, size in memory.extents))
    except BadBuffer:
        return False
    return True
