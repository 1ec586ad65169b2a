"""Analysis: which sizes of a graph are the same in every call, from symbols and never from the sizes of one call.

    a = add(x [b, n, 64], f(y) [b, m, 64]);  c = cat([x, z [b, k, 64]], 1)    -->    n = m, and k is another size

Two sizes are the same where their expressions are equal, or where an operator demands it of its arguments: a sum of
numbers at the same places, a concatenation along another dimension. 16 image tokens and 16 text tokens are of one size
in one call only. Adds no guard. What operators demand is read off a graph once, when a comparison first needs it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from weakref import WeakKeyDictionary

from torch.fx import Graph, GraphModule, Node

from dcc.passes.graph import along, arguments, is_tensor, op_name, returned, shape
from dcc.torch_internals import expression, fixed_size, hint, symbols_of

ALIGNED = frozenset({"add", "sub", "mul", "div", "where", "maximum", "minimum"})  # broadcast, number by number
JOINED = frozenset({"cat", "stack"})

Size = Any  # a number, or the sympy expression of a symbolic size


def canonical(size: Any) -> Size:
    """A size as a number, or as an expression that is equal for sizes that are equal by arithmetic."""
    fixed = fixed_size(size)
    return expression(size).expand() if fixed is None else fixed


def same_size(graph: Graph, one: Any, other: Any) -> bool:
    """Whether two sizes of a graph are the same in every call that it serves."""
    first, second = canonical(one), canonical(other)
    if first == second:
        return True
    if isinstance(first, int) and isinstance(second, int):
        return False
    return _ties(graph).root(first) == _ties(graph).root(second)


def same_sizes(a: Node, b: Node) -> bool:
    """Whether two tensor nodes of one graph have the same sizes in every call."""
    mine, its = shape(a), shape(b)
    return len(mine) == len(its) and all(same_size(a.graph, *pair) for pair in zip(mine, its, strict=True))


def same_shape(a: Node, b: Node) -> bool:
    """Whether two tensor nodes of one graph have the same sizes in every call, and the same dtype."""
    return a.meta["val"].dtype == b.meta["val"].dtype and same_sizes(a, b)


def follows(a: Node, b: Node) -> bool:
    """Whether each size of `a` is that of `b` up to rounding to whole patches, as an output's is that of its latent.

    A fixed size is taken for a symbolic one that it was equal to at capture: weights fix the number of channels.
    """
    mine, its = shape(a), shape(b)

    def rounded(one: Any, other: Any) -> bool:
        one_is_fixed = fixed_size(one) is not None or fixed_size(other) is not None
        return hint(one) == hint(other) and (one_is_fixed or symbols_of(one) == symbols_of(other))

    pairs = list(zip(mine, its, strict=False))
    return len(mine) == len(its) and all(same_size(a.graph, *pair) or rounded(*pair) for pair in pairs)


def carries_batch(graph_module: GraphModule, node: Node) -> bool:
    """Whether a value has the samples of the batch as its first dimension, as the graph's first output has.

    False where the graph has a fixed batch.
    """
    batch, first = shape(returned(graph_module)[0])[0], shape(node)[:1]
    return bool(first) and fixed_size(batch) is None and same_size(node.graph, first[0], batch)


class _Ties:
    """Sizes that operators make equal, as a forest: each size points to one that is the same, a root to none."""

    def __init__(self, graph: Graph) -> None:
        self.parent: dict[Size, Size] = {}
        for node in graph.nodes:
            for one, other in _demanded(node):
                first, second = self.root(canonical(one)), self.root(canonical(other))
                if first != second:
                    self.parent[first] = second

    def root(self, size: Size) -> Size:
        while size in self.parent:
            size = self.parent[size]
        return size


_KNOWN: WeakKeyDictionary[Graph, _Ties] = WeakKeyDictionary()


def _ties(graph: Graph) -> _Ties:
    if graph not in _KNOWN:
        _KNOWN[graph] = _Ties(graph)
    return _KNOWN[graph]


def _demanded(node: Node) -> Iterator[tuple[Any, Any]]:
    """Pairs of sizes that are the same because the node's operator takes values of these shapes."""
    name = op_name(node)
    if name in ALIGNED:
        shapes = [shape(source)[::-1] for source in node.all_input_nodes if is_tensor(source)]
    elif name in JOINED and all(map(is_tensor, node.all_input_nodes)):
        shapes = [shape(source) for source in arguments(node)[0]]
        if name == "cat":
            joined = along(node, 1, len(shape(node)))
            shapes = [sizes[:joined] + sizes[joined + 1 :] for sizes in shapes]
    else:
        return
    for index, first in enumerate(shapes):
        for second in shapes[index + 1 :]:
            for pair in zip(first, second, strict=False):
                if 1 not in map(fixed_size, pair):
                    yield pair
