# SPDX-License-Identifier: Apache-2.0
"""What a register access costs: through the keeper where it traps, by a plain load where it is
mapped."""

from __future__ import annotations

import socket
import statistics
import time
from itertools import repeat

import numpy as np

from holdfast.bench.echo import echo
from holdfast.bench.plan import Run
from holdfast.bench.result import Result, ratios, rounded, times
from holdfast.device import Device
from holdfast.regs.xdma import CONFIG_BAR, CONFIG_IDENTIFIER, USER_BAR, USER_PAGE_SIZE

BLOCKS = 10
MAPPED_BLOCKS = 9
WORD = 0x5AA5_1234
MESSAGE = b"x" * 64
"""About as long as a request for a register."""


def register_trapped(run: Run) -> list[Result]:
    """A load of a register that traps: client, keeper, function, and back."""
    count = max(1, run.sizes.loads // BLOCKS)
    loads: list[float] = []
    echoes: list[float] = []
    by_block: list[float] = []
    verified = True
    with echo() as sock, run.open() as card:
        _loads(card, 20)
        _echoes(sock, 20)
        for _ in range(BLOCKS):
            taken, right = _loads(card, count)
            bare = _echoes(sock, count)
            verified &= right
            loads += taken
            echoes += bare
            by_block.append(2 * statistics.median(bare) / statistics.median(taken))
    return [
        Result(
            "register_trapped",
            statistics.median(loads) * 1e6,
            "us",
            statistics.median(by_block),
            "two bare SOCK_SEQPACKET echo round trips between processes",
            verified=verified,
            detail={
                "us": times(loads, 1e6),
                "echo_us": times(echoes, 1e6),
                "ratio": ratios(by_block),
            },
        )
    ]


def _loads(card: Device, count: int) -> tuple[list[float], bool]:
    bar, at = card.bars[CONFIG_BAR], CONFIG_IDENTIFIER.at()
    taken, right = [], True
    clock = time.perf_counter
    for _ in range(count):
        begun = clock()
        word = bar.load(at, 4)
        taken.append(clock() - begun)
        right &= word == CONFIG_IDENTIFIER.reset
    return taken, right


def _echoes(sock: socket.socket, count: int) -> list[float]:
    taken = []
    clock = time.perf_counter
    for _ in range(count):
        begun = clock()
        sock.send(MESSAGE)
        sock.recv(len(MESSAGE))
        taken.append(clock() - begun)
    return taken


def register_mapped(run: Run) -> list[Result]:
    """A load from the mapped part of a BAR."""
    count = run.sizes.mapped_loads
    own: list[float] = []
    bare: list[float] = []
    with run.open() as card:
        bar = card.bars[USER_BAR]
        words = bar.view(USER_PAGE_SIZE, 4096).view(np.uint32).data
        bar.store(USER_PAGE_SIZE, WORD, 4)
        verified = bar.load(USER_PAGE_SIZE, 4) == words[0] == WORD
        for _ in range(MAPPED_BLOCKS):
            load = bar.load
            begun = time.perf_counter()
            for _ in repeat(None, count):
                load(USER_PAGE_SIZE, 4)
            between = time.perf_counter()
            for _ in repeat(None, count):
                words.__getitem__(0)
            bare.append((time.perf_counter() - between) / count)
            own.append((between - begun) / count)
        del words
    ratio = [theirs / mine for theirs, mine in zip(bare, own, strict=True)]
    return [
        Result(
            "register_mapped",
            statistics.median(own) * 1e9,
            "ns",
            statistics.median(ratio),
            "a bare load from a memoryview of the same word",
            verified=verified,
            detail={
                "loads_per_round": count,
                "memoryview_ns": rounded(statistics.median(bare) * 1e9),
                "ratio": ratios(ratio),
            },
        )
    ]
