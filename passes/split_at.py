"""Splits a variant after the values that a trigger looks at, into a prefix that all rows share and a suffix.

    h = f(x); d = distance(h, seen); y = g(h); return (y, d)    -->    prefix (x, seen) -> (h, d);  suffix (h) -> (y)

This is not in PASSES, because it makes two graphs of one. Values that are no tensors (sizes, lists of views) are
computed again in the suffix instead of being handed over.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch.fx import Graph, GraphModule, Node

from dcc.passes.graph import is_tensor, nodes_by_name, returned
from dcc.passes.same_sizes import carries_batch
from dcc.passes.values import VALUE, Handed


def ancestors(graph_module: GraphModule, names: Iterable[str]) -> set[str]:
    """Names of the nodes that the named ones need, themselves included, graph inputs left out."""
    nodes = nodes_by_name(graph_module)
    return {node.name for node in _needed([nodes[name] for name in names], set()) if node.op != "placeholder"}


def prefix(graph_module: GraphModule, outputs: Sequence[str]) -> GraphModule:
    """A graph that computes the named nodes and nothing else; its outputs are these."""
    nodes = nodes_by_name(graph_module)
    values = [nodes[name] for name in outputs]
    wanted = _needed(values, set())
    graph, copies = Graph(), {}
    for node in graph_module.graph.nodes:
        if node in wanted:
            copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output(tuple(copies[node] for node in values))
    return GraphModule(graph_module, graph)


def suffix(graph_module: GraphModule, inside: set[str], drop: Sequence[str]) -> tuple[GraphModule, list[str]]:
    """The graph without the nodes named in `inside`, and the names of the tensors it takes from them.

    `drop` names outputs that belong to the prefix. Handed-over tensors become graph inputs of the same names.
    """
    handed: dict[Node, Node] = {}
    graph = Graph()
    copies: dict[Node, Node] = {}
    body = [node for node in graph_module.graph.nodes if node.op not in ("placeholder", "output")]
    outputs = [node for node in returned(graph_module) if node.name not in drop]
    wanted = _needed(outputs, inside)
    for node in graph_module.graph.nodes:
        if node.op == "placeholder" and node in wanted:
            copies[node] = graph.node_copy(node)
    for node in body:
        if node in wanted and node.name in inside and is_tensor(node):
            handed[node] = graph.placeholder(node.name)
            handed[node].meta.update(node.meta)
            handed[node].meta[VALUE] = Handed(node.name, carries_batch(graph_module, node))
            copies[node] = handed[node]
    for node in body:
        if node in wanted and node not in copies:
            copies[node] = graph.node_copy(node, lambda n: copies[n])
    graph.output(tuple(copies[node] for node in outputs))
    return GraphModule(graph_module, graph), [node.name for node in handed]


def _needed(outputs: Sequence[Node], inside: set[str]) -> set[Node]:
    """Nodes that `outputs` need. The walk back ends at tensors `inside` the prefix: those are handed over."""
    found: set[Node] = set()
    todo = list(outputs)
    while todo:
        node = todo.pop()
        if node in found:
            continue
        found.add(node)
        if node.name not in inside or not is_tensor(node):
            todo.extend(node.all_input_nodes)
    return found
