"""Inserts cheap linear maps of values, to which the values of corrected sites are then kept relative.

    h = linear(x, w); return (gelu(h),)
-->
    factors f0 [r, C] and f1 [D, r] are inputs;  m = linear(linear(x, f0), f1);  h = linear(x, w); return (gelu(h),)

A site whose port has m as its base is written as h - m and forecast as m + its anchor: a change of x since that anchor
still counts, through the small map. Refuses a value that is not in the graph, or has other channels than the map.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.fx import GraphModule, Node

from dcc.errors import PassError
from dcc.passes.base import Correction, Order, Pass
from dcc.passes.graph import insert_call, node_of, nodes_by_name, shape
from dcc.passes.values import Factor, declare

aten = torch.ops.aten


@dataclass(frozen=True)
class Corrections(Order):
    """The maps that sites are kept relative to."""

    maps: tuple[Correction, ...]


class InsertCorrectors(Pass):
    """Gives every corrected site the map that it is kept relative to."""

    name: ClassVar[str] = "insert_correctors"
    takes = Corrections
    after: ClassVar[tuple[str, ...]] = ("drop_asserts",)

    def apply(self, graph_module: GraphModule, order: Corrections) -> int:
        for correction in order.maps:
            source = node_of(nodes_by_name(graph_module), correction.source, self.name)
            if shape(source)[-1] != correction.shapes[0][-1]:
                raise PassError(
                    f"{self.name}: {correction.site!r}: a map of {correction.shapes[0][-1]} channels does not fit the "
                    f"value {correction.source!r} of {shape(source)[-1]}"
                )
            _insert(graph_module, correction, source)
        return len(order.maps)


def _insert(graph_module: GraphModule, correction: Correction, source: Node) -> None:
    like = source.meta["val"]
    factors = [
        declare(graph_module, Factor(correction, index), like.new_empty(size))
        for index, size in enumerate(correction.shapes)
    ]
    matrices = [factor for factor in factors if len(shape(factor)) == 2]
    biases: list[Node | None] = [None] * (len(matrices) - 1) + [factors[-1] if correction.bias else None]
    here = source.next
    while here.op == "placeholder":
        here = here.next
    value = source
    with graph_module.graph.inserting_before(here):
        for matrix, bias in zip(matrices, biases, strict=True):
            value = insert_call(graph_module, aten.linear.default, value, matrix, bias)
    value.name = correction.name
