"""Keeps what guidance adds to a merged batch, and makes the unconditional half from it where only the other half runs.

    y = f(x); return (y,)                         x is [unconditional; conditional]
--> computed:  u, c = chunk(y, 2); return (y, sub(u, c))
--> forecast:  x is the conditional half, A0 and coefficients are inputs;
               u = add(y, combine(coefficients, 0, [A0], True)); return (cat([u, y]),)

The caller hands over the conditional half of every input of a forecast row. Leaves rows alone that have no guidance
site. Refuses a graph whose first output is not that site's.
"""

from __future__ import annotations

import operator
from typing import ClassVar

import torch
from torch.fx import GraphModule, Node

from dcc.errors import PassError
from dcc.passes.base import GUIDANCE, Pass, Row, Site, anchor_name, write_name
from dcc.passes.forms import insert_read
from dcc.passes.graph import COEFFICIENTS, add_placeholder, insert_call, nodes_by_name, output_node, shape

aten = torch.ops.aten


class InsertGuidance(Pass):
    """See the file's docstring."""

    name: ClassVar[str] = "insert_guidance"
    after: ClassVar[tuple[str, ...]] = ("insert_cache_reads",)

    def apply(self, graph_module: GraphModule, row: Row) -> int:
        output, edits = output_node(graph_module), 0
        for site in (site for site in row.computed if site.kind == GUIDANCE):
            value = self._own(graph_module, site, output)
            with graph_module.graph.inserting_before(output):
                kept = insert_call(graph_module, aten.sub.Tensor, *_halves(graph_module, value))
            kept.name = write_name(site, 0)
            output.args = ((*output.args[0], kept),)
            edits += 1
        for group, sites in enumerate(row.forecast):
            for site in (site for site in sites if site.kind == GUIDANCE):
                self._join(graph_module, self._own(graph_module, site, output), site, group, row)
                edits += 1
        return edits

    def _own(self, graph_module: GraphModule, site: Site, output: Node) -> Node:
        """The denoiser's output, as it is now: itself or what forecasts it."""
        if site.ports[0].out not in nodes_by_name(graph_module):
            raise PassError(f"{self.name}: the graph has no node {site.ports[0].out!r}; the site is another capture's")
        return output.args[0][0]

    @staticmethod
    def _join(graph_module: GraphModule, value: Node, site: Site, group: int, row: Row) -> None:
        output = output_node(graph_module)
        table = nodes_by_name(graph_module).get(COEFFICIENTS)
        if table is None:
            like = value.meta["val"].new_empty(
                (row.start(len(row.forecast)), shape(value)[0], row.anchors), dtype=torch.float32
            )
            table = add_placeholder(graph_module, COEFFICIENTS, like)
        like = torch.empty_like(value.meta["val"], memory_format=torch.contiguous_format)
        anchors = [add_placeholder(graph_module, anchor_name(site, 0, age), like) for age in range(row.anchors)]
        with graph_module.graph.inserting_before(output):
            added = insert_read(graph_module, row, group, site, site.ports[0], table, anchors)
            unconditional = insert_call(graph_module, aten.add.Tensor, value, added)
            joined = insert_call(graph_module, aten.cat.default, [unconditional, value])
        output.args = ((joined, *output.args[0][1:]),)


def _halves(graph_module: GraphModule, value: Node) -> list[Node]:
    """The two halves of a batch. Their recorded sizes stay those of the whole: halving a symbolic size would fix it."""
    halves = graph_module.graph.call_function(aten.chunk.default, (value, 2))
    halves.meta["val"] = [value.meta["val"], value.meta["val"]]
    parts = [graph_module.graph.call_function(operator.getitem, (halves, index)) for index in (0, 1)]
    for part in parts:
        part.meta["val"] = value.meta["val"]
    return parts
