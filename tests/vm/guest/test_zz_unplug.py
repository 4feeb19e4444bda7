# SPDX-License-Identifier: Apache-2.0
"""A function is unplugged under a transfer, as by its slot's button. Runs inside a lab guest.

The last file of all, because what is unplugged does not come back. QEMU asks the guest's kernel
(drivers/pci/hotplug/pciehp_ctrl.c, which waits 5 s in case the button is pressed again), the kernel
asks VFIO's user, and takes the function when that has let go.
"""

from __future__ import annotations

import os
import time

import numpy as np
import pytest

import holdfast
from holdfast.errors import DeviceGone
from holdfast.kernel import pci_sysfs
from holdfast.lab import guest
from holdfast.regs import edu as regs
from holdfast.torture import edu_scene as scene
from holdfast.torture.actors import spawn
from holdfast.torture.edu_actors import Bystander, engine_of
from holdfast.torture.outside import settle

pytestmark = [
    pytest.mark.guest,
    pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning"),
]

EXPECTED = bool(os.environ.get("HOLDFAST_LAB_EXPECT"))
PATIENCE = 60.0
"""Seconds. An emulated guest on a busy host is slow; nothing here is about speed."""
COUNT = regs.BUFFER_SIZE - 64
OWN = 0x11


def test_an_unplugged_function_goes_when_its_keeper_has_let_go() -> None:
    places = {str(bdf): name for name, bdf in guest.functions().items()}
    pluggable = [f for f in scene.edus() if f.bdf.bus and f.reset_methods and scene.alone(f)]
    if not pluggable or not places:
        if EXPECTED and "no-iommu" not in os.environ.get("HOLDFAST_LAB_SCENARIO", ""):
            pytest.fail("no edu behind a port, though it is expected here")
        pytest.skip("no edu behind a root port here")
    found = pluggable[0]
    target = f"pci:{found.bdf}"

    def body(_: int, writing: int) -> None:
        card = holdfast.open(target, access="exclusive", timeout=PATIENCE)
        buffer = card.alloc(COUNT, align=4096)
        os.write(writing, b"r")
        while True:
            try:  # a transfer is always running, whenever the kernel asks
                engine_of(card).from_card(buffer).wait(PATIENCE)
            except DeviceGone:
                break
        os.write(writing, b"g")

    with scene.WarmStack(target), Bystander(OWN) as bystander:
        client = spawn(body)
        try:
            assert client.read(1, PATIENCE) == b"r"
            assert guest.ask("unplug", places[str(found.bdf)])

            def still_there() -> int:
                return int(pci_sysfs.device_path(found.bdf).exists())

            assert settle(still_there, goal=0, timeout=PATIENCE) == 0
            assert client.read(1, PATIENCE) == b"g"
            assert client.reap() == 0
        except BaseException:
            client.kill()
            client.reap()
            raise
        deadline = time.monotonic() + PATIENCE
        while not guest.ask("unplugged", places[str(found.bdf)]):
            assert time.monotonic() < deadline, "QEMU still has it"
            time.sleep(0.1)
        for memory in (*bystander.arrays, *bystander.drained()):
            assert np.all(memory == OWN)
