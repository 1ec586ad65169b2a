"""Everything that a module holds, as a flat table by path that can be kept and compared: values, never identities."""

from __future__ import annotations

import collections
import enum
import functools
import itertools
import random
import types
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

FAKE = "a value of a trace"
OUTSIDE = "(outside)"  # begins the part of a path that leads out of the module: a closure, a class
_LOCAL = "odd_"  # classes of these test files are looked into, those of libraries are not
_ATOMS = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.layout, enum.Enum, slice)
_NUMBERS_OF_A_TRACE = (torch.SymInt, torch.SymFloat, torch.SymBool, torch.fx.Proxy)
_KINDS_OF_TENSOR = {"Tensor", "Parameter", "Buffer", "UninitializedParameter"}

Snapshot = dict[str, Any]


@dataclass(frozen=True, eq=False)
class Kept:
    """A copy of a tensor that equals another only bit for bit, with all that a user can see of it."""

    value: Tensor
    about: tuple[Any, ...]
    stride: tuple[int, ...]

    @staticmethod
    def of(tensor: Tensor) -> Kept:
        about = (type(tensor).__name__, tensor.dtype, tuple(tensor.shape), tensor.layout)
        about += ("requires grad" if tensor.requires_grad else "",)
        with torch.inference_mode(False), torch.no_grad():
            plain = tensor.detach() if tensor.layout is torch.strided else tensor.detach().to_dense()
            return Kept(plain.as_subclass(Tensor).clone(), about, plain.stride())

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Kept) or (self.about, self.stride) != (other.about, other.stride):
            return False
        return self._bits() == other._bits()

    def equals(self, other: object) -> bool:
        """Whether the other one holds equal numbers, however they lie in memory; 0.0 and -0.0 are equal."""
        if not isinstance(other, Kept) or self.about != other.about:
            return False
        return torch.allclose(self.value, other.value, rtol=0, atol=0, equal_nan=True)

    def __hash__(self) -> int:
        return hash(self.about)

    def _bits(self) -> bytes:
        return self.value.contiguous().flatten().resolve_conj().view(torch.uint8).numpy().tobytes()

    def __repr__(self) -> str:
        return f"<{', '.join(map(str, filter(None, self.about)))}>"

    def beside(self, other: Any) -> str:
        """How this one differs from the right one."""
        if not isinstance(other, Kept) or self.about != other.about:
            return f"{self!r}, right: {other!r}"
        if self.equals(other) and self.stride != other.stride:
            return f"strides {self.stride}, right: {other.stride}"
        ours, right = self.value.to(torch.complex128), other.value.to(torch.complex128)
        return f"relative error {float((ours - right).norm() / right.norm()):.3g}"


def snapshot(value: Any) -> Snapshot:
    """Every value that can be reached from `value`, by path."""
    walk = _Walk()
    walk.see(value, "")
    return walk.found


def differences(ours: Snapshot, right: Snapshot, outside: bool = True, memory: bool = True) -> list[str]:
    """What differs, one line a path.

    Without what lies outside of the module where `outside` is False; without strides, and without asking whether two
    equal tensors are one, where `memory` is False.
    """
    lines = []
    for path in [*ours, *(path for path in right if path not in ours)]:
        if not outside and OUTSIDE in path:
            continue
        a, b = ours.get(path, "nothing"), right.get(path, "nothing")
        if not memory:
            a, b = _resolved(ours, a), _resolved(right, b)
        if not (a == b or (not memory and isinstance(a, Kept) and a.equals(b))):
            lines.append(f"{path or 'it'}: {a.beside(b) if isinstance(a, Kept) else f'{a!r}, right: {b!r}'}")
    return lines


def _resolved(found: Snapshot, value: Any) -> Any:
    """The value that stands at the path of a Same."""
    return found[value.path] if isinstance(value, Same) else value


@dataclass(frozen=True)
class Same:
    """The very same object as stands at another path."""

    path: str


def traces(found: Snapshot) -> list[str]:
    """Paths at which a value of a trace was left behind."""
    return [path for path, value in found.items() if isinstance(value, str) and value.startswith(FAKE)]


def generators() -> Snapshot:
    """The states of the three global generators."""
    return snapshot({"torch": torch.get_rng_state(), "random": random.getstate(), "numpy": np.random.get_state()})


class _Walk:
    def __init__(self) -> None:
        self.found: Snapshot = {}
        self.paths: dict[int, str] = {}
        self.held: list[Any] = []  # so that no address is given twice

    def see(self, value: Any, path: str) -> None:
        if isinstance(value, _NUMBERS_OF_A_TRACE):
            self.found[path] = f"{FAKE}: {type(value).__name__}"
            return
        if isinstance(value, _ATOMS):
            self.found[path] = repr(value)
            return
        if id(value) in self.paths:
            self.found[path] = Same(self.paths[id(value)])
            return
        self.paths[id(value)] = path
        self.held.append(value)
        for kind, look in _LOOKS:
            if isinstance(value, kind):
                look(self, value, path)
                return
        self.found[path] = type(value).__qualname__
        self.attributes(value, path)

    def attributes(self, value: Any, path: str) -> None:
        """The attributes of an object, and those of its class where it is one of ours."""
        for name, item in getattr(value, "__dict__", {}).items():
            self.see(item, f"{path}.{name}")
        for kind in type(value).__mro__:
            slots = kind.__dict__.get("__slots__", ())
            for name in (slots,) if isinstance(slots, str) else slots:
                if name not in ("__dict__", "__weakref__") and hasattr(value, name):
                    self.see(getattr(value, name), f"{path}.{name}")
        self.class_attributes(type(value), path)

    def class_attributes(self, of: type, path: str) -> None:
        """What the classes of these tests hold themselves."""
        for kind in of.__mro__:
            for name, item in vars(kind).items() if _LOCAL in kind.__module__ else ():
                if not name.startswith("__") and isinstance(item, (*_ATOMS, Tensor, list, dict, set)):
                    self.see(item, f"{path}.{OUTSIDE}{kind.__name__}.{name}")

    def tensor(self, value: Tensor, path: str) -> None:
        if isinstance(value, torch._subclasses.FakeTensor) or "Functional" in type(value).__name__:
            self.found[path] = f"{FAKE}: {type(value).__name__}"
        elif isinstance(value, nn.parameter.UninitializedTensorMixin):
            self.found[path] = type(value).__name__
        else:
            self.found[path] = Kept.of(value)
            if value.is_leaf and value.grad is not None:
                self.see(value.grad, f"{path}.grad")

    def module(self, value: nn.Module, path: str) -> None:
        self.found[path] = type(value).__qualname__
        for name, item in vars(value).items():
            if "_hooks" in name and isinstance(item, dict):
                item = list(item.values())  # the keys are numbers that torch counts over all modules
            self.see(item, f"{path}.{name}")
        self.class_attributes(type(value), path)

    def mapping(self, value: Mapping[Any, Any], path: str) -> None:
        self.found[path] = f"{type(value).__qualname__} of {len(value)}"
        for index, (key, item) in enumerate(list(value.items())):
            plain = isinstance(key, (str, int, float, tuple, type(None))) and len(repr(key)) < 60
            if (isinstance(key, int) and key > 2**20) or not plain:  # an address
                self.see(key if not isinstance(key, int) else None, f"{path}.key{index}")
                key = f"#{index}"
            self.see(item, f"{path}[{key}]")
        self.attributes(value, path)

    def sequence(self, value: Any, path: str) -> None:
        self.found[path] = f"{type(value).__qualname__} of {len(value)}"
        for index, item in enumerate(list(value)):
            self.see(item, f"{path}[{index}]")

    def unordered(self, value: Any, path: str) -> None:
        self.found[path] = f"{type(value).__qualname__} of {sorted(map(repr, value))}"

    def function(self, value: types.FunctionType, path: str) -> None:
        self.found[path] = f"function {value.__qualname__}"
        if _LOCAL not in value.__module__:
            return
        self.see(value.__defaults__, f"{path}.defaults")
        for name, cell in zip(value.__code__.co_freevars, value.__closure__ or (), strict=True):
            try:
                self.see(cell.cell_contents, f"{path}.{OUTSIDE}{name}")
            except ValueError:  # a cell that was never filled
                self.found[f"{path}.{OUTSIDE}{name}"] = "empty"

    def method(self, value: types.MethodType, path: str) -> None:
        self.see(value.__self__, f"{path}.self")
        self.see(value.__func__, f"{path}.function")

    def partial(self, value: functools.partial, path: str) -> None:
        for name in ("func", "args", "keywords"):
            self.see(getattr(value, name), f"{path}.{name}")


def _shown(show: Callable[[Any], Any]) -> Callable[[_Walk, Any, str], None]:
    def look(walk: _Walk, value: Any, path: str) -> None:
        walk.found[path] = type(value).__qualname__
        walk.see(show(value), f"{path}.shown")

    return look


_LOOKS: tuple[tuple[Any, Callable[[_Walk, Any, str], None]], ...] = (
    (Tensor, _Walk.tensor),
    (nn.Module, _Walk.module),
    ((type, types.ModuleType, types.BuiltinFunctionType), _shown(lambda value: value.__name__)),
    (
        RemovableHandle,
        _shown(lambda value: sorted(set(vars(value)) - {"id"})),
    ),  # its number is counted over all modules
    (weakref.WeakKeyDictionary, _shown(lambda value: list(value.items()))),
    (Mapping, _Walk.mapping),
    ((list, tuple, collections.deque), _Walk.sequence),
    ((set, frozenset), _Walk.unordered),
    (types.FunctionType, _Walk.function),
    (types.MethodType, _Walk.method),
    (functools.partial, _Walk.partial),
    (weakref.ref, _shown(lambda value: value())),
    (np.ndarray, _shown(lambda value: (str(value.dtype), value.shape, value.tobytes()))),
    (np.generic, _shown(repr)),
    (torch.Generator, _shown(lambda value: value.get_state())),
    (random.Random, _shown(lambda value: value.getstate())),
    (np.random.Generator, _shown(lambda value: repr(value.bit_generator.state))),
    (itertools.count, _shown(repr)),
)
