"""The state of a denoiser: what its graph depends on besides its inputs and the values of its weights.

A captured graph is true of one state: of the module tree, of every attribute of the modules and of the objects that
hang on them (processors, hooks, settings), of which weights there are, and of the dtype, device and layout of each. A
`Mark` notes a state so that comparing takes a millisecond; only where that comparison fails is the state described in
full, by values, to find out whether it was seen before (capture/watch.py).
"""

from __future__ import annotations

import functools
import io
import itertools
import operator
import random
import sys
import types
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from dcc.record.seam import own_vars
from dcc.torch_internals import (
    COMPILED_CALL,
    REGISTERED,
    attention_backend,
    children,
    global_hooks,
    pytree,
    slots,
    version,
)

PLAIN = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size)
LONGEST = 4096  # items of a container that are looked at one by one; of longer ones, only how many there are
DEEPEST = 64  # how far objects in objects are followed
GENERATORS = (torch.Generator, random.Random, np.random.Generator, np.random.RandomState)
SMALL = 1 << 20  # numbers of a buffer that are compared; some operators write to one without telling its version
OUTSIDE = frozenset({COMPILED_CALL})  # what runs in the place of the module, and is none of its own code's business
_END = object()
_INTERNAL = frozenset(name for name, value in vars(nn.Module()).items() if isinstance(value, dict | set))
_READ = (*REGISTERED, "_forward_hooks", "_forward_pre_hooks")  # those that every call looks at, hooks or none
_UNREAD = _INTERNAL.difference(_READ)


class Walk:
    """All that hangs on a module, each thing under the module's attribute that leads to it, such as `blocks.0.scale`.

    `ignored` are attributes that are left out.
    """

    def __init__(self, module: nn.Module, ignored: frozenset[str] = frozenset()) -> None:
        self.ignored = ignored | OUTSIDE
        self.items: list[tuple[str, Any]] = []  # every value that was met
        self.views: list[Callable[[], Iterable[Any]]] = []  # each gives what a container holds now
        self.attributes: list[dict[str, Any]] = []  # of modules, of which there are many
        self.places: list[tuple[dict[str, Any], str, Any]] = []  # those attributes that are no plain values
        self.containers: list[Any] = []  # dicts, lists, sets and deques, which can be put back as they were
        self.long: list[Any] = []  # those of which only the length is noted
        self.modules: dict[str, nn.Module] = {}
        self.objects: list[Any] = []  # others that have attributes
        self.weights: list[tuple[str, Tensor]] = []  # parameters and buffers
        self.loose: list[tuple[str, Tensor]] = []  # tensors that are not registered
        self.generators: list[tuple[str, Any]] = []
        self.unique: list[str] = []  # attributes whose state can be neither read nor put back
        self._seen: set[int] = set()
        self._left: list[tuple[str, Any, int]] = []
        self._meet("", module, 0)
        while self._left:
            self._follow(*self._left.pop())

    def _meet(self, attribute: str, value: Any, depth: int) -> None:
        self.items.append((attribute, value))
        if not isinstance(value, PLAIN) and id(value) not in self._seen:
            self._seen.add(id(value))  # `items` holds the value, so that its id is not given again
            self._left.append((attribute, value, depth + 1))

    def _follow(self, attribute: str, value: Any, depth: int) -> None:
        if isinstance(value, nn.Module):
            self._follow_module(attribute, value, depth)
        elif isinstance(value, Tensor):
            self.loose.append((attribute, value))
        elif isinstance(value, GENERATORS):
            self.generators.append((attribute, value))
        elif isinstance(value, Iterator) and not isinstance(value, io.IOBase):
            self.unique.append(attribute)
        elif depth <= DEEPEST:
            self._follow_object(attribute, value, depth)

    def _follow_object(self, attribute: str, value: Any, depth: int) -> None:
        if isinstance(value, dict):
            self._contain(attribute, value, value.values, depth)
            if value:
                self.views.append(functools.partial(_keys, value))
        elif isinstance(value, list | set | deque):
            self._contain(attribute, value, value.__iter__, depth)
        elif isinstance(value, types.FunctionType) and value.__closure__:
            self._view(attribute, functools.partial(contents, value.__closure__), depth)
        elif has_attributes(value):
            self.objects.append(value)
            if (own := getattr(value, "__dict__", None)) is not None:
                self._contain(attribute, own, own.values, depth)
            else:
                self._view(attribute, functools.partial(slotted, value), depth)
        else:
            for part in parts(value):
                self._meet(attribute, part, depth)

    def _follow_module(self, path: str, module: nn.Module, depth: int) -> None:
        self.modules[path] = module
        own = own_vars(module)
        self.containers.append(vars(module))
        if path == "" or any(_join(path, name) in self.ignored for name in own):
            self.views.append(functools.partial(_kept, module, path, self.ignored))
        else:
            self.attributes.append(own)
        if names_and_values(module):
            self._view(path, functools.partial(slotted, module), depth)
        for held in (*slots(module), children(module)):
            self._seen.add(id(held))
            self.containers.append(held)
            self.views.append(held.values)
        for key, child in children(module).items():
            self._meet(_join(path, key), child, depth - 1)
        for key, tensor in itertools.chain.from_iterable(held.items() for held in slots(module)):
            self._hold(_join(path, key), tensor)
        for name, value in own.items():
            attribute = _join(path, name)
            if attribute not in self.ignored and name not in REGISTERED:
                if name not in _INTERNAL and not isinstance(value, PLAIN):
                    self.places.append((vars(module), name, value))
                self._meet(attribute, value, depth)

    def _hold(self, attribute: str, tensor: Tensor | None) -> None:
        """Notes a parameter or a buffer."""
        self.items.append((attribute, tensor))
        if tensor is not None and is_lazy(tensor):
            self.unique.append(attribute)
        elif tensor is not None:
            self._seen.add(id(tensor))
            self.weights.append((attribute, tensor))

    def _contain(self, attribute: str, container: Any, values: Callable[[], Iterable[Any]], depth: int) -> None:
        self.containers.append(container)
        if len(container) > LONGEST:
            self.long.append(container)
        else:
            self._view(attribute, values, depth)

    def _view(self, attribute: str, values: Callable[[], Iterable[Any]], depth: int) -> None:
        self.views.append(values)
        for value in values():
            self._meet(attribute, value, depth)

    def facts(self) -> dict[str, list[Any]]:
        """By attribute, all that hangs on it, each thing in a form that is equal if and only if nothing has changed."""
        found: dict[str, list[Any]] = {}
        for attribute, value in self.items:
            found.setdefault(attribute, []).append(_Same(value))
        for attribute, tensor in [*self.loose, *self.weights]:
            found[attribute].append((version(tensor), address(tensor)))
            if not isinstance(tensor, nn.Parameter) and tensor.numel() <= SMALL and tensor.layout is torch.strided:
                found[attribute].append(values_of(tensor))
        for attribute, generator in self.generators:
            found[attribute].append(state_of(generator))
        return found


class Mark:
    """A state as it was: plain attributes of modules by value, what else there is by identity, weights by address.

    Comparing lists of values is quick, because Python looks at identity first; what is equal without being the same is
    told apart by its type, and by identity where it is no plain value. What no forward call reads, such as hooks of
    `state_dict`, is left out.
    """

    def __init__(self, module: nn.Module, ignored: frozenset[str] = frozenset()) -> None:
        walk = Walk(module, ignored)
        unread = {id(vars(part).get(name)) for part in walk.modules.values() for name in _UNREAD}
        owned = [(getattr(values, "__self__", None), values) for values in walk.views]
        owned = [(owner, values) for owner, values in owned if owner is None or id(owner) not in unread]
        empty = [isinstance(owner, dict | list | set | deque) and not owner for owner, _ in owned]
        self.empty = [owner for (owner, _), is_empty in zip(owned, empty, strict=True) if is_empty]
        self.views = [values for (_, values), is_empty in zip(owned, empty, strict=True) if not is_empty]
        self.saved = [*_all(map(operator.call, self.views)), _END]
        self.attributes, self.sizes = walk.attributes, list(map(len, walk.attributes))
        self.internal = [*_all(map(_internal, self.attributes))]
        own = [(own, name) for own in self.attributes for name in own if name not in _INTERNAL]
        self.owned_by, self.keys = [pair[0] for pair in own], [pair[1] for pair in own]
        self.values = list(map(operator.getitem, self.owned_by, self.keys))
        self.types = list(map(type, self.values))
        places = walk.places
        self.holders, self.names, self.held = [p[0] for p in places], [p[1] for p in places], [p[2] for p in places]
        self.long, self.lengths = walk.long, list(map(len, walk.long))
        self.owners = [*walk.modules.values(), *walk.objects]
        self.kinds = list(map(type, self.owners))
        kinds = dict.fromkeys(self.kinds)
        self.called = [(kind, name) for kind in kinds for name in _bases(kind)[0]]
        self.bases = own_bases(kinds)
        self.code = self._code()
        self.weights = [tensor for _, tensor in walk.weights if is_plain(tensor)]
        self.addresses = list(map(Tensor.data_ptr, self.weights))
        self.loose = [tensor for _, tensor in walk.loose]
        self.versions = list(map(version, self.loose))
        self.world, self.library = world(), library()

    def _code(self) -> list[Any]:
        return [getattr(kind, name) for kind, name in self.called] + [*_all(vars(base).values() for base in self.bases)]

    def holds(self) -> bool:
        """Whether the module is still in this state."""
        try:
            return (
                not any(self.empty)
                and list(map(len, self.attributes)) == self.sizes
                and [*_all(map(_internal, self.attributes))] == self.internal
                and (values := list(map(operator.getitem, self.owned_by, self.keys))) == self.values
                and list(map(type, values)) == self.types
                and all(map(operator.is_, map(operator.getitem, self.holders, self.names), self.held))
                and all(map(operator.is_, itertools.chain(_all(map(operator.call, self.views)), (_END,)), self.saved))
                and list(map(len, self.long)) == self.lengths
                and list(map(type, self.owners)) == self.kinds
                and list(map(Tensor.data_ptr, self.weights)) == self.addresses
                and list(map(version, self.loose)) == self.versions
                and self._code() == self.code
                and world() == self.world
                and library() == self.library
            )
        except Exception:  # values that do not compare, or a container that another thread changes: look closer
            return False


_all = itertools.chain.from_iterable
_internal = operator.itemgetter(*_READ)


class _Same:
    """Equal to another where both stand for the very same object."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.value is other.value

    __hash__ = None  # type: ignore[assignment]


def differing(before: Mapping[str, Any], after: Mapping[str, Any]) -> tuple[str, ...]:
    """The attributes whose facts differ, new and lost ones included."""
    names = dict.fromkeys([*before, *after])
    return tuple(name for name in names if before.get(name) != after.get(name))


def state_of(generator: Any) -> Any:
    """The state of a random number generator of torch, numpy or Python, in a form that compares."""
    if isinstance(generator, torch.Generator):
        return bytes(generator.get_state().numpy())
    if isinstance(generator, random.Random):
        return generator.getstate()
    state = generator.get_state() if isinstance(generator, np.random.RandomState) else generator.bit_generator.state
    return repr([item.tobytes() if isinstance(item, np.ndarray) else item for item in pytree.tree_leaves(state)])


def world() -> tuple[Any, ...]:
    """What torch and diffusers let code set for all modules, as far as it changes what a module computes."""
    modes = torch.are_deterministic_algorithms_enabled(), global_hooks()
    return torch.get_default_dtype(), attention_backend(), *modes


def library() -> tuple[Any, ...]:
    """The functions that modules are made of, of which some get patched."""
    return tuple(vars(nn.functional).values())


def address(tensor: Tensor) -> int:
    """Where the values of a tensor are; moving, casting, and emptying it in place all change that."""
    return tensor.data_ptr() if is_plain(tensor) else id(tensor)


def is_plain(tensor: Tensor) -> bool:
    """Whether a tensor is of no other class and layout than torch's own, so that its values have an address."""
    return type(tensor) in (nn.Parameter, Tensor) and tensor.layout is torch.strided


def values_of(tensor: Tensor) -> bytes:
    """The values of a tensor, in a form that compares."""
    if tensor.is_meta or not tensor.numel():
        return b""
    real = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    return real.detach().cpu().resolve_neg().flatten().contiguous().view(torch.uint8).numpy().tobytes()


def code_of(kind: type) -> tuple[Any, ...]:
    """What a class gives to its instances: the code that they run when called, and the attributes of classes.

    Of torch's and Python's own classes only the former, which is all that gets patched there.
    """
    called, bases = _bases(kind)
    return *(getattr(kind, name) for name in called), *_all(vars(base).values() for base in bases)


@functools.cache
def _bases(kind: type) -> tuple[tuple[str, ...], tuple[type, ...]]:
    called = tuple(name for name in ("forward", "__call__") if any(name in vars(base) for base in kind.__mro__))
    roots = ((base, base.__module__.partition(".")[0]) for base in kind.__mro__)
    return called, tuple(base for base, root in roots if root != "torch" and root not in sys.stdlib_module_names)


def own_bases(kinds: Iterable[type]) -> list[type]:
    """All classes that these are made of and that are neither torch's nor Python's own, each once."""
    return [*dict.fromkeys(_all(_bases(kind)[1] for kind in kinds))]


def class_attributes(kinds: Iterable[type]) -> list[tuple[type, str, Any]]:
    """Plain attributes of classes that are neither torch's nor Python's own, which instances share."""
    found = ((base, name, value) for base in own_bases(kinds) for name, value in vars(base).items())
    return [(base, name, value) for base, name, value in found if isinstance(value, PLAIN) and name[:2] != "__"]


def has_attributes(value: Any) -> bool:
    """Whether an object is one whose attributes are its state: not a class, not of Python's own library or torch's."""
    kind = type(value)
    if isinstance(value, (type, types.ModuleType)):
        return False
    if kind is types.SimpleNamespace:
        return True
    root = kind.__module__.partition(".")[0]
    return root not in sys.stdlib_module_names and root not in ("torch", "numpy") and _attributed(kind)


def _attributed(kind: type) -> bool:
    return bool(kind.__dictoffset__) or any("__slots__" in vars(base) for base in kind.__mro__)


def parts(value: Any) -> tuple[Any, ...]:
    """What an unchangeable value is made of: items of a tuple, the function and arguments of a partial or a method."""
    if isinstance(value, tuple | frozenset):
        return tuple(value)
    if isinstance(value, functools.partial):
        return value.func, value.args, value.keywords
    if isinstance(value, types.MethodType):
        return value.__func__, value.__self__
    return ()


def slotted(value: Any) -> tuple[Any, ...]:
    """The attributes of an object that has slots in place of a dictionary."""
    return tuple(item for _, item in names_and_values(value))


def names_and_values(value: Any) -> list[tuple[str, Any]]:
    """The slots of an object that are set, with what they hold."""
    found: list[tuple[str, Any]] = []
    for base in type(value).__mro__:
        names = vars(base).get("__slots__", ())
        found += [(n, getattr(value, n)) for n in ((names,) if isinstance(names, str) else names) if hasattr(value, n)]
    return found


def contents(cells: tuple[types.CellType, ...]) -> tuple[Any, ...]:
    """What a function has from around it; None in place of a variable that is not set."""
    return tuple(_content(cell) for cell in cells)


def _content(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # the variable is not set yet
        return None


def _kept(module: nn.Module, path: str, ignored: frozenset[str]) -> list[Any]:
    return [value for name, value in own_vars(module).items() if _join(path, name) not in ignored]


def _keys(container: dict[Any, Any]) -> Iterable[Any]:
    return container.keys()


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
