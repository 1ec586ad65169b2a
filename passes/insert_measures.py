"""Returns what a run-time trigger looks at: distances of watched values to what they were, and the values themselves.

    h = add(x, f(x)); return (g(h),)
-->
    (x, seen_h_previous): h = add(x, f(x)); d = distance(h, seen_h_previous, "rel_l1", b); w = clone(h)
    return (g(h), w, d)

A forecast as the reference is combined from the values seen at computed steps with the coefficient rows behind those of
the row's forecasts. Watched values come first, then distances, in the row's order. Refuses a site whose nodes are not
in the graph.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch.fx import GraphModule, Node

from dcc.kernels import combine, distance
from dcc.passes.base import Look, Pass, Port, Row, look_name, seen_name, watch_name
from dcc.passes.graph import (
    COEFFICIENTS,
    add_placeholder,
    current,
    insert_call,
    is_tensor,
    node_of,
    nodes_by_name,
    output_node,
    shape,
)

aten = torch.ops.aten


class InsertMeasures(Pass):
    """See the file's docstring."""

    name: ClassVar[str] = "insert_measures"
    after: ClassVar[tuple[str, ...]] = ("insert_cache_reads",)

    def apply(self, graph_module: GraphModule, row: Row) -> int:
        if not row.watched:
            return 0
        nodes, output = nodes_by_name(graph_module), output_node(graph_module)
        extra = []
        values: dict[Port, Node] = {}
        with graph_module.graph.inserting_before(output):
            for port in row.watched:
                value = current(node_of(nodes, port.out, self.name))
                if port.base is not None:
                    base = current(node_of(nodes, port.base, self.name))
                    value = insert_call(graph_module, aten.sub.Tensor, value, base)
                kept = insert_call(graph_module, aten.clone.default, value, memory_format=torch.contiguous_format)
                kept.name = watch_name(port)
                values[port] = value
                extra.append(kept)
            size = insert_call(graph_module, aten.sym_size.int, _batched_input(graph_module), 0) if row.looks else None
        seen: dict[str, Node] = {}
        for look in row.looks:
            references = self._references(graph_module, look, values[look.port], row, seen)
            with graph_module.graph.inserting_before(output):
                other = references[0] if references else None
                if look.against == "forecast":
                    table, last = self._one_more_row(graph_module, references[0], row.anchors)
                    other = insert_call(graph_module, combine.reference, table, last, references, True)
                number = insert_call(graph_module, distance.reference, values[look.port], other, look.norm, size)
                number.name = look_name(look)
                extra.append(number)
        output.args = ((*output.args[0], *extra),)
        return len(extra)

    @staticmethod
    def _references(graph_module: GraphModule, look: Look, value: Node, row: Row, seen: dict[str, Node]) -> list[Node]:
        """The graph inputs that hold what the look compares with."""
        ages = {"zero": (), "forecast": range(row.anchors), "anchor": (0,), "older": (1,), "previous": ("previous",)}
        found = []
        for key in ages[look.against]:
            name = seen_name(look.port, key)
            if name not in seen:
                like = torch.empty_like(value.meta["val"], memory_format=torch.contiguous_format)
                seen[name] = add_placeholder(graph_module, name, like)
            found.append(seen[name])
        return found

    @staticmethod
    def _one_more_row(graph_module: GraphModule, like: Node, anchors: int) -> tuple[Node, int]:
        """The coefficient input with one more row, and that row's index; made where no forecast has made it yet."""
        table = nodes_by_name(graph_module).get(COEFFICIENTS)
        rows = 0 if table is None else int(table.meta["val"].shape[0])
        value = like.meta["val"].new_empty((rows + 1, shape(like)[0], anchors), dtype=torch.float32)
        if table is None:
            return add_placeholder(graph_module, COEFFICIENTS, value), rows
        table.meta["val"] = value
        return table, rows


def _batched_input(graph_module: GraphModule) -> Node:
    """A graph input that is as long as the output's batch; the output itself would keep the whole graph alive."""
    output = output_node(graph_module).args[0][0]
    inputs = [n for n in graph_module.graph.nodes if n.op == "placeholder" and is_tensor(n) and shape(n)]
    return next((n for n in inputs if str(shape(n)[0]) == str(shape(output)[0])), output)
