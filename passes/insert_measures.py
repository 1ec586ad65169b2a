"""Returns what a run-time trigger looks at: distances of watched values to what they were, and the values themselves.

    h = add(x, f(x)); return (g(h),)
-->
    (x, seen_h_previous): h = add(x, f(x)); d = distance(h, seen_h_previous, "rel_l1", b); w = clone(h)
    return (g(h), w, d)

Where the reference is a forecast, it is combined from the values seen at computed steps, with the coefficient rows that
follow those of the row's own forecasts. Watched values are returned first, then distances, in the order in which the
row lists them. Refuses a site whose nodes are not in the graph.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.fx import GraphModule, Node

from dcc.kernels import combine, distance
from dcc.passes.base import Look, Order, Pass, Port
from dcc.passes.graph import current, insert_call, is_tensor, node_of, nodes_by_name, output_node, returned, shape
from dcc.passes.values import Coefficients, Distance, Seen, Watched, declare, emit, input_node

aten = torch.ops.aten


@dataclass(frozen=True)
class Measures(Order):
    """Values to return, which a trigger compares with later ones, and distances to measure in this call.

    `anchors` is how many values a drafted forecast combines.
    """

    watched: tuple[Port, ...]
    looks: tuple[Look, ...]
    anchors: int


class InsertMeasures(Pass):
    """Returns what a trigger reads, and the values that it will compare later ones with."""

    name: ClassVar[str] = "insert_measures"
    takes = Measures
    after: ClassVar[tuple[str, ...]] = ("insert_cache_reads",)

    def apply(self, graph_module: GraphModule, order: Measures) -> int:
        if not order.watched:
            return 0
        nodes, output = nodes_by_name(graph_module), output_node(graph_module)
        size = _batched_input(graph_module)
        values: dict[Port, Node] = {}
        for port in order.watched:
            with graph_module.graph.inserting_before(output):
                value = current(node_of(nodes, port.out, self.name))
                if port.base is not None:
                    base = current(node_of(nodes, port.base, self.name))
                    value = insert_call(graph_module, aten.sub.Tensor, value, base)
                kept = insert_call(graph_module, aten.clone.default, value, memory_format=torch.contiguous_format)
            values[port] = value
            emit(graph_module, Watched(port), kept)
        with graph_module.graph.inserting_before(output):
            batch = insert_call(graph_module, aten.sym_size.int, size, 0) if order.looks else None
        for look in order.looks:
            references = self._references(graph_module, look, values[look.port], order.anchors)
            with graph_module.graph.inserting_before(output):
                other = references[0] if references else None
                if look.against == "forecast":
                    table, last = self._one_more_row(graph_module, references[0], order.anchors)
                    other = insert_call(graph_module, combine.reference, table, last, references, True)
                number = insert_call(graph_module, distance.reference, values[look.port], other, look.norm, batch)
            emit(graph_module, Distance(look), number)
        return len(order.watched) + len(order.looks)

    @staticmethod
    def _references(graph_module: GraphModule, look: Look, value: Node, anchors: int) -> list[Node]:
        """The graph inputs that hold what the look compares with."""
        ages = {"zero": (), "forecast": range(anchors), "anchor": (0,), "older": (1,), "previous": ("previous",)}
        like = torch.empty_like(value.meta["val"], memory_format=torch.contiguous_format)
        return [declare(graph_module, Seen(look.port, key), like) for key in ages[look.against]]

    @staticmethod
    def _one_more_row(graph_module: GraphModule, like: Node, anchors: int) -> tuple[Node, int]:
        """The coefficient input with one more row, and that row's index; declared here where no forecast did so."""
        table = input_node(graph_module, Coefficients())
        rows = 0 if table is None else int(table.meta["val"].shape[0])
        value = like.meta["val"].new_empty((rows + 1, shape(like)[0], anchors), dtype=torch.float32)
        if table is None:
            return declare(graph_module, Coefficients(), value), rows
        table.meta["val"] = value
        return table, rows


def _batched_input(graph_module: GraphModule) -> Node:
    """A graph input that is as long as the output's batch; the output itself would keep the whole graph alive."""
    output = returned(graph_module)[0]
    inputs = [n for n in graph_module.graph.nodes if n.op == "placeholder" and is_tensor(n) and shape(n)]
    return next((n for n in inputs if str(shape(n)[0]) == str(shape(output)[0])), output)
