"""Leaves a module as it was: whatever its own code, an export or a check has changed in it is put back."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dcc.capture.state import Walk, names_and_values
from dcc.record.seam import is_of_the_seam
from dcc.torch_internals import version

_MISSING = object()


@contextlib.contextmanager
def preserved(module: nn.Module) -> Iterator[None]:
    """Puts back, on leaving, what the module keeps: attributes, containers, tensors that are no parameters.

    So are the states of the random number generators: those of the module, torch's, numpy's and Python's.
    """
    walk = Walk(module)
    slotted = [(thing, names_and_values(thing)) for thing in walk.objects if not hasattr(thing, "__dict__")]
    contents = [(container, _copy(container)) for container in walk.containers]
    tensors = [t for _, t in walk.loose] + [t for _, t in walk.weights if not isinstance(t, nn.Parameter)]
    values = [(t, t.detach().clone(), version(t)) for t in tensors if not t.is_meta]
    generators = [(generator, generator.get_state()) for _, generator in walk.generators]
    with numbers_preserved():
        try:
            yield
        finally:
            for container, before in contents:
                _put_back(container, before)
            for thing, before in slotted:
                for name, value in before:
                    setattr(thing, name, value)
            for tensor, value, number in values:
                if number is None or version(tensor) != number:
                    _write(tensor, value)
            for generator, state in generators:
                generator.set_state(state)


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
    name, keys, *rest = np.random.get_state()
    return random.getstate(), name, keys.tobytes(), *rest, *torch_states


def _copy(container: Any) -> list[Any]:
    return list(container.items()) if isinstance(container, dict) else list(container)


def _put_back(container: Any, before: list[Any]) -> None:
    if isinstance(container, dict):
        names = dict(before)
        for name in [name for name in container if name not in names and not is_of_the_seam(container, name)]:
            dict.__delitem__(container, name)
        for name, value in before:
            if container.get(name, _MISSING) is not value and not is_of_the_seam(container, name):
                dict.__setitem__(container, name, value)
    elif isinstance(container, set):
        if container != set(before):
            container.clear()
            container.update(before)
    elif len(container) != len(before) or any(a is not b for a, b in zip(container, before, strict=True)):
        container.clear()
        container.extend(before)


def _write(tensor: Tensor, value: Tensor) -> None:
    with torch.no_grad(), torch.inference_mode(tensor.is_inference()):
        if tensor.shape == value.shape:
            tensor.copy_(value)
