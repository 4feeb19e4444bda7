# SPDX-License-Identifier: Apache-2.0
"""Kernel and protocol layouts as data. Nothing here opens, reads or calls anything."""
