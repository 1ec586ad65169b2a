"""A captured denoiser: one functional ATen graph whose weights are inputs, which serves every call that fits it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from dcc.capture.describe import described
from dcc.capture.preserve import preserved
from dcc.capture.settings import NO_SETTINGS, Setting, Settings
from dcc.capture.watch import State
from dcc.errors import CaptureError
from dcc.passes.graph import batched_output, shape
from dcc.passes.values import VALUE, Argument, Input, Served
from dcc.record.call import Call
from dcc.torch_internals import fixed_size, pytree, slots


@dataclass(frozen=True, eq=False)
class Weight(Input):
    """A parameter or buffer, read from the live module at every call so that weight swaps and casts take effect.

    `owners` has, by the full name of every weight of the graph, the module's own dictionary that holds it.
    """

    path: str  # its full name in the module
    owners: dict[str, dict[str, Any]]

    @property
    def name(self) -> str:
        return self.path

    def tensor(self, served: Served) -> Tensor:
        return self.get()

    def get(self) -> Tensor:
        """The tensor as it is now. Raises CaptureError where it is gone."""
        value = self.owners[self.path].get(self.path.rpartition(".")[2])
        if value is None:
            raise CaptureError(f"weight {self.path!r} was there at capture and is gone now; compile again")
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
    `state` is the one in which it stands for the module; `ignored` are attributes of the module that its own calls
    change, `settings` floats of the module that are inputs, and with `keeps` its first call makes something that later
    ones use. `proven` grows: it holds the layouts at
    which the graph was seen to equal the module.
    """

    graph_module: GraphModule
    call: Call
    weights: dict[str, Weight]
    constants: dict[str, Tensor]
    inputs: dict[str, str]  # call path -> placeholder name
    out_spec: pytree.TreeSpec
    problem: str | None = None
    origin: str = "exported"
    state: State = field(default_factory=State)
    ignored: frozenset[str] = frozenset()
    keeps: bool = False
    settings: Settings = NO_SETTINGS
    proven: set[Any] = field(default_factory=set)
    _symbols: dict[str, list[Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        paths = {name: path for path, name in self.inputs.items()}
        settings = {name: index for index, name in enumerate(self.settings.names)}
        for node in self.graph_module.graph.nodes:
            if node.op != "placeholder":
                break
            if node.name in self.weights:
                node.meta[VALUE] = self.weights[node.name]
            elif node.name in self.constants:
                node.meta[VALUE] = Constant(node.name, self.constants[node.name])
            elif node.name in settings:
                node.meta[VALUE] = Setting(node.name, settings[node.name], self.settings)
            else:
                node.meta[VALUE] = Argument(paths[node.name], node.name)

    @property
    def batch(self) -> str:
        """The symbol of the batch's size, or its fixed size as text."""
        return str(next(iter(shape(batched_output(self.graph_module))), 1))

    def part(self, call: Call, rows: slice | Tensor) -> Call:
        """`call` for some samples of the batch: `rows` of every tensor whose first dimension is the batch."""
        names = {path: self._symbols.get(path, []) for path in call.names}
        own = [bool(sizes) and str(sizes[0]) == self.batch for sizes in names.values()]
        return replace(call, tensors=tuple(t[rows] if o else t for t, o in zip(call.tensors, own, strict=True)))

    def fits(self, state: State) -> bool:
        """Whether the graph stands for the module in this state: all but the settings is as it was captured."""
        changed = self.state.changed(state)
        return changed is not None and changed <= self.settings.attributes

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
        values.update(zip(self.settings.names, self.settings.tensors(), strict=True))
        for path, tensor in zip(call.names, call.tensors, strict=True):
            if path in self.inputs:
                values[self.inputs[path]] = tensor
        return values

    def read_from(self, module: nn.Module) -> None:
        """Reads weights where the module has them now: one of its parts may have been replaced by one like it."""
        for weight in self.weights.values():
            weight.owners[weight.path] = slots_of(module, weight.path)
        self.settings.read_from(module)

    def is_like(self, other: Captured) -> bool:
        """Whether another captured graph computes the same from the same weights: what was lowered serves it too."""
        return (
            self.problem is None
            and other.problem is None
            and self.call.signature == other.call.signature
            and self._symbols == other._symbols
            and {n: w.path for n, w in self.weights.items()} == {n: w.path for n, w in other.weights.items()}
            and self.settings.names == other.settings.names
            and self.settings.attributes == other.settings.attributes
            and self.constants.keys() == other.constants.keys()
            and all(torch.equal(value, other.constants[name]) for name, value in self.constants.items())
            and str(self.graph_module.graph) == str(other.graph_module.graph)
        )

    def agrees(self, module: nn.Module, call: Call) -> bool:
        """Whether the graph gives the module's own outputs for this call.

        Compared once per layout, grad mode and values of settings.
        """
        kind = self.kind(call)
        if self.problem or kind in self.proven:
            return True
        with preserved(module):
            expected = pytree.tree_leaves(call.twin().run(module))
        if not self.gives(call, expected):
            return False
        self.proven.add(kind)
        return True

    def kind(self, call: Call) -> Any:
        """Equal for calls of which one stands for all when the graph is compared with the module."""
        return call.layout, torch.is_grad_enabled(), self.settings.values()

    def gives(self, call: Call, expected: Sequence[Any]) -> bool:
        """Whether the graph gives these outputs for a call: bit for bit on a CPU, up to rounding elsewhere."""
        if not self.accepts(call):
            return False
        try:
            with torch.no_grad(), call.without_autocast():
                actual = self.graph_module(*self.inputs_of(call))
        except (RuntimeError, AssertionError, IndexError, ValueError, KeyError, TypeError, CaptureError):
            return False  # sizes folded at capture do not fit this call, or weights are gone
        return same(actual, expected)

    def inputs_of(self, call: Call) -> list[Tensor]:
        """Graph inputs of this call in placeholder order."""
        values = self.bindings(call)
        return [values[node.name] for node in self.graph_module.graph.nodes if node.op == "placeholder"]


def fixed_or_symbol(size: Any) -> int | str:
    """A fixed size as a number, a symbolic one as its expression."""
    fixed = fixed_size(size)
    return str(size) if fixed is None else fixed


def weights_of(module: nn.Module, names: Mapping[str, str]) -> dict[str, Weight]:
    """The module's weights as inputs of a graph: from the names of placeholders, and the full names of weights."""
    owners = {path: slots_of(module, path) for path in names.values()}
    return {name: Weight(path, owners) for name, path in names.items()}


def slots_of(module: nn.Module, path: str) -> dict[str, Any]:
    """The module's own dictionary that holds the weight of this full name."""
    owner, _, key = path.rpartition(".")
    parameters, buffers = slots(module.get_submodule(owner))
    held: Any = parameters if key in parameters else buffers
    return held


Answers = Sequence[tuple[Call, Sequence[Any]]]  # calls, and what the module returned for each


def gives_all(captured: Captured, answers: Answers) -> bool:
    """Whether a graph gives the module's own outputs for all of these calls that it accepts, at least one."""
    accepted = [(call, outputs) for call, outputs in answers if captured.accepts(call)]
    return bool(accepted) and all(captured.gives(call, outputs) for call, outputs in accepted)


def same(actual: Sequence[Any], expected: Sequence[Any]) -> bool:
    """Whether outputs are equal: bit for bit on a CPU, up to rounding on devices that may add in another order."""
    return len(actual) == len(expected) and all(map(_same, actual, expected))


def _content(value: Any) -> Any:
    return value.tolist() if isinstance(value, Tensor) else type(value)


def _same(actual: Any, expected: Any) -> bool:
    if not isinstance(actual, Tensor) or not isinstance(expected, Tensor):
        return described(actual, _content) == described(expected, _content)
    if actual.shape != expected.shape or actual.dtype != expected.dtype:
        return False
    rtol, atol = (0.0, 0.0) if expected.device.type == "cpu" else (1e-3, 1e-4)
    return torch.allclose(actual, expected, rtol=rtol, atol=atol, equal_nan=True)
