"""Analysis: the part of a graph that acts on each token alone, so that it may run on some tokens only.

    x1 = ...;  h = linear(gelu(linear(norm(x1) * scale + shift)));  x2 = x1 + gate * h

The region of h ends at x1: to compute some tokens of h, take those tokens of x1 and run the calls between on them.
Tokens are dimension 1 of a value [B, N, C...]. All this is proved node by node from the operators: a dimension counts
as tokens only where data flow shows that it is, never because of its size.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from torch.fx import Node

from dcc.passes.graph import arguments, is_tensor, op_name, shape
from dcc.passes.same_sizes import same_shape, same_size, same_sizes
from dcc.passes.stream_walk import SUMS
from dcc.torch_internals import fixed_size

WHOLE = 2**63 - 1  # the end of a slice that takes everything

# Operators whose tensors are broadcast against each other, number by number.
POINTWISE = frozenset(
    {
        "add", "sub", "mul", "div", "neg", "abs", "exp", "log", "sqrt", "rsqrt", "reciprocal", "pow", "square", "sin",
        "cos", "erf", "gelu", "silu", "relu", "relu6", "leaky_relu", "sigmoid", "tanh", "softplus", "mish", "elu",
        "hardswish", "hardsigmoid", "clamp", "clamp_min", "clamp_max", "maximum", "minimum", "where", "to", "_to_copy",
        "clone", "contiguous", "detach", "alias", "dropout",
    }
)  # fmt: skip
MATRIX = frozenset({"linear", "matmul"})  # tokens times a matrix that is the same for all of them
NORMS = frozenset({"layer_norm", "rms_norm"})
# Operators that work along one dimension, and the position of that dimension among their arguments.
ALONG = {
    "chunk": 2, "split": 2, "split_with_sizes": 2, "slice": 1, "select": 1, "unbind": 1, "unsqueeze": 1, "squeeze": 1,
    "cat": 1, "stack": 1, "unflatten": 1, "flatten": 1, "softmax": 1, "mean": 1, "sum": 1, "amax": 1,
}  # fmt: skip


@dataclass(frozen=True)
class Region:
    """Nodes that make a value, in graph order, and the values [B, N, C...] at which they take tokens from outside."""

    nodes: tuple[str, ...]
    ends: frozenset[str]


def token_region(value: Node, ends: Collection[str]) -> Region | str:
    """What makes `value` [B, N, C...] token by token from the values named in `ends`, or a reason why nothing does."""
    if not is_tensor(value) or len(shape(value)) < 3 or fixed_size(shape(value)[1]) == 1:
        return f"{value.name} is no value of shape [batch, tokens, channels] with two or more tokens"
    tokens = shape(value)[1]
    inside: dict[str, Node] = {}
    taken: set[str] = set()
    todo = [value]
    while todo:
        node = todo.pop()
        if node.name in inside or node.name in taken:
            continue
        if node is not value and (node.name in ends or node.op == "placeholder"):
            taken.add(node.name)
            continue
        carriers = _carriers(node, tokens)
        if isinstance(carriers, str):
            return f"{node.name} ({op_name(node) or node.target}): {carriers}"
        inside[node.name] = node
        todo.extend(carriers)
    return Region(tuple(node.name for node in sorted(inside.values())), frozenset(taken))


def residual_ends(value: Node) -> tuple[set[str], Node | None]:
    """Where a branch's region ends: the values on the residual stream that it is added to; and the first sum with it.

    Empty, and None, where the value is added to no residual stream.
    """
    node = value
    while True:
        users = [user for user in node.users if is_tensor(user)]
        addition = next((u for u in users if op_name(u) in SUMS and len(u.all_input_nodes) == 2), None)
        if addition is not None and same_shape(addition, value):
            break
        if len(users) != 1 or op_name(users[0]) not in POINTWISE or not same_sizes(users[0], value):
            return set(), None
        node = users[0]
    ends: set[str] = set()
    todo = [other for other in addition.all_input_nodes if other is not node]
    while todo:
        current = todo.pop()
        if current.name not in ends and is_tensor(current) and same_shape(current, value):
            ends.add(current.name)
            todo.extend(current.all_input_nodes if op_name(current) in SUMS else [])
    return ends, addition


def _carriers(node: Node, tokens: Any) -> list[Node] | str:
    """Arguments of `node` that carry its tokens in dimension 1; or why a token of its value needs other tokens too."""
    name = op_name(node)
    if name == "getitem":
        return [arguments(node)[0]]
    if name in POINTWISE:
        if name == "dropout" and len(arguments(node)) > 2 and arguments(node)[2]:
            return "is random"
        return _aligned(node, tokens)
    if name in MATRIX:
        first, *others = node.all_input_nodes
        if len(shape(first)) < 3 or any(len(shape(other)) > 2 for other in others):
            return "is no product of tokens with one matrix"
        return _carrying([first], tokens)
    if name in NORMS:
        first = arguments(node)[0]
        if len(arguments(node)[1]) > len(shape(first)) - 2:
            return "normalises over tokens"
        return _carrying([first], tokens)
    if name in ("permute", "transpose"):
        return _carrying([arguments(node)[0]], tokens) if _keeps_tokens(node) else "moves the token dimension"
    if name in ALONG:
        return _along(node, name, tokens)
    return "mixes tokens, or is not known to leave them apart"


def _aligned(node: Node, tokens: Any) -> list[Node] | str:
    """Tensors of a pointwise call that carry tokens; those broadcast over them are used as they are."""
    found = []
    for other in node.all_input_nodes:
        if not is_tensor(other):
            return "takes a size"
        if len(shape(other)) > len(shape(node)):
            return f"{other.name} has more dimensions"
        dimension = 1 - (len(shape(node)) - len(shape(other)))
        if dimension < 0 or fixed_size(shape(other)[dimension]) == 1:
            continue
        if dimension == 0:
            return f"{other.name} has a row per token, but no batch"
        found.append(other)
    return _carrying(found, tokens)


def _along(node: Node, name: str, tokens: Any) -> list[Node] | str:
    many = name in ("cat", "stack")
    tensors = list(arguments(node)[0]) if many else [arguments(node)[0]]
    rank = len(shape(tensors[0])) + (name in ("unsqueeze", "stack"))
    position = ALONG[name]
    default: Any = -1 if name == "softmax" else 0
    dimension: Any = arguments(node)[position] if len(arguments(node)) > position else node.kwargs.get("dim", default)
    if any(other not in tensors for other in node.all_input_nodes):
        return "takes a size"
    if name == "slice" and dimension in (0, 1) and list(arguments(node)[2:]) in ([], [0], [0, WHOLE]):
        return _carrying(tensors, tokens)
    dimensions = [d % rank for d in (dimension if isinstance(dimension, list) else [dimension])]
    if min(dimensions, default=0) < 2:
        return "works along the tokens or the batch"
    return _carrying(tensors, tokens)


def _keeps_tokens(node: Node) -> bool:
    """Whether batch and tokens stay dimensions 0 and 1."""
    rank = len(shape(node))
    if op_name(node) == "permute":
        return [d % rank for d in arguments(node)[1]][:2] == [0, 1]
    return min(d % rank for d in arguments(node)[1:3]) >= 2


def _carrying(found: list[Node], tokens: Any) -> list[Node] | str:
    """`found`, where each of them has the tokens in dimension 1; else the reason why not."""
    if not found:
        return "is made of no value that carries the tokens"
    other = next((n for n in found if len(shape(n)) < 2 or not same_size(n.graph, shape(n)[1], tokens)), None)
    return f"{other.name} has no {tokens} tokens" if other is not None else found
