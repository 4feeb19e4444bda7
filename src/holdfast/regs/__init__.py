# SPDX-License-Identifier: Apache-2.0
"""Register banks as data: one source for drivers, emulation, dumps and documentation."""
