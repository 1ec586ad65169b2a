"""Blocks of one structure become calls of one shared body, so that compile time does not grow with depth.

    h1 = add(x, linear(x, w1)); h2 = add(h1, linear(h1, w2)); return (g(h2),)
-->
    body(a, w): return (add(a, linear(a, w)),)
    h1 = invoke_subgraph(body, x, w1)[0]; h2 = invoke_subgraph(body, h1, w2)[0]; return (g(h2),)

Blocks are numbered modules (blocks.py); two share a body where their nodes, constants and the shapes, strides, dtypes
and devices of all their values are the same. Where a block has no twin, twins are searched among the blocks inside it.
Needs a graph whose `meta["val"]` are those of the shapes to be compiled.

A body returns no view, because Inductor silently reads a returned view with a storage offset at offset 0. Views at a
block's end stay outside, others are copied. Refuses a block that has nodes of another block in its middle.
"""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from dcc.passes.base import LOWERING, Order, Pass
from dcc.passes.blocks import is_inside, numbered_blocks
from dcc.passes.graph import layout, nodes_by_name
from dcc.torch_internals import OpOverload, invoke_subgraph, legalize_graph, pytree, schema, storage_id

TWINS = 2  # the fewest blocks of one structure that are outlined
MIN_NODES = 8  # smaller blocks cost Inductor less than a call does


@dataclass(frozen=True)
class Region:
    """Nodes that become one call: in graph order, with the values that enter and leave."""

    nodes: tuple[Node, ...]
    inputs: tuple[Node, ...]
    outputs: tuple[Node, ...]


@dataclass(frozen=True)
class Outlines(Order):
    """Asks for outlining; a lowering that went wrong is tried again without it."""


class OutlineBlocks(Pass):
    """Makes compile time depend on how many different blocks there are, not on how many in all."""

    name: ClassVar[str] = "outline_blocks"
    stage: ClassVar[str] = LOWERING
    takes = Outlines
    after: ClassVar[tuple[str, ...]] = ("specialize",)
    optional: ClassVar[bool] = True

    def apply(self, graph_module: GraphModule, order: Outlines) -> int:
        return outline_blocks(graph_module)[1]


def bodies(graph_module: GraphModule) -> int:
    """How many shared bodies a graph has."""
    return sum(node.op == "get_attr" for node in {n.target: n for n in graph_module.graph.nodes}.values())


def outline_blocks(graph_module: GraphModule) -> tuple[int, int]:
    """Outlines in place; returns how many bodies there are and how many calls of them."""
    groups = twins(graph_module)
    for index, regions in enumerate(groups):  # all bodies before any call: a call changes what later regions take
        graph_module.add_submodule(f"body_{index}", _body(regions[0]))
    replaced: dict[Node, Node] = {}
    for index, regions in enumerate(groups):
        for region in regions:
            _call(graph_module, f"body_{index}", region, replaced)
    if groups:
        legalize_graph(graph_module)  # a call stands at its block's end, perhaps after what uses the block's values
    return len(groups), sum(map(len, groups))


def twins(graph_module: GraphModule) -> list[list[Region]]:
    """Groups of regions of one structure: the outermost ones that have twins."""
    blocks = {path: set(block.nodes) for path, block in numbered_blocks(graph_module).items()}
    order = {node: index for index, node in enumerate(graph_module.graph.nodes)}
    nodes = nodes_by_name(graph_module)
    level = [path for path in blocks if not any(is_inside(path, other) for other in blocks if other != path)]
    found: list[list[Region]] = []
    while level:
        groups: dict[Any, list[tuple[str, Region]]] = defaultdict(list)
        alone = []
        for path in level:
            taken = set().union(*(names for other, names in blocks.items() if _apart(other, path)))
            region = _region({nodes[name] for name in blocks[path]}, {nodes[name] for name in taken}, order)
            if region is None:
                alone.append(path)
            else:
                groups[_structure(region)].append((path, region))
        for members in groups.values():
            if len(members) >= TWINS and len(members[0][1].nodes) >= MIN_NODES:
                found.append([region for _, region in members])
            else:
                alone += [path for path, _ in members]
        level = [path for outer in alone for path in _children(outer, blocks)]
    return found


def _apart(path: str, other: str) -> bool:
    return not is_inside(path, other) and not is_inside(other, path)


def _children(path: str, blocks: Iterable[str]) -> list[str]:
    """The outermost blocks inside the block at `path`."""
    inner = [other for other in blocks if other != path and is_inside(other, path)]
    return [one for one in inner if not any(is_inside(one, other) for other in inner if other != one)]


def _region(members: set[Node], others: set[Node], order: dict[Node, int]) -> Region | None:
    """The region of a block's nodes and of all nodes between two of them.

    None where nodes of `others` are between them, and where values that are no tensors would enter or leave.
    """
    ordered = sorted(members, key=order.__getitem__)
    window = _between(ordered[0], ordered[-1])
    after, before = set(members), set(members)
    for node in window:
        if any(source in after for source in node.all_input_nodes):
            after.add(node)
    for node in reversed(window):
        if any(user in before for user in node.users):
            before.add(node)
    inside = after & before
    if inside & others:
        return None
    for node in reversed(window):
        if node in inside and _is_view(node) and not any(user in inside for user in node.users):
            inside.discard(node)
    # an item of a tuple goes with what makes the tuple
    inside |= {user for node in inside if not _tensor(node) for user in node.users}
    kept = tuple(node for node in window if node in inside)
    entering = dict.fromkeys(source for node in kept for source in node.all_input_nodes if source not in inside)
    leaving = tuple(node for node in kept if any(user not in inside for user in node.users))
    if not kept or not leaving or not all(_tensor(node) for node in (*entering, *leaving)):
        return None
    return Region(kept, tuple(entering), leaving)


def _between(first: Node, last: Node) -> list[Node]:
    found = [first]
    while found[-1] is not last:
        found.append(found[-1].next)
    return found


def _tensor(node: Node) -> bool:
    return isinstance(node.meta.get("val"), Tensor)


def _is_view(node: Node) -> bool:
    """Whether the result shares the memory of an argument."""
    returns = schema(node.target).returns if isinstance(node.target, OpOverload) else ()
    return any(value.alias_info is not None for value in returns)


def _structure(region: Region) -> Any:
    """What two regions must have in common to share a body; hashable."""
    number = {node: index for index, node in enumerate((*region.inputs, *region.nodes))}

    def plain(value: Any) -> Any:
        leaves, spec = pytree.tree_flatten(value, is_leaf=lambda leaf: isinstance(leaf, Node))
        return tuple(("%", number[v]) if isinstance(v, Node) else (type(v), v) for v in leaves), str(spec)

    calls = tuple((node.target, plain((node.args, dict(node.kwargs))), _kind(node)) for node in region.nodes)
    return tuple(map(_kind, region.inputs)), calls, tuple(number[node] for node in region.outputs)


def _kind(node: Node) -> Any:
    val = node.meta["val"]
    parts = val if isinstance(val, (tuple, list)) else (val,)
    return tuple(layout(v) if isinstance(v, Tensor) else v for v in parts)


def _body(region: Region) -> GraphModule:
    graph, copies = Graph(), {}
    for index, node in enumerate(region.inputs):
        copies[node] = graph.placeholder(f"arg_{index}")
        copies[node].meta["val"] = node.meta["val"]
    for node in region.nodes:
        copies[node] = graph.node_copy(node, copies.__getitem__)
    outputs, taken = [], {_storage(node) for node in region.inputs}
    for node in region.outputs:
        value = copies[node]
        if _storage(node) in taken or node.meta["val"].storage_offset():
            value = graph.call_function(torch.ops.aten.clone.default, (value,))
            value.meta["val"] = torch.empty_like(node.meta["val"])
        taken.add(_storage(node))
        outputs.append(value)
    graph.output(tuple(outputs))
    return GraphModule({}, graph)


def _storage(node: Node) -> int:
    return storage_id(node.meta["val"])


def _call(graph_module: GraphModule, name: str, region: Region, replaced: dict[Node, Node]) -> None:
    graph = graph_module.graph
    with graph.inserting_after(region.nodes[-1]):
        body = graph.get_attr(name)
    inputs = [replaced.get(node, node) for node in region.inputs]
    with graph.inserting_after(body):
        call = graph.call_function(invoke_subgraph, (body, name, *inputs))
    call.meta["val"] = tuple(node.meta["val"] for node in region.outputs)
    last = call
    for index, node in enumerate(region.outputs):
        with graph.inserting_after(last):
            last = graph.call_function(operator.getitem, (call, index))
        last.meta["val"] = node.meta["val"]
        node.replace_all_uses_with(last)
        replaced[node] = last
    for node in reversed(region.nodes):
        graph.erase_node(node)
