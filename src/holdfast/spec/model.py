# SPDX-License-Identifier: Apache-2.0
"""A strategy on a machine, as something that can be explored."""

from __future__ import annotations

import numpy as np

from holdfast.spec import card, invariants, kernel
from holdfast.spec.layout import Batch, Layout, Mask
from holdfast.spec.rules import Rule
from holdfast.spec.setting import Setting
from holdfast.spec.strategy import Strategy
from holdfast.spec.world import World


class StrategyModel:
    """Everything that can happen to one strategy in one setting."""

    def __init__(self, strategy: type[Strategy], setting: Setting) -> None:
        self.setting = setting
        self.strategy = strategy(setting)
        self.world = World(setting, self.strategy)
        self.rules: list[Rule] = [
            *kernel.rules(self.world), *card.rules(self.world), *self.strategy.rules(self.world)
        ]  # fmt: skip
        self.final = invariants.FINAL

    @property
    def layout(self) -> Layout:
        return self.world.layout

    def initial(self) -> Batch:
        """Nothing has begun; resets of this card stop DMA, or do not."""
        kinds = 2 if self.strategy.resets else 1
        start = Batch([np.zeros(kinds, np.uint64) for _ in range(self.layout.words)])
        start[self.world.lies] = np.arange(kinds, dtype=np.uint8)
        if self.world.keeper.bits:
            start[self.world.bme] = 1  # it took the card over, saw it at rest, and turned it on
        return start

    def judge(self, states: Batch) -> dict[str, Mask]:
        return invariants.judge(self.world, states)
