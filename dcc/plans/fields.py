"""Checks what a file holds against the dataclass that it becomes: its fields, and the type of each."""

from __future__ import annotations

import dataclasses
import functools
import sys
import types
import typing
from collections.abc import Mapping
from typing import Any

from dcc.errors import DccError

LARGEST = 2**63 - 1  # of whole numbers that count something


def finite(value: Any) -> bool:
    """Whether it is a number, neither NaN nor infinite nor too large for a float; True and False are none."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def whole(value: Any, least: int = 0) -> bool:
    """Whether it is a whole number from `least` on that counts something; True and False are none."""
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= LARGEST


def read_fields(cls: type, data: Mapping[Any, Any], refused: type[DccError], what: str) -> dict[str, Any]:
    """The fields of a dataclass from an object of a file, lists as tuples.

    Raises `refused`, naming `what` and the field, for one that is unknown, missing or of another type.
    """
    known = [field.name for field in dataclasses.fields(cls)]
    if unknown := [str(name) for name in data if name not in known]:
        raise refused(f"{what} has no field {', '.join(unknown):.200}; it has: {', '.join(sorted(known))}")
    found = {}
    for name in known:
        if name in data:
            found[name] = tuples(data[name])
            if not _fits(found[name], _hints(cls)[name]):
                raise refused(f"{what}: field {name!r} must be {_spelled(_hints(cls)[name])}; got {data[name]!r:.80}")
    if missing := [name for name in required(cls) if name not in data]:
        raise refused(f"{what}: field {missing[0]!r} is missing")
    return found


def required(cls: type) -> list[str]:
    """The fields without a default."""
    missing = dataclasses.MISSING
    return [f.name for f in dataclasses.fields(cls) if f.default is missing and f.default_factory is missing]


def tuples(value: Any) -> Any:
    """The value with tuples for its lists."""
    return tuple(tuples(item) for item in value) if isinstance(value, (list, tuple)) else value


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def _fits(value: Any, hint: Any) -> bool:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, argument) for argument in arguments)
    if origin is tuple:
        length = len(value) if arguments[-1] is Ellipsis and isinstance(value, tuple) else len(arguments)
        return isinstance(value, tuple) and len(value) == length and all(_fits(item, arguments[0]) for item in value)
    if hint is float:  # an infinite threshold is one that nothing exceeds; NaN means nothing
        return finite(value) or value in (float("inf"), float("-inf"))
    if hint is int:
        return whole(value, -LARGEST)
    return isinstance(value, origin or hint)


def _spelled(hint: Any) -> str:
    """A type as people call it."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(map(_spelled, arguments))
    if origin is tuple:
        return f"a list, each entry {_spelled(arguments[0])}"
    names = {str: "text", int: "a whole number", float: "a number", bool: "true or false", type(None): "null"}
    return names.get(hint, "an object")
