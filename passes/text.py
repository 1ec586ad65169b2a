"""Canonical text of a graph (stable names, targets, shapes, dtypes) for dumps, golden tests, replay and cache keys."""

from __future__ import annotations

import hashlib
from typing import Any, cast

import torch
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from dcc.torch_internals import OpOverload


def text(graph_module: GraphModule) -> str:
    """One line per node, `%3 = aten.add.Tensor(%1, %2) # f32[s0, 64]`; equal for graphs that differ in names only.

    Inputs keep their names. Bodies that blocks share follow, each under its own name.
    """
    numbers = {node: f"%{index}" for index, node in enumerate(graph_module.graph.nodes)}
    own = "\n".join(_line(node, numbers) for node in graph_module.graph.nodes) + "\n"
    names = dict.fromkeys(str(node.target) for node in graph_module.graph.nodes if node.op == "get_attr")
    return own + "".join(f"{name}:\n{text(cast('GraphModule', graph_module.get_submodule(name)))}" for name in names)


def digest(graph_module: GraphModule) -> str:
    """SHA-256 of `text`, in hexadecimal."""
    return hashlib.sha256(text(graph_module).encode()).hexdigest()


def _line(node: Node, numbers: dict[Node, str]) -> str:
    if node.op == "output":
        return f"return {_value(node.args[0], numbers)}"
    if node.op == "placeholder":
        return f"{numbers[node]} = input {node.target}{_type(node)}"
    arguments = [_value(arg, numbers) for arg in node.args]
    arguments += [f"{key}={_value(arg, numbers)}" for key, arg in sorted(node.kwargs.items())]
    return f"{numbers[node]} = {_target(node)}({', '.join(arguments)}){_type(node)}"


def _target(node: Node) -> str:
    if isinstance(node.target, str):
        return f"module {node.target}"
    if isinstance(node.target, OpOverload):
        return str(node.target)
    return f"{node.target.__module__}.{node.target.__name__}"


def _value(value: Any, numbers: dict[Node, str]) -> str:
    class Name(str):
        __repr__ = str.__str__

    return repr(map_arg(value, lambda node: Name(numbers[node])))


def _type(node: Node) -> str:
    val = node.meta.get("val")
    if isinstance(val, torch.Tensor):
        dtype = str(val.dtype).removeprefix("torch.").replace("float", "f").replace("int", "i")
        return f"  # {dtype}[{', '.join(str(size) for size in val.shape)}]"
    return ""
