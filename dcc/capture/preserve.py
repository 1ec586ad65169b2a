"""Leaves a module as it was: whatever its own code, an export or a check has changed in it is put back."""

from __future__ import annotations

import contextlib
import functools
import random
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dcc.capture.state import Walk, class_attributes, names_and_values
from dcc.errors import CaptureError
from dcc.record.seam import is_of_the_seam

_MISSING = object()
SMALL_MODULE = 1 << 24  # numbers in all of its parameters


@contextlib.contextmanager
def preserved(module: nn.Module) -> Iterator[None]:
    """Puts back, on leaving, what the module keeps: attributes, containers, classes, the values of tensors.

    Of parameters, which some modules write to, only those of small modules are put back. So are the states of the
    random number generators: those of the module, torch's, numpy's and Python's. Raises CaptureError for what cannot be
    put back: iterators, and parameters that get their size at the first call.
    """
    walk = Walk(module)
    if walk.unique:
        raise CaptureError(
            f"{type(module).__name__}.{walk.unique[0]} is an iterator or a lazy parameter, which cannot be put back "
            "after dcc has tried the module out; give it something that can be read again"
        )
    classes = [(part, type(part)) for part in walk.modules.values()]
    objects = (*walk.objects, *walk.modules.values())
    slotted = [(thing, name, value) for thing in objects for name, value in names_and_values(thing)]
    contents = [(container, _copy(container)) for container in walk.containers]
    tensors = [t for _, t in (*walk.loose, *walk.weights) if t.layout is torch.strided and not t.is_meta]
    small = sum(t.numel() for t in tensors if isinstance(t, nn.Parameter)) <= SMALL_MODULE
    values = [(t, t.detach().clone()) for t in tensors if small or not isinstance(t, nn.Parameter)]
    shared = class_attributes(map(type, objects))
    gradients = [(t, "grad", t.grad) for _, t in walk.weights]
    generators = [_remembered(generator) for _, generator in walk.generators]
    with numbers_preserved():
        try:
            yield
        finally:
            for part, kind in classes:
                if type(part) is not kind:
                    part.__class__ = kind
            for container, before in contents:
                _put_back(container, before)
            for tensor, value in values:
                if tensor.shape != value.shape or not torch.equal(tensor, value):
                    _write(tensor, value)
            for thing, name, value in (*slotted, *shared, *gradients):
                if getattr(thing, name, _MISSING) is not value:
                    setattr(thing, name, value)
            for put_back in generators:
                put_back()


def _remembered(generator: Any) -> Callable[[], Any]:
    """What puts a random number generator back to where it is now."""
    if isinstance(generator, torch.Generator):
        return functools.partial(generator.set_state, generator.get_state())
    if isinstance(generator, random.Random):
        return functools.partial(generator.setstate, generator.getstate())
    if isinstance(generator, np.random.RandomState):
        return functools.partial(generator.set_state, generator.get_state())
    return functools.partial(setattr, generator.bit_generator, "state", generator.bit_generator.state)


@contextlib.contextmanager
def numbers_preserved() -> Iterator[None]:
    """Puts back, on leaving, the states of the global random number generators of torch, numpy and Python."""
    python, numbers = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numbers)


def numbers() -> tuple[Any, ...]:
    """The states of the global random number generators, in a form that compares."""
    devices = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    torch_states = [bytes(state.numpy()) for state in (torch.get_rng_state(), *devices)]
    state: Any = np.random.get_state()
    return random.getstate(), state[0], state[1].tobytes(), *state[2:], *torch_states


def _copy(container: Any) -> list[Any]:
    return list(container.items()) if isinstance(container, dict) else list(container)


def _put_back(container: Any, before: list[Any]) -> None:
    if _same(container, before):
        return
    # the attributes of a compiled module, of which some are not its own
    if isinstance(container, dict) and "_dcc_entries" in container:
        names = dict(before)
        for name in [name for name in container if name not in names and not is_of_the_seam(container, name)]:
            del container[name]
        container.update((name, value) for name, value in before if not is_of_the_seam(container, name))
    elif isinstance(container, OrderedDict):
        OrderedDict.clear(container)
        OrderedDict.update(container, before)
    elif isinstance(container, dict):
        dict.clear(container)
        dict.update(container, before)
    else:
        container.clear()
        container.update(before) if isinstance(container, set) else container.extend(before)


def _same(container: Any, before: list[Any]) -> bool:
    now = _copy(container)
    if len(now) != len(before):
        return False
    if isinstance(container, dict):
        return all(a[0] is b[0] and a[1] is b[1] for a, b in zip(now, before, strict=True))
    return all(a is b for a, b in zip(now, before, strict=True))


def _write(tensor: Tensor, value: Tensor) -> None:
    with torch.inference_mode(tensor.is_inference()), torch.no_grad():  # in this order: the first enables gradients
        if tensor.shape != value.shape:
            tensor.resize_(value.shape)
        tensor.copy_(value)
