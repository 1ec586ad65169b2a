"""Analysis: where a value rides on a residual stream, and the branches that are added to that stream.

    x1 = x0 + gate * attention(norm(x0));  x2 = x1 + gate * mlp(norm(x1))

x2 rides on x0; its branches are attention(...) and mlp(...), taken before their gates. They are found by walking back
from a value through additions and shape changes only (stream_walk.py).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch.fx import Node

from dcc.passes.graph import arguments, carries_tensors, is_tensor, op_name, shape
from dcc.passes.same_sizes import same_shape, same_size, same_sizes
from dcc.passes.side_products import PRODUCTS
from dcc.passes.stream_walk import SHAPE_CHANGES, SUMS, tensors, walk

ATTENTION = ("scaled_dot_product", "softmax")
ACTIVATIONS = ("gelu", "silu", "relu", "sigmoid", "tanh")


@dataclass(frozen=True)
class Branch:
    """A value added to a residual stream: the node before its gate, the addition, and what kind of module made it."""

    value: Node
    addition: Node
    kind: str


def stream_sources(node: Node, stop: set[str]) -> set[str]:
    """Names in `stop` that `node` is a sum of, through additions and shape changes only."""
    return {found.name for found in walk(node, stop) if found.name in stop}


def base_of(node: Node, entering: Iterable[Node]) -> Node | None:
    """The entering value of the same shape that `node` rides on, None where it rides on none or on several."""
    candidates = {candidate.name: candidate for candidate in entering}
    sources = stream_sources(node, set(candidates))
    fitting = [value for name, value in candidates.items() if name in sources and same_shape(value, node)]
    return fitting[0] if len(fitting) == 1 else None


def branches(node: Node, stop: set[str], inside: frozenset[str]) -> list[Branch]:
    """Branches added between the values in `stop` and `node`, in execution order; `inside` bounds what a branch is."""
    found = []
    for addition in walk(node, stop):
        if op_name(addition) not in SUMS or len(tensors(addition)) != 2 or addition.name not in inside:
            continue
        left, right = tensors(addition)
        on_stream = [bool(stream_sources(side, stop)) for side in (left, right)]
        if on_stream[0] == on_stream[1]:
            continue
        stream, value = (left, right) if on_stream[0] else (right, left)
        if same_shape(stream, addition) and same_shape(value, addition):
            ungated = _before_gate(value)
            found.append(Branch(ungated, addition, _kind(ungated, stream, inside)))
    return sorted(found, key=lambda branch: branch.addition)


def attention_output(value: Node, inside: frozenset[str]) -> Node | None:
    """The attention's output [B, N, C] in a branch that projects attention and MLP together, None where it has none."""
    todo, seen = [value], {value}
    while todo and not op_name(todo[-1]).lstrip("_").startswith(ATTENTION):
        found = [n for n in todo.pop().all_input_nodes if n.name in inside and n not in seen]
        seen.update(found)
        todo.extend(found)
    node, best = todo[-1] if todo else None, None
    while node is not None and op_name(node) != "cat":
        if is_tensor(node) and len(shape(node)) == 3 and _same_tokens(node, value):
            best = node
        users = [user for user in node.users if carries_tensors(user)]
        node = users[0] if len(users) == 1 and op_name(users[0]) in SHAPE_CHANGES else None
    return best


def _same_tokens(one: Node, other: Node) -> bool:
    """Whether two values [B, N, ...] have the same samples and tokens."""
    return all(same_size(one.graph, *pair) for pair in list(zip(shape(one), shape(other), strict=False))[:2])


def _before_gate(value: Node) -> Node:
    """The value before its gate (a factor that is broadcast over it), dropout and casts."""
    name, found = op_name(value), tensors(value)
    if name == "dropout" or (name in ("to", "_to_copy") and len(found) == 1):
        return _before_gate(found[0])
    if name == "mul" and len(found) == 2:
        full = [tensor for tensor in found if is_tensor(tensor) and same_sizes(tensor, value)]
        if len(full) == 1:
            return _before_gate(full[0])
    return value


def _kind(value: Node, stream: Node, inside: frozenset[str]) -> str:
    """What made a branch, by the operators between the stream and the value.

    attn, cross (its keys do not come from the stream), attn+mlp (both side by side), mlp, conv or other.
    """
    made_by = _between(value, stream, inside)
    names = {op_name(node) for node in made_by}
    attentions = [node for node in made_by if op_name(node).startswith("scaled_dot_product")]
    if attentions or any(name.lstrip("_").startswith(ATTENTION) for name in names):
        if attentions and not any(stream in _between(arguments(node)[1], stream, inside) for node in attentions):
            return "cross"
        wide = any(op_name(n) in ACTIVATIONS and is_tensor(n) and len(shape(n)) == len(shape(stream)) for n in made_by)
        return "attn+mlp" if wide else "attn"
    if any(name.startswith("conv") for name in names):
        return "conv"
    return "mlp" if names.intersection(PRODUCTS) else "other"


def _between(value: Node, stream: Node, inside: frozenset[str]) -> set[Node]:
    """Nodes that `value` is made of, back to the stream (included where it is reached) and to the block's inputs."""
    todo, seen = [value], set()
    while todo:
        node = todo.pop()
        if node in seen or (node is not stream and node.name not in inside):
            continue
        seen.add(node)
        if node is not stream:
            todo.extend(node.all_input_nodes)
    return seen
