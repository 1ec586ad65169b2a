"""Fixes the sizes of a graph to those of given inputs: sizes become numbers, every value gets its real shape.

    n = sym_size(x, 1); y = view(x, [n, -1])    -->    y = view(x, [1024, -1])

Lowering needs this, because it makes code for one set of shapes. Refuses nothing; an operator that these sizes do not
fit raises its own error.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg

from dcc.passes.base import LOWERING, Order, Pass
from dcc.torch_internals import pytree


@dataclass(frozen=True)
class Shapes(Order):
    """Tensors, fake or real, that the inputs will be like, in order."""

    values: Sequence[Tensor]


class Specialize(Pass):
    """Makes a graph of symbolic sizes one of fixed sizes."""

    name: ClassVar[str] = "specialize"
    stage: ClassVar[str] = LOWERING
    takes = Shapes

    def apply(self, graph_module: GraphModule, order: Shapes) -> int:
        before = len(graph_module.graph.nodes)
        graph_module.graph = specialize(graph_module, order.values).graph
        return before - len(graph_module.graph.nodes)


def specialize(graph_module: GraphModule, values: Sequence[Tensor]) -> GraphModule:
    """A copy for inputs like `values` (fake or real tensors, one per placeholder), with metas of the same sizes."""
    graph, copies = Graph(), {}
    numbers: dict[Node, Any] = {}  # nodes that are sizes, or made of sizes
    known: dict[Node, Any] = {}
    inputs = iter(values)
    modules = dict(graph_module.named_modules())

    def copied(value: Any) -> Any:
        return map_arg(value, lambda node: numbers[node] if node in numbers else copies[node])

    for node in graph_module.graph.nodes:
        if node.op == "placeholder":
            known[node] = next(inputs)
        elif node.op == "output":
            graph.output(copied(node.args[0]))
            break
        else:
            args, kwargs = map_arg((node.args, dict(node.kwargs)), known.__getitem__)
            function = modules[node.target] if node.op == "call_module" else node.target
            known[node] = function(*args, **kwargs)
            if not any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(known[node])):
                numbers[node] = known[node]
                continue
        copies[node] = graph.create_node(node.op, node.target, copied(node.args), copied(dict(node.kwargs)), node.name)
        copies[node].meta = {**node.meta, "val": known[node]}
    return GraphModule(graph_module, graph)
