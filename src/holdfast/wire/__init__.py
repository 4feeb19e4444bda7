# SPDX-License-Identifier: Apache-2.0
"""Protocols without I/O: bytes and descriptor counts in, typed messages and events out."""
