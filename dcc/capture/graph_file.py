"""A captured graph as a file: a `tensor_file` of its constants, with its nodes as JSON in the header.

The file holds no code, and nothing of it becomes code: names are identifiers, operators stand in a table
(operators.py), sizes are arithmetic on symbols (sizes.py), and types and devices are looked up by name.
"""

from __future__ import annotations

import json
import keyword
import os
import re
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from dcc.capture.operators import check_call_of_sizes, name_of, target_of
from dcc.capture.sizes import LARGEST, SizeReader, SizeWriter
from dcc.errors import CaptureError
from dcc.tensor_file import read_tensors, write_tensors
from dcc.torch_internals import OpOverload, module_stack, schema, set_module_stack

MARK, FORMAT = "dcc_graph", 2
FIELDS = {
    "facts": dict, "nodes": list, "values": list, "stacks": list, "symbols": dict, "sizes": list, "devices": dict
}  # fmt: skip
NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,199}")
DEVICE = re.compile(r"(cpu|cuda|mps|xpu|meta)(:\d{1,3})?")
MOST_NODES, MOST_VALUES = 50_000, 10_000
DTYPES = (
    *("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool"),
    *("uint16", "uint32", "uint64", "complex32", "complex64", "complex128"),
    *("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu"),
)
LAYOUTS = ("strided",)
MEMORY_FORMATS = ("contiguous_format", "preserve_format", "channels_last", "channels_last_3d")
TORCH_VALUES: dict[str, dict[str, Any]] = {  # what an argument may be besides numbers and text, by its name
    "dtype": {name: getattr(torch, name) for name in DTYPES if hasattr(torch, name)},
    "layout": {name: getattr(torch, name) for name in LAYOUTS},
    "memory_format": {name: getattr(torch, name) for name in MEMORY_FORMATS},
}
TORCH_NAMES = {value: {kind: name} for kind, known in TORCH_VALUES.items() for name, value in known.items()}


def write_graph(
    path: str | os.PathLike[str], graph: Graph, facts: dict[str, Any], constants: dict[str, Tensor]
) -> None:
    """Writes the graph, atomically, with JSON `facts` and tensors by name.

    Raises CaptureError, naming the node, for what a file cannot hold: a target that is no operator of the table
    (control flow, an eager module), an argument that is no number, text or torch value.
    """
    writer = _Writer()
    nodes = [writer.node(index, node) for index, node in enumerate(graph.nodes)]
    header = {
        "facts": facts,
        "nodes": nodes,
        "values": writer.values,
        "stacks": [json.loads(text) for text in writer.stacks],
        "symbols": writer.sizes.hints(),
        "sizes": writer.sizes.table,
        "devices": {name: str(tensor.device) for name, tensor in constants.items()},
    }
    _Reader(header).graph_module()  # what could not be read again is not written
    write_tensors(path, MARK, FORMAT, header, constants)


def read_graph(path: str | os.PathLike[str]) -> tuple[GraphModule, dict[str, Any], dict[str, Tensor]]:
    """The graph of `write_graph`, the facts and the tensors. Raises CaptureError for anything else."""
    header, constants = read_tensors(path, MARK, FORMAT, CaptureError)
    try:
        if set(header) != set(FIELDS) or not all(isinstance(header[name], kind) for name, kind in FIELDS.items()):
            raise CaptureError(f"the header must hold {', '.join(FIELDS)}; it holds {', '.join(header):.200}")
        if set(header["devices"]) != set(constants):
            raise CaptureError("field 'devices' must name every tensor")
        constants = {name: constants[name].to(_device(device)) for name, device in header["devices"].items()}
        return _Reader(header).graph_module(), header["facts"], constants
    except Exception as error:  # torch raises many kinds for values that do not fit each other
        raise CaptureError(f"{path}: the graph is malformed: {error}") from error


class _Writer:
    """Nodes as JSON values; equal facts of values, and equal module paths, are written once."""

    def __init__(self) -> None:
        self.sizes = SizeWriter()
        self.index: dict[Node, int] = {}
        self.values: list[Any] = []
        self.known: dict[str, int] = {}
        self.stacks: dict[str, int] = {}
        self.seen: dict[int, tuple[int, Any]] = {}

    def node(self, index: int, node: Node) -> list[Any]:
        """A node as [op, name, target, args, kwargs, index of its value or None, index of its module paths]."""
        self.index[node] = index
        try:
            target = node.target if node.op in ("placeholder", "output") else name_of(node.target)
            value = self.value_index(node.meta["val"]) if "val" in node.meta else None
            paths = json.dumps([path for path, _ in module_stack(node).values()])
            args, kwargs = self.argument(list(node.args)), {k: self.argument(v) for k, v in node.kwargs.items()}
        except CaptureError as error:
            raise CaptureError(f"node {node.name!r}: {error}") from error
        return [node.op, node.name, target, args, kwargs, value, self.stacks.setdefault(paths, len(self.stacks))]

    def value_index(self, val: Any) -> int:
        """Index of a value's facts; repeated blocks share their values."""
        if id(val) not in self.seen:
            fact = self.value(val)
            index = self.known.setdefault(json.dumps(fact), len(self.values))
            if index == len(self.values):
                self.values.append(fact)
            self.seen[id(val)] = index, val  # held, so that its id is not given again
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
        if isinstance(value, torch.device):
            return {"device": str(value)}
        if isinstance(value, torch.dtype | torch.layout | torch.memory_format) and value in TORCH_NAMES:
            return TORCH_NAMES[value]
        raise CaptureError(f"a file cannot hold the argument {value!r}, a {type(value).__name__}")

    def value(self, val: Any) -> Any:
        if isinstance(val, Tensor):
            if val.layout != torch.strided:
                raise CaptureError(f"a file cannot hold a value of layout {val.layout}")
            sizes, strides = [self.sizes.write(s) for s in val.shape], [self.sizes.write(s) for s in val.stride()]
            return {"tensor": [str(val.dtype).removeprefix("torch."), str(val.device), sizes, strides]}
        if isinstance(val, list | tuple):
            return {"values": [self.value(item) for item in val]}
        return {"number": self.sizes.write(val)}


class _Reader:
    """Nodes from JSON values; values of equal facts share one fake tensor. Raises many kinds for what is malformed."""

    def __init__(self, header: dict[str, Any]) -> None:
        self.header = header
        self.nodes: list[Node] = []
        if len(header["nodes"]) > MOST_NODES or len(header["values"]) > MOST_VALUES:
            raise CaptureError(f"more than {MOST_NODES} nodes or {MOST_VALUES} values")
        self.sizes = SizeReader(header["symbols"], header["sizes"])
        with self.sizes.environment.fake_mode:
            self.values = [self.value(fact) for fact in header["values"]]
        self.stacks = [{path: (path, None) for path in map(_text, paths)} for paths in header["stacks"]]

    def graph_module(self) -> GraphModule:
        graph = Graph()
        for entry in self.header["nodes"]:
            try:
                self.nodes.append(self.node(graph, *entry))
            except (CaptureError, IndexError, KeyError, TypeError, ValueError) as error:
                raise CaptureError(f"node {len(self.nodes)}: {error}") from error
        graph.lint()
        return GraphModule({}, graph)

    def node(
        self,
        graph: Graph,
        op: str,
        name: str,
        target: str,
        args: list[Any],
        kwargs: dict[str, Any],
        value: Any,
        at: Any,
    ) -> Node:
        arguments = tuple(self.argument(arg) for arg in args)
        named = {_name(key): self.argument(arg) for key, arg in kwargs.items()}
        found: Any = target
        if op == "placeholder":
            _name(target)
            if named or any(argument is not None for argument in arguments):
                raise CaptureError("an input of the graph has no arguments")
        elif op == "call_function":
            found = target_of(target)
            if isinstance(found, OpOverload) and (unknown := set(named) - {a.name for a in schema(found).arguments}):
                raise CaptureError(f"{target} takes no {', '.join(sorted(unknown))}")
        elif (op, target) != ("output", "output"):
            raise CaptureError(f"{op!r:.40} of {target!r:.40} is no input, call or output")
        node = graph.create_node(op, found, arguments, named, _name(name))
        if node.name != name:
            raise CaptureError(f"{name!r} came back as {node.name!r}")
        if value is not None:
            node.meta["val"] = self.values[_index(value)]
        set_module_stack(node, self.stacks[_index(at)])
        check_call_of_sizes(node)
        return node

    def argument(self, value: Any) -> Any:
        if isinstance(value, list):
            return [self.argument(item) for item in value]
        if isinstance(value, dict):
            ((kind, content),) = value.items()
            if kind == "node":
                return self.nodes[_index(content)]
            if kind == "tuple":
                return tuple(self.argument(item) for item in content)
            return _device(content) if kind == "device" else TORCH_VALUES[kind][content]
        if type(value) is int and abs(value) > LARGEST:
            raise CaptureError("a number is beyond 64 bits")
        return value

    def value(self, fact: Any) -> Any:
        ((kind, content),) = fact.items()
        if kind == "values":
            return [self.value(item) for item in content]
        if kind == "number":
            return self.sizes.read(content)
        if kind != "tensor":
            raise CaptureError(f"{kind!r:.40} is no value; there are: tensor, values, number")
        dtype, device, sizes, strides = content
        shape, steps = [self.sizes.read(s) for s in sizes], [self.sizes.read(s) for s in strides]
        return torch.empty_strided(shape, steps, dtype=TORCH_VALUES["dtype"][dtype], device=_device(device))


def _name(value: Any) -> str:
    """An identifier, which is all that FX writes into the code of a graph as it is."""
    if not isinstance(value, str) or not NAME.fullmatch(value) or keyword.iskeyword(value):
        raise CaptureError(f"{value!r:.40} is no name")
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str) or len(value) > 1000:
        raise CaptureError(f"{value!r:.40} is no path of a module")
    return value


def _index(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise CaptureError(f"{value!r:.40} is no index")
    return value


def _device(value: Any) -> torch.device:
    if not isinstance(value, str) or not DEVICE.fullmatch(value):
        raise CaptureError(f"{value!r:.40} is no device")
    return torch.device(value)
