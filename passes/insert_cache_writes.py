"""Returns the value of every computed site as an extra output, so that the session can keep it as an anchor.

    h = add(x, f(x)); return (g(h),)    -->    h = add(x, f(x)); w = clone(sub(h, x)); return (g(h), w)

The write is a contiguous copy: an anchor must not alias the caller's output, nor keep a larger storage alive.
Refuses a site whose nodes are not in the graph.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch.fx import GraphModule

from dcc.passes.base import GUIDANCE, Pass, Row, write_name
from dcc.passes.graph import insert_call, node_of, nodes_by_name, output_node

aten = torch.ops.aten


class InsertCacheWrites(Pass):
    """See the file's docstring."""

    name: ClassVar[str] = "insert_cache_writes"
    after: ClassVar[tuple[str, ...]] = ("drop_asserts", "insert_correctors")

    def apply(self, graph_module: GraphModule, row: Row) -> int:
        nodes, output = nodes_by_name(graph_module), output_node(graph_module)
        writes = []
        for site in (site for site in row.computed if site.kind != GUIDANCE):
            for index, port in enumerate(site.ports):
                with graph_module.graph.inserting_before(output):
                    value = node_of(nodes, port.out, self.name)
                    if port.base is not None:
                        value = insert_call(graph_module, aten.sub.Tensor, value, node_of(nodes, port.base, self.name))
                    value = insert_call(graph_module, aten.clone.default, value, memory_format=torch.contiguous_format)
                value.name = write_name(site, index)
                writes.append(value)
        output.args = ((*output.args[0], *writes),)
        return len(writes)
