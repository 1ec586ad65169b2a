"""Inserts cheap linear maps of values, to which the values of corrected sites are then kept relative.

    h = linear(x, w); return (gelu(h),)
-->
    factors f0 [r, C] and f1 [D, r] are inputs;  m = linear(linear(x, f0), f1);  h = linear(x, w); return (gelu(h),)

A site whose port has m as its base is written as h - m and forecast as m + its anchor: what has changed in x since then
is not forgotten, but goes through the small map. Refuses a value that is not in the graph or has other channels.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch.fx import GraphModule, Node

from dcc.errors import PassError
from dcc.passes.base import Correction, Pass, Row
from dcc.passes.graph import add_placeholder, insert_call, node_of, nodes_by_name, shape

aten = torch.ops.aten


class InsertCorrectors(Pass):
    """See the file's docstring."""

    name: ClassVar[str] = "insert_correctors"
    after: ClassVar[tuple[str, ...]] = ("drop_asserts",)

    def apply(self, graph_module: GraphModule, row: Row) -> int:
        for correction in row.corrections:
            source = node_of(nodes_by_name(graph_module), correction.source, self.name)
            if shape(source)[-1] != correction.shapes[0][-1]:
                raise PassError(
                    f"{self.name}: {correction.site!r}: a map of {correction.shapes[0][-1]} channels does not fit the "
                    f"value {correction.source!r} of {shape(source)[-1]}"
                )
            _insert(graph_module, correction, source)
        return len(row.corrections)


def _insert(graph_module: GraphModule, correction: Correction, source: Node) -> None:
    like = source.meta["val"]
    names = zip(correction.inputs, correction.shapes, strict=True)
    factors = [add_placeholder(graph_module, name, like.new_empty(size)) for name, size in names]
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
