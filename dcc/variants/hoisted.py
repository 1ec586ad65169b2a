"""What no step changes is computed once per request: the graph that computes it, and the values that a stream holds.

A prologue is the captured graph cut down to the values worth holding (passes/invariants.py). A stream runs it when a
variant first takes one of them, and again where an input that the values were made from is another tensor or was
written to since: a new weight takes effect at once, as it does without hoisting.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.fx import GraphModule

from dcc.capture.settings import Setting
from dcc.discover.sites import Sites
from dcc.passes.base import Site
from dcc.passes.invariants import invariants, worth_hoisting
from dcc.passes.split_at import prefix
from dcc.passes.values import VALUE, Argument, Input, Served
from dcc.record.call import Call
from dcc.torch_internals import version


@dataclass
class Held:
    """The values of one prologue run, by the node that makes each, and what they were made from."""

    marks: tuple[Any, ...]
    values: dict[str, Tensor]
    made_from: tuple[Tensor, ...] = ()  # held so that their addresses, which are among the marks, are not given again


@dataclass(frozen=True)
class Prologue:
    """The graph that computes once what no step changes; without `names` there is nothing to compute.

    `inputs` are what it takes, `names` the nodes of the captured graph whose values it gives, `fixed` the indices of
    the inputs whose values it reads; of others it reads the sizes only. It runs eagerly, because lowering takes longer
    than one run per request saves.
    """

    graph_module: GraphModule | None = None
    inputs: tuple[Input, ...] = ()
    names: tuple[str, ...] = ()
    fixed: tuple[int, ...] = ()

    def values(
        self, served: Served, given: Call, held: dict[Any, Held], weigh: Callable[[], None]
    ) -> dict[str, Tensor]:
        """The held values by node; they are computed where they are not held yet.

        `given` is the call as the caller made it, because the identity of its tensors counts; `held` is what the stream
        holds, by the shapes of the call; `weigh` is called after a run.
        """
        own = dict(zip(given.names, given.tensors, strict=True))
        taken = [self.inputs[index] for index in self.fixed]
        read = [own[i.path] if isinstance(i, Argument) else i.tensor(served) for i in taken]
        marks = tuple(map(_mark, read))
        known = held.get(given.shapes)
        if known is None or known.marks != marks:
            assert self.graph_module is not None  # there are names
            outputs = self.graph_module(*(value.tensor(served) for value in self.inputs))
            made_from = tuple(t for i, t in zip(taken, read, strict=True) if isinstance(i, Argument | Setting))
            known = held[given.shapes] = Held(marks, dict(zip(self.names, outputs, strict=True)), made_from)
            weigh()
        return known.values


def hoisted(sites: Sites, selected: Iterable[Iterable[Site]]) -> tuple[str, ...]:
    """Names of the captured graph's nodes to compute once per request; none where it is not known which inputs move.

    Values of the `selected` sites stay: they are cached as the plan says.
    """
    if sites.captured.problem or not sites.varying:
        return ()
    kept = {port.out for group in selected for site in group for port in site.ports}
    return worth_hoisting(sites.graph_module, sites.costs, moving_inputs(sites), kept)


def moving_inputs(sites: Sites) -> set[str]:
    """Graph inputs that change from step to step, or that are made anew at every step though their values stay."""
    return {name for path, name in sites.captured.inputs.items() if path not in sites.kept}


def prologue(sites: Sites, names: Sequence[str]) -> Prologue:
    """The prologue of these nodes of the captured graph."""
    if not names:
        return Prologue()
    graph_module = prefix(sites.graph_module, names)
    read = invariants(graph_module, moving_inputs(sites))
    placeholders = [node for node in graph_module.graph.nodes if node.op == "placeholder"]
    fixed = tuple(index for index, node in enumerate(placeholders) if node.name in read)
    return Prologue(graph_module, tuple(node.meta[VALUE] for node in placeholders), tuple(names), fixed)


def held_bytes(held: dict[Any, Held]) -> int:
    """Bytes of memory that the values of a stream take; views of one value count once."""
    storages = {}
    for tensor in (tensor for once in held.values() for tensor in once.values.values()):
        storages[tensor.device, tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    return sum(storages.values())


def _mark(tensor: Tensor) -> tuple[Any, ...]:
    """What tells a tensor from another one, and from itself before it was written to."""
    return tensor.data_ptr(), version(tensor), tensor.shape, tensor.stride(), tensor.dtype
