"""The one seam: a handler is set on a denoiser in place, and runs where the denoiser would.

The denoiser stays the very object and class that it was: `isinstance`, loaders, hooks, `state_dict`, `save_pretrained`
and whatever users set on it are its own. torch calls `module._compiled_call_impl` where that is set, which is how
`nn.Module.compile` works in place; installing adds that entry and a few others to the module's own dictionary, removing
takes them out. Copies and pickles are of the plain module, and so is what `save_pretrained` writes; it puts the plan
beside it, as a file that `dcc.Plan.load` reads.

What else reaches the handler: `module.forward(...)` called directly, and `torch.compile` on top of the module or of
code that calls it. Dynamo looks past `_compiled_call_impl`, but not past a `forward` of the instance that it is told to
leave alone; it breaks its graph there. `module.compile()` would take the handler's place, and is refused.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from dcc.errors import AlreadyCompiledError, PipelineError
from dcc.torch_internals import COMPILED_CALL, plain_call

HANDLER = "_dcc"  # the entry that holds the handler
BOOKKEEPING = ("_dcc_before", "_dcc_entries")
SAVED = ("dcc", "plan.json")  # where save_pretrained puts the plan, in the folder of the denoiser

_ORIGINALS: ContextVar[frozenset[int]] = ContextVar("dcc_originals", default=frozenset())  # ids of plain modules
_POSITIONS: ContextVar[dict[int, Position]] = ContextVar("dcc_positions")


@dataclass(frozen=True)
class Position:
    """What a pipeline says about a denoiser call through `cache_context`; the fields are those of diffusers."""

    name: str
    step_index: int | None = None
    num_inference_steps: int | None = None
    timestep: Any = None
    sigma: float | None = None


class Handler:
    """Runs in the place of `module` while it is installed there, or when it is called itself."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def call(self, *args: Any, **kwargs: Any) -> Any:
        """What runs in place of `module(*args, **kwargs)`. In here `self.module(...)` is the original."""
        raise NotImplementedError

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with disabled(self.module):
            return self.call(*args, **kwargs)

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise PipelineError(
            f"a {type(self).__name__} holds programs and the state of requests, and cannot be copied; copy the "
            "pipeline or module that it runs in, whose copies are the original, save its plan with "
            "plan.save(path), and compile the copy with plan=dcc.Plan.load(path)"
        )

    def entries(self) -> dict[str, Any]:
        """Attributes that the module gets along with the handler, where it has none of that name."""
        return {}

    @property
    def position(self) -> Position | None:
        """The innermost `cache_context` of this module in this thread or task."""
        return _POSITIONS.get({}).get(id(self.module))

    @contextmanager
    def cache_context(self, name: str, **fields: Any) -> Iterator[None]:
        """Names the stream ("cond", "uncond") of the calls inside, and says where the loop is; as in diffusers.

        `fields` may hold step_index, num_inference_steps, timestep and sigma; others are accepted and not used.
        """
        known = {key: fields[key] for key in Position.__dataclass_fields__ if key in fields}
        token = _POSITIONS.set(_POSITIONS.get({}) | {id(self.module): Position(name, **known)})
        try:
            yield
        finally:
            _POSITIONS.reset(token)


def handler_of(module: Any) -> Handler | None:
    """The handler that is installed on a module, None where there is none."""
    return vars(module).get(HANDLER) if isinstance(module, nn.Module) else None


def install(module: nn.Module, handler: Handler) -> None:
    """Sets the handler on the module, in the place of the one that is there."""
    remove(module)
    own = {
        HANDLER: handler,
        COMPILED_CALL: _calls(module, handler),
        "forward": _forwards(module, handler),
        "cache_context": _context(module, handler),
        "compile": _refusal(module),
        "__getstate__": functools.partial(_plain_state, module),
    }
    entries = handler.entries()
    own |= {name: value for name, value in entries.items() if not hasattr(module, name)}
    if "plan" in entries and hasattr(module, "save_pretrained"):
        own["save_pretrained"] = _saves(module, entries["plan"])
    before = {name: vars(module)[name] for name in own if name in vars(module)}
    own |= {"_dcc_before": before, "_dcc_entries": dict(own)}
    vars(module).update(own)


def remove(module: nn.Module) -> Handler | None:
    """Takes the handler off the module, which is then as it was; returns the handler.

    An entry that something else has replaced since stays.
    """
    handler = handler_of(module)
    if handler is None:
        return None
    entries, before = vars(module).pop("_dcc_entries"), vars(module).pop("_dcc_before")
    for name, value in entries.items():
        if vars(module).get(name) is value:
            del vars(module)[name]
            if name in before:
                vars(module)[name] = before[name]
    return handler


@contextmanager
def installed(module: nn.Module, handler: Handler | None) -> Iterator[None]:
    """Sets the handler, or none, on the module inside the context, and always puts back what was there before."""
    before = remove(module)
    if handler is not None:
        install(module, handler)
    try:
        yield
    finally:
        remove(module)
        if before is not None:
            install(module, before)


@contextmanager
def disabled(module: nn.Module) -> Iterator[None]:
    """Runs the module's own code inside the context, in this thread or task; others still run the handler."""
    token = _ORIGINALS.set(_ORIGINALS.get() | {id(module)})
    try:
        yield
    finally:
        _ORIGINALS.reset(token)


def own_vars(module: nn.Module) -> dict[str, Any]:
    """The module's own attributes, without what installing added; what has replaced that since is the module's own."""
    own = vars(module)
    if HANDLER not in own:
        return own
    entries, before = own["_dcc_entries"], own["_dcc_before"]
    kept = {}
    for name, value in own.items():
        if name not in entries or entries[name] is not value:
            kept[name] = value
        elif name in before:
            kept[name] = before[name]
    for name in BOOKKEEPING:
        kept.pop(name, None)
    return kept


def is_of_the_seam(attributes: dict[Any, Any], name: Any) -> bool:
    """Whether an entry of a module's own dictionary is one that installing sets."""
    return name in BOOKKEEPING or name in attributes.get("_dcc_entries", {})


def _runs_plain(module: nn.Module) -> bool:
    return id(module) in _ORIGINALS.get()


def _calls(module: nn.Module, handler: Handler) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        if _runs_plain(module):
            return plain_call(module)(*args, **kwargs)
        return handler(*args, **kwargs)

    return torch.compiler.disable(call)


def _forwards(module: nn.Module, handler: Handler) -> Callable[..., Any]:
    own = vars(module).get("forward")

    @functools.wraps(module.forward)
    def forward(*args: Any, **kwargs: Any) -> Any:
        if _runs_plain(module) or handler_of(module) is not handler:
            # looked up now, because classes are patched
            return own(*args, **kwargs) if own else type(module).forward(module, *args, **kwargs)
        return handler(*args, **kwargs)

    return torch.compiler.disable(forward)


def _context(module: nn.Module, handler: Handler) -> Callable[..., Any]:
    own = getattr(module, "cache_context", None)

    @contextmanager
    def cache_context(name: str, **fields: Any) -> Iterator[None]:
        with handler.cache_context(name, **fields):
            if own is None:
                yield
            else:
                with own(name, **fields):
                    yield

    return cache_context


def _saves(module: nn.Module, plan: Any) -> Callable[..., Any]:
    original: Any = module.save_pretrained

    @functools.wraps(original)
    def save_pretrained(save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> Any:
        if not os.path.isfile(save_directory):  # else the original says what is wrong
            path = os.path.join(save_directory, *SAVED)
            os.makedirs(os.path.dirname(path), exist_ok=True)
            plan.save(path)
        return original(save_directory, *args, **kwargs)

    return save_pretrained


def _refusal(module: nn.Module) -> Callable[..., Any]:
    def compile(*args: Any, **kwargs: Any) -> None:
        raise AlreadyCompiledError(
            f"{type(module).__name__}.compile() would take the place of what dcc compiled, and cache nothing; "
            "dcc.restore it first, or leave it: dcc has lowered it already"
        )

    return compile


def _plain_state(module: nn.Module) -> dict[str, Any]:
    """What copying and pickling keep of the module: all but what installing added."""
    own, state = own_vars(module), type(module).__getstate__(module)
    ours = {name for name in state if is_of_the_seam(state, name)}
    return {name: own[name] if name in ours else state[name] for name in state if name in own or name not in ours}
