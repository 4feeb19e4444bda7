# SPDX-License-Identifier: Apache-2.0
"""``holdfast bench``: every figure against a limit or a peer that was measured in the same run.

A figure in microseconds or bytes per second says more about a machine than about a program. What
is reported here is a ratio to something that the same machine did at the same time: memory copied
by ``memcpy``, the same work done by a C loop, bare system calls. The two take turns in rounds, so
that a busy neighbour hits both, and what was moved is looked at byte by byte in each round.
"""
