"""Fitted forecasts of the raw output: one least-squares problem for each gap between two anchors.

Between two anchors the denoiser is not called, and a deterministic sampler is linear in what it is given. So of all
forecasts in a gap only their weighted sum matters: it moves the state from the first skipped step to the next anchor.
The fit chooses a correction `delta` of the extrapolating polynomial, the same at every step of the gap, such that this
sum carries the state to where the uncached run is at the next anchor; earlier errors are pulled back, too. It runs
inside a cached run over the calibration prompts, so each gap sees the anchors and the drift that it will really have.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from dcc.plans.predictors import newton_through
from dcc.record.call import bind
from dcc.record.recorder import Recording
from dcc.record.seam import Handler
from dcc.search.trace import Layout, Trace, first_tensor
from dcc.torch_internals import pytree

LINEAR = 2e-2  # relative residual up to which the sampler counts as linear; half-precision states leave 1e-3 or so


@dataclass(frozen=True)
class Sampler:
    """x[s+1] = keep[s] x[s] + sum_h now[s, h] out[s, h] + sum_h before[s, h] out[s-1, h], found from runs (float64).

    `keep` [steps], `now` and `before` [steps, parts]; the last step is known only where the loop shows its result.
    `before` is zero for one-step samplers. `residual` is the largest relative error of any step.
    """

    keep: Tensor
    now: Tensor
    before: Tensor
    residual: float

    @property
    def linear(self) -> bool:
        """Whether the recorded runs obey the recurrence."""
        return self.residual <= LINEAR

    def weights(self, start: int, end: int) -> tuple[float, Tensor, Tensor]:
        """x[end] from x[start]: the factor of x[start], the weights [end - start, parts] of the outputs of those steps,
        and the weights [parts] of the output before `start`."""
        factor, earlier = 1.0, torch.zeros(self.now.shape[1], dtype=torch.float64)
        weights = torch.zeros(end - start, self.now.shape[1], dtype=torch.float64)
        for step in range(end - 1, start - 1, -1):
            weights[step - start] += factor * self.now[step]
            if step > start:
                weights[step - start - 1] += factor * self.before[step]
            else:
                earlier = factor * self.before[step]
            factor *= float(self.keep[step])
        return factor, weights, earlier


def find_sampler(traces: Sequence[Trace]) -> Sampler | None:
    """The recurrence that the runs obey, None where states and outputs do not have one shape."""
    first = traces[0]
    steps, parts = len(first.outputs), len(first.outputs[0])
    if any(x.shape != out.shape[1:] for t in traces for x, out in zip(t.samples, t.outputs, strict=True)):
        return None
    keep, now, before = (
        torch.ones(steps, dtype=torch.float64),
        *(torch.zeros(steps, parts, dtype=torch.float64) for _ in range(2)),
    )
    residual = 0.0
    for step in range(steps):
        ends = [t.final if step + 1 == steps else t.samples[step + 1] for t in traces]
        if any(end is None for end in ends):
            keep[step], now[step], before[step] = keep[step - 1], now[step - 1], before[step - 1]
            continue
        solution, error, history = torch.empty(0), math.inf, 0
        for history in (0, 1)[: 1 + (step > 0)]:
            rows = [[t.samples[step], *t.outputs[step], *(t.outputs[step - 1] if history else ())] for t in traces]
            columns = [torch.cat([row[c].flatten() for row in rows]).double() for c in range(len(rows[0]))]
            wanted = torch.cat([end.flatten() for end in ends if end is not None]).double()
            matrix = torch.stack(columns, 1)
            solution = torch.linalg.lstsq(matrix, wanted[:, None], driver="gelsd").solution[:, 0]
            error = float((matrix @ solution - wanted).norm() / wanted.norm().clamp_min(1e-30))
            if error <= LINEAR / 10:
                break
        keep[step], now[step] = solution[0], solution[1 : 1 + parts]
        before[step] = solution[1 + parts :] if history else 0.0
        residual = max(residual, error)
    return Sampler(keep, now, before, residual)


@dataclass(frozen=True)
class FitOptions:
    """How a gap is fitted, with `anchors` regressors.

    `ridge`, relative to their mean square, pulls the fit to the polynomial of `order`.
    """

    anchors: int = 3
    order: int = 1
    ridge: float = 1e-6


@dataclass
class Fit:
    """Coefficients of the raw output for one step mask, accumulated over the batches that were run so far.

    `coefficients[step]` weighs the anchors, newest first; empty at computed steps.
    """

    mask: Sequence[int]
    options: FitOptions
    sampler: Sampler
    coefficients: dict[int, list[float]] = field(default_factory=dict)
    normal: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def gap(self, step: int, anchors: Sequence[tuple[int, Tensor]], state: Tensor, trace: Trace) -> None:
        """Sets the coefficients of the gap that begins at `step`, from anchors (step, [parts, n, d]) newest first and
        the drifted `state` [n, d] there; `trace` is the same batch uncached."""
        end = next((s for s in range(step, len(self.mask)) if self.mask[s]), len(self.mask))
        goal = end
        if end == len(self.mask) and trace.final is None:
            goal = end - 1  # the last state is not shown: aim at the one before, and treat the last step alike
        priors = {s: self._prior(s, [a for a, _ in anchors]) for s in range(step, end)}
        delta = torch.zeros(len(anchors), dtype=torch.float64)
        if goal > step:
            factor, weights, earlier = self.sampler.weights(step, goal)
            moved = torch.stack([self._combined(weights.sum(0), value) for _, value in anchors], 1)
            base = factor * state.flatten().double()
            for s in range(step, goal):
                for share, (_, value) in zip(priors[s], anchors, strict=True):
                    base += float(share) * self._combined(weights[s - step], value)
            if anchors[0][0] == step - 1:
                base += self._combined(earlier, anchors[0][1])
            reached = trace.final if goal == len(self.mask) else trace.samples[goal]
            assert reached is not None
            wanted = reached.flatten().double() - base
            delta = self._solve(step, moved, wanted)
        for s in range(step, end):
            self.coefficients[s] = (priors[s] + delta).tolist()

    def _prior(self, step: int, anchors: Sequence[int]) -> Tensor:
        return torch.from_numpy(newton_through(step, anchors, self.options.order + 1))

    @staticmethod
    def _combined(weights: Tensor, value: Tensor) -> Tensor:
        """sum_h weights[h] value[h], flat, float64."""
        return torch.einsum("h,hnd->nd", weights.to(value.device), value.double()).flatten()

    def _solve(self, step: int, matrix: Tensor, wanted: Tensor) -> Tensor:
        """Ridge least squares over this batch and those before it."""
        gram, right = matrix.T @ matrix, matrix.T @ wanted
        if not bool(gram.isfinite().all() and right.isfinite().all()):  # this mask diverges, and is judged by that
            return torch.zeros(len(gram), dtype=gram.dtype)
        if step in self.normal:
            gram, right = gram + self.normal[step][0], right + self.normal[step][1]
        self.normal[step] = gram, right
        damping = self.options.ridge * gram.diagonal().mean().clamp_min(1e-30)
        return torch.linalg.solve(
            gram + damping * torch.eye(len(gram), dtype=gram.dtype, device=gram.device), right
        ).cpu()


class OutputRunner(Handler):
    """Runs a mask on the raw output: the original at full steps, forecasts between; fits gaps where `fit` is given."""

    def __init__(
        self, module: nn.Module, recording: Recording, layout: Layout, mask: Sequence[int], depth: int
    ) -> None:
        super().__init__(module)
        self.recording, self.layout, self.mask, self.depth = recording, layout, mask, depth
        self.begin({}, None, None)

    def begin(self, coefficients: dict[int, list[float]], fit: Fit | None, trace: Trace | None) -> None:
        """Starts a run, with given coefficients or fitting them to `trace`."""
        self.count, self.coefficients, self.fit, self.trace = 0, coefficients, fit, trace
        self.values: list[Any] = []  # what the calls of this step returned
        self.anchors: list[tuple[int, list[Any]]] = []  # (step, what its calls returned), newest first

    def call(self, *args: Any, **kwargs: Any) -> Any:
        step, call = divmod(self.count, self.layout.calls)
        self.count += 1
        if self.mask[step]:
            outputs = self.module(*args, **kwargs)
            self.values.append(outputs)
            if call + 1 == self.layout.calls:
                self.anchors.insert(0, (step, list(self.values)))
                del self.anchors[self.depth :]
                self.values.clear()
            return outputs
        if self.fit is not None and self.trace is not None and call == 0 and self.mask[step - 1]:
            by_name = self._tensors(args, kwargs)
            anchors = [(s, torch.cat([self.layout.split(first_tensor(v)) for v in vs])) for s, vs in self.anchors]
            self.fit.gap(step, anchors, self.layout.state(by_name[self.layout.sample_name]), self.trace)
            self.coefficients.update(self.fit.coefficients)
        like, spec = pytree.tree_flatten(self.anchors[0][1][call])
        terms = [first_tensor(values[call]) for _, values in self.anchors]
        weighed = [a * term.float() for a, term in zip(self.coefficients[step], terms, strict=False)]
        total = functools.reduce(torch.add, weighed)
        index = next(i for i, value in enumerate(like) if isinstance(value, Tensor))
        return pytree.tree_unflatten([*like[:index], total.to(like[index].dtype), *like[index + 1 :]], spec)

    def _tensors(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Tensor]:
        call = bind(self.module, args, kwargs, self.recording.as_tensors)
        return dict(zip(call.names, call.tensors, strict=True))
