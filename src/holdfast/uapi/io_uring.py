# SPDX-License-Identifier: Apache-2.0
"""io_uring as far as pinning memory needs it: registered buffers (linux/io_uring.h).

Names are the header's without the ``IORING_`` and ``io_uring_`` prefixes.
"""

from __future__ import annotations

import struct
from typing import Final

SYS_SETUP: Final = 425
SYS_REGISTER: Final = 427
"""System call numbers, the same on every architecture (asm-generic/unistd.h)."""

UNREGISTER_BUFFERS: Final = 1
REGISTER_BUFFERS2: Final = 15
REGISTER_BUFFERS_UPDATE: Final = 16
"""``enum io_uring_register_op``"""

RSRC_REGISTER_SPARSE: Final = 1 << 0
"""All slots of the table start empty. Since Linux 5.19."""

MAX_REG_BUFFERS: Final = 1 << 14
"""Slots of a table (io_uring/rsrc.c; in no header)."""
MAX_BUFFER: Final = 1 << 30
"""Bytes in one buffer: the limit of kernels before 6.17; later ones take 1 TiB (io_uring/rsrc.c,
``io_buffer_validate``, ``io_validate_user_buf_range``)."""

PARAMS_SIZE: Final = 120
"""``struct io_uring_params``: all zero asks for the defaults."""

RSRC_REGISTER: Final = struct.Struct("<IIQQQ")
"""``struct io_uring_rsrc_register``: nr, flags, resv2, data, tags."""
assert RSRC_REGISTER.size == 32

RSRC_UPDATE2: Final = struct.Struct("<IIQQII")
"""``struct io_uring_rsrc_update2``: offset, resv, data, tags, nr, resv2."""
assert RSRC_UPDATE2.size == 32

IOVEC: Final = struct.Struct("<QQ")
"""``struct iovec`` of a 64-bit process: iov_base, iov_len. Both 0 empty a slot."""
assert IOVEC.size == 16
