"""A captured denoiser: one functional ATen graph whose weights are inputs, which serves every call that fits it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from dcc.errors import CaptureError
from dcc.passes.graph import returned
from dcc.passes.values import VALUE, Argument, Input, Served
from dcc.record.call import Call
from dcc.torch_internals import fixed_size, pytree, slots


@dataclass(frozen=True, eq=False)
class Weight(Input):
    """A parameter or buffer, read from the live module at every call so that weight swaps and casts take effect."""

    owner: dict[str, Tensor | None]
    key: str
    path: str  # its full name in the module

    @property
    def name(self) -> str:
        return self.path

    def tensor(self, served: Served) -> Tensor:
        return self.get()

    def get(self) -> Tensor:
        """The tensor as it is now. Raises CaptureError where it is gone."""
        value = self.owner[self.key]
        if value is None:
            raise CaptureError(f"weight {self.key!r} was there at capture and is None now; compile again")
        return value


@dataclass(frozen=True, eq=False)
class Constant(Input):
    """A tensor that the capture found in the module's code."""

    placeholder: str
    value: Tensor

    @property
    def name(self) -> str:
        return self.placeholder

    def tensor(self, served: Served) -> Tensor:
        return self.value


@dataclass(frozen=True, eq=False)
class Captured:
    """A denoiser as one graph. Graph inputs: weights, then the call's tensors; outputs: a flat tuple.

    It holds nothing of a recorded run, so that any number of compilations may share it. `problem` is why the module
    could not be exported; the graph is then one call of the eager module. `origin` says where the graph comes from.
    `proven` grows: it holds the shapes at which the graph was seen to equal the module.
    """

    graph_module: GraphModule
    call: Call
    weights: dict[str, Weight]
    constants: dict[str, Tensor]
    inputs: dict[str, str]  # call path -> placeholder name
    out_spec: pytree.TreeSpec
    problem: str | None = None
    origin: str = "exported"
    proven: set[tuple[tuple[int, ...], ...]] = field(default_factory=set)
    _symbols: dict[str, list[Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        paths = {name: path for path, name in self.inputs.items()}
        for node in self.graph_module.graph.nodes:
            if node.op != "placeholder":
                break
            if node.name in self.weights:
                node.meta[VALUE] = self.weights[node.name]
            elif node.name in self.constants:
                node.meta[VALUE] = Constant(node.name, self.constants[node.name])
            else:
                node.meta[VALUE] = Argument(paths[node.name], node.name)

    @property
    def batch(self) -> str:
        """The symbol of the batch's size, or its fixed size as text."""
        return str(returned(self.graph_module)[0].meta["val"].shape[0])

    def part(self, call: Call, rows: slice | Tensor) -> Call:
        """`call` for some samples of the batch: `rows` of every tensor whose first dimension is the batch."""
        names = {path: self._symbols.get(path, []) for path in call.names}
        own = [bool(sizes) and str(sizes[0]) == self.batch for sizes in names.values()]
        return replace(call, tensors=tuple(t[rows] if o else t for t, o in zip(call.tensors, own, strict=True)))

    def accepts(self, call: Call) -> bool:
        """Whether the graph serves this call: same signature, fixed sizes equal, symbolic sizes consistent."""
        if call.signature != self.call.signature:
            return False
        if self.problem:
            return True
        bound: dict[str, int] = {}
        for name, tensor in zip(call.names, call.tensors, strict=True):
            expected = self._symbols.get(name)
            if expected is None:
                continue
            for symbol, size in zip(expected, tensor.shape, strict=True):
                if isinstance(symbol, int):
                    if symbol != size:
                        return False
                elif bound.setdefault(symbol, int(size)) != size:
                    return False
        return True

    def bindings(self, call: Call) -> dict[str, Tensor]:
        """Every graph input of this call by placeholder name."""
        values = {name: weight.get() for name, weight in self.weights.items()}
        values.update(self.constants)
        for path, tensor in zip(call.names, call.tensors, strict=True):
            if path in self.inputs:
                values[self.inputs[path]] = tensor
        return values

    def agrees(self, module: nn.Module, call: Call, exactly: bool = False) -> bool:
        """Whether the graph gives the eager module's outputs for this call, up to float rounding or `exactly`.

        Up to rounding, the two are compared once per shape; exactly means bit for bit.
        """
        if self.problem or (not exactly and call.shapes in self.proven):
            return True
        with torch.no_grad():
            expected = pytree.tree_leaves(module(**call.arguments()))
            try:
                actual = self.graph_module(*self.inputs_of(call))
            except (RuntimeError, AssertionError, IndexError, ValueError, KeyError, CaptureError):
                return False  # sizes folded at capture do not fit this call, or weights are gone
        rtol, atol = (0.0, 0.0) if exactly else (1e-3, 1e-4)
        equal = len(actual) == len(expected) and all(
            a.shape == e.shape and a.dtype == e.dtype and torch.allclose(a, e, rtol=rtol, atol=atol, equal_nan=True)
            for a, e in zip(actual, expected, strict=True)
        )
        if equal:
            self.proven.add(call.shapes)
        return equal

    def is_exact(self, module: nn.Module, *calls: Call) -> bool:
        """Whether the first of `calls` that it accepts gives the module's outputs bit for bit; False without one."""
        call = next((call for call in calls if self.accepts(call)), None)
        return call is not None and self.agrees(module, call, exactly=True)

    def inputs_of(self, call: Call) -> list[Tensor]:
        """Graph inputs of this call in placeholder order."""
        values = self.bindings(call)
        return [values[node.name] for node in self.graph_module.graph.nodes if node.op == "placeholder"]


def fixed_or_symbol(size: Any) -> int | str:
    """A fixed size as a number, a symbolic one as its expression."""
    fixed = fixed_size(size)
    return str(size) if fixed is None else fixed


def weight_of(module: nn.Module, target: str) -> Weight:
    path, _, key = target.rpartition(".")
    owner = module.get_submodule(path)
    parameters, buffers = slots(owner)
    held: Any = parameters if key in parameters else buffers
    return Weight(held, key, target)
