"""Returns small sketches of the values of every site as extra outputs, so that a calibration can compare steps.

    h = add(x, f(x)); return (g(h),)
-->
    s = stack([x, h]); return (g(h), sketch.reference(s, sample), sketch.coordinates(s, sample))

A residual's value and its base are sketched separately: sketches are linear, so their difference is the residual's
sketch, and a base is the value of the block before it. Values of one shape are sketched together, up to TOGETHER
numbers at a time, so that small features cost few calls and large ones do not stay alive. Runs in calibration only, on
eager graphs. Refuses a site whose nodes are not in the graph.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from dcc.kernels import sketch
from dcc.passes.base import Order, Pass, Site
from dcc.passes.graph import in_graph_order, insert_call, node_of, nodes_by_name, output_node, returned, sizes

aten = torch.ops.aten
TOGETHER = 2**18
WIDTHS = {sketch.reference: sketch.SIZE, sketch.coordinates: sketch.COORDINATES}


@dataclass(frozen=True)
class Sketches(Order):
    """The sites to sketch; `sample` names the graph input whose first dimension is the number of samples."""

    sites: tuple[Site, ...]
    sample: str


class InsertSketches(Pass):
    """Returns a sketch of every site's values."""

    name: ClassVar[str] = "insert_sketches"
    takes = Sketches
    after: ClassVar[tuple[str, ...]] = ("drop_asserts",)

    def apply(self, graph_module: GraphModule, order: Sketches) -> int:
        nodes, output = nodes_by_name(graph_module), output_node(graph_module)
        like = node_of(nodes, order.sample, self.name)
        extra = []
        for group in groups(graph_module, order.sites):
            members = [nodes[name] for name in group]
            with graph_module.graph.inserting_before(_after(members[-1])):
                stacked = insert_call(graph_module, aten.stack.default, members)
                extra += [_summary(graph_module, function, stacked, like) for function in WIDTHS]
        output.args = ((*returned(graph_module), *extra),)
        return len(extra)


def groups(graph_module: GraphModule, sites: Sequence[Site]) -> list[list[str]]:
    """Names of all distinct values and bases of the sites, in the groups that are sketched together."""
    nodes = nodes_by_name(graph_module)
    names = {name for site in sites for port in site.ports for name in (port.out, port.base) if name is not None}
    for name in sorted(names):
        node_of(nodes, name, InsertSketches.name)
    found: list[list[str]] = []
    open_groups: dict[tuple[object, ...], list[str]] = {}
    for name in in_graph_order(graph_module, names):
        value = nodes[name].meta["val"]
        # symbolic shapes: 16 text tokens and 16 pixels are of one size here, but not in calls of other sizes
        key = (*map(str, value.shape), value.dtype, value.device)
        group = open_groups.get(key)
        if group is None or (len(group) + 1) * torch.Size(sizes(nodes[name])).numel() > TOGETHER:
            group = open_groups[key] = []
            found.append(group)
        group.append(name)
    return found


def _summary(graph_module: GraphModule, function: Callable[..., Tensor], stacked: Node, like: Node) -> Node:
    """A call of `function` whose meta has the sizes at capture, not symbols; nothing in the graph reads its value."""
    node = graph_module.graph.call_function(function, (stacked, like))
    count, *rest = sizes(stacked)
    samples = (sizes(like) or (1,))[0]
    width = min(torch.Size(rest).numel() // samples, WIDTHS[function])
    node.meta["val"] = stacked.meta["val"].new_empty((count, samples, width), dtype=torch.float32)
    return node


def _after(node: Node) -> Node:
    """The first node after `node` before which a call may be inserted: graph inputs are skipped."""
    following = node.next
    while following.op == "placeholder":
        following = following.next
    return following
