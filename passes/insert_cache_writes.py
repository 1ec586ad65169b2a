"""Returns the value of every computed site as an extra output, so that the session can keep it as an anchor.

    h = add(x, f(x)); return (g(h),)    -->    h = add(x, f(x)); w = clone(sub(h, x)); return (g(h), w)

The write is a contiguous copy: an anchor must not alias the caller's output, nor keep a larger storage alive.
Refuses a site whose nodes are not in the graph.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.fx import GraphModule

from dcc.passes.base import Order, Pass, Site
from dcc.passes.graph import KEEPS, insert_call, node_of, nodes_by_name, output_node
from dcc.passes.values import Write, emit

aten = torch.ops.aten


@dataclass(frozen=True)
class Writes(Order):
    """The sites that are computed and kept."""

    sites: tuple[Site, ...]


class InsertCacheWrites(Pass):
    """Returns the values of computed sites, from which later forecasts are made."""

    name: ClassVar[str] = "insert_cache_writes"
    takes = Writes
    after: ClassVar[tuple[str, ...]] = ("drop_asserts", "insert_correctors")

    def apply(self, graph_module: GraphModule, order: Writes) -> int:
        nodes, output = nodes_by_name(graph_module), output_node(graph_module)
        edits = 0
        for site in order.sites:
            for index, port in enumerate(site.ports):
                with graph_module.graph.inserting_before(output):
                    reader, value = None, node_of(nodes, port.out, self.name)
                    if port.base is not None:
                        base = node_of(nodes, port.base, self.name)
                        value = reader = insert_call(graph_module, aten.sub.Tensor, value, base)
                    value = insert_call(graph_module, aten.clone.default, value, memory_format=torch.contiguous_format)
                (reader or value).meta[KEEPS] = port.out
                emit(graph_module, Write(site.name, index), value)
                edits += 1
        return edits
