"""Replaces values that no step changes by graph inputs, which are computed once per session.

    k = linear(text, w); return (attention(x, k),)    -->    (x, once_k): return (attention(x, once_k),)

The caller chooses the values (`invariants.worth_hoisting`); what only they needed is left dead. Leaves alone a value
that nothing uses any more. Refuses a value whose node is not in the graph, and one that is no tensor.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch.fx import GraphModule

from dcc.errors import PassError
from dcc.passes.base import Order, Pass
from dcc.passes.graph import is_tensor, node_of, nodes_by_name
from dcc.passes.values import Once, declare


@dataclass(frozen=True)
class Hoists(Order):
    """Names of the nodes whose values become graph inputs."""

    nodes: tuple[str, ...]


class HoistInvariants(Pass):
    """Makes graph inputs of values that no step changes."""

    name: ClassVar[str] = "hoist_invariants"
    takes = Hoists
    after: ClassVar[tuple[str, ...]] = ("insert_cache_reads", "insert_guidance", "insert_measures", "insert_forecasts")
    optional: ClassVar[bool] = True

    def apply(self, graph_module: GraphModule, order: Hoists) -> int:
        nodes, edits = nodes_by_name(graph_module), 0
        for name in order.nodes:
            node = node_of(nodes, name, self.name)
            if not is_tensor(node):
                raise PassError(f"{self.name}: node {name!r} is no tensor; only tensors are held between steps")
            if node.users:
                node.replace_all_uses_with(declare(graph_module, Once(name), node.meta["val"]))
                edits += 1
        return edits
