# SPDX-License-Identifier: Apache-2.0
"""Drivers: one file per function, keeper half and client half together. Start with ``edu``."""
