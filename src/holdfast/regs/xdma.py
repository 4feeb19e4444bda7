# SPDX-License-Identifier: Apache-2.0
"""Registers and descriptors of the XDMA core (DMA/Bridge Subsystem for PCI Express).

Source: AMD PG195, "PCIe to DMA Configuration Registers", and the vendor and mainline Linux
drivers for what the guide leaves open. Every register is a naturally aligned little-endian dword.

The configuration BAR decodes offset bits 15:12 as the target block and bits 11:8 as the channel.
Channels of one direction share their rows (``count`` 4, ``stride`` 0x100); the two directions
differ only in the base, so :data:`CHANNEL` and :data:`SG` are indexed by :class:`Direction`::

    CHANNEL[Direction.C2H].control.at(2)      # 0x1204

The user BAR's first page is Holdfast's own: the stream sources behind the C2H channels and the
user interrupt lines. It is the "user logic" of the emulated card.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, fields

import numpy as np

from holdfast.regs.spec import Bank, Field, Mode, Register

VENDOR = 0x10EE
DEVICE = 0x9038
CLASS_CODE = 0x120000  # processing accelerator

USER_BAR = 0
CONFIG_BAR = 1
BYPASS_BAR = 2
CONFIG_BAR_SIZE = 0x10000
USER_BAR_SIZE = 0x10000
USER_PAGE_SIZE = 0x1000
"""The trapped part of the user BAR; the rest is mappable scratch memory."""

MAX_CHANNELS = 4
"""Channels per direction that the register map has room for."""
USER_IRQS = 16
MSIX_VECTORS = 32
MSIX_TABLE_OFFSET = 0x8000
MSIX_PBA_OFFSET = 0x8FE0


class Direction(enum.IntEnum):
    """Data direction as the core names it; the value is the channel block's target number."""

    H2C = 0
    C2H = 1


class Target(enum.IntEnum):
    """Bits 15:12 of a configuration BAR offset, and bits 19:16 of the block's identifier."""

    H2C = 0
    C2H = 1
    IRQ = 2
    CONFIG = 3
    H2C_SG = 4
    C2H_SG = 5
    SG_COMMON = 6


VERSION = 0x06  # 2017.1 and later
IDENTIFIER_STREAM = Field("stream", 15, 15)
IDENTIFIER_CHANNEL = Field("channel", 11, 8)
IDENTIFIER_BLOCK = Field("block", 31, 16)


def identifier(target: Target, channel: int = 0, *, stream: bool = False) -> int:
    """The identifier word of a block (PG195, "Channel Identifier (0x00)" and its sisters)."""
    word = 0x1FC00000 | target << 16 | VERSION
    return word | IDENTIFIER_STREAM.put(int(stream)) | IDENTIFIER_CHANNEL.put(channel)


class Control(enum.IntFlag):
    """Channel control 0x04. The ``IE_`` bits gate the *logging* of the status bit of that name."""

    RUN = 1 << 0
    IE_DESCRIPTOR_STOPPED = 1 << 1
    IE_DESCRIPTOR_COMPLETED = 1 << 2
    IE_ALIGN_MISMATCH = 1 << 3
    IE_MAGIC_STOPPED = 1 << 4
    IE_INVALID_LENGTH = 1 << 5
    IE_IDLE_STOPPED = 1 << 6
    IE_READ_ERROR = 0x1F << 9
    IE_WRITE_ERROR = 0x1F << 14
    IE_DESC_ERROR = 0x1F << 19
    NON_INCREMENTING = 1 << 25
    POLL_WRITEBACK = 1 << 26
    NO_STREAM_WRITEBACK = 1 << 27


CONTROL_MASK = 0x0EFFFE7F
"""Implemented bits of channel control (PG195: 31:28, 24 and 8:7 are reserved)."""


class Status(enum.IntFlag):
    """Channel status 0x40 (write one to clear) and 0x44 (clear on read); bit 0 is read-only."""

    BUSY = 1 << 0
    DESCRIPTOR_STOPPED = 1 << 1
    DESCRIPTOR_COMPLETED = 1 << 2
    ALIGN_MISMATCH = 1 << 3
    MAGIC_STOPPED = 1 << 4
    INVALID_LENGTH = 1 << 5
    IDLE_STOPPED = 1 << 6
    READ_UNSUPPORTED_REQUEST = 1 << 9  # H2C: PCIe read
    READ_DECODE_ERROR = 1 << 9  # C2H: card (AXI) read
    WRITE_DECODE_ERROR = 1 << 14  # H2C: card (AXI) write
    DESC_UNSUPPORTED_REQUEST = 1 << 19  # descriptor fetch


STATUS_ERRORS = 0x00FFFE38
"""Status bits that mean failure: everything but stopped, completed and idle."""
STATUS_CLEARABLE = 0x00FFFFFE
"""Bits that 0x44 clears; also the value that rings the acknowledge doorbell."""


class Writeback(enum.IntFlag):
    """The poll-mode write-back dword (PG195, "Poll Mode")."""

    COUNT = 0x00FFFFFF
    ERROR = 1 << 31


CREDITS_MAX = 0x3FF
ADJACENT_MAX = 0x3F
ALIGNMENTS_VALUE = 0x00010140  # any alignment, any length, 64 address bits


@dataclass(frozen=True, slots=True)
class ChannelRegisters:
    """Rows of a channel block (targets 0 and 1), one instance per channel."""

    identifier: Register
    control: Register
    control_w1s: Register
    control_w1c: Register
    status: Register
    status_rc: Register
    completed_count: Register
    alignments: Register
    writeback_lo: Register
    writeback_hi: Register
    irq_enable: Register
    irq_enable_w1s: Register
    irq_enable_w1c: Register
    perf_control: Register
    perf_cycles_lo: Register
    perf_cycles_hi: Register
    perf_data_lo: Register
    perf_data_hi: Register
    perf_pending_lo: Register
    perf_pending_hi: Register


@dataclass(frozen=True, slots=True)
class SgRegisters:
    """Rows of a channel's scatter-gather block (targets 4 and 5)."""

    identifier: Register
    descriptor_lo: Register
    descriptor_hi: Register
    descriptor_adjacent: Register
    descriptor_credits: Register


def _row(
    base: int, name: str, offset: int, mode: Mode = Mode.RW, doc: str = "", reset: int = 0
) -> Register:
    return Register(
        name, base + offset, mode, reset=reset, doc=doc, count=MAX_CHANNELS, stride=0x100
    )


def _channel_rows(base: int) -> ChannelRegisters:
    return ChannelRegisters(
        identifier=_row(base, "identifier", 0x00, Mode.RO, "0 where the channel is absent"),
        control=_row(base, "control", 0x04, doc="Run and error enables"),
        control_w1s=_row(base, "control_w1s", 0x08, Mode.W1S),
        control_w1c=_row(base, "control_w1c", 0x0C, Mode.W1C),
        status=_row(base, "status", 0x40, Mode.W1C, "events; bit 0 busy"),
        status_rc=_row(base, "status_rc", 0x44, Mode.RC, "events, cleared by this read"),
        completed_count=_row(base, "completed_count", 0x48, Mode.RO, "since Run rose"),
        alignments=_row(base, "alignments", 0x4C, Mode.RO, reset=ALIGNMENTS_VALUE),
        writeback_lo=_row(base, "writeback_lo", 0x88, doc="poll-mode write-back address"),
        writeback_hi=_row(base, "writeback_hi", 0x8C),
        irq_enable=_row(base, "irq_enable", 0x90, doc="status bits that interrupt"),
        irq_enable_w1s=_row(base, "irq_enable_w1s", 0x94, Mode.W1S),
        irq_enable_w1c=_row(base, "irq_enable_w1c", 0x98, Mode.W1C),
        perf_control=_row(base, "perf_control", 0xC0),
        perf_cycles_lo=_row(base, "perf_cycles_lo", 0xC4, Mode.RO),
        perf_cycles_hi=_row(base, "perf_cycles_hi", 0xC8, Mode.RO),
        perf_data_lo=_row(base, "perf_data_lo", 0xCC, Mode.RO),
        perf_data_hi=_row(base, "perf_data_hi", 0xD0, Mode.RO),
        perf_pending_lo=_row(base, "perf_pending_lo", 0xD4, Mode.RO),
        perf_pending_hi=_row(base, "perf_pending_hi", 0xD8, Mode.RO),
    )


def _sg_rows(base: int) -> SgRegisters:
    return SgRegisters(
        identifier=_row(base, "sg_identifier", 0x00, Mode.RO),
        descriptor_lo=_row(base, "descriptor_lo", 0x80, doc="first descriptor after Run"),
        descriptor_hi=_row(base, "descriptor_hi", 0x84),
        descriptor_adjacent=_row(base, "descriptor_adjacent", 0x88, doc="extra adjacent ones"),
        descriptor_credits=_row(base, "descriptor_credits", 0x8C, doc="a write adds"),
    )


def _rows(group: ChannelRegisters | SgRegisters) -> tuple[Register, ...]:
    return tuple(getattr(group, field.name) for field in fields(group))


CHANNEL = {Direction.H2C: _channel_rows(0x0000), Direction.C2H: _channel_rows(0x1000)}
SG = {Direction.H2C: _sg_rows(0x4000), Direction.C2H: _sg_rows(0x5000)}

H2C = Bank("h2c", _rows(CHANNEL[Direction.H2C]))
C2H = Bank("c2h", _rows(CHANNEL[Direction.C2H]))
H2C_SG = Bank("h2c_sg", _rows(SG[Direction.H2C]))
C2H_SG = Bank("c2h_sg", _rows(SG[Direction.C2H]))


class PerfControl(enum.IntFlag):
    """Performance monitor 0xC0, in the vendor driver's bit order.

    PG195 lists Run and Auto the other way round; the driver only writes 2 and 5, where both
    readings agree.
    """

    RUN = 1
    CLEAR = 2
    AUTO = 4


# -- SGDMA common, target 6 ----------------------------------------------------------------------

SG_HALT_H2C = Field("halt_h2c", 3, 0)
SG_HALT_C2H = Field("halt_c2h", 19, 16)
SG_CHANNELS_MASK = 0x000F000F
"""Implemented bits of the halt and credit-mode registers: 3:0 H2C, 19:16 C2H."""


def sg_bit(direction: Direction, channel: int) -> int:
    """The channel's bit in the SGDMA common registers (halt, credit mode)."""
    return 1 << (channel + 16 * direction)


SG_COMMON_IDENTIFIER = Register(
    "sg_common_identifier", 0x6000, Mode.RO, reset=identifier(Target.SG_COMMON)
)
SG_HALT = Register("sg_halt", 0x6010, fields=(SG_HALT_H2C, SG_HALT_C2H), doc="halt fetching")
SG_HALT_W1S = Register("sg_halt_w1s", 0x6014, Mode.W1S)
SG_HALT_W1C = Register("sg_halt_w1c", 0x6018, Mode.W1C)
SG_CREDIT_MODE = Register("sg_credit_mode", 0x6020, doc="fetch only as far as credits go")
SG_CREDIT_MODE_W1S = Register("sg_credit_mode_w1s", 0x6024, Mode.W1S)
SG_CREDIT_MODE_W1C = Register("sg_credit_mode_w1c", 0x6028, Mode.W1C)

SG_COMMON = Bank(
    "sg_common",
    (
        SG_COMMON_IDENTIFIER,
        SG_HALT,
        SG_HALT_W1S,
        SG_HALT_W1C,
        SG_CREDIT_MODE,
        SG_CREDIT_MODE_W1S,
        SG_CREDIT_MODE_W1C,
    ),
)

# -- IRQ block, target 2 -------------------------------------------------------------------------

IRQ_IDENTIFIER = Register("irq_identifier", 0x2000, Mode.RO, reset=identifier(Target.IRQ))
IRQ_USER_ENABLE = Register("irq_user_enable", 0x2004)
IRQ_USER_ENABLE_W1S = Register("irq_user_enable_w1s", 0x2008, Mode.W1S)
IRQ_USER_ENABLE_W1C = Register("irq_user_enable_w1c", 0x200C, Mode.W1C)
IRQ_CHANNEL_ENABLE = Register("irq_channel_enable", 0x2010, doc="H2C from bit 0, C2H above")
IRQ_CHANNEL_ENABLE_W1S = Register("irq_channel_enable_w1s", 0x2014, Mode.W1S)
IRQ_CHANNEL_ENABLE_W1C = Register("irq_channel_enable_w1c", 0x2018, Mode.W1C)
IRQ_USER_REQUEST = Register("irq_user_request", 0x2040, Mode.RO, doc="source and enable")
IRQ_CHANNEL_REQUEST = Register("irq_channel_request", 0x2044, Mode.RO, doc="source and enable")
IRQ_USER_PENDING = Register("irq_user_pending", 0x2048, Mode.RO, doc="source")
IRQ_CHANNEL_PENDING = Register("irq_channel_pending", 0x204C, Mode.RO, doc="source")
IRQ_USER_VECTOR = Register("irq_user_vector", 0x2080, count=4, stride=4, doc="4 fields per word")
IRQ_CHANNEL_VECTOR = Register("irq_channel_vector", 0x20A0, count=2, stride=4)
IRQ_VECTOR_MASK = 0x1F1F1F1F

IRQ = Bank(
    "irq",
    (
        IRQ_IDENTIFIER,
        IRQ_USER_ENABLE,
        IRQ_USER_ENABLE_W1S,
        IRQ_USER_ENABLE_W1C,
        IRQ_CHANNEL_ENABLE,
        IRQ_CHANNEL_ENABLE_W1S,
        IRQ_CHANNEL_ENABLE_W1C,
        IRQ_USER_REQUEST,
        IRQ_CHANNEL_REQUEST,
        IRQ_USER_PENDING,
        IRQ_CHANNEL_PENDING,
        IRQ_USER_VECTOR,
        IRQ_CHANNEL_VECTOR,
    ),
)

# -- Config block, target 3 ----------------------------------------------------------------------

DATA_WIDTH = 8
"""Bytes per beat of the emulated data path (64 bits)."""

CONFIG_IDENTIFIER = Register("config_identifier", 0x3000, Mode.RO, reset=identifier(Target.CONFIG))
CONFIG_BUS_DEVICE = Register("config_bus_device", 0x3004, Mode.RO)
CONFIG_MAX_PAYLOAD = Register("config_max_payload", 0x3008, Mode.RO, doc="128 << value bytes")
CONFIG_MAX_READ_REQUEST = Register("config_max_read_request", 0x300C, Mode.RO, doc="128 << value")
CONFIG_SYSTEM_ID = Register("config_system_id", 0x3010, Mode.RO, reset=0xFF01)
CONFIG_MSI_ENABLE = Register("config_msi_enable", 0x3014, Mode.RO, doc="bit 0 MSI, bit 1 MSI-X")
CONFIG_DATA_WIDTH = Register("config_data_width", 0x3018, Mode.RO, doc="64 << value bits")
CONFIG_PCIE_CONTROL = Register("config_pcie_control", 0x301C, reset=1, doc="relaxed ordering")
CONFIG_USER_MAX_PAYLOAD = Register("config_user_max_payload", 0x3040)
CONFIG_USER_MAX_READ_REQUEST = Register("config_user_max_read_request", 0x3044)
CONFIG_WRITE_FLUSH = Register("config_write_flush", 0x3060, doc="2^value clocks, 0 off")

CONFIG = Bank(
    "config",
    (
        CONFIG_IDENTIFIER,
        CONFIG_BUS_DEVICE,
        CONFIG_MAX_PAYLOAD,
        CONFIG_MAX_READ_REQUEST,
        CONFIG_SYSTEM_ID,
        CONFIG_MSI_ENABLE,
        CONFIG_DATA_WIDTH,
        CONFIG_PCIE_CONTROL,
        CONFIG_USER_MAX_PAYLOAD,
        CONFIG_USER_MAX_READ_REQUEST,
        CONFIG_WRITE_FLUSH,
    ),
)

CONFIG_BANKS = (H2C, C2H, IRQ, CONFIG, H2C_SG, C2H_SG, SG_COMMON)
"""Everything in the configuration BAR below the MSI-X table."""

# -- Descriptor ----------------------------------------------------------------------------------


class Desc(enum.IntFlag):
    """The control word of a descriptor (PG344, "Descriptors")."""

    STOP = 1 << 0
    COMPLETED = 1 << 1
    EOP = 1 << 4


DESC_MAGIC = 0xAD4B0000
DESC_MAGIC_MASK = 0xFFFF0000
DESC_ADJACENT = Field("adjacent", 13, 8)
DESC_MAX_LENGTH = (1 << 28) - 1
DESC_SIZE = 32

DESCRIPTOR = np.dtype(
    [
        ("control", "<u4"),
        ("length", "<u4"),
        ("source", "<u8"),
        ("destination", "<u8"),
        ("next", "<u8"),
    ]
)
assert DESCRIPTOR.itemsize == DESC_SIZE

METADATA = np.dtype([("status", "<u4"), ("length", "<u4")])
"""C2H stream write-back (PG195, "DMA C2H Stream"); drivers place them 32 bytes apart."""
assert METADATA.itemsize == 8
METADATA_MAGIC = 0x52B40000
METADATA_EOP = 1

# -- User page: the emulated card's own logic ----------------------------------------------------


class SourceControl(enum.IntFlag):
    """Control of a stream source. A rising ENABLE restarts its counters and empties its FIFO."""

    ENABLE = 1
    SINE = 2  # clear: counter


USER_IDENTIFIER_VALUE = 0x484F4C44
USER_IDENTIFIER = Register("user_identifier", 0x00, Mode.RO, reset=USER_IDENTIFIER_VALUE)
USER_CHANNELS = Register("user_channels", 0x04, Mode.RO, doc="7:0 H2C, 15:8 C2H channels")
USER_MEMORY_LO = Register("user_memory_lo", 0x08, Mode.RO, doc="card memory in bytes")
USER_MEMORY_HI = Register("user_memory_hi", 0x0C, Mode.RO)
USER_IRQ_LINES = Register("user_irq_lines", 0x10, doc="levels of the 16 user interrupt inputs")
USER_IRQ_LINES_W1S = Register("user_irq_lines_w1s", 0x14, Mode.W1S)
USER_IRQ_LINES_W1C = Register("user_irq_lines_w1c", 0x18, Mode.W1C)


def _source(name: str, offset: int, mode: Mode, doc: str, reset: int = 0) -> Register:
    return Register(
        f"source_{name}", 0x100 + offset, mode, reset=reset, doc=doc, count=4, stride=0x40
    )


SOURCE_CONTROL = _source("control", 0x00, Mode.RW, "enable, pattern")
SOURCE_RATE = _source("rate", 0x04, Mode.RW, "bytes per second; 0: as fast as it is taken")
SOURCE_DEPTH = _source("depth", 0x08, Mode.RW, "FIFO in bytes", reset=1 << 20)
SOURCE_PACKET = _source("packet", 0x0C, Mode.RW, "bytes per packet; 0: endless")
SOURCE_PRODUCED_LO = _source("produced_lo", 0x10, Mode.RO, "bytes, dropped ones included")
SOURCE_PRODUCED_HI = _source("produced_hi", 0x14, Mode.RO, "")
SOURCE_OVERRUN_LO = _source("overrun_lo", 0x18, Mode.RO, "bytes dropped because the FIFO was full")
SOURCE_OVERRUN_HI = _source("overrun_hi", 0x1C, Mode.RO, "")
SOURCE_LEVEL = _source("level", 0x20, Mode.RO, "bytes in the FIFO")
SOURCE_PERIOD = _source("period", 0x24, Mode.RW, "samples per sine period", reset=1024)

USER = Bank(
    "user",
    (
        USER_IDENTIFIER,
        USER_CHANNELS,
        USER_MEMORY_LO,
        USER_MEMORY_HI,
        USER_IRQ_LINES,
        USER_IRQ_LINES_W1S,
        USER_IRQ_LINES_W1C,
        SOURCE_CONTROL,
        SOURCE_RATE,
        SOURCE_DEPTH,
        SOURCE_PACKET,
        SOURCE_PRODUCED_LO,
        SOURCE_PRODUCED_HI,
        SOURCE_OVERRUN_LO,
        SOURCE_OVERRUN_HI,
        SOURCE_LEVEL,
        SOURCE_PERIOD,
    ),
)
