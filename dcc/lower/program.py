"""Lowers the graph of one variant to a callable for fixed shapes.

The last passes fix its sizes and outline repeated blocks, and the graph goes straight to Inductor. Each program is
compared once with its eager graph, on the first real inputs it gets; where they disagree the graph is lowered without
outlining, then not at all, and the reason is kept. Modes that ask for CUDA graphs get dcc's own (cuda_graphs.py), which
are compared once more: Inductor's would copy the weights, which are inputs.
"""

from __future__ import annotations

import contextlib
import functools
import os
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.fx import GraphModule

from dcc import arguments
from dcc.errors import LoweringError
from dcc.lower import cuda_graphs
from dcc.passes.base import LOWERING, Row
from dcc.passes.graph import copy_of
from dcc.passes.outline_blocks import Outlines, bodies
from dcc.passes.specialize import Shapes
from dcc.record.call import Call
from dcc.text import error_line
from dcc.torch_internals import compile_with_inductor, fake_mode_with_sizes, load_inductor, probe_cpu
from dcc.variants.observe import Observer
from dcc.variants.variant import Variant

Backend = Literal["inductor", "eager"]
Mode = Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"]  # those of torch.compile
BACKENDS: tuple[str, ...] = get_args(Backend)
MODES: tuple[str, ...] = get_args(Mode)
GRAPHED = ("reduce-overhead", "max-autotune")  # those with CUDA graphs
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 1e-2}


@dataclass
class Program:
    """A variant lowered for one set of shapes, strides and devices."""

    variant: Variant
    backend: str
    call: Callable[..., Sequence[Tensor]]
    seconds: float = 0.0
    problem: str | None = None  # what went wrong when it was lowered
    bodies: int = 0  # how many bodies are compiled once and called for several blocks

    @property
    def problems(self) -> list[str]:
        """What it does other than asked, found when it was lowered and in calls since."""
        return [said for said in (self.problem, getattr(self.call, "problem", None)) if said]

    def __call__(self, values: Sequence[Tensor]) -> list[Tensor]:
        """Runs on `values` in the order of `variant.inputs`."""
        return list(self.call(*values))


def check_backend(backend: str, mode: str = "default") -> None:
    """Raises LoweringError, listing what there is, for an unknown backend or mode, or a mode that has no effect."""
    arguments.chosen("backend", backend, BACKENDS, LoweringError)
    arguments.chosen("mode", mode, MODES, LoweringError)
    if backend == "eager" and mode != "default":
        raise LoweringError(f"mode {mode!r} is Inductor's, the eager backend has none; leave one of them out")


@functools.cache
def start_inductor() -> threading.Thread:
    """Loads Inductor and starts, in a thread, what it does once per process before it makes code for a CPU.

    It builds and loads test programs to find out what the processor can do: a second, or eight with an empty cache.
    """
    load_inductor()

    def probe() -> None:
        with contextlib.suppress(OSError, AttributeError):  # on two cores the recorded run would take thrice as long
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)
        with contextlib.suppress(Exception):  # Inductor meets it again, and the lowering says so
            probe_cpu()

    thread = threading.Thread(target=probe, name="dcc start_inductor", daemon=True)
    thread.start()
    return thread


class Programs(dict[Any, Program]):
    """The programs of one compiled denoiser, by variant and shapes, lowered when first asked for. Thread-safe."""

    def __init__(self, backend: str, mode: str = "default", observer: Observer | None = None) -> None:
        super().__init__()
        self.backend, self.mode, self.observer = backend, mode, observer or Observer()
        self.lock = threading.RLock()

    def of(self, variant: Variant, call: Call, inputs: Sequence[Tensor]) -> Program:
        """The variant lowered for calls of these shapes; lowers it where it is not yet.

        Shapes of the call decide those of all inputs; one weight stands for the dtype and device of the others.
        """
        kinds = tuple((t.shape, t.stride(), t.dtype, t.device) for t in (*call.tensors, *inputs[:1]))
        key = (id(variant), kinds)
        program = self.get(key)
        if program is None:
            with self.lock:
                if key not in self:
                    self[key] = lower(variant, inputs, self.backend, self.mode, self.observer)
                program = self[key]
        return program


def lower(
    variant: Variant,
    values: Sequence[Tensor],
    backend: str,
    mode: str = "default",
    observer: Observer | None = None,
) -> Program:
    """A program for inputs like `values`, compared with eager on them; where that is wrong, a safer one and why."""
    check_backend(backend, mode)
    if backend == "eager":
        return Program(variant, "eager", variant.graph_module)
    start, problems, prepared = time.perf_counter(), [], None
    call: Callable[..., Sequence[Tensor]] = variant.graph_module
    shared = 0
    expected = variant.graph_module(*values)
    for outline in (True, False):
        try:
            graph_module, fakes, shared = prepared or _prepared(variant, values, outline, observer or Observer())
            if outline and not shared:  # nothing to outline: lowered whole at the next turn
                prepared = graph_module, fakes, 0
                continue
            call = _inductor(graph_module, fakes, mode)
            problem = _compare(call, values, expected)
        except Exception as error:  # Inductor raises many kinds; the reason is kept and shown by summary()
            problem = f"Inductor: {error_line(error)}"
        if problem is None:
            said = [f"is lowered whole: {'; '.join(problems)}"] if problems else []
            if mode in GRAPHED:
                call, problem = _graphed(call, values, expected)
                said += [f"runs without a CUDA graph: {problem}"] if problem else []
            return Program(variant, "inductor", call, time.perf_counter() - start, "; ".join(said) or None, shared)
        problems.append(f"with outlined blocks: {problem}" if outline else problem)
    return Program(
        variant, "eager", variant.graph_module, time.perf_counter() - start, f"runs eagerly: {'; '.join(problems)}"
    )


def _prepared(
    variant: Variant, values: Sequence[Tensor], outline: bool, observer: Observer
) -> tuple[GraphModule, list[Tensor], int]:
    """The graph for inputs like these, those inputs as fake tensors, and how many bodies its blocks share."""
    fake_mode = fake_mode_with_sizes()
    fakes: list[Tensor] = [fake_mode.from_tensor(value.detach(), static_shapes=True) for value in values]
    graph_module = copy_of(variant.graph_module)
    orders = (Shapes(fakes), Outlines()) if outline else (Shapes(fakes),)
    with torch.no_grad(), fake_mode:
        observer.run_all(graph_module, Row(orders), f"{variant.name}_lowered", stage=LOWERING)
    return graph_module, fakes, bodies(graph_module) if outline else 0


def _inductor(graph_module: GraphModule, fakes: Sequence[Tensor], mode: str) -> Callable[..., Sequence[Tensor]]:
    """Compiles without Dynamo: the graph is captured already, so there is nothing to guard or to break.

    Inductor keeps what it makes on disk, by graph, versions, settings and device; a second process finds it there.
    """
    if all(value.device.type == "cpu" for value in fakes):
        start_inductor().join()
    for node in graph_module.graph.nodes:
        node.meta.pop("val", None)  # Inductor makes its own
    return compile_with_inductor(graph_module, fakes, mode)


def _graphed(
    call: Callable[..., Sequence[Tensor]], values: Sequence[Tensor], expected: Sequence[Tensor]
) -> tuple[Callable[..., Sequence[Tensor]], str | None]:
    """The call as a CUDA graph; or the call as it is, and the reason why."""
    problem = cuda_graphs.refusal(values)
    if problem is not None:
        return call, problem
    try:
        graphed = cuda_graphs.Graphed(call, cuda_graphs.pool_of(values[0].device))
        problem = _compare(graphed, values, expected)
    except Exception as error:  # what cannot be recorded raises many kinds; the reason is shown by summary()
        return call, error_line(error)
    return (call, problem) if problem else (graphed, None)


def _compare(call: Callable[..., Sequence[Tensor]], values: Sequence[Tensor], expected: Sequence[Tensor]) -> str | None:
    """What is wrong with the lowered call on these inputs, None where nothing is."""
    actual = list(call(*values))
    for index, (ours, reference) in enumerate(zip(actual, expected, strict=True)):
        if ours.shape != reference.shape or ours.dtype != reference.dtype:
            return (
                f"output {index} of the lowered variant is {ours.dtype}{list(ours.shape)}, not {list(reference.shape)}"
            )
        if not reference.is_floating_point():
            if not torch.equal(ours, reference):
                return f"output {index} of the lowered variant differs"
            continue
        scale = reference.double().norm()
        error = float((ours.double() - reference.double()).norm() / scale) if scale > 0 else float(ours.double().norm())
        if not error <= TOLERANCE.get(reference.dtype, 1e-3):
            return f"output {index} of the lowered variant differs from eager by {error:.1e} (relative)"
    return None
