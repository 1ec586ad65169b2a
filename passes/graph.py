"""The few FX helpers that passes share."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from typing import Any, cast

import torch
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg

from dcc.errors import PassError
from dcc.torch_internals import OpOverload, hint, lazy_graph_module, schema

KEEPS = "dcc_keeps"  # meta of a node that reads a computed value in order to keep it: the name of that value
REPLACED = "dcc_forecast"  # meta of a node whose value is forecast: the node that stands for it


def nodes_by_name(graph_module: GraphModule) -> dict[str, Node]:
    """Nodes of the graph by their name."""
    return {node.name: node for node in graph_module.graph.nodes}


def node_of(nodes: dict[str, Node], name: str, where: str) -> Node:
    """The node called `name`. Raises PassError, naming the pass `where` and the node, where the graph has none."""
    if name not in nodes:
        raise PassError(f"{where}: the graph has no node {name!r}; the site belongs to another capture")
    return nodes[name]


def current(node: Node) -> Node:
    """The node that carries a value now: itself, or what forecasts it."""
    return node.meta.get(REPLACED, node)


def is_tensor(node: Node) -> bool:
    """Whether `node` is known to carry one tensor."""
    return isinstance(node.meta.get("val"), torch.Tensor)


def carries_tensors(node: Node) -> bool:
    """Whether `node` carries a tensor or a list of tensors, not a size."""
    val = node.meta.get("val")
    return isinstance(val, torch.Tensor) or (isinstance(val, list | tuple) and any(map(torch.is_tensor, val)))


def op_name(node: Node) -> str:
    """Name of the ATen operator without its overload; "getitem" for an item of a list; else ""."""
    if node.op == "call_function" and isinstance(node.target, OpOverload):
        return schema(node.target).name.split("::")[-1]
    return "getitem" if node.target is operator.getitem else ""


def sizes(node: Node) -> tuple[int, ...]:
    """Sizes of a tensor node at capture, for estimates; same_sizes.py compares sizes."""
    return tuple(hint(size) for size in shape(node))


def shape(node: Node) -> tuple[Any, ...]:
    """Symbolic shape of a tensor node."""
    return tuple(node.meta["val"].shape)


def layout(tensor: torch.Tensor) -> tuple[Any, ...]:
    """Sizes, strides, dtype and device: all that an operator may ask about a tensor except its values."""
    return tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.device


def output_node(graph_module: GraphModule) -> Node:
    """The graph's output node; its first argument is a flat tuple."""
    return next(iter(reversed(graph_module.graph.nodes)))


def returned(graph_module: GraphModule) -> tuple[Node, ...]:
    """The nodes whose values the graph returns, in order."""
    return cast("tuple[Node, ...]", output_node(graph_module).args[0])


def arguments(node: Node) -> tuple[Any, ...]:
    """The positional arguments of a call; which of them are nodes depends on the operator."""
    return cast("tuple[Any, ...]", node.args)


def along(node: Node, position: int, rank: int) -> int:
    """The dimension along which an operator works, its argument number `position` or `dim`, counted from the first."""
    given: Any = node.args[position] if position < len(node.args) else node.kwargs.get("dim", 0)
    return given % rank


def insert_call(graph_module: GraphModule, target: Callable[..., Any], *args: Any, **kwargs: Any) -> Node:
    """A new call at the graph's present insertion point, with `meta["val"]` computed on fake tensors."""
    node = graph_module.graph.call_function(target, args, kwargs)
    fake_args, fake_kwargs = map_arg((args, kwargs), lambda n: n.meta["val"])
    node.meta["val"] = target(*fake_args, **fake_kwargs)
    return node


def copy_of(graph_module: GraphModule) -> GraphModule:
    """A graph module of the same modules with a copy of the graph, free to be edited.

    Its code is generated when it is first run, because many copies are lowered and never run.
    """
    graph = Graph()
    graph.output(graph.graph_copy(graph_module.graph, {}))
    return lazy_graph_module(graph_module, graph)


def add_placeholder(graph_module: GraphModule, name: str, val: torch.Tensor) -> Node:
    """A new graph input after the existing ones."""
    inputs = [node for node in graph_module.graph.nodes if node.op == "placeholder"]
    first_body = inputs[-1].next if inputs else next(iter(graph_module.graph.nodes))
    with graph_module.graph.inserting_before(first_body):
        node = graph_module.graph.placeholder(name)
    node.meta["val"] = val
    return node


def in_graph_order(graph_module: GraphModule, names: Iterable[str]) -> list[str]:
    """`names` sorted by where their nodes stand in the graph."""
    position = {node.name: index for index, node in enumerate(graph_module.graph.nodes)}
    return sorted(names, key=position.__getitem__)
