# SPDX-License-Identifier: Apache-2.0
"""DMA memory: where the function sees it, who holds it, and how it is cut into buffers.

Bookkeeping without system calls: ``iova`` (address space), ``pool`` (buffers in a slab), ``arena``
(frames), ``sg`` (scatter-gather lists), ``ledger`` (quotas). With memory: ``slab`` (the keeper's
files), ``buffer`` and ``pin`` (what clients hold).
"""
