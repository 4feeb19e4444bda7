# SPDX-License-Identifier: Apache-2.0
"""Registers of QEMU's educational device, BAR 0.

Source: QEMU ``docs/specs/edu.rst`` and the behaviour of ``hw/misc/edu.c`` from version 11.1 on.
Registers below 0x80 are 32 bits wide; the DMA registers are 64 bits wide and take 4- or 8-byte
accesses (a 4-byte write replaces the whole value).
"""

from __future__ import annotations

import enum

from holdfast.regs.spec import Bank, Field, Mode, Register

VENDOR = 0x1234
DEVICE = 0x11E8
REVISION = 0x10
CLASS_CODE = 0x00FF00
SUBSYSTEM_VENDOR = 0x1AF4
SUBSYSTEM = 0x1100

BAR = 0
BAR_SIZE = 1 << 20
DMA_MASK = (1 << 28) - 1
"""Default address mask of the DMA engine (28 bits)."""

BUFFER_START = 0x40000
"""Device address of the DMA buffer. Reachable by DMA only, never through the BAR."""
BUFFER_SIZE = 4096

IDENTIFICATION_VALUE = 0x010000ED
"""``0xRRrr00ed``: major and minor version, and the letters of the name."""


class Status(enum.IntFlag):
    """The status register: bit 0 is the device's, bit 7 the driver's."""

    COMPUTING = 0x01
    IRQ_FACTORIAL = 0x80


class DmaCommand(enum.IntFlag):
    """The DMA command register."""

    START = 1  # reads as busy
    TO_RAM = 2  # clear: RAM to buffer
    IRQ = 4  # raise Cause.DMA when done


class Cause(enum.IntFlag):
    """Values the device itself raises in the interrupt status."""

    FACTORIAL = 0x001
    DMA = 0x100


STATUS_COMPUTING = Field("computing", 0, 0)
STATUS_IRQ_FACTORIAL = Field("irq_factorial", 7, 7)
DMA_START = Field("start", 0, 0)
DMA_TO_RAM = Field("to_ram", 1, 1)
DMA_IRQ = Field("irq", 2, 2)

IDENTIFICATION = Register(
    "identification", 0x00, Mode.RO, reset=IDENTIFICATION_VALUE, doc="device version"
)
LIVENESS = Register("liveness", 0x04, doc="reads the complement of what was written")
FACTORIAL = Register("factorial", 0x08, doc="write n; reads n! mod 2^32 when status says done")
STATUS = Register("status", 0x20, fields=(STATUS_COMPUTING, STATUS_IRQ_FACTORIAL))
IRQ_STATUS = Register("irq_status", 0x24, Mode.RO, doc="union of the raised values")
IRQ_RAISE = Register("irq_raise", 0x60, Mode.WO, doc="raise these bits and interrupt")
IRQ_ACKNOWLEDGE = Register("irq_acknowledge", 0x64, Mode.WO, doc="clear these bits")
DMA_SOURCE = Register("dma_source", 0x80, width=8, doc="address to read from")
DMA_DESTINATION = Register("dma_destination", 0x88, width=8, doc="address to write to")
DMA_COUNT = Register("dma_count", 0x90, width=8, doc="bytes to move")
DMA_COMMAND = Register("dma_command", 0x98, width=8, fields=(DMA_START, DMA_TO_RAM, DMA_IRQ))

BANK = Bank(
    "edu",
    (
        IDENTIFICATION,
        LIVENESS,
        FACTORIAL,
        STATUS,
        IRQ_STATUS,
        IRQ_RAISE,
        IRQ_ACKNOWLEDGE,
        DMA_SOURCE,
        DMA_DESTINATION,
        DMA_COUNT,
        DMA_COMMAND,
    ),
)
