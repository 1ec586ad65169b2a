"""Captures a denoiser once, as a functional ATen graph whose weights are inputs. The only file that uses torch.export.

A `Call` is one set of arguments in canonical form; a `Captured` is the graph that serves every call of the same
signature whose shapes fit (DESIGN contract 1). Graphs are kept on disk, because an export takes about two milliseconds
an operator; what a later process reads there has to give the module's outputs bit for bit, or is made anew.
"""

from __future__ import annotations

import getpass
import hashlib
import inspect
import operator
import os
import tempfile
import warnings
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.export
from torch import Tensor, nn
from torch.export.graph_signature import InputKind, OutputKind
from torch.fx import Graph, GraphModule, Node
from torch.utils import _pytree as pytree

from dcc import repeats
from dcc.errors import CaptureError
from dcc.fingerprint import code_hash
from dcc.graph_file import read_graph, write_graph
from dcc.passes.graph import nodes_by_name, output_node, shape, sizes, symbols
from dcc.passes.verify import is_mutation, verify
from dcc.repeats import one_of_each_kind, write_out
from dcc.text import error_line

STORED = 64  # graphs kept on disk; the oldest give way
CONSTANTS = (type(None), bool, int, float, str, torch.dtype, torch.device)


@dataclass(frozen=True)
class Call:
    """Arguments of one denoiser call: the tensors by path, and everything else as the signature.

    `names[i]` is a readable path such as `hidden_states` or `added_cond_kwargs.time_ids`. `signature` is hashable and
    equal for calls that one graph can serve, up to shapes.
    """

    names: tuple[str, ...]
    tensors: tuple[Tensor, ...]
    constants: dict[str, Any]
    spec: pytree.TreeSpec
    leaf_names: tuple[str, ...]

    @property
    def signature(self) -> tuple[Any, ...]:
        kinds = tuple((t.dim(), t.dtype, t.device) for t in self.tensors)
        return self.names, kinds, tuple(self.constants.items())

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """Of its tensors."""
        return tuple(tuple(tensor.shape) for tensor in self.tensors)

    def arguments(self, tensors: tuple[Tensor, ...] | None = None) -> dict[str, Any]:
        """The keyword arguments again, with other tensors if given."""
        values = dict(zip(self.names, self.tensors if tensors is None else tensors, strict=True)) | self.constants
        return pytree.tree_unflatten([values[name] for name in self.leaf_names], self.spec)

    def contiguous(self) -> Call:
        """The same call with dense tensors, as lowered code expects; copies only what is not dense."""
        return replace(self, tensors=tuple(tensor.contiguous() for tensor in self.tensors))


def bind(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], as_tensors: frozenset[str]) -> Call:
    """Canonical form of `module(*args, **kwargs)`: positional and keyword spellings give the same call.

    `as_tensors` names numeric arguments to pass as tensors because they change from step to step. Raises TypeError
    as the module's forward would, and CaptureError for a value that is neither tensor, number, string, list nor dict.
    """
    bound = inspect.signature(module.forward).bind(*args, **kwargs)
    bound.apply_defaults()
    arguments: dict[str, Any] = {}
    for name, value in bound.arguments.items():
        kind = bound.signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_KEYWORD:
            arguments.update(value)
        elif kind in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.POSITIONAL_ONLY):
            if value:
                raise CaptureError(
                    f"{type(module).__name__}.forward takes {name!r} by position only; name its parameters"
                )
        else:
            arguments[name] = value
    leaves, spec = pytree.tree_flatten_with_path(arguments)
    names, tensors, tensor_names, constants = [], [], [], {}
    for path, value in leaves:
        name = ".".join(str(getattr(key, "key", getattr(key, "idx", key))) for key in path)
        names.append(name)
        if name in as_tensors and isinstance(value, (int, float)) and not isinstance(value, bool):
            value = torch.tensor(value, dtype=torch.float32 if isinstance(value, float) else torch.int64)
        if isinstance(value, Tensor):
            tensor_names.append(name)
            tensors.append(value)
        elif isinstance(value, CONSTANTS):
            constants[name] = value
        else:
            raise CaptureError(
                f"argument {name!r} of {type(module).__name__} is a {type(value).__name__}; "
                "dcc takes tensors, numbers, strings, and lists or dicts of them"
            )
    return Call(tuple(tensor_names), tuple(tensors), constants, spec, tuple(names))


@dataclass
class Weight:
    """A parameter or buffer, read from the live module at every call so that weight swaps and casts take effect."""

    owner: dict[str, Tensor | None]
    key: str
    path: str  # in the module

    def get(self) -> Tensor:
        value = self.owner[self.key]
        if value is None:
            raise CaptureError(f"weight {self.key!r} was there at capture and is None now; compile again")
        return value


@dataclass
class Captured:
    """A denoiser as one graph. Graph inputs: weights, then the call's tensors; outputs: a flat tuple.

    `problem` is why the module could not be exported; the graph is then one call of the eager module. `origin` says
    where it comes from.
    """

    graph_module: GraphModule
    call: Call
    weights: dict[str, Weight]
    constants: dict[str, Tensor]
    inputs: dict[str, str]  # call path -> placeholder name
    out_spec: pytree.TreeSpec
    problem: str | None = None
    origin: str = "exported"
    varying: frozenset[str] = frozenset()  # paths of the tensors that change from step to step
    fixed: frozenset[str] = frozenset()  # paths of the tensors that are the very same ones at every step
    guided: bool = False  # the batch is [unconditional; conditional] of the same samples (Recording.guided)
    halves: bool | None = None  # whether half of the batch alone gives its half of the output; None until asked
    proven: set[tuple[tuple[int, ...], ...]] = field(default_factory=set)  # shapes at which it equals the module
    _symbols: dict[str, list[Any]] = field(default_factory=dict)

    @property
    def batch(self) -> str:
        """The symbol of the batch's size, or its fixed size as text."""
        return str(output_node(self.graph_module).args[0][0].meta["val"].shape[0])

    def learn(self, varying: Iterable[str], fixed: Iterable[str], guided: bool) -> None:
        """Notes what a recorded run showed (Recording): inputs that move, those that are kept, and guidance."""
        self.varying, self.fixed, self.guided = frozenset(varying), frozenset(fixed), guided

    def carries_batch(self, node: Node) -> bool:
        """Whether a value of the graph has the samples of the batch as its first dimension."""
        first, output = shape(node)[:1], output_node(self.graph_module).args[0][0]
        return bool(first) and self.batch in symbols(first[0]) and sizes(node)[0] == sizes(output)[0]

    def part(self, call: Call, rows: slice | Tensor) -> Call:
        """The call of some samples of the batch: these rows of every tensor that has the batch first."""
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
        """Whether the graph gives the eager module's outputs for this call, to float rounding or bit for bit.

        To float rounding is asked once for each shape.
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
        """Whether it gives the module's outputs bit for bit for the first of the calls that it accepts; one it must."""
        call = next((call for call in calls if self.accepts(call)), None)
        return call is not None and self.agrees(module, call, exactly=True)

    def inputs_of(self, call: Call) -> list[Tensor]:
        """Graph inputs of this call in placeholder order."""
        values = self.bindings(call)
        return [values[node.name] for node in self.graph_module.graph.nodes if node.op == "placeholder"]


def capture(module: nn.Module, call: Call, first: Call | None = None) -> Captured:
    """Exports `module` for calls like this one; capture with a batch of 2 or more, because sizes of 1 are fixed.

    `first` is a call that it will serve: on that one, where it can, it is compared with the module.
    Tries all dimensions dynamic, then fixed shapes, then falls back to the eager module as one opaque node, keeping
    the reason in `problem`. A module that was captured before is not captured again while its old graph still gives
    its outputs bit for bit, so compiling once more for another plan is quick.
    """
    tests = (call,) if first is None else (first, call)
    for known in _CAPTURES.get(module, []):
        if known.accepts(call) and known.is_exact(module, *tests):
            return known
    path = _place(module, call)
    captured, why_not = _read(path, module, call, tests)
    if captured is None:
        captured = _first_that_exports(module, call, tests)
        captured.origin += f", because the graph on disk {why_not}" if why_not else ""
        _write(path, captured)
    if captured.problem is None:
        _CAPTURES.setdefault(module, []).append(captured)
    return captured


_CAPTURES: WeakKeyDictionary[nn.Module, list[Captured]] = WeakKeyDictionary()


def _place(module: nn.Module, call: Call) -> Path | None:
    """The file of the graph for this code and call in DCC_CACHE_DIR, by default beside what Inductor keeps.

    None where that variable is empty.
    """
    folder = os.environ.get("DCC_CACHE_DIR")
    if folder == "":
        return None
    own = [torch.__version__, *(Path(file).read_text() for file in (__file__, repeats.__file__))]
    own += [code_hash(module), call.signature, call.spec, *call.shapes]
    name = hashlib.sha256("\n".join(map(str, own)).encode()).hexdigest()[:32]
    beside = os.environ.get("TORCHINDUCTOR_CACHE_DIR") or f"{tempfile.gettempdir()}/torchinductor_{getpass.getuser()}"
    return Path(folder or f"{beside}/dcc") / f"{name}.graph"


def _read(path: Path | None, module: nn.Module, call: Call, tests: Sequence[Call]) -> tuple[Captured | None, str]:
    """The stored graph; None where there is none, and where it is of no use why."""
    if path is None or not path.exists():
        return None, ""
    try:
        graph_module, facts, constants = read_graph(path)
        verify(graph_module, "reading a stored graph")
        inputs, nodes = facts["inputs"], nodes_by_name(graph_module)
        captured = Captured(
            graph_module,
            call,
            {name: _live(module, target) for name, target in facts["weights"].items()},
            constants,
            inputs,
            pytree.treespec_loads(facts["outputs"]),
            origin="read from disk",
            _symbols={name: [_size(size) for size in shape(nodes[inputs[name]])] for name in inputs},
        )
    except Exception as error:  # cut short, foreign, or of another version of torch's own internals
        return None, f"cannot be read: {error_line(error)}"
    if not captured.accepts(call) or not captured.is_exact(module, *tests):
        return None, "gives other values than the module"
    return captured, ""


def _write(path: Path | None, captured: Captured) -> None:
    """Keeps the graph for later processes; where it cannot be kept, `origin` says why."""
    if path is None or captured.problem is not None:
        return
    try:
        facts = {
            "inputs": captured.inputs,
            "weights": {name: weight.path for name, weight in captured.weights.items()},
            "outputs": pytree.treespec_dumps(captured.out_spec),
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        write_graph(path, captured.graph_module.graph, facts, captured.constants)
        stored = sorted(path.parent.glob("*.graph"), key=lambda file: file.stat().st_mtime)
        for file in stored[:-STORED]:
            file.unlink(missing_ok=True)
    except (CaptureError, OSError, NotImplementedError) as error:  # the last: outputs of a class that has no name
        captured.origin = f"exported, not kept on disk: {error_line(error)}"


def _first_that_exports(module: nn.Module, call: Call, tests: Sequence[Call]) -> Captured:
    problems = []
    for dynamic in (True, False):
        for context in (one_of_each_kind(module), nullcontext(False)):
            some_repeat = True
            try:
                with context as some_repeat:
                    captured = _export(module, call, dynamic)
                if not some_repeat or captured.is_exact(module, *tests):
                    return captured
                problem = "blocks of one kind differ in what they compute"
            except Exception as error:  # torch.export raises many kinds; each is recorded and shown by summary()
                problem = error_line(error)
            if not some_repeat:
                break
        problems.append(f"{'dynamic' if dynamic else 'fixed'} shapes: {problem}")
    return _opaque(module, call, "; ".join(problems))


def _export(module: nn.Module, call: Call, dynamic: bool) -> Captured:
    kwargs = call.arguments()
    shapes = None
    if dynamic:
        shapes = pytree.tree_map(_dynamic_dims, kwargs)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.export's own deprecations, nothing a caller could act on
        program = torch.export.export(module, (), kwargs, dynamic_shapes=shapes, strict=False)
        if any(is_mutation(node) for node in program.graph.nodes):
            program = program.run_decompositions({})  # functional form, operators left whole
    return _from_program(module, call, program)


def _dynamic_dims(value: Any) -> dict[int, Any] | None:
    """Every dimension symbolic, except those of size 1: torch.export fixes 0 and 1."""
    if not isinstance(value, Tensor):
        return None
    return {d: torch.export.Dim.STATIC if size == 1 else torch.export.Dim.AUTO for d, size in enumerate(value.shape)}


def _from_program(module: nn.Module, call: Call, program: torch.export.ExportedProgram) -> Captured:
    placeholders = {node.name: node for node in program.graph.nodes if node.op == "placeholder"}
    weights, constants, user_inputs = {}, {}, []
    for spec in program.graph_signature.input_specs:
        name = spec.arg.name
        if spec.kind is InputKind.USER_INPUT:
            user_inputs.append(name)
        elif spec.kind in (InputKind.PARAMETER, InputKind.BUFFER):
            weights[name] = _live(module, spec.target)
        else:
            constants[name] = program.constants[spec.target]
    write_out(program.graph, module, {placeholders[name]: weight.get() for name, weight in weights.items()})
    inputs, symbols = {}, {}
    for path, name in zip(call.leaf_names, user_inputs, strict=True):
        node = placeholders[name]
        if path in call.names:
            inputs[path] = name
            symbols[path] = [_size(size) for size in node.meta["val"].shape]
        else:
            program.graph.erase_node(node)  # a constant: part of the signature, folded into the graph
    graph_module = GraphModule(dict(program.graph_module.named_modules()), program.graph)
    for spec in program.graph_signature.output_specs:
        if spec.kind is not OutputKind.USER_OUTPUT:
            raise CaptureError(f"the module writes to {spec.target!r} while it runs; a cached graph must be functional")
    output = output_node(graph_module)
    output.args = (tuple(output.args[0]),)
    verify(graph_module, "capture")
    return Captured(graph_module, call, weights, constants, inputs, program.call_spec.out_spec, _symbols=symbols)


def _size(size: Any) -> int | str:
    """A fixed size as a number, a symbolic one as its expression."""
    fixed = size if isinstance(size, int) else size.node.maybe_as_int()
    return str(size) if fixed is None else int(fixed)


def _live(module: nn.Module, target: str) -> Weight:
    path, _, key = target.rpartition(".")
    owner = module.get_submodule(path)
    return Weight(owner._parameters if key in owner._parameters else owner._buffers, key, target)


def _opaque(module: nn.Module, call: Call, problem: str) -> Captured:
    """One node that calls the eager module: its raw output can still be cached, nothing inside can."""
    with torch.no_grad():
        outputs, out_spec = pytree.tree_flatten(module(**call.arguments()))
    if not all(isinstance(value, Tensor) for value in outputs):
        raise CaptureError(
            f"{type(module).__name__} returns values that are not tensors, and exports neither: {problem}"
        )

    class Eager(nn.Module):
        def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
            return tuple(pytree.tree_leaves(module(**call.arguments(tensors))))

    graph, inputs, placeholders = Graph(), {}, []
    for index, (path, tensor) in enumerate(zip(call.names, call.tensors, strict=True)):
        node = graph.placeholder(f"input_{index}")
        node.meta["val"] = tensor.to("meta")
        inputs[path] = node.name
        placeholders.append(node)
    eager = graph.call_module("eager", tuple(placeholders))
    eager.meta["val"] = tuple(value.to("meta") for value in outputs)
    items = []
    for index, value in enumerate(outputs):
        item = graph.call_function(operator.getitem, (eager, index))
        item.meta["val"] = value.to("meta")
        items.append(item)
    graph.output(tuple(items))
    graph_module = GraphModule({"eager": Eager()}, graph)
    return Captured(graph_module, call, {}, {}, inputs, out_spec, problem=problem)
