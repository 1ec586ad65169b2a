"""Keeps what guidance adds to a merged batch, and makes the unconditional half from it where only the other half runs.

    y = f(x); return (y,)                         x is [unconditional; conditional]
--> computed:  u, c = chunk(y, 2); return (y, sub(u, c))
--> forecast:  x is the conditional half, A0 and coefficients are inputs;
               u = add(y, combine(coefficients, 0, [A0], True)); return (cat([u, y]),)

The caller hands over the conditional half of every input of a forecast row. Leaves alone rows that have no guidance
site. Refuses a guidance site whose node is not in the graph.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch.fx import GraphModule, Node

from dcc.errors import PassError
from dcc.passes.base import Group, Order, Pass, Site, Table
from dcc.passes.forms import coefficient_input, insert_read
from dcc.passes.graph import insert_call, nodes_by_name, output_node, returned, shape
from dcc.passes.values import Anchor, Write, declare, emit

aten = torch.ops.aten


@dataclass(frozen=True)
class Guidance(Order):
    """The guidance sites that are kept, and the groups of those that are forecast, with the size of the table."""

    kept: tuple[Site, ...] = ()
    groups: tuple[Group, ...] = ()
    table: Table = field(default_factory=Table)


class InsertGuidance(Pass):
    """Keeps what guidance adds, or makes the unconditional half of the batch from it."""

    name: ClassVar[str] = "insert_guidance"
    takes = Guidance
    after: ClassVar[tuple[str, ...]] = ("insert_cache_reads",)

    def apply(self, graph_module: GraphModule, order: Guidance) -> int:
        output, edits = output_node(graph_module), 0
        for site in order.kept:
            value = self._own(graph_module, site, output)
            with graph_module.graph.inserting_before(output):
                kept = insert_call(graph_module, aten.sub.Tensor, *_halves(graph_module, value))
            emit(graph_module, Write(site.name, 0), kept)
            edits += 1
        for group in order.groups:
            for site in group.sites:
                self._join(graph_module, self._own(graph_module, site, output), site, group, order.table)
                edits += 1
        return edits

    def _own(self, graph_module: GraphModule, site: Site, output: Node) -> Node:
        """The node of the denoiser's output, or of what forecasts it. Raises PassError for another graph's site."""
        if site.ports[0].out not in nodes_by_name(graph_module):
            raise PassError(f"{self.name}: the graph has no node {site.ports[0].out!r}; the site is another capture's")
        return returned(graph_module)[0]

    @staticmethod
    def _join(graph_module: GraphModule, value: Node, site: Site, group: Group, table: Table) -> None:
        output = output_node(graph_module)
        coefficients = coefficient_input(graph_module, table, shape(value)[0])
        like = torch.empty_like(value.meta["val"], memory_format=torch.contiguous_format)
        # these anchors have half the batch already, so nothing has to be cut from them
        anchors = [declare(graph_module, Anchor(site.name, 0, age), like) for age in range(table.anchors)]
        with graph_module.graph.inserting_before(output):
            added = insert_read(graph_module, group, site, site.ports[0], coefficients, anchors)
            unconditional = insert_call(graph_module, aten.add.Tensor, value, added)
            joined = insert_call(graph_module, aten.cat.default, [unconditional, value])
        output.args = ((joined, *returned(graph_module)[1:]),)


def _halves(graph_module: GraphModule, value: Node) -> list[Node]:
    """The two halves of a batch. Their metas keep the sizes of the whole: halving a symbolic size would fix it."""
    halves = graph_module.graph.call_function(aten.chunk.default, (value, 2))
    halves.meta["val"] = [value.meta["val"], value.meta["val"]]
    parts = [graph_module.graph.call_function(operator.getitem, (halves, index)) for index in (0, 1)]
    for part in parts:
        part.meta["val"] = value.meta["val"]
    return parts
