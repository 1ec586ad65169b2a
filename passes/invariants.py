"""Analysis: what no step changes, and which of it is worth computing once per session instead of at every step.

    k = linear(text, w); kv = view(k); return (attention(x, kv),)    x moves, text and w do not: k and kv are fixed;
                                                                     kv is at the frontier, and pays for being held

A node is fixed where it takes fixed values only, draws no random numbers and is one of ATen's or Python's own
operators. Sizes of graph inputs are fixed too, because values are held per shape.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Mapping
from typing import cast

import torch
from torch.fx import GraphModule, Node

from dcc.passes.costs import Cost
from dcc.passes.graph import arguments, is_tensor, returned
from dcc.torch_internals import OpOverload, schema

FLOPS_PER_BYTE = 8  # a core does about ten FLOPs while it reads a byte, a GPU a hundred: below this, compute it again
# without FLOPs: how many times a value's own bytes are written on the way to it; one pass is fused with what reads it
PASSES_SAVED = 2
MIN_BYTES = 1 << 16  # without FLOPs: fewer bytes written are a few launches, which do not pay for one more input
INFLATION = 2  # a value without FLOPs of its own that is this many times as large as its inputs is made at every step

NAMESPACES = ("aten", "prims")
PYTHON = ("_operator", "math", "builtins", "torch", "torch.sym_ops")


def invariants(graph_module: GraphModule, moving: Collection[str], kept: Collection[str] = ()) -> set[str]:
    """Names of the nodes that no step changes, where the graph inputs in `moving` are those that steps change.

    Nodes in `kept`, and nodes that take their values, do not count as fixed.
    """
    fixed: set[str] = set()
    for node in graph_module.graph.nodes:
        if node.op == "placeholder":
            if node.name not in moving and node.name not in kept:
                fixed.add(node.name)
        elif node.op == "call_function" and node.name not in kept:
            if is_size(node) or (is_pure(node) and all(n.name in fixed for n in node.all_input_nodes)):
                fixed.add(node.name)
    return fixed


def frontier(graph_module: GraphModule, fixed: Collection[str]) -> list[str]:
    """The computed tensors among `fixed` that the output or a node that is not fixed takes, in the graph's order."""
    return [
        node.name
        for node in graph_module.graph.nodes
        if node.name in fixed
        and node.op == "call_function"
        and is_tensor(node)
        and any(user.name not in fixed for user in node.users)
    ]


def worth_hoisting(
    graph_module: GraphModule, costs: Mapping[str, Cost], moving: Collection[str], kept: Collection[str] = ()
) -> tuple[str, ...]:
    """Names of the frontier's nodes that pay for being held, in the graph's order.

    `costs` are those of one call; `kept` names values that have to be computed in the graph because they are cached. A
    value that does not pay is left to the steps, and its inputs are then at the frontier. An output of the graph is
    never chosen: the caller may write into it.
    """
    nodes = {node.name: node for node in graph_module.graph.nodes}
    left: set[str] = {*kept, *(name for node in returned(graph_module) for name in _aliases(node))}
    while True:
        fixed = invariants(graph_module, moving, left)
        found = frontier(graph_module, fixed)
        refused = {said for name in found if (said := _refused(nodes[name], fixed, costs)) is not None}
        if not refused:
            return tuple(found)
        left |= refused


def is_size(node: Node) -> bool:
    """Whether the node reads a size of a graph input."""
    return node.target is torch.ops.aten.sym_size.int and arguments(node)[0].op == "placeholder"


def is_pure(node: Node) -> bool:
    """Whether the call gives equal values for equal arguments, as far as its operator tells."""
    target = node.target
    if not isinstance(target, OpOverload):
        return getattr(target, "__module__", "") in PYTHON
    if target.namespace not in NAMESPACES or schema(target).is_mutable:
        return False
    return torch.Tag.nondeterministic_seeded not in target.tags or _without_dropout(node)


def is_alias(node: Node) -> bool:
    """Whether the value shares its first argument's memory, or may: views, and casts that may have nothing to do."""
    if node.target is operator.getitem:
        return is_alias(arguments(node)[0])
    target = node.target
    if not isinstance(target, OpOverload) or not node.all_input_nodes:
        return False
    returned = [r for r in schema(target).returns if r.alias_info is not None]
    return bool(returned) or torch.Tag.maybe_aliasing_or_mutating in target.tags


def _without_dropout(node: Node) -> bool:
    """Whether an operator that may drop values at random drops none in this call."""
    takes = schema(cast("OpOverload", node.target)).arguments
    names = [argument.name for argument in takes]
    given = {argument.name: argument.default_value for argument in takes if argument.has_default_value()}
    given |= dict(zip(names, node.args, strict=False)) | node.kwargs
    if "dropout_p" in names:
        return given["dropout_p"] == 0
    return "train" in names and "p" in names and (given["train"] is False or given["p"] == 0)


def _root(node: Node) -> Node:
    """The node that made the memory in which the value lies."""
    while is_alias(node):
        node = arguments(node)[0]
    return node


def _aliases(node: Node) -> list[str]:
    """Names of the node and of those whose memory it shares."""
    names = [node.name]
    while is_alias(node):
        node = arguments(node)[0]
        names.append(node.name)
    return names


def _refused(node: Node, fixed: Collection[str], costs: Mapping[str, Cost]) -> str | None:
    """The node that has to be left to the steps so that this one is not held; None where it pays to hold it."""
    own, taken = costs[node.name], sum(costs[n.name].bytes for n in node.all_input_nodes)
    if own.flops == 0 and own.bytes > INFLATION * taken:
        return node.name
    root = _root(node)
    if root.op == "placeholder":
        return node.name
    cone = _cone(root, fixed)
    size = costs[root.name].bytes
    flops = sum(costs[n.name].flops for n in cone)
    written = sum(costs[n.name].bytes for n in cone if not is_alias(n))
    if flops >= FLOPS_PER_BYTE * size > 0 or (written >= PASSES_SAVED * size and written >= MIN_BYTES):
        return None
    return root.name


def _cone(root: Node, fixed: Collection[str]) -> list[Node]:
    """`root` and the fixed nodes that are computed for it alone: all users of such a node are among these."""
    found, todo = {root: None}, [root]
    while todo:
        for node in todo.pop().all_input_nodes:
            if node not in found and node.op == "call_function" and node.name in fixed:
                if all(user in found for user in node.users):
                    found[node] = None
                    todo.append(node)
    return list(found)
