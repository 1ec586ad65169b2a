"""The graph's invariants (passes/README.md), executable: what every pass may assume and must leave behind."""

from __future__ import annotations

from torch.fx import GraphModule, Node

from dcc.errors import PassError
from dcc.passes.graph import returned
from dcc.torch_internals import OpOverload, schema

OPS = ("placeholder", "call_function", "call_module", "output")  # and get_attr for a body that blocks share


def verify(graph_module: GraphModule, where: str) -> None:
    """Raises PassError, naming `where` (a pass or stage) and the node, unless every invariant holds.

    Invariants: nodes are in topological order and belong to one graph; names are unique; no attribute is read except
    bodies that blocks share (weights are inputs); no call mutates its arguments; every value has `meta["val"]`; the
    output is one flat tuple of nodes.
    """
    try:
        graph_module.graph.lint()
    except RuntimeError as error:
        raise PassError(f"{where}: {error}") from error
    for node in graph_module.graph.nodes:
        problem = _problem(node)
        if problem:
            raise PassError(f"{where}: node {node.name!r} ({node.target}) {problem}")
    outputs = returned(graph_module)
    if not isinstance(outputs, tuple) or not all(isinstance(value, Node) for value in outputs):
        raise PassError(f"{where}: the output is not a flat tuple of nodes: {outputs}")


def _problem(node: Node) -> str | None:
    if _is_body(node):
        return None
    if node.op not in OPS:
        return f"is a {node.op}; only {', '.join(OPS)} are allowed"
    if is_mutation(node):
        return "mutates its arguments; the graph must be functional"
    if node.op != "output" and "val" not in node.meta and not returns_nothing(node):
        return "has no meta['val']"
    return None


def _is_body(node: Node) -> bool:
    """Whether the node names a body that blocks share (outline_blocks.py)."""
    owner = node.graph.owning_module
    return node.op == "get_attr" and isinstance(getattr(owner, str(node.target), None), GraphModule)


def returns_nothing(node: Node) -> bool:
    """Whether the call only checks something."""
    return isinstance(node.target, OpOverload) and not schema(node.target).returns


def is_mutation(node: Node) -> bool:
    """Whether the call writes to one of its arguments."""
    target = node.target
    return isinstance(target, OpOverload) and schema(target).is_mutable
