"""Whether a denoiser is a function of its inputs and its state alone, which is what a graph can stand for.

Found out by running it: on a call, on another like it, and on the first again. What it changes in itself, in its
arguments or in random numbers, and answers that depend on the calls before, are found.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from dcc.capture.captured import same
from dcc.capture.describe import described
from dcc.capture.preserve import numbers, preserved
from dcc.capture.state import Walk, differing, values_of
from dcc.record.call import Call
from dcc.torch_internals import plain_call, pytree, version

LOWER = 0.75  # what the other call's numbers are, as a part of the first one's


@dataclass(frozen=True)
class Evidence:
    """What runs of a module showed. `finding` says, in words, what it does besides answering; None for nothing.

    `changed` are attributes that its calls change, `answers` pairs of a call and what the module returned.
    """

    finding: str | None
    changed: frozenset[str] = frozenset()
    answers: list[tuple[Call, list[Any]]] = field(default_factory=list)
    spec: pytree.TreeSpec | None = None
    shifting: bool = False  # its answers to equal calls have other structures
    keeps: bool = False  # its first call makes what later ones use, whatever the inputs are, such as a table


@dataclass(frozen=True)
class _Run:
    """One run of a module: its outputs, and what it changed."""

    outputs: list[Any]
    spec: pytree.TreeSpec
    changed: tuple[str, ...]
    said: tuple[str, ...]


def examine(module: nn.Module, call: Call) -> Evidence:
    """Runs the module three to five times on copies of a call's tensors; whoever asks puts its state back."""
    other = _other(call)
    first, said, changed = _at_first(module, call, other)
    if first.changed:  # what it made was put back
        first = _run(module, call)
    answers = [(call, first.outputs)]
    try:
        second = _run(module, other)
        answers.append((other, second.outputs))
    except Exception:  # inputs that the module refuses say nothing about it
        second = first
    third = _run(module, call)
    later = {*third.changed, *(second.changed if second is not first else ())}
    if later and not said:
        said.append(f"its calls change {_listed(sorted(later))}")
    if not same(third.outputs, first.outputs):
        said.append("its answer to equal inputs depends on the calls before")
    said += dict.fromkeys((*first.said, *second.said, *third.said))
    return Evidence(
        "; ".join(said) or None,
        frozenset(later | changed),
        answers,
        first.spec,
        shifting=third.spec != first.spec,
        keeps=bool(first.changed),
    )


def _at_first(module: nn.Module, call: Call, other: Call) -> tuple[_Run, list[str], set[str]]:
    """The first call of a module, what is wrong with what it makes and keeps, and which attributes that is.

    Nothing is where it is the same whatever the inputs are, such as a table, and no weight, which graphs read live.
    """
    with preserved(module):
        first = _run(module, call)
        made = first.changed
        kept = _contents(module, made)
        weights = {name for name, _ in Walk(module).weights}
    if not made:
        return first, [], set()
    if written := weights.intersection(made):
        return first, [f"its calls change {_listed(sorted(written))}"], set(made)
    with preserved(module):
        try:
            _run(module, other)
        except Exception:  # inputs that the module refuses say nothing about what it keeps
            return first, [], set()
        differs = differing(kept, _contents(module, made))
    if differs:
        return first, [f"it keeps {_listed(differs)} of the inputs of a call"], set(made)
    return first, [], set()


def _run(module: nn.Module, call: Call) -> _Run:
    twin = call.twin()
    before, drawn = Walk(module).facts(), numbers()
    versions = [version(tensor) for tensor in twin.tensors]
    arguments = twin.own_arguments()
    leaves, nesting = pytree.tree_flatten(arguments)
    outputs, spec = pytree.tree_flatten(plain_call(module)(*arguments[0], **arguments[1]))
    outputs = [value.detach().clone() if isinstance(value, Tensor) else value for value in outputs]
    said = []
    if drawn != numbers():
        said.append("it draws random numbers")
    written = [
        name
        for name, tensor, given, number in zip(twin.names, twin.tensors, call.tensors, versions, strict=True)
        if (version(tensor) != number if number is not None else not torch.equal(tensor, given))
    ]
    after, nesting_after = pytree.tree_flatten(arguments)
    if written or nesting != nesting_after or any(a is not b for a, b in zip(leaves, after, strict=True)):
        said.append(f"it writes to its argument {_listed(written)}" if written else "it writes to its arguments")
    return _Run(outputs, spec, differing(before, Walk(module).facts()), tuple(said))


def _other(call: Call) -> Call:
    """A call of the same shapes with lower numbers everywhere: valid where the first is, as indices too."""
    changed = []
    for tensor in call.tensors:
        if tensor.is_floating_point() or tensor.is_complex():
            changed.append(tensor * LOWER)
        else:
            changed.append(tensor if tensor.dtype is torch.bool else tensor // 2)
    return replace(call, tensors=tuple(changed))


def _contents(module: nn.Module, attributes: tuple[str, ...]) -> dict[str, Any]:
    """By attribute, what hangs on it, by values: equal for equal tensors."""
    found: dict[str, list[Any]] = {}

    def name(value: Any) -> Any:
        return values_of(value) if isinstance(value, Tensor) else type(value).__name__

    for attribute, value in Walk(module).items:
        if attribute in attributes:
            found.setdefault(attribute, []).append(described(value, name))
    return found


def _listed(names: Sequence[str]) -> str:
    return ", ".join(f"`{name}`" for name in names[:3]) + (", ..." if names[3:] else "")
