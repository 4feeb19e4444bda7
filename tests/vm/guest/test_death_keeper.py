# SPDX-License-Identifier: Apache-2.0
"""Keeper and client are both SIGKILLed in the middle of DMA: what is left is the kernel's release.

Runs inside a lab guest, on QEMU's edu. With the last descriptor and the last window gone, VFIO
takes bus mastering away, resets the function if it can, and only then unmaps and unpins
(drivers/vfio/pci/vfio_pci_core.c ``vfio_pci_core_disable``, drivers/vfio/vfio_main.c
``vfio_df_close``). Innocent memory is taken at that moment and looked at after the card's 100 ms;
then a fresh keeper has to work.
"""

from __future__ import annotations

import os
import signal
import time

import numpy as np
import pytest

import holdfast
from holdfast.drivers.edu import EduEngine
from holdfast.kernel import procfs
from holdfast.regs import edu as regs
from holdfast.torture import edu_scene as scene
from holdfast.torture.actors import Child, spawn
from holdfast.torture.edu_actors import WINDOW, Bystander
from holdfast.torture.outside import settle

pytestmark = [
    pytest.mark.guest,
    pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning"),
]

EXPECTED = set(filter(None, os.environ.get("HOLDFAST_LAB_EXPECT", "").split(",")))
PATIENCE = 60.0
"""Seconds. An emulated guest on a busy host is slow; nothing here is about speed."""
BIG = 64 << 20
COUNT = regs.BUFFER_SIZE - 64
FROM_CARD = 0xA5
OWN = 0x11


@pytest.fixture(params=["type1", "iommufd"])
def backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def target_of(backend: str, where: str) -> str:
    """An edu by one backend: without a reset on the root bus, with one behind a root port."""
    for found in scene.edus():
        here = "root" if found.bdf.bus == 0 else "port" if found.reset_methods else ""
        if here == where and scene.alone(found) and backend in scene.offered(found):
            return f"pci:{found.bdf}?backend={backend}"
    if backend in EXPECTED:
        pytest.fail(f"no edu for {backend} ({where}), though it is expected here")
    pytest.skip(f"no edu for {backend} here")


def posting_client(target: str) -> Child:
    """A client with much memory, whose card-to-host transfer has just been posted."""

    def body(_: int, writing: int) -> None:
        card = holdfast.open(target, access="exclusive", timeout=PATIENCE)
        assert isinstance(card.dma, EduEngine)
        buffer = card.alloc(BIG)
        buffer.array[:COUNT] = FROM_CARD
        scene.post_from(card.bars[regs.BAR].registers, int(buffer.iova), COUNT)
        while scene.busy(card.bars[regs.BAR].registers):
            time.sleep(0.001)
        buffer.array[:COUNT] = OWN
        os.write(writing, b"r")
        scene.post_to(card.bars[regs.BAR].registers, int(buffer.iova), COUNT)
        signal.pause()

    child = spawn(body)
    assert child.read(1, PATIENCE) == b"r"
    return child


@pytest.mark.parametrize(
    ("where", "first"), [("root", "keeper"), ("root", "client"), ("port", "keeper")]
)
def test_without_keeper_and_client_the_kernel_lets_go_in_the_right_order(
    backend: str, where: str, first: str
) -> None:
    target = target_of(backend, where)
    pins, free = scene.outstanding_pins(), procfs.meminfo()["MemFree"]
    with scene.WarmStack(target) as stack:
        client = posting_client(target)
        try:
            kills = {"keeper": stack.kill, "client": client.kill}
            kills.pop(first)()
            kills.popitem()[1]()
        finally:
            client.kill()  # at the latest
            client.reap()
        with Bystander(OWN) as bystander:
            assert settle(lambda: scene.outstanding_pins() - pins, goal=0, timeout=PATIENCE) == 0
            time.sleep(2 * WINDOW)  # the card's own: nothing signals a write that must not come
            for memory in (*bystander.arrays, *bystander.drained()):
                assert np.all(memory == OWN)
        missing = settle(lambda: missing_since(free), goal=BIG // 2, timeout=PATIENCE)
        assert missing <= BIG // 2, "the memory did not come back"
    with scene.WarmStack(target):
        assert scene.there_and_back(target, 7, PATIENCE)


def missing_since(free: int) -> int:
    """Bytes of free memory that there were before, and are not now."""
    return max(0, free - procfs.meminfo()["MemFree"])
