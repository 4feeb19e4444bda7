# SPDX-License-Identifier: Apache-2.0
"""The keeper: owns a function and its DMA memory, leases both, and outlives its clients."""
