"""Modules and what hangs on them, described by values: equal descriptions mean the same code with the same settings."""

from __future__ import annotations

import types
from collections import deque
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from dcc.capture.state import DEEPEST, PLAIN, code_of, contents, has_attributes, parts, slotted
from dcc.passes.graph import layout
from dcc.record.seam import own_vars
from dcc.torch_internals import slots


def described(
    value: Any,
    name: Callable[[Any], Any],
    ignored: frozenset[str] = frozenset(),
    floats: dict[str, list[str]] | None = None,
) -> Any:
    """A hashable description of a value: of a module with all in it, of a container, of an object by its attributes.

    Modules that run the same code with the same settings on weights of equal shapes have equal ones. `name` stands for
    what has no value of its own: a function, a class, a tensor that is not registered. `ignored` are attributes left
    out, as paths from the value. `floats`, where given, gets Python's floats by the attribute that they hang on, and
    their values are then left out.
    """
    return _Describer(name, ignored, floats).of(value, "", 0)


def described_weight(tensor: Tensor) -> Any:
    """What code may ask about a tensor, real or fake, but for its values."""
    size, stride, dtype, device = layout(tensor)
    return type(tensor), str(size), str(stride), dtype, device


class _Describer:
    def __init__(
        self, name: Callable[[Any], Any], ignored: frozenset[str], floats: dict[str, list[str]] | None
    ) -> None:
        self.name, self.ignored, self.floats = name, ignored, floats
        self.seen: dict[int, int] = {}
        self.held: list[Any] = []  # so that no id is given again meanwhile

    def of(self, value: Any, path: str, depth: int) -> Any:
        if isinstance(value, PLAIN):
            return self.plain(value, path)
        if id(value) in self.seen:
            return "again", self.seen[id(value)]
        self.seen[id(value)] = len(self.seen)
        self.held.append(value)
        if depth > DEEPEST:
            return self.name(value)
        if isinstance(value, nn.Module):
            return self.module(value, path, depth)
        if isinstance(value, list | tuple | deque):
            return type(value).__name__, tuple(self.of(item, path, depth + 1) for item in value)
        if isinstance(value, dict):
            items = ((self.of(k, path, depth + 1), self.of(v, path, depth + 1)) for k, v in value.items())
            return type(value).__name__, tuple(items)
        if isinstance(value, set | frozenset):
            return type(value).__name__, tuple(sorted(str(self.of(item, path, depth + 1)) for item in value))
        if isinstance(value, types.FunctionType) and value.__closure__:
            cells = tuple(self.of(item, path, depth + 1) for item in contents(value.__closure__))
            return self.name(value.__code__), cells
        if isinstance(value, Tensor):
            return self.name(value), described_weight(value)
        if has_attributes(value):
            own = getattr(value, "__dict__", None)
            facts = slotted(value) if own is None else tuple(own.items())
            return self.kind(type(value)), self.of(facts, path, depth + 1)
        if pieces := parts(value):
            return type(value).__name__, tuple(self.of(piece, path, depth + 1) for piece in pieces)
        return self.name(value)

    def plain(self, value: Any, path: str) -> Any:
        if self.floats is None or type(value) is not float:
            return type(value).__name__, str(value)
        self.floats.setdefault(path, []).append(str(value))
        return "float"

    def module(self, module: nn.Module, path: str, depth: int) -> Any:
        parameters, buffers = slots(module)
        weights = tuple((key, None if t is None else described_weight(t)) for key, t in (parameters | buffers).items())
        rest = []
        for key, value in sorted(own_vars(module).items()):
            place = f"{path}.{key}" if path else key
            if value is parameters or value is buffers or place in self.ignored:
                continue
            if key == "_modules":
                inside = f"{path}." if path else ""
                rest.append((key, tuple((n, self.of(m, inside + n, depth + 1)) for n, m in value.items())))
            else:
                rest.append((key, self.of(value, place, depth + 1)))
        return self.kind(type(module)), weights, tuple(rest)

    def kind(self, kind: type) -> Any:
        """A class with the code that it runs when called, which may have been patched."""
        given = (str(part) if isinstance(part, PLAIN) else self.name(part) for part in code_of(kind))
        return self.name(kind), *given
