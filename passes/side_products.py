"""Analysis: low-rank products that are added beside a full one, as adapters of a layer do.

    p = linear(x, w);  y = add(p, mul(linear(linear(x, a), b), 0.5))    -->    y is the whole value of the product p;
                                                                              the other two products are at its side

An adapter may be there in one state of a module and not in another. What its layer gives is y then and p else, and
whether a list of modules is a stack of blocks may depend on neither product at the side.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from torch.fx import GraphModule, Node

from dcc.passes.graph import arguments, is_tensor, op_name
from dcc.passes.stream_walk import SUMS
from dcc.passes.values import is_number

PRODUCTS = ("linear", "addmm", "mm", "matmul", "bmm", "convolution", "conv1d", "conv2d", "conv3d")
SCALED = frozenset({"mul", "div", "dropout", "to", "_to_copy", "clone", "contiguous", "detach", "alias", "type_as"})
DATA = {"addmm": 1}  # the position of what is multiplied among a product's arguments, where it is not the first


@dataclass
class SideProducts:
    """`whole` is the sum that each product with others at its side becomes, by name; `at_side` names the others."""

    whole: dict[str, Node] = field(default_factory=dict)
    at_side: set[str] = field(default_factory=set)

    def product(self, node: Node) -> Node:
        """The product whose whole value a node carries; the node itself where it carries none."""
        return next((p for p in _terms(node) if self.whole.get(p.name) is node), node)


def side_products(graph_module: GraphModule) -> SideProducts:
    """Every product of the graph that has others at its side."""
    found = SideProducts()
    for node in graph_module.graph.nodes:
        if op_name(node) not in PRODUCTS:
            continue
        value = node
        while (more := next((u for u in value.users if _side(u, value, node)), None)) is not None:
            found.at_side.update(name for other in _side(more, value, node) for name in other)
            value = found.whole[node.name] = more
    return found


def _side(addition: Node, value: Node, product: Node) -> list[tuple[str, str]]:
    """The pairs of products that `addition` adds to `value`; none where it adds anything else that `product`'s input
    has to do with."""
    if op_name(addition) not in SUMS or value not in addition.args:
        return []
    data = _plain(_data(product))
    terms = _terms(*(arg for arg in arguments(addition)[:2] if isinstance(arg, Node) and arg is not value))
    inner = {term: _plain(_data(term)) for term in terms if op_name(term) in PRODUCTS}
    pairs = {term: one for term, one in inner.items() if op_name(one) in PRODUCTS and _plain(_data(one)) is data}
    rest = [term for term in terms if term not in pairs and term is not product]
    if not pairs or any(data is term or data in _sources(term) for term in rest):
        return []
    return [(term.name, one.name) for term, one in pairs.items()]


def _terms(*todo: Node) -> Iterable[Node]:
    """What values are made of through sums and factors only."""
    seen: dict[Node, None] = {}
    stack = list(todo)
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen[node] = None
        if op_name(node) in SUMS | SCALED:
            stack.extend(node.all_input_nodes)
    return [node for node in seen if op_name(node) not in SUMS | SCALED]


def _sources(node: Node) -> set[Node]:
    """Everything that a value is made of."""
    seen, stack = set(), [node]
    while stack:
        for source in stack.pop().all_input_nodes:
            if source not in seen:
                seen.add(source)
                stack.append(source)
    return seen


def _data(product: Node) -> Node:
    return arguments(product)[DATA.get(op_name(product), 0)]


def _plain(node: Node) -> Node:
    """The value before factors and casts of one argument."""
    while op_name(node) in SCALED:
        scaled = [value for value in node.all_input_nodes if is_tensor(value) and not is_number(value)]
        if len(scaled) != 1:
            break
        node = scaled[0]
    return node
