# SPDX-License-Identifier: Apache-2.0
"""The strategies of 1998 and their successors, run for real on today's kernel.

``*.c``: one program per strategy, compiled inside a guest; ``trial.h`` is the frame they share and
the place to start reading. ``rows``: which are run under which events, and what is expected.
``trials``: the guest's side, ``python3 -m holdfast.lab.strategies``. ``report``: what was observed,
as JSON and as the table of docs/strategies.md.
"""
