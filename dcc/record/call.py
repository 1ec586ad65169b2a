"""One call of a denoiser in canonical form: its tensors by path, everything else as the signature."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Sequence
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from dcc.errors import CaptureError
from dcc.torch_internals import plain_call, pytree

CONSTANTS = (type(None), bool, int, float, str, torch.dtype, torch.device)


@dataclass(frozen=True)
class Call:
    """Arguments of one denoiser call: the tensors by path, and everything else as the signature.

    `names[i]` is a readable path such as `hidden_states` or `added_cond_kwargs.time_ids`. `signature` is hashable and
    equal for calls that one graph can serve, up to shapes. `numbers` are the names of tensors that were Python numbers.
    `autocast` is the dtype of the autocast that surrounds the call, None where there is none. `positional` is
    how many arguments were given by position.
    """

    names: tuple[str, ...]
    tensors: tuple[Tensor, ...]
    constants: dict[str, Any]
    spec: pytree.TreeSpec
    leaf_names: tuple[str, ...]
    numbers: frozenset[str] = frozenset()
    autocast: torch.dtype | None = None
    positional: int = 0

    @functools.cached_property
    def signature(self) -> tuple[Any, ...]:
        kinds = tuple((t.dim(), t.dtype, t.device) for t in self.tensors)
        constants = tuple((name, type(value), value) for name, value in self.constants.items())
        return self.names, kinds, constants, self.spec, self.autocast

    @functools.cached_property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """The shapes of its tensors."""
        return tuple(tuple(tensor.shape) for tensor in self.tensors)

    def arguments(self, tensors: Sequence[Tensor] | None = None) -> dict[str, Any]:
        """The keyword arguments of the call as a graph takes them: numbers that change from step to step as tensors."""
        values = dict(zip(self.names, self.tensors if tensors is None else tensors, strict=True)) | self.constants
        return pytree.tree_unflatten([values[name] for name in self.leaf_names], self.spec)

    def own_arguments(self, tensors: Sequence[Tensor] | None = None) -> tuple[list[Any], dict[str, Any]]:
        """The arguments as the module itself takes them: by position those that the caller gave so, numbers as such."""
        tensors = self.tensors if tensors is None else tensors
        values: list[Any] = [t.item() if n in self.numbers else t for n, t in zip(self.names, tensors, strict=True)]
        own = self.arguments(values)
        positional = [own.pop(name) for name in list(own)[: self.positional]]
        return positional, own

    def run(self, module: nn.Module, tensors: Sequence[Tensor] | None = None) -> Any:
        """What the module itself, without what dcc has set on it, returns for this call or for other tensors."""
        args, kwargs = self.own_arguments(tensors)
        return plain_call(module)(*args, **kwargs)

    @functools.cached_property
    def layout(self) -> tuple[Any, ...]:
        """The shapes and strides of its tensors, on which the code of a module may depend."""
        return tuple((tuple(t.shape), t.stride() if t.layout is torch.strided else t.layout) for t in self.tensors)

    def detached(self) -> Call:
        """The same call on the same values, without the history that gradients need."""
        own = {id(t): t.detach() for t in self.tensors}
        return replace(self, tensors=tuple(own[id(t)] for t in self.tensors))

    def twin(self) -> Call:
        """The same call on copies of its tensors, which a module that writes to its inputs may have."""
        copies = {id(t): _copy(t) for t in self.tensors}
        return replace(self, tensors=tuple(copies[id(t)] for t in self.tensors))

    def contiguous(self) -> Call:
        """The same call with dense tensors, as lowered code expects; copies only what is not dense."""
        return replace(self, tensors=tuple(tensor.contiguous() for tensor in self.tensors))

    def without_autocast(self) -> contextlib.AbstractContextManager[Any]:
        """For running a graph: what autocast would cast is cast in the graph already."""
        if self.autocast is None:
            return contextlib.nullcontext()
        return torch.autocast(self.tensors[0].device.type, enabled=False)


@dataclass
class Served:
    """A call that is being served: the arguments as they were given, and what the module itself returned, if it ran."""

    call: Call
    given: tuple[tuple[Any, ...], dict[str, Any]]
    result: Any = None


SERVED: ContextVar[Served] = ContextVar("dcc_served")


def _copy(tensor: Tensor) -> Tensor:
    """A copy of the same strides; an expanded tensor, in which one value is written to many places, stays itself."""
    if tensor.layout is not torch.strided:
        return tensor.detach().clone()
    expanded = any(stride == 0 and size > 1 for stride, size in zip(tensor.stride(), tensor.shape, strict=True))
    if expanded:
        return tensor
    copy = tensor.detach().clone()
    if copy.stride() != tensor.stride():  # a part of a larger tensor, with gaps
        copy = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device).copy_(copy)
    return copy


def _autocast(tensors: Sequence[Tensor]) -> torch.dtype | None:
    kind = tensors[0].device.type if tensors else "cpu"
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None


def bind(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], as_tensors: frozenset[str]) -> Call:
    """Canonical form of `module(*args, **kwargs)`: positional and keyword spellings give the same call.

    `as_tensors` names numeric arguments to pass as tensors because they change from step to step. Raises TypeError
    as the module's forward would, and CaptureError for a value that is neither tensor, number, string, list nor dict.
    """
    bound = _signature(module).bind(*args, **kwargs)
    bound.apply_defaults()
    arguments: dict[str, Any] = {}
    for name, value in bound.arguments.items():
        kind = bound.signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_KEYWORD:
            arguments.update(value)
        elif kind in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.POSITIONAL_ONLY):
            if kind is inspect.Parameter.POSITIONAL_ONLY or value:
                raise CaptureError(
                    f"{type(module).__name__}.forward takes {name!r} by position only; name its parameters"
                )
        else:
            arguments[name] = value
    leaves, spec = pytree.tree_flatten_with_path(arguments)
    names, tensors, tensor_names, numbers, constants = [], [], [], [], {}
    for path, value in leaves:
        name = ".".join(map(_spelled, path))
        names.append(name)
        if name in as_tensors and isinstance(value, (int, float)) and not isinstance(value, bool):
            value = torch.tensor(value, dtype=torch.float64 if isinstance(value, float) else torch.int64)
            numbers.append(name)
        if isinstance(value, Tensor):
            tensor_names.append(name)
            tensors.append(value)
        elif isinstance(value, CONSTANTS):
            constants[name] = value
        else:
            raise CaptureError(
                f"argument {name!r} of {type(module).__name__} is a {type(value).__name__}; "
                "dcc takes tensors, numbers, strings, and lists or dicts of them"
            )
    return Call(
        tuple(tensor_names),
        tuple(tensors),
        constants,
        spec,
        tuple(names),
        frozenset(numbers),
        _autocast(tensors),
        len(args),
    )


def _spelled(key: Any) -> str:
    """A step of a path: a key of a dict, the place in a list; in quotes where it could be taken for several steps."""
    name = str(getattr(key, "key", getattr(key, "idx", key)))
    return repr(name) if "." in name else name


_SIGNATURES: WeakKeyDictionary[Any, dict[bool, inspect.Signature]] = WeakKeyDictionary()


def _signature(module: nn.Module) -> inspect.Signature:
    """The signature of a module's forward; reading one takes as long as the rest of a forecast step's host work."""
    forward = module.forward
    function = getattr(forward, "__func__", forward)
    known, bound = _SIGNATURES.setdefault(function, {}), function is not forward
    if bound not in known:
        known[bound] = inspect.signature(forward)
    return known[bound]
