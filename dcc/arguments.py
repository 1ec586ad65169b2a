"""Checks of what callers pass to public functions: each names the argument, what it got, and the good values."""

from __future__ import annotations

import difflib
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from numbers import Integral, Real
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin

from dcc.errors import ArgumentError, DccError

MOST = 2**63 - 1  # the largest seed that every generator takes


def shown(value: Any) -> str:
    """A value as a message shows it: what it is, on one short line."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return f"{value!r:.80}"
    return f"{type(value).__name__} {' '.join(repr(value).split()):.60}"


def whole(name: str, value: Any, least: int = 0, most: int | None = None, error: type[DccError] = ArgumentError) -> int:
    """The value as an int. Raises `error` unless it is a whole number from `least` to `most`; booleans are none."""
    upper = math.inf if most is None else most
    if isinstance(value, bool) or not isinstance(value, Integral) or not least <= int(value) <= upper:
        good = f"a whole number of {least} or more" if most is None else f"a whole number from {least} to {most}"
        raise error(f"{name}={shown(value)} must be {good}")
    return int(value)


def seed_of(value: Any) -> int:
    """A seed as an int. Raises ArgumentError unless it is a whole number that generators take."""
    return whole("seed", value, 0, MOST)


def positive(name: str, value: Any, error: type[DccError] = ArgumentError, unit: str = "") -> float:
    """The value as an int or float. Raises `error` unless it is a finite number above 0; booleans are none."""
    if isinstance(value, bool) or not isinstance(value, Real) or not 0 < float(value) < math.inf:
        raise error(f"{name}={shown(value)} must be a positive number{unit and f' of {unit}'}, more than 0")
    return int(value) if isinstance(value, Integral) else float(value)


def number(name: str, value: Any, error: type[DccError] = ArgumentError) -> float:
    """The value as a float. Raises `error` unless it is a finite number; booleans are none."""
    if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(float(value)):
        raise error(f"{name}={shown(value)} must be a finite number")
    return float(value)


def flag(name: str, value: Any, error: type[DccError] = ArgumentError) -> bool:
    """The value. Raises `error` unless it is True or False."""
    if not isinstance(value, bool):
        raise error(f"{name}={shown(value)} must be True or False")
    return value


def function(name: str, value: Any, takes: str) -> Callable[..., Any] | None:
    """The value. Raises ArgumentError unless it can be called, or is None; `takes` shows a good one."""
    if value is not None and not callable(value):
        raise ArgumentError(f"{name}={shown(value)} must be a function, e.g. {takes}, or None")
    return value


def progress_of(value: Any) -> Callable[[str], None]:
    """What to call with a line of progress, for a caller's `progress`. Raises ArgumentError for no function."""
    return function("progress", value, "print") or (lambda line: None)


def chosen(name: str, value: Any, known: Iterable[str], error: type[DccError] = ArgumentError) -> str:
    """The value. Raises `error`, listing all and naming the nearest, unless it is one of the known names."""
    names = list(known)
    if not isinstance(value, str) or value not in names:
        near = nearest(value, names) if isinstance(value, str) else ""
        raise error(f"unknown {name} {shown(value)}; there are: {', '.join(names)}{near}")
    return value


def text(name: str, value: Any, example: str, error: type[DccError] = ArgumentError) -> str:
    """The value. Raises `error` unless it is a string that is not empty."""
    if not isinstance(value, str) or not value:
        raise error(f"{name}={shown(value)} must be a string that is not empty, e.g. {example!r}")
    return value


def path(name: str, value: Any, error: type[DccError] = ArgumentError) -> str:
    """A path as a string. Raises `error` unless it is a string or a path, not empty and without null characters."""
    if not isinstance(value, (str, os.PathLike)) or not isinstance(given := os.fspath(value), str):
        raise error(f"{name}={shown(value)} must be the path of a file, a string or a pathlib.Path")
    if not given or "\0" in given:
        raise error(f"{name}={shown(given)} is no path of a file")
    return given


def new_file(name: str, value: Any, error: type[DccError] = ArgumentError) -> str:
    """A path as a string. Raises `error` unless a file can be put there: not a folder, but in one that exists."""
    given = path(name, value, error)
    folder = os.path.dirname(os.path.abspath(given))
    if not os.path.isdir(folder):
        raise error(f"{name}={given!r}: there is no folder {folder}; create it or choose another path")
    if os.path.isdir(given):
        raise error(f"{name}={given!r} is a folder; name a file in it, e.g. {os.path.join(given, 'dcc')!r}")
    return given


def fits(value: Any, hint: Any) -> bool:
    """Whether a value is of an annotated type; an int is a float too, and NaN is no number.

    A boolean is no number, but a list of numbers may hold some, as masks do.
    """
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return any(fits(value, each) for each in inner)
    if hint in (int, float):
        wanted = Integral if hint is int else Real
        return isinstance(value, wanted) and not isinstance(value, bool) and value == value
    if origin is Mapping or origin is dict:
        return isinstance(value, Mapping) and all(fits(k, inner[0]) and fits(v, inner[1]) for k, v in value.items())
    if origin in (Sequence, list, tuple):
        if not isinstance(value, Sequence) or isinstance(value, (str, bytes)):
            return False
        if origin is tuple and Ellipsis not in inner and len(value) != len(inner):
            return False
        return all(fits(each, inner[0]) or (inner[0] is int and isinstance(each, bool)) for each in value)
    return hint is Any or (value is None if hint in (None, NoneType) else isinstance(value, origin or hint))


def nearest(name: str, known: Sequence[str]) -> str:
    """A question, "did you mean 'x'?" in brackets, for the known name most like `name`; empty where none is."""
    found = difflib.get_close_matches(name, known, 1)
    return f" (did you mean {found[0]!r}?)" if found else ""


def listed(names: Sequence[str], known: Sequence[str]) -> str:
    """Unknown names with, for each, the known one that is nearest."""
    return ", ".join(f"{name!r}{nearest(name, known)}" for name in names)
