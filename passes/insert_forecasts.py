"""Spells every cache read out as arithmetic, which Inductor fuses with what follows.

    r = combine(c, 0, [A0, A1], True)
-->
    rows = select(c, 0, 0); k0, k1 = view(select(rows, 1, 0), [b, 1, 1]), view(select(rows, 1, 1), [b, 1, 1])
    r = to(add(mul(to(A0, float32), k0), mul(to(A1, float32), k1)), dtype of A0)

Accumulates in float32, or complex64, whatever the dtype of the anchors. Leaves other calls alone.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch.fx import GraphModule, Node

from dcc.kernels import combine
from dcc.passes.base import Order, Pass
from dcc.passes.graph import insert_call, shape
from dcc.torch_internals import to_copy

aten = torch.ops.aten


def is_cache_read(node: Node) -> bool:
    """Whether `node` is a read that insert_cache_reads left."""
    return node.op == "call_function" and node.target is combine.reference


class InsertForecasts(Pass):
    """Leaves Inductor nothing but plain arithmetic."""

    name: ClassVar[str] = "insert_forecasts"
    after: ClassVar[tuple[str, ...]] = ("insert_cache_reads",)
    optional: ClassVar[bool] = True

    def apply(self, graph_module: GraphModule, order: Order | None = None) -> int:
        reads = [node for node in graph_module.graph.nodes if is_cache_read(node)]
        for read in reads:
            with graph_module.graph.inserting_before(read):
                read.replace_all_uses_with(_spell_out(graph_module, *read.args))
            graph_module.graph.erase_node(read)
        return len(reads)


def _spell_out(
    graph_module: GraphModule, coefficients: Node, group: int, anchors: list[Node], per_sample: bool
) -> Node:
    def call(target, *args, **kwargs):
        return insert_call(graph_module, target, *args, **kwargs)

    dtype = anchors[0].meta["val"].dtype
    wide = torch.complex64 if dtype.is_complex else torch.float32

    def widened(node: Node) -> Node:
        return node if dtype == wide else call(to_copy, node, dtype=wide)

    rows = call(aten.select.int, coefficients, 0, group)
    if not per_sample:
        rows = call(aten.slice.Tensor, rows, 0, 0, 1)
    total: Any = None
    for age, anchor in enumerate(anchors):
        dim = len(shape(anchor))
        sizes = [-1] + [1] * (dim - 1) if dim else []
        column = call(aten.view.default, call(aten.select.int, rows, 1, age), sizes)
        term = call(aten.mul.Tensor, widened(anchor), column)
        total = term if total is None else call(aten.add.Tensor, total, term)
    return total if dtype == wide else call(to_copy, total, dtype=dtype)
