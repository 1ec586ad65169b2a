"""Floats that hang on a module and change often, such as the scale of an adapter, as inputs of a graph.

A graph holds the numbers of the state in which it was captured. Where a number has been seen to change, the module is
captured once more with a tensor in its place, and that graph serves all values: it reads the number at every call.
torch.export refuses code that branches on one; the first call with a new value is compared with the module still.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from dcc.capture.state import DEEPEST, has_attributes
from dcc.passes.values import Number, Served
from dcc.record.seam import own_vars

Floats = Mapping[str, Sequence[str]]  # by attribute, the floats that hang on it, as text
GIVEN = "dcc_settings"  # the argument that stands for them while a module is exported


@dataclass(frozen=True, eq=False)
class Setting(Number):
    """One float of a module: a tensor [] float64 on the CPU, which combines with others as a Python float does."""

    placeholder: str
    index: int
    settings: Settings

    @property
    def name(self) -> str:
        return self.placeholder

    def tensor(self, served: Served) -> Tensor:
        return self.settings.tensor(self.index)


@dataclass(eq=False)
class Settings:
    """The floats that hang on some `attributes` of a module, in a fixed order; `places` say where they are now."""

    attributes: frozenset[str]
    places: list[tuple[Any, Any]]  # a dict or list, and the key or index
    names: tuple[str, ...] = ()  # of the graph's inputs that stand for them
    _made: dict[int, tuple[float, Tensor]] = field(default_factory=dict)

    @classmethod
    def of(cls, module: nn.Module, attributes: Iterable[str]) -> Settings:
        """The floats on these attributes, as they are now."""
        return cls(frozenset(attributes), _places(module, attributes))

    def read_from(self, module: nn.Module) -> None:
        """Reads them where the module has them now."""
        self.places = _places(module, self.attributes)

    def values(self) -> tuple[float, ...]:
        """The numbers as they are now."""
        return tuple(holder[key] for holder, key in self.places)

    def tensor(self, index: int) -> Tensor:
        """One of them as it is now, as a tensor, which is made anew where the module has another object."""
        holder, key = self.places[index]
        value, (known, tensor) = holder[key], self._made.get(index, (None, None))
        if tensor is None or value is not known:
            tensor = torch.tensor(value, dtype=torch.float64)
            self._made[index] = value, tensor
        return tensor

    def tensors(self) -> list[Tensor]:
        """All of them as tensors."""
        return list(map(self.tensor, range(len(self.places))))

    @contextlib.contextmanager
    def replaced(self, tensors: Sequence[Tensor]) -> Iterator[None]:
        """Inside, the module has these tensors in their places."""
        values = self.values()
        try:
            for (holder, key), tensor in zip(self.places, tensors, strict=True):
                holder[key] = tensor
            yield
        finally:
            for (holder, key), value in zip(self.places, values, strict=True):
                holder[key] = value

    @contextlib.contextmanager
    def given(self, module: nn.Module) -> Iterator[dict[str, list[Tensor]]]:
        """Inside, the module takes one more argument, tensors for these numbers; yields it as they are now."""
        if not self.places:
            yield {}
            return
        own, inner = vars(module), module.forward
        before = {"forward": own["forward"]} if "forward" in own else {}

        def forward(*args: Any, **kwargs: Any) -> Any:
            with self.replaced(kwargs.pop(GIVEN)):
                return inner(*args, **kwargs)

        signature = inspect.signature(inner)
        taken = list(signature.parameters.values())
        rest = [taken.pop()] if taken and taken[-1].kind is inspect.Parameter.VAR_KEYWORD else []
        extra = inspect.Parameter(GIVEN, inspect.Parameter.KEYWORD_ONLY)
        vars(forward)["__signature__"] = signature.replace(parameters=[*taken, extra, *rest])
        own["forward"] = forward
        try:
            yield {GIVEN: self.tensors()}
        finally:
            del own["forward"]
            own.update(before)


NO_SETTINGS = Settings(frozenset(), [])


def replaceable(module: nn.Module, floats: Floats, attributes: Iterable[str]) -> frozenset[str]:
    """Those of the attributes whose floats can all be replaced: they stand in dicts, lists and objects' attributes."""
    return frozenset(name for name in attributes if len(_places(module, [name])) == len(floats.get(name, ())))


def _places(module: nn.Module, attributes: Iterable[str]) -> list[tuple[Any, Any]]:
    found: list[tuple[Any, Any]] = []
    for attribute in sorted(attributes):
        owner, _, name = attribute.rpartition(".")
        try:
            part = module.get_submodule(owner)
        except AttributeError:  # a module that hangs on another as a plain attribute
            continue
        if name in own_vars(part):
            _search(vars(part), name, own_vars(part)[name], found, set(), 0)
    return found


def _search(holder: Any, key: Any, value: Any, found: list[tuple[Any, Any]], seen: set[int], depth: int) -> None:
    if type(value) is float:
        found.append((holder, key))
    if depth > DEEPEST or id(value) in seen or isinstance(value, nn.Module | Tensor):
        return
    if isinstance(value, dict):
        items = list(value.items())
    elif isinstance(value, list):
        items = list(enumerate(value))
    elif has_attributes(value) and hasattr(value, "__dict__"):
        items, value = list(vars(value).items()), vars(value)
    else:
        return
    seen.add(id(value))
    for inner, item in items:
        _search(value, inner, item, found, seen, depth + 1)
