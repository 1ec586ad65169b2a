"""Replaces every use of a forecast site by a read of its anchors.

    h = add(x, f(x)); return (g(h),)
-->
    anchors A0, A1 and coefficients c are inputs;  r = combine(c, 0, [A0, A1], True);  return (g(add(x, r)),)

A form (forms.py) makes the read from several rows of coefficients. A node that keeps a computed site's value still
reads the true value, whatever is forecast around it. What only `h` needed is left dead. Sites are replaced from the
last to the first, so that a residual's base that is itself a forecast site is replaced too.

Refuses a site whose nodes are not in the graph, and two sites on one node.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from dcc.errors import PassError
from dcc.passes.base import Group, Order, Pass, Port, Site, Table
from dcc.passes.forms import coefficient_input, insert_read
from dcc.passes.graph import (
    KEEPS,
    REPLACED,
    in_graph_order,
    insert_call,
    node_of,
    nodes_by_name,
    returned,
    shape,
)
from dcc.passes.same_sizes import carries_batch
from dcc.passes.values import Anchor, declare

aten = torch.ops.aten


@dataclass(frozen=True)
class Reads(Order):
    """The groups of sites that are forecast, and the size of the coefficient table that weighs their anchors."""

    groups: tuple[Group, ...]
    table: Table


class InsertCacheReads(Pass):
    """Makes every use of a forecast site a use of its forecast."""

    name: ClassVar[str] = "insert_cache_reads"
    takes = Reads
    after: ClassVar[tuple[str, ...]] = ("insert_cache_writes",)

    def apply(self, graph_module: GraphModule, order: Reads) -> int:
        nodes = nodes_by_name(graph_module)
        ports: dict[str, tuple[Group, Site, int, Port]] = {}
        for group in order.groups:
            for site in group.sites:
                for index, port in enumerate(site.ports):
                    if port.out in ports:
                        other = ports[port.out][1].name
                        raise PassError(f"{self.name}: {other!r} and {site.name!r} both forecast the node {port.out!r}")
                    node_of(nodes, port.out, self.name)
                    node_of(nodes, port.base or port.out, self.name)
                    ports[port.out] = (group, site, index, port)
        if not ports:
            return 0
        batch = shape(next(iter(returned(graph_module))))[0]
        coefficients = coefficient_input(graph_module, order.table, batch)
        for name in reversed(in_graph_order(graph_module, ports)):
            group, site, index, port = ports[name]
            like, batched = _anchor_like(nodes[name], nodes, port), carries_batch(graph_module, nodes[name])
            anchors = [
                declare(graph_module, Anchor(site.name, index, age, batched), like)
                for age in range(order.table.anchors)
            ]
            out = nodes[name]
            with graph_module.graph.inserting_after(out):
                value = insert_read(graph_module, group, site, port, coefficients, anchors)
            if port.base is not None:
                with graph_module.graph.inserting_after(value):
                    value = insert_call(graph_module, aten.add.Tensor, nodes[port.base], value)
            out.replace_all_uses_with(value, delete_user_cb=lambda user, own=name: user.meta.get(KEEPS) != own)
            out.meta[REPLACED] = value
        return len(ports)


def _anchor_like(out: Node, nodes: dict[str, Node], port: Port) -> Tensor:
    value = out.meta["val"]
    if port.base is not None:
        value = value - nodes[port.base].meta["val"]
    return torch.empty_like(value, memory_format=torch.contiguous_format)
