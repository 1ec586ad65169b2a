"""Replaces every use of a forecast site by a read of its anchors.

    h = add(x, f(x)); return (g(h),)
-->
    anchors A0, A1 and coefficients c are inputs;  r = combine(c, 0, [A0, A1], True);  return (g(add(x, r)),)

A form (forms.py) makes the read of more rows of coefficients than one. What only `h` needed is left dead. Sites are
replaced from the last to the first, so that a residual's base that is itself a forecast site is replaced too.

Refuses a site whose nodes are not in the graph, and two sites on one node.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from dcc.errors import PassError
from dcc.passes.base import GUIDANCE, Pass, Port, Row, Site, anchor_name, write_name
from dcc.passes.forms import insert_read
from dcc.passes.graph import (
    COEFFICIENTS,
    REPLACED,
    add_placeholder,
    in_graph_order,
    insert_call,
    node_of,
    nodes_by_name,
    output_node,
    shape,
)

aten = torch.ops.aten


class InsertCacheReads(Pass):
    """See the file's docstring."""

    name: ClassVar[str] = "insert_cache_reads"
    after: ClassVar[tuple[str, ...]] = ("insert_cache_writes",)

    def apply(self, graph_module: GraphModule, row: Row) -> int:
        nodes = nodes_by_name(graph_module)
        ports: dict[str, tuple[int, Site, int, Port]] = {}
        for group, sites in enumerate(row.forecast):
            for site in (site for site in sites if site.kind != GUIDANCE):
                for index, port in enumerate(site.ports):
                    if port.out in ports:
                        other = ports[port.out][1].name
                        raise PassError(f"{self.name}: {other!r} and {site.name!r} both forecast the node {port.out!r}")
                    node_of(nodes, port.out, self.name)
                    node_of(nodes, port.base or port.out, self.name)
                    ports[port.out] = (group, site, index, port)
        if not ports:
            return 0
        batch = shape(next(iter(output_node(graph_module).args[0])))[0]
        any_value = nodes[next(iter(ports))].meta["val"]
        coefficients = add_placeholder(
            graph_module,
            COEFFICIENTS,
            any_value.new_empty((row.start(len(row.forecast)), batch, row.anchors), dtype=torch.float32),
        )
        for name in reversed(in_graph_order(graph_module, ports)):
            group, site, index, port = ports[name]
            anchors = [
                add_placeholder(graph_module, anchor_name(site, index, age), _anchor_like(nodes[port.out], nodes, port))
                for age in range(row.anchors)
            ]
            own_writes = {_reader_for_write(nodes, other, i) for other in row.computed for i in _ends_in(other, name)}
            out = nodes[name]
            with graph_module.graph.inserting_after(out):
                value = insert_read(graph_module, row, group, site, port, coefficients, anchors)
            if port.base is not None:
                with graph_module.graph.inserting_after(value):
                    value = insert_call(graph_module, aten.add.Tensor, nodes[port.base], value)
            out.replace_all_uses_with(value, delete_user_cb=lambda user, own=own_writes: user not in own)
            out.meta[REPLACED] = value
        return len(ports)


def _ends_in(site: Site, name: str) -> list[int]:
    return [index for index, port in enumerate(site.ports) if port.out == name]


def _reader_for_write(nodes: dict[str, Node], site: Site, index: int) -> Node | None:
    """What reads a computed site's value for its write: it stays the true one, whatever is forecast around it."""
    write = nodes.get(write_name(site, index))
    return write if write is None or site.ports[index].base is None else write.args[0]


def _anchor_like(out: Node, nodes: dict[str, Node], port: Port) -> Tensor:
    value = out.meta["val"]
    if port.base is not None:
        value = value - nodes[port.base].meta["val"]
    return torch.empty_like(value, memory_format=torch.contiguous_format)
