"""Finds the kinds of a value that plan files name: the subclasses of its base that have a `kind`."""

from __future__ import annotations

from typing import TypeVar

T = TypeVar("T")


def kinds_of(base: type[T]) -> dict[str, type[T]]:
    """Subclasses by kind, including those of subclasses; a new class is found as soon as it is defined."""
    found: dict[str, type[T]] = {}
    for cls in base.__subclasses__():
        if "kind" in vars(cls):
            found[cls.kind] = cls  # type: ignore[attr-defined]
        found |= kinds_of(cls)
    return found
