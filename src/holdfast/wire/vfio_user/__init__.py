# SPDX-License-Identifier: Apache-2.0
"""The vfio-user protocol without I/O.

``frame`` header and framing · ``capabilities`` the VERSION message · ``messages`` every other
payload · ``client`` and ``server`` one session object for each side: what a received message means
in the present state, and which bytes to send.

Sessions are not thread-safe; whoever drives one holds a lock around it. They never see a socket and
never own a descriptor: they are told how many came with a message, and say whether that is right.
"""
