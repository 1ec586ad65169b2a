"""Captures a denoiser once, as a functional ATen graph whose weights are inputs. The only file that uses torch.export.

A Captured serves every call of the same signature whose shapes fit. A graph that a later process reads from disk has to
give the module's outputs bit for bit; otherwise the module is captured anew.
"""

from __future__ import annotations

import operator
import warnings
from contextlib import nullcontext
from dataclasses import replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.export
from torch import Tensor, nn
from torch.export.graph_signature import InputKind, OutputKind
from torch.fx import Graph, GraphModule, Node

from dcc.capture import store
from dcc.capture.captured import Answers, Captured, fixed_or_symbol, gives_all, weights_of
from dcc.capture.preserve import preserved
from dcc.capture.purity import Evidence, examine
from dcc.capture.repeats import one_of_each_kind, write_out
from dcc.capture.settings import GIVEN, NO_SETTINGS, Settings
from dcc.capture.watch import State
from dcc.errors import CaptureError
from dcc.passes.graph import output_node, returned
from dcc.passes.verify import is_mutation, verify
from dcc.record.call import SERVED, Call
from dcc.text import error_line
from dcc.torch_internals import plain_call, pytree, symbols_of


def capture(
    module: nn.Module,
    call: Call,
    first: Call | None = None,
    ignored: frozenset[str] = frozenset(),
    settings: frozenset[str] = frozenset(),
) -> Captured:
    """Exports `module`, in the state that it is in, for calls like this one, and leaves it in that state.

    Capture with a batch of 2 or more, because sizes of 1 are fixed. `first` is another call that the graph will serve;
    `ignored` are attributes that make no difference to the state; the floats on `settings` become inputs of the graph.
    Raises CaptureError where the module's code does not take that, because it branches on them, say.

    Tries all dimensions dynamic, then fixed shapes, then falls back to the eager module as one opaque node, keeping the
    reason in `problem`: no graph stands for a module that is more than a function of its inputs, and none is taken that
    gives other values than the module. A module that was captured before in this state is not captured again, so
    compiling once more for another plan is quick.
    """
    call, first = call.detached(), first.detached() if first is not None else None
    state = State.of(module, ignored)
    with preserved(module):
        evidence = examine(module, call)
        if evidence.shifting:
            raise CaptureError(
                f"{type(module).__name__} answers equal calls in structures that differ ({evidence.finding}); dcc "
                "forecasts answers of one structure"
            )
        finding = f"it has {state.hooks}" if state.hooks else evidence.finding
        if finding:
            captured = replace(_opaque(module, call, evidence, finding), ignored=ignored | evidence.changed)
        else:
            captured = _captured(module, call, first, state, evidence, settings)
    if captured.ignored != ignored:
        state = State.of(module, captured.ignored)
    if captured.problem is not None:
        return replace(captured, state=state)
    if not captured.fits(state):  # new, or from disk
        captured = replace(captured, state=state, keeps=evidence.keeps)
        keep(module, captured)
    captured.read_from(module)
    captured.proven.update(captured.kind(own) for own in (call, first) if own is not None and captured.accepts(own))
    return captured


def _captured(
    module: nn.Module, call: Call, first: Call | None, state: State, evidence: Evidence, settings: frozenset[str]
) -> Captured:
    """A graph that was captured in this state, by this process or an earlier one, or a new one."""
    tests = evidence.answers
    if first is not None and first.layout != call.layout:
        tests = [*tests, (first, pytree.tree_leaves(first.twin().run(module)))]
    for known in _CAPTURES.get(module, []):
        if known.fits(state) and known.settings.attributes == settings:
            known.read_from(module)
            if gives_all(known, tests):
                return known
    if settings:
        return _with_settings(module, call, settings, tests)
    path = store.place(module, call)
    captured, why_not = store.read(path, module, call, tests)
    if captured is None:
        captured = _first_that_exports(module, call, evidence, tests)
        said = store.write(path, captured) or (f", because the graph on disk {why_not}" if why_not else "")
        captured = replace(captured, origin=captured.origin + said)
    return captured


_CAPTURES: WeakKeyDictionary[nn.Module, list[Captured]] = WeakKeyDictionary()


def keep(module: nn.Module, captured: Captured) -> None:
    """Keeps a captured graph of a module for other compilations, as long as the module is there."""
    _CAPTURES.setdefault(module, []).append(captured)


def refresh(module: nn.Module, state: State) -> None:
    """Lets the graphs that were captured in a state read their weights from where the module has them now."""
    for captured in _CAPTURES.get(module, []):
        if captured.fits(state):
            captured.read_from(module)


def _with_settings(module: nn.Module, call: Call, settings: frozenset[str], tests: Answers) -> Captured:
    """A graph of which floats on the module are inputs; traced block by block, because blocks differ in these."""
    named, floats = ", ".join(sorted(settings)), Settings.of(module, settings)
    try:
        with preserved(module):
            captured = _export(module, call, True, floats)
    except Exception as error:  # torch.export raises many kinds
        raise CaptureError(f"the numbers on {named} cannot be inputs: {error_line(error)}") from error
    if not gives_all(captured, tests):
        raise CaptureError(f"with the numbers on {named} as inputs the graph gives other values")
    return captured


def _first_that_exports(module: nn.Module, call: Call, evidence: Evidence, tests: Answers) -> Captured:
    problems = []
    for dynamic in (True, False):
        problem = ""
        for context in (one_of_each_kind(module), nullcontext(False)):
            some_repeat = True
            try:
                with preserved(module), context as some_repeat:
                    captured = _export(module, call, dynamic)
                if gives_all(captured, tests):
                    return captured
                problem = "the graph gives other values than the module"
            except Exception as error:  # torch.export raises many kinds; each is recorded and shown by summary()
                problem = error_line(error)
            if not some_repeat:
                break
        problems.append(f"{'dynamic' if dynamic else 'fixed'} shapes: {problem}")
    return _opaque(module, call, evidence, "; ".join(problems))


def _export(module: nn.Module, call: Call, dynamic: bool, settings: Settings = NO_SETTINGS) -> Captured:
    with torch.no_grad(), settings.given(module) as given, warnings.catch_warnings():
        kwargs = call.arguments() | given
        shapes = pytree.tree_map(_dynamic_dims, kwargs) if dynamic else None
        warnings.simplefilter("ignore")  # torch.export's own deprecations, nothing a caller could act on
        program = torch.export.export(module, (), kwargs, dynamic_shapes=shapes, strict=False)
        if call.autocast or any(is_mutation(node) for node in program.graph.nodes):
            program = program.run_decompositions({})  # functional form with autocast's casts, operators left whole
    return _from_program(module, call, program, settings)


def _dynamic_dims(value: Any) -> dict[int, Any] | None:
    """Every dimension symbolic, except those of size 1: torch.export fixes 0 and 1."""
    if not isinstance(value, Tensor):
        return None
    return {d: torch.export.Dim.STATIC if size == 1 else torch.export.Dim.AUTO for d, size in enumerate(value.shape)}


def _from_program(module: nn.Module, call: Call, program: torch.export.ExportedProgram, settings: Settings) -> Captured:
    placeholders = {node.name: node for node in program.graph.nodes if node.op == "placeholder"}
    paths, constants, user_inputs = {}, {}, []
    for spec in program.graph_signature.input_specs:
        name, target = spec.arg.name, str(spec.target)
        if spec.kind is InputKind.USER_INPUT:
            user_inputs.append(name)
        elif spec.kind in (InputKind.PARAMETER, InputKind.BUFFER):
            paths[name] = target
        else:
            constants[name] = program.constants[target]
    weights = weights_of(module, paths)
    write_out(program.graph, module, {placeholders[name]: weight.get() for name, weight in weights.items()})
    given = [name for name in user_inputs if name.startswith(GIVEN)]
    user_inputs = [name for name in user_inputs if name not in given]
    inputs, symbols = {}, {}
    for path, name in zip(call.leaf_names, user_inputs, strict=True):
        node = placeholders[name]
        if path in call.names:
            inputs[path] = name
            symbols[path] = [fixed_or_symbol(size) for size in node.meta["val"].shape]
        else:
            program.graph.erase_node(node)  # a constant: part of the signature, folded into the graph
    graph_module = GraphModule(dict(program.graph_module.named_modules()), program.graph)
    for spec in program.graph_signature.output_specs:
        if spec.kind is not OutputKind.USER_OUTPUT:
            raise CaptureError(f"the module writes to {spec.target!r} while it runs; a cached graph must be functional")
    if any(map(_depends_on_data, graph_module.graph.nodes)):
        raise CaptureError("sizes or branches depend on the values of tensors")
    output = output_node(graph_module)
    output.args = (tuple(returned(graph_module)),)
    verify(graph_module, "capture")
    out_spec = program.call_spec.out_spec
    assert out_spec is not None
    return Captured(
        graph_module,
        call,
        weights,
        constants,
        inputs,
        out_spec,
        settings=replace(settings, names=tuple(given)),
        _symbols=symbols,
    )


def _depends_on_data(node: Node) -> bool:
    """Whether a number of the graph is known only when tensors have their values; torch calls it u0, or zuf0."""
    value = node.meta.get("val")
    sizes = value.shape if isinstance(value, Tensor) and value.layout is torch.strided else (value,)
    numbers = [size for size in sizes if isinstance(size, torch.SymInt | torch.SymFloat | torch.SymBool)]
    return any(name.startswith(("u", "zuf")) for size in numbers for name in symbols_of(size))


def _opaque(module: nn.Module, call: Call, evidence: Evidence, problem: str) -> Captured:
    """One node that calls the eager module: its raw output can still be cached, nothing inside can."""
    outputs, out_spec = evidence.answers[0][1], evidence.spec
    assert out_spec is not None
    if not all(isinstance(value, Tensor) for value in outputs):
        raise CaptureError(
            f"{type(module).__name__} returns values that are not tensors, and cannot be captured either: {problem}"
        )

    class Eager(nn.Module):
        def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
            served = SERVED.get(None)
            if served is None or not all(map(operator.is_, tensors, served.call.tensors)):
                return tuple(pytree.tree_leaves(call.run(module, tensors)))
            args, kwargs = served.given  # the very arguments, which the module may write to
            served.result = plain_call(module)(*args, **kwargs)
            return tuple(pytree.tree_leaves(served.result))

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
