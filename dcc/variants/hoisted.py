"""What no step changes is computed once a session: the graph that computes it, and the values that a stream holds.

A prologue is the captured graph cut down to the values worth holding (passes/invariants.py). A stream runs it when a
variant first takes one of them, and again where an input that the values were made from is another tensor or was
written to since: a new weight takes effect at once, as it does without hoisting.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.fx import GraphModule

from dcc.capture.captured import Captured
from dcc.discover.sites import Sites
from dcc.passes.base import Site, once_name
from dcc.passes.invariants import invariants, worth_hoisting
from dcc.passes.split_at import prefix
from dcc.record.call import Call


@dataclass
class Once:
    """The values of one prologue run, by the name of the graph input that takes them, and what they were made from."""

    marks: tuple[Any, ...]
    values: dict[str, Tensor]
    made_from: tuple[Tensor, ...] = ()  # held so that their addresses, which are among the marks, are not given again


@dataclass(frozen=True)
class Prologue:
    """The graph that computes once what no step changes; without `names` there is nothing to compute.

    `fixed` are the inputs whose values it reads; others give their sizes only. It runs eagerly: lowering takes longer
    than one run a session saves.
    """

    graph_module: GraphModule | None = None
    inputs: tuple[str, ...] = ()
    names: tuple[str, ...] = ()  # of the graph inputs of variants that take its outputs, in order
    fixed: tuple[str, ...] = ()

    def bound(
        self,
        taken: Collection[str],
        given: Call,
        captured: Captured,
        values: Mapping[str, Tensor],
        held: dict[Any, Once],
        weigh: Callable[[], None],
    ) -> dict[str, Tensor]:
        """The held values by the name of the graph input; none where a variant, whose inputs are `taken`, needs none.

        `given` is the call as the caller made it, whose tensors' identity counts, `values` the graph inputs by name,
        `held` what the stream holds, by the shapes of the call; `weigh` is called after a run.
        """
        if not any(name in taken for name in self.names):
            return {}
        own = {captured.inputs[p]: t for p, t in zip(given.names, given.tensors, strict=True) if p in captured.inputs}
        marks = tuple(_mark(own.get(name, values[name])) for name in self.fixed)
        shapes = given.shapes
        if shapes not in held or held[shapes].marks != marks:
            outputs = self.graph_module(*(values[name] for name in self.inputs))
            made_from = tuple(own[name] for name in self.fixed if name in own)
            held[shapes] = Once(marks, dict(zip(self.names, outputs, strict=True)), made_from)
            weigh()
        return held[shapes].values


def hoisted(captured: Captured, sites: Sites, selected: Iterable[Iterable[Site]]) -> tuple[str, ...]:
    """Names of the captured graph's nodes to compute once a session; none where it is not known which inputs move.

    Values of the `selected` sites stay: they are cached as the plan says.
    """
    if captured.problem or not captured.varying:
        return ()
    kept = {port.out for group in selected for site in group for port in site.ports}
    return worth_hoisting(captured.graph_module, sites.costs, moving_inputs(captured), kept)


def moving_inputs(captured: Captured) -> set[str]:
    """Graph inputs that change from step to step, or that are made anew at every step though their values stay."""
    return {name for path, name in captured.inputs.items() if path not in captured.fixed}


def prologue(captured: Captured, names: Sequence[str]) -> Prologue:
    """The prologue of these nodes of the captured graph."""
    if not names:
        return Prologue()
    graph_module = prefix(captured.graph_module, names)
    read = invariants(graph_module, moving_inputs(captured))
    inputs = tuple(node.name for node in graph_module.graph.nodes if node.op == "placeholder")
    fixed = tuple(name for name in inputs if name in read)
    return Prologue(graph_module, inputs, tuple(map(once_name, names)), fixed)


def held_bytes(held: dict[Any, Once]) -> int:
    """Bytes of memory that the values of a stream take; views of one value count once."""
    storages = {}
    for tensor in (tensor for once in held.values() for tensor in once.values.values()):
        storages[tensor.device, tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    return sum(storages.values())


def _mark(tensor: Tensor) -> tuple[Any, ...]:
    """What tells a tensor from another one, and from itself before it was written to."""
    version = None if tensor.is_inference() else tensor._version
    return tensor.data_ptr(), version, tensor.shape, tensor.stride(), tensor.dtype
