# SPDX-License-Identifier: Apache-2.0
"""All strategies by key, in the order of the table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from holdfast.spec.keeper import VARIANTS
from holdfast.spec.strategies import SIMPLE
from holdfast.spec.strategy import Strategy

STRATEGIES: Final[Mapping[str, type[Strategy]]] = {each.key: each for each in (*SIMPLE, *VARIANTS)}
