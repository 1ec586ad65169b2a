"""Drops assertions on values, dtypes and shapes that the capture recorded.

    x = linear(h); _assert_tensor_metadata(x, dtype=float32); return x    -->    x = linear(h); return x

An assertion counts as a use, so it would keep alive the computation that a forecast replaces. What assertions guard is
checked once per call by the captured graph's signature instead.
"""

from __future__ import annotations

from typing import ClassVar

from torch.fx import GraphModule, Node

from dcc.passes.base import Order, Pass
from dcc.torch_internals import ASSERTIONS


def is_assertion(node: Node) -> bool:
    """Whether `node` only checks something."""
    return node.op == "call_function" and node.target in ASSERTIONS and not node.users


class DropAsserts(Pass):
    """Takes assertions out. Refuses nothing: a graph without assertions is left as it is."""

    name: ClassVar[str] = "drop_asserts"
    optional: ClassVar[bool] = True

    def apply(self, graph_module: GraphModule, order: Order | None = None) -> int:
        assertions = [node for node in graph_module.graph.nodes if is_assertion(node)]
        for node in assertions:
            graph_module.graph.erase_node(node)
        return len(assertions)
