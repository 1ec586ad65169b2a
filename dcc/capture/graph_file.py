"""A captured graph as a file: safetensors of its constants, with its nodes as JSON in the header.

The file holds no code. Targets are looked up by name among torch's operators and a few functions of sizes; sizes are
arithmetic on symbols, rebuilt in a shape environment of their own.
"""

from __future__ import annotations

import importlib
import json
import math
import os
import re
from collections.abc import Callable
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from dcc.errors import CaptureError
from dcc.files import write_file
from dcc.torch_internals import (
    OpOverload,
    expression,
    fixed_size,
    hint,
    module_stack,
    set_module_stack,
    sizes_from_hints,
    spell,
)

FORMAT = 1
FUNCTIONS = re.compile(r"_operator:\w+|math:\w+|torch:sym_\w+|builtins:(abs|max|min|round)")  # may be targets
ATTRIBUTE = re.compile(r"__|(?<!math)\.[A-Za-z_]")  # what arithmetic on symbols has no use for
SYMBOLIC = (torch.SymInt, torch.SymFloat, torch.SymBool)
TORCH_VALUES = {"dtype": torch.dtype, "layout": torch.layout, "memory_format": torch.memory_format}


def write_graph(
    path: str | os.PathLike[str], graph: Graph, facts: dict[str, Any], constants: dict[str, Tensor]
) -> None:
    """Writes the graph, atomically, with JSON `facts` and tensors by name.

    Raises CaptureError, naming the node, for what a file cannot hold: a target that is no operator (control flow,
    an eager module), an argument that is no number, text or torch value.
    """
    writer = _Writer()
    nodes = [writer.node(index, node) for index, node in enumerate(graph.nodes)]
    header = {
        "format": FORMAT,
        "facts": facts,
        "nodes": nodes,
        "values": list(writer.values),
        "stacks": list(writer.stacks),
        "symbols": writer.hints(),
        "devices": {name: str(tensor.device) for name, tensor in constants.items()},
    }
    dense = {name: tensor.detach().cpu().contiguous() for name, tensor in constants.items()}
    write_file(path, save(dense, metadata={"graph": json.dumps(header)}))


def read_graph(path: str | os.PathLike[str]) -> tuple[GraphModule, dict[str, Any], dict[str, Tensor]]:
    """The graph of `write_graph`, the facts and the tensors. Raises CaptureError for a file of another format."""
    with safe_open(os.fspath(path), framework="pt") as file:
        header = json.loads((file.metadata() or {}).get("graph", "{}"))
        if header.get("format") != FORMAT:
            raise CaptureError(f"{path}: graph format {header.get('format')}, this dcc reads {FORMAT}")
        constants = {name: file.get_tensor(name).to(header["devices"][name]) for name in header["devices"]}
    return _Reader(header).graph_module(), header["facts"], constants


class _Writer:
    """Nodes as JSON values; equal facts of values, and equal module paths, are written once."""

    def __init__(self) -> None:
        self.index: dict[Node, int] = {}
        self.values: dict[str, int] = {}
        self.stacks: dict[str, int] = {}
        self.known: dict[str, int] = {}
        self.used: set[str] = set()
        self.seen: dict[int, tuple[int, Any]] = {}

    def node(self, index: int, node: Node) -> list[Any]:
        """A node as [op, name, target, args, kwargs, index of its value or None, index of its module paths]."""
        self.index[node] = index
        try:
            target = node.target if node.op in ("placeholder", "output") else _name(node.target)
            value = self.value_index(node.meta["val"]) if "val" in node.meta else None
            paths = [path for path, _ in module_stack(node).values()]
            args, kwargs = self.argument(list(node.args)), {k: self.argument(v) for k, v in node.kwargs.items()}
        except CaptureError as error:
            raise CaptureError(f"node {node.name!r}: {error}") from error
        return [node.op, node.name, target, args, kwargs, value, self.once(self.stacks, paths)]

    def once(self, table: dict[str, int], value: Any) -> int:
        return table.setdefault(json.dumps(value), len(table))

    def value_index(self, val: Any) -> int:
        """Index of a value's facts; repeated blocks share their values."""
        if id(val) not in self.seen:
            self.seen[id(val)] = self.once(self.values, self.value(val)), val  # held, so that its id is not given again
        return self.seen[id(val)][0]

    def argument(self, value: Any) -> Any:
        if isinstance(value, Node):
            return {"node": self.index[value]}
        if isinstance(value, list):  # and FX's immutable one
            return [self.argument(item) for item in value]
        if isinstance(value, tuple):
            return {"tuple": [self.argument(item) for item in value]}
        if value is None or type(value) in (bool, int, float, str):
            return value
        for kind, types in TORCH_VALUES.items():
            if isinstance(value, types):
                return {kind: str(value).removeprefix("torch.")}
        if isinstance(value, torch.device):
            return {"device": str(value)}
        raise CaptureError(f"a file cannot hold the argument {value!r}, a {type(value).__name__}")

    def value(self, val: Any) -> Any:
        if isinstance(val, Tensor):
            if val.layout != torch.strided:
                raise CaptureError(f"a file cannot hold a value of layout {val.layout}")
            sizes, strides = [self.size(s) for s in val.shape], [self.size(s) for s in val.stride()]
            return {"tensor": [str(val.dtype).removeprefix("torch."), str(val.device), sizes, strides]}
        if isinstance(val, list | tuple):
            return {"values": [self.value(item) for item in val]}
        return {"number": self.size(val)}

    def size(self, size: Any) -> Any:
        """A size as a number, or as the text of its expression where it is symbolic."""
        if size is None or isinstance(size, bool | int | float):
            return size
        if not isinstance(size, SYMBOLIC):
            raise CaptureError(f"a file cannot hold a value of type {type(size).__name__}")
        fixed = fixed_size(size) if isinstance(size, torch.SymInt) else None
        if fixed is not None:
            return fixed
        formula = expression(size)
        self.used |= {str(symbol) for symbol in formula.free_symbols}
        if formula.is_Symbol:
            self.known[str(formula)] = hint(size)
        return spell(formula)

    def hints(self) -> dict[str, int]:
        """The size of every symbol at capture."""
        if missing := self.used - set(self.known):
            raise CaptureError(f"no value of the graph has the size {', '.join(sorted(missing))} alone")
        return self.known


class _Reader:
    """Nodes from JSON values; values of equal facts share one fake tensor."""

    def __init__(self, header: dict[str, Any]) -> None:
        self.header, self.nodes = header, []
        self.fake_mode, sizes = sizes_from_hints(header["symbols"])
        self.names: dict[str, Any] = {"math": math, "max": max, "min": min, **sizes}
        with self.fake_mode:
            self.values = [self.value(json.loads(text)) for text in header["values"]]
        self.stacks = [json.loads(text) for text in header["stacks"]]

    def graph_module(self) -> GraphModule:
        graph = Graph()
        for op, name, target, args, kwargs, value, stack in self.header["nodes"]:
            target = _function(target) if op == "call_function" else target
            arguments = tuple(self.argument(arg) for arg in args)
            node = graph.create_node(op, target, arguments, {k: self.argument(v) for k, v in kwargs.items()}, name)
            if node.name != name:
                raise CaptureError(f"node {name!r} came back as {node.name!r}")
            if value is not None:
                node.meta["val"] = self.values[value]
            set_module_stack(node, {path: (path, None) for path in self.stacks[stack]})
            self.nodes.append(node)
        return GraphModule({}, graph)

    def argument(self, value: Any) -> Any:
        if isinstance(value, list):
            return [self.argument(item) for item in value]
        if not isinstance(value, dict):
            return value
        ((kind, content),) = value.items()
        if kind == "node":
            return self.nodes[content]
        if kind == "tuple":
            return tuple(self.argument(item) for item in content)
        return torch.device(content) if kind == "device" else getattr(torch, content)

    def value(self, fact: dict[str, Any]) -> Any:
        ((kind, content),) = fact.items()
        if kind == "values":
            return [self.value(item) for item in content]
        if kind == "number":
            return self.size(content)
        dtype, device, sizes, strides = content
        shape, steps = [self.size(s) for s in sizes], [self.size(s) for s in strides]
        return torch.empty_strided(shape, steps, dtype=getattr(torch, dtype), device=device)

    def size(self, size: Any) -> Any:
        if not isinstance(size, str):
            return size
        if ATTRIBUTE.search(size):
            raise CaptureError(f"{size!r} is no arithmetic on sizes")
        return eval(size, {"__builtins__": {}}, self.names)


def _name(target: Any) -> str:
    """The name of an operator or function under which `_function` finds it again."""
    if isinstance(target, OpOverload):
        return str(target)
    name = f"{getattr(target, '__module__', '')}:{getattr(target, '__name__', '')}"
    if _function(name) is not target:
        raise CaptureError(f"a file cannot hold a call of {target}")
    return name


def _function(name: str) -> Callable[..., Any]:
    """The operator `aten.add.Tensor` or the function `_operator:getitem`. Raises CaptureError where there is none."""
    try:
        if FUNCTIONS.fullmatch(name):
            module, function = name.split(":")
            return getattr(importlib.import_module(module), function)
        namespace, operator, overload = name.split(".")
        return getattr(getattr(getattr(torch.ops, namespace), operator), overload)
    except (AttributeError, ValueError) as error:
        raise CaptureError(f"no operator {name!r} in this torch") from error
