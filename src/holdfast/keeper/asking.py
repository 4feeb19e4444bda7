# SPDX-License-Identifier: Apache-2.0
"""What is asked of a driver, and what of its answers is believed.

A driver is a stranger's code in the keeper. It may raise anything, answer anything, and the objects
that it answers with may misbehave as well when they are looked at. So everything here runs in the
driver's own thread, never on the loop, and what leaves that thread are plain numbers and errors of
:mod:`holdfast.errors`. An answer that makes no sense counts as no answer.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Self, SupportsIndex, TypeVar

import numpy as np

from holdfast import errors
from holdfast.driver import Driver
from holdfast.errors import DriverFailed, HoldfastError, ProtocolError

T = TypeVar("T")

MOST_TEXT = 500
"""Characters that an error of a driver may have: they travel in answers to every ``ps``."""
MOST_CHANNELS = 1024


def guarded(function: Callable[[], T]) -> T:
    """Call driver code; whatever it raises leaves as an error that can be shown and sent.

    Errors that the backend raises come through as they are, for the ladder tells them apart.
    """
    try:
        return function()
    except HoldfastError as error:
        if _is_ours(error):
            raise
        raise DriverFailed(_text(error), operation="drive") from error
    except BaseException as error:
        raise DriverFailed(_text(error), operation="drive") from error


def _is_ours(error: HoldfastError) -> bool:
    """Whether an error is one that Holdfast itself defines, with the fields that it should have."""
    if type(error).__module__ != errors.__name__ or isinstance(error, ProtocolError):
        return False
    try:
        texts = (error.what, error.operation, error.target, error.hint)
        number = error.errno
    except AttributeError:
        return False
    whole = all(type(text) is str and len(text) <= MOST_TEXT for text in texts)
    return whole and (number is None or type(number) is int)


def _text(error: BaseException) -> str:
    """What an error of a driver says, if it can say it."""
    kind = str(type.__getattribute__(type(error), "__name__"))
    try:
        said = str(error)
    except BaseException:  # noqa: BLE001 - its __str__ is the driver's code, too
        said = "(its text cannot be had)"
    return f"the driver raised {kind}: {said}"[:MOST_TEXT]


def in_flight(driver: Driver, channels: Sequence[int]) -> int:
    """``Driver.in_flight``; DriverFailed unless it is a whole number that can be."""
    return _count(driver.in_flight(channels), "in_flight")


def stop(driver: Driver, channels: Sequence[int]) -> bool:
    """``Driver.stop``; DriverFailed unless it is True or False."""
    return _truth(driver.stop(channels), "stop")


def failed(driver: Driver, channels: Sequence[int]) -> bool:
    """``Driver.failed``; DriverFailed unless it is True or False."""
    return _truth(driver.failed(channels), "failed")


def drain(driver: Driver, channels: Sequence[int]) -> None:
    """``Driver.drain``, whatever it answers."""
    driver.drain(channels)


def _count(value: object, method: str) -> int:
    number = int.__add__(operator.index(value), 0) if isinstance(value, SupportsIndex) else -1
    if number < 0:
        raise DriverFailed(f"{method} answered {_name(value)}", operation="drive")
    return number


def _truth(value: object, method: str) -> bool:
    if not isinstance(value, bool | np.bool_):
        raise DriverFailed(f"{method} answered {_name(value)}", operation="drive")
    return bool(value)


def _name(value: object) -> str:
    if type(value) is int:
        return f"{value}"[:40]
    return f"something of type {type.__getattribute__(type(value), '__name__')}"


@dataclass(frozen=True, slots=True)
class DriverFacts:
    """What a driver says of itself once, so that nobody has to ask it on the loop."""

    name: str
    channels: int
    default_channels: int
    control_bytes: int
    stop_is_final: bool
    reset_stops_dma: bool
    engine_bars: frozenset[int]
    tells: bool
    """It can say what is in flight; else nothing will ever prove the function quiet."""

    @classmethod
    def of(cls, driver: Driver) -> Self:
        """Ask a driver that has been probed. Blocking; DriverFailed for nonsense."""
        return guarded(lambda: cls._ask(driver))

    @classmethod
    def _ask(cls, driver: Driver) -> Self:
        channels = _count(driver.channels(), "channels")
        if channels > MOST_CHANNELS:
            raise DriverFailed(f"channels answered {channels}", operation="drive")
        return cls(
            name=str(driver.name)[:64],
            channels=channels,
            default_channels=_count(driver.default_channels(), "default_channels"),
            control_bytes=_count(driver.control_bytes, "control_bytes"),
            stop_is_final=driver.stop_is_final is True,
            reset_stops_dma=driver.reset_stops_dma is True,
            engine_bars=frozenset(_count(bar, "engine_bars") for bar in driver.engine_bars),
            tells=type(driver).in_flight is not Driver.in_flight,
        )
