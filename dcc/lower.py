"""Lowers the graph of one variant to a callable for fixed shapes. The only file that uses torch._inductor.

Each lowered variant is compared once with its eager graph, on the first real inputs it gets; where they disagree the
eager graph serves, and the reason is kept (DESIGN contract 6).
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.fx import GraphModule

from dcc.errors import LoweringError
from dcc.passes.base import Correction, state_of
from dcc.passes.forms import Constant
from dcc.passes.graph import copy_of

BACKENDS = ("inductor", "eager")
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 1e-2}


@dataclass
class Variant:
    """The graph of one schedule row. Inputs are bound by name; outputs are the denoiser's own, then the writes."""

    name: str
    graph_module: GraphModule
    inputs: tuple[str, ...]
    outputs: int
    writes: tuple[str, ...] = ()
    constants: tuple[Constant, ...] = ()  # inputs that its forecasts need besides anchors and coefficients
    corrections: tuple[Correction, ...] = ()  # whose factors are inputs

    @property
    def states(self) -> tuple[str, ...]:
        """States of token selection that it returns anew, by the name of the input that takes them."""
        return tuple(state for name in self.writes if (state := state_of(name)) is not None)


@dataclass
class Program:
    """A variant lowered for one set of shapes, strides and devices."""

    variant: Variant
    backend: str
    call: Callable[..., Sequence[Tensor]]
    seconds: float = 0.0
    problem: str | None = None
    checked: bool = field(default=False)

    def __call__(self, values: Sequence[Tensor]) -> list[Tensor]:
        """Runs on `values` in the order of `variant.inputs`; the first call also runs and compares the eager graph."""
        if self.checked:
            return list(self.call(*values))
        expected = list(self.variant.graph_module(*values))
        if self.backend != "eager":
            self.problem = self.problem or _compare(self.call, values, expected)
            if self.problem:
                self.backend, self.call = "eager", self.variant.graph_module
        self.checked = True
        return expected


def lower(variant: Variant, values: Sequence[Tensor], backend: str) -> Program:
    """A program for inputs like `values`. Falls back to eager, with the reason, where Inductor fails."""
    if backend not in BACKENDS:
        raise LoweringError(f"unknown backend {backend!r}; there are: {', '.join(BACKENDS)}")
    if backend == "eager":
        return Program(variant, "eager", variant.graph_module, checked=True)
    start = time.perf_counter()
    try:
        call = _inductor(variant.graph_module, values)
    except Exception as error:  # Inductor raises many kinds; the reason is kept and shown by summary()
        reason = f"Inductor: {type(error).__name__}: {str(error).strip().splitlines()[0][:200] if str(error) else ''}"
        return Program(variant, "eager", variant.graph_module, time.perf_counter() - start, reason, checked=True)
    return Program(variant, "inductor", call, time.perf_counter() - start)


def _inductor(graph_module: GraphModule, values: Sequence[Tensor]) -> Callable[..., Sequence[Tensor]]:
    """Straight to Inductor, without Dynamo: the graph is captured already, so there is nothing to guard or to break."""
    import torch._inductor  # two seconds that a user of the eager backend need not wait

    lowered = copy_of(graph_module)
    for node in lowered.graph.nodes:
        node.meta.pop("val", None)  # symbolic shapes of the capture; Inductor sees the shapes of `values`
    mode = FakeTensorMode()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own deprecations; under -W error they would stop the lowering
        fakes = [mode.from_tensor(value.detach()) for value in values]
        return torch._inductor.compile(lowered, fakes)


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
