# SPDX-License-Identifier: Apache-2.0
"""The executable specification: which ways of holding DMA memory are safe, and why not.

Read :mod:`~holdfast.spec.world` (what there is), :mod:`~holdfast.spec.kernel` and
:mod:`~holdfast.spec.card` (what happens by itself), :mod:`~holdfast.spec.strategies` (what one can
do about it), :mod:`~holdfast.spec.keeper` (what Holdfast does: the tables of
:mod:`holdfast.keeper.state`), :mod:`~holdfast.spec.invariants` (what must never be), and then
:mod:`~holdfast.spec.explore` (how every order of events is tried).

Pure: it knows nothing of the system it runs on, and imports only the keeper's tables.
"""
