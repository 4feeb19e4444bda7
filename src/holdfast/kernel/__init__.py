# SPDX-License-Identifier: Apache-2.0
"""System calls, and nothing else: the only room that talks to the kernel through libc.

Everything above deals in descriptors, bytes and errors. Functions here raise
:class:`~holdfast.errors.SystemFailure` (or a subclass by errno, see ``failure.py``) unless their
docstring says that a plain ``OSError`` passes.
"""
