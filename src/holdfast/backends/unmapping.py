# SPDX-License-Identifier: Apache-2.0
"""Several unmaps, one after the other: for backends that have nothing quicker."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from holdfast.errors import HoldfastError
from holdfast.values import Iova

Outcome = int | HoldfastError
"""What became of one unmap: the bytes that it took away, or why it failed."""


def one_by_one(
    unmap: Callable[[Iova, int], int], ranges: Sequence[tuple[Iova, int]]
) -> list[Outcome]:
    """``contracts.FunctionBackend.dma_unmap_many`` made of ``dma_unmap``."""
    outcomes: list[Outcome] = []
    for iova, size in ranges:
        try:
            outcomes.append(unmap(iova, size))
        except HoldfastError as error:
            outcomes.append(error)
        except Exception as error:  # noqa: BLE001 - what is gone already must not be lost with it
            said = f"{type(error).__name__}: {error}"
            outcomes.append(HoldfastError(said, operation="unmap"))
    return outcomes
