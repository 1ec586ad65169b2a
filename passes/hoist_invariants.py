"""Replaces values that no step changes by graph inputs, which are computed once a session.

    k = linear(text, w); return (attention(x, k),)    -->    (x, once_k): return (attention(x, once_k),)

Which values is the row's choice (`invariants.worth_hoisting`); what only they needed is left dead. Leaves a value alone
that nothing takes any more. Refuses a value whose node is not in the graph, and one that is no tensor.
"""

from __future__ import annotations

from typing import ClassVar

from torch.fx import GraphModule

from dcc.errors import PassError
from dcc.passes.base import Pass, Row, once_name
from dcc.passes.graph import add_placeholder, is_tensor, node_of, nodes_by_name


class HoistInvariants(Pass):
    """See the file's docstring."""

    name: ClassVar[str] = "hoist_invariants"
    after: ClassVar[tuple[str, ...]] = ("insert_cache_reads", "insert_guidance", "insert_measures", "insert_forecasts")
    optional: ClassVar[bool] = True

    def apply(self, graph_module: GraphModule, row: Row) -> int:
        nodes, edits = nodes_by_name(graph_module), 0
        for name in row.hoisted:
            node = node_of(nodes, name, self.name)
            if not is_tensor(node):
                raise PassError(f"{self.name}: node {name!r} is no tensor; only tensors are held between steps")
            if node.users:
                node.replace_all_uses_with(add_placeholder(graph_module, once_name(name), node.meta["val"]))
                edits += 1
        return edits
