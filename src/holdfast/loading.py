# SPDX-License-Identifier: Apache-2.0
"""Classes by name: ``package.module:Class`` or ``path/to/file.py:Class``.

A user's file is run as a module of its own, once per process; a file that already runs (as
``__main__``, say) is not run again.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
from pathlib import Path
from types import ModuleType
from typing import TypeVar

from holdfast.errors import BadTarget

T = TypeVar("T")


def load_class(spec: str, base: type[T], *, target: str, hint: str = "") -> type[T]:
    """The class that ``spec`` names, which must be a subclass of ``base``.

    Raises BadTarget if there is nothing of that name, or something else. Errors that the user's
    own code raises while it is loaded come through as they are.
    """
    place, colon, name = spec.rpartition(":")
    if not colon or not place or not name:
        raise _bad(f"nothing is called {spec!r}", target, hint)
    if place.endswith(".py"):
        module = _load_file(Path(place), target, hint)
    else:
        module = _load_module(place, target, hint)
    found = getattr(module, name, None)
    if found is None:
        raise _bad(f"{place} has no {name}", target, hint)
    if not (inspect.isclass(found) and issubclass(found, base)):
        raise _bad(f"{name} is not a subclass of {base.__qualname__}", target, hint)
    return found


def _bad(what: str, target: str, hint: str) -> BadTarget:
    return BadTarget(what, operation="load class", target=target, hint=hint)


def _load_module(place: str, target: str, hint: str) -> ModuleType:
    try:
        return importlib.import_module(place)
    except ModuleNotFoundError as error:
        if error.name is not None and (place + ".").startswith(error.name + "."):
            raise _bad(f"no module {place}", target, hint) from error
        raise  # the module is there; something that it imports is not


def _load_file(path: Path, target: str, hint: str) -> ModuleType:
    if not path.is_file():
        raise _bad(f"no file {path}", target, hint)
    path = path.resolve()
    for module in list(sys.modules.values()):
        loaded = getattr(module, "__file__", None)
        if loaded and Path(loaded).resolve() == path:
            return module
    title = f"holdfast_user_{path.stem}"
    spec = importlib.util.spec_from_file_location(title, path)
    if spec is None or spec.loader is None:
        raise _bad(f"{path} cannot be loaded", target, hint)
    module = importlib.util.module_from_spec(spec)
    sys.modules[title] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[title]
        raise
    return module
