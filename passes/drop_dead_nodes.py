"""Removes what no output needs, including inputs that nothing reads.

    (x, w, A0): h = linear(x, w); return (g(A0),)    -->    (A0): return (g(A0),)

The graph is functional (passes/README.md), so a node without users has no effect. This is where a forecast saves
its work; the runtime binds inputs by name, so a dropped input costs nothing.
"""

from __future__ import annotations

from typing import ClassVar

from torch.fx import GraphModule

from dcc.passes.base import Order, Pass


class DropDeadNodes(Pass):
    """Takes out what nothing needs. Never drops an output."""

    name: ClassVar[str] = "drop_dead_nodes"
    after: ClassVar[tuple[str, ...]] = ("drop_asserts", "insert_cache_writes", "insert_cache_reads")
    optional: ClassVar[bool] = True

    def apply(self, graph_module: GraphModule, order: Order | None = None) -> int:
        dropped = 0
        for node in reversed(graph_module.graph.nodes):
            if node.op != "output" and not node.users:
                graph_module.graph.erase_node(node)
                dropped += 1
        return dropped
