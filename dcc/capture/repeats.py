"""Traces one block of each kind, so that the time of an export depends on the kinds of blocks, not on depth.

While torch.export traces a module, the first call of a block runs between two boundary operators, and later calls of
blocks of the same kind, with inputs of the same shapes, are one opaque operator each. Afterwards every such operator
is replaced by a copy of the nodes between the boundaries that reads the weights of its own block. Two blocks are of
one kind where their classes, settings and weights' shapes are equal all the way down, so that `forward` takes the
same path through both; `capture` compares the outcome with the module all the same.
"""

from __future__ import annotations

import itertools
import operator
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, Node

from dcc.capture.describe import described, described_weight
from dcc.errors import CaptureError
from dcc.passes.graph import arguments, layout
from dcc.torch_internals import module_stack, pytree, set_module_stack

SMALLEST = 4  # the fewest modules of a block that is copied; copying less saves nothing
PLAIN = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device)
SIZES = (torch.SymInt, torch.SymFloat, torch.SymBool)
_TENSOR = object()


@dataclass(frozen=True)
class First:
    """The traced call of a kind of block: its key, the path of its block, and what the block returned."""

    key: str
    path: str
    spec: pytree.TreeSpec
    constants: tuple[Any, ...]  # the leaves of what it returned, _TENSOR for tensors

    def returned(self, tensors: Sequence[Tensor]) -> Any:
        """What another block of this kind returns, made of its `tensors`."""
        rest = iter(tensors)
        leaves = [next(rest) if value is _TENSOR else value for value in self.constants]
        return pytree.tree_unflatten(leaves, self.spec)


_OUTPUTS: dict[str, list[tuple[Any, ...]]] = {}  # by key, while an export runs: size, stride, dtype, device
_KEYS = itertools.count()


@torch.library.custom_op("dcc::boundary", mutates_args=())
def _boundary(key: str, path: str, tensors: list[Tensor]) -> list[Tensor]:
    """Copies of the tensors that enter or leave the block at `path`, which is traced as `key`."""
    return [tensor.clone() for tensor in tensors]


@_boundary.register_fake
def _(key: str, path: str, tensors: list[Tensor]) -> list[Tensor]:
    return [_empty(*layout(tensor)) for tensor in tensors]


@torch.library.custom_op("dcc::repeat", mutates_args=())
def _repeat(key: str, path: str, tensors: list[Tensor]) -> list[Tensor]:
    """Stands, until `write_out`, for a call of the block at `path` like that of the traced block `key`; never run."""
    raise CaptureError(f"block {path!r} was not written out in the exported graph")


@_repeat.register_fake
def _(key: str, path: str, tensors: list[Tensor]) -> list[Tensor]:
    return [_empty(*facts) for facts in _OUTPUTS[key]]


def _empty(size: Any, stride: Any, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.empty_strided(size, stride, dtype=dtype, device=device)


BOUNDARY, REPEAT = torch.ops.dcc.boundary.default, torch.ops.dcc.repeat.default


@contextmanager
def one_of_each_kind(module: nn.Module) -> Iterator[bool]:
    """Within the context an export of `module` traces one block of each kind; yields whether any kind repeats.

    Blocks are the children of ModuleLists and Sequentials; while the context lasts their `forward` is replaced, and
    calls in other threads go through to the real one. The exported graph needs `write_out`.
    """
    kinds: dict[Any, list[tuple[str, nn.Module]]] = {}
    for path, block in module.named_modules():
        inside = path and isinstance(module.get_submodule(path.rpartition(".")[0]), nn.ModuleList | nn.Sequential)
        if inside and len(list(block.modules())) >= SMALLEST and "forward" not in vars(block):
            kinds.setdefault(described(block, id), []).append((path, block))
    repeated = [blocks for blocks in kinds.values() if len(blocks) > 1]
    keys: list[str] = []
    try:
        for blocks in repeated:
            known: dict[Any, First] = {}
            for path, block in blocks:
                block.forward = _forward(block.forward, path, known, keys)
        yield bool(repeated)
    finally:
        for _, block in itertools.chain(*repeated):
            block.__dict__.pop("forward", None)
        for key in keys:
            _OUTPUTS.pop(key, None)


def _forward(original: Callable[..., Any], path: str, known: dict[Any, First], keys: list[str]) -> Callable[..., Any]:
    """Stands for a block's `forward`: the first block called with such arguments is traced, others are one operator."""
    tracing = threading.get_ident()

    def forward(*args: Any, **kwargs: Any) -> Any:
        if threading.get_ident() != tracing:
            return original(*args, **kwargs)
        leaves, spec = pytree.tree_flatten((args, kwargs))
        tensors = list({id(leaf): leaf for leaf in leaves if isinstance(leaf, Tensor)}.values())
        place = {id(tensor): index for index, tensor in enumerate(tensors)}
        described = ((place[id(x)], described_weight(x)) if id(x) in place else _constant(x) for x in leaves)
        signature = str(spec), *described
        first = known.get(signature)
        if first is not None and first.path != path:
            return first.returned(torch.ops.dcc.repeat(first.key, path, tensors))

        key = first.key if first else str(next(_KEYS))
        inside = torch.ops.dcc.boundary(key, path, tensors)
        leaves = [inside[place[id(leaf)]] if id(leaf) in place else leaf for leaf in leaves]
        args, kwargs = pytree.tree_unflatten(leaves, spec)
        leaves, spec = pytree.tree_flatten(original(*args, **kwargs))
        outputs = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        constants = tuple(_TENSOR if isinstance(leaf, Tensor) else leaf for leaf in leaves)
        if not outputs or not all(leaf is _TENSOR or isinstance(leaf, PLAIN) for leaf in constants):
            return pytree.tree_unflatten(leaves, spec)
        first = First(key, path, spec, constants)
        outside = torch.ops.dcc.boundary(key, path, outputs)
        keys.append(key)
        _OUTPUTS[key] = [layout(tensor) for tensor in outside]
        known[signature] = first
        return first.returned(outside)

    return forward


def _constant(value: Any) -> Any:
    """An argument that is no tensor: by value where that is plain, sizes by their expression, others by identity."""
    if isinstance(value, PLAIN):
        return type(value), value
    return str(value) if isinstance(value, SIZES) else id(value)


def write_out(graph: Graph, module: nn.Module, weights: Mapping[Node, Tensor]) -> None:
    """Replaces every repeat in the graph by the nodes of its traced block, and drops the boundaries.

    Args:
        graph: the graph of an export within `one_of_each_kind(module)`.
        weights: the module's parameters and buffers by the graph input that stands for them.

    Raises CaptureError, naming the block, where its weights are shared in another way than the traced one's.
    """
    node_of = {id(tensor): node for node, tensor in weights.items()}
    boundaries: dict[str, list[Node]] = {}
    for node in list(graph.nodes):  # in order: repeats inside a traced block are written out before it is copied
        if node.target is BOUNDARY:
            boundaries.setdefault(arguments(node)[0], []).append(node)
        elif node.target is REPEAT:
            key, path, _ = arguments(node)
            enter, leave = boundaries[key][:2]
            copies = _weights(module, arguments(enter)[1], path, node_of)
            _copy(node, enter, leave, copies)
            _replace(node, [copies.get(value) or value for value in arguments(leave)[2]])
    for node in list(graph.nodes):
        if node.target is BOUNDARY:
            _replace(node, arguments(node)[2])


def _weights(module: nn.Module, first: str, other: str, node_of: Mapping[int, Node]) -> dict[Node, Node]:
    """From the graph inputs that the block `first` reads to those that the block `other` reads in their place."""
    found: dict[Node, Node] = {}
    mine, others = (_tensors(module.get_submodule(path)) for path in (first, other))
    for name, tensor in mine.items():
        if id(tensor) in node_of:
            node = node_of.get(id(others.get(name)))
            if node is None or found.setdefault(node_of[id(tensor)], node) is not node:
                raise CaptureError(f"weight {name!r} of {other!r} is shared in another way than that of {first!r}")
    return found


def _tensors(block: nn.Module) -> dict[str, Tensor]:
    return dict([*block.named_parameters(remove_duplicate=False), *block.named_buffers(remove_duplicate=False)])


def _copy(repeat: Node, enter: Node, leave: Node, copies: dict[Node, Node]) -> None:
    """Copies the nodes between two boundaries to where a repeat stands.

    `copies` maps nodes of the traced block to those of the repeat. Sizes that depend on nothing in the block are not
    copied: one serves all blocks.
    """
    _, path, tensors = arguments(repeat)
    first, node = arguments(enter)[1], enter.next
    while node is not leave:
        if node.target is operator.getitem and arguments(node)[0] is enter:
            copies[node] = tensors[arguments(node)[1]]
        elif any(map(copies.__contains__, node.all_input_nodes)) or not isinstance(node.meta.get("val"), SIZES):
            with repeat.graph.inserting_before(repeat):
                copy = repeat.graph.node_copy(node, lambda value: copies.get(value, value))
            inner = [entry for entry in module_stack(node).values() if entry[0].startswith(f"{first}.")]
            moved = {path + inside[len(first) :]: (path + inside[len(first) :], kind) for inside, kind in inner}
            set_module_stack(copy, module_stack(repeat) | moved)
            copies[node] = copy
        node = node.next


def _replace(node: Node, values: Sequence[Node]) -> None:
    """Replaces the items of a node that is a list of tensors by `values`, and drops the node."""
    for item in list(node.users):
        item.replace_all_uses_with(values[arguments(item)[1]])
        node.graph.erase_node(item)
    node.graph.erase_node(node)
