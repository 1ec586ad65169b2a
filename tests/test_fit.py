"""Fitted forecasts of the raw output: the sampler's recurrence, the least squares of a gap, the runner."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from dcc.plans.predictors import newton
from dcc.search.fit import Fit, FitOptions, OutputRunner, find_sampler
from dcc.search.trace import COORDINATES, Layout, Trace, Tracer, coordinates

from . import tiny

pytestmark = pytest.mark.usefixtures("graphs")

STEPS, N, D = 10, 3, 40


def simulate(outputs: Tensor, history: float = 0.0, noise: float = 0.0) -> Trace:
    """A run whose state obeys x' = 0.9 x + 0.1 (2 out_0 - out_1) + history (previous out_0); outputs [s, 2, n, d]."""
    trace = Trace(outputs=list(outputs))
    x = torch.randn(N, D)
    for step in range(STEPS):
        trace.samples.append(x)
        x = 0.9 * x + 0.1 * (2 * outputs[step, 0] - outputs[step, 1]) + noise * torch.randn(N, D)
        if step:
            x = x + history * outputs[step - 1, 0]
    trace.final = x
    return trace


def smooth_outputs() -> Tensor:
    """[steps, 2, n, d], quadratic in the step."""
    a, b, c = torch.randn(3, 1, 2, N, D)
    t = torch.arange(STEPS)[:, None, None, None] / STEPS
    return a + b * t + c * t**2


def test_the_recurrence_of_a_one_step_sampler_is_found() -> None:
    sampler = find_sampler([simulate(torch.randn(STEPS, 2, N, D)), simulate(torch.randn(STEPS, 2, N, D))])
    assert sampler is not None and sampler.linear and sampler.residual < 1e-5
    assert torch.allclose(sampler.keep, torch.full((STEPS,), 0.9).double(), atol=1e-5)
    assert torch.allclose(sampler.now, torch.tensor([0.2, -0.1]).double().expand(STEPS, 2), atol=1e-5)
    assert sampler.before.abs().max() == 0


def test_the_recurrence_of_a_two_step_sampler_is_found() -> None:
    sampler = find_sampler([simulate(torch.randn(STEPS, 2, N, D), history=0.05)])
    assert sampler is not None and sampler.residual < 1e-5
    assert torch.allclose(sampler.before[1:, 0], torch.full((STEPS - 1,), 0.05).double(), atol=1e-5)


def test_a_random_sampler_is_not_linear() -> None:
    sampler = find_sampler([simulate(torch.randn(STEPS, 2, N, D), noise=0.2)])
    assert sampler is not None and not sampler.linear


def test_states_and_outputs_of_different_shape_give_no_sampler() -> None:
    trace = simulate(torch.randn(STEPS, 2, N, D))
    trace.samples = [x[:, :-1] for x in trace.samples]
    assert find_sampler([trace]) is None


@pytest.mark.parametrize("history", [0.0, 0.05])
def test_weights_carry_a_state_over_a_gap(history: float) -> None:
    trace = simulate(torch.randn(STEPS, 2, N, D), history)
    sampler = find_sampler([trace])
    factor, weights, earlier = sampler.weights(3, 7)
    moved = factor * trace.samples[3].double() + torch.einsum("h,hnd->nd", earlier, trace.outputs[2].double())
    for step in range(3, 7):
        moved += torch.einsum("h,hnd->nd", weights[step - 3], trace.outputs[step].double())
    assert torch.allclose(moved.float(), trace.samples[7], atol=1e-5)


def gap_state(options: FitOptions, trace: Trace, drift: Tensor | float = 0.0) -> tuple[Tensor, dict[int, list[float]]]:
    """The state at step 8 when the gap 5..7 is forecast from anchors 4, 2, 0, beginning with a drifted state."""
    sampler = find_sampler([trace])
    mask = [1, 0, 1, 0, 1, 0, 0, 0, 1, 1]
    fit = Fit(mask, options, sampler)
    anchors = [(s, trace.outputs[s]) for s in (4, 2, 0)[: options.anchors]]
    fit.gap(5, anchors, trace.samples[5] + drift, trace)
    x = trace.samples[5] + drift
    for step in (5, 6, 7):
        out = sum(c * a for c, (_, a) in zip(fit.coefficients[step], anchors, strict=True))
        x = 0.9 * x + 0.1 * (2 * out[0] - out[1])
    return x, fit.coefficients


def test_a_gap_that_anchors_can_explain_is_bridged_exactly() -> None:
    trace = simulate(smooth_outputs())
    x, coefficients = gap_state(FitOptions(3, ridge=1e-12), trace)
    assert torch.allclose(x, trace.samples[8], atol=1e-4)
    assert sorted(coefficients) == [5, 6, 7]


def test_the_fit_beats_its_polynomial_and_drift_is_pulled_back() -> None:
    trace = simulate(smooth_outputs() + 0.3 * torch.randn(STEPS, 2, N, D))
    plain, _ = gap_state(FitOptions(3, ridge=1e12), trace)
    fitted, _ = gap_state(FitOptions(3), trace)
    error = (fitted - trace.samples[8]).norm()
    assert error < 0.9 * (plain - trace.samples[8]).norm()
    drift = 0.5 * trace.outputs[4][0]  # of the kind that anchors can undo
    drifted, _ = gap_state(FitOptions(3), trace, drift)
    assert (drifted - trace.samples[8]).norm() < error + 0.5 * (0.9**3 * drift).norm()


def test_a_large_ridge_is_the_polynomial() -> None:
    trace = simulate(smooth_outputs())
    _, coefficients = gap_state(FitOptions(3, order=1, ridge=1e15), trace)
    for step, values in coefficients.items():
        assert values == pytest.approx([*newton(step, [4, 2]), 0.0], abs=1e-9)


def test_batches_are_pooled() -> None:
    traces = [simulate(smooth_outputs() + 0.1 * torch.randn(STEPS, 2, N, D)) for _ in range(2)]
    sampler = find_sampler(traces)
    both = Fit([1, 0, 1, 0, 1, 0, 0, 0, 1, 1], FitOptions(3), sampler)
    for trace in traces:
        both.gap(5, [(s, trace.outputs[s]) for s in (4, 2, 0)], trace.samples[5], trace)
    merged = Trace(
        [torch.cat(pair) for pair in zip(traces[0].samples, traces[1].samples, strict=True)],
        [torch.cat(pair, 1) for pair in zip(traces[0].outputs, traces[1].outputs, strict=True)],
        torch.cat([traces[0].final, traces[1].final]),
    )
    once = Fit(both.mask, FitOptions(3), sampler)
    once.gap(5, [(s, merged.outputs[s]) for s in (4, 2, 0)], merged.samples[5], merged)
    for step in (5, 6, 7):
        assert both.coefficients[step] == pytest.approx(once.coefficients[step], rel=1e-4)


def test_coordinates_are_all_or_a_fixed_choice() -> None:
    assert torch.equal(coordinates(7), torch.arange(7))
    many = coordinates(10 * COORDINATES)
    assert len(many) == COORDINATES and torch.equal(many, coordinates(10 * COORDINATES))
    assert all(a < b for a, b in pairwise(many[:100].tolist()))


@pytest.mark.parametrize("model", ["dit", "unet-sd"])
def test_the_runner_equals_the_compiled_plan(model: str) -> None:
    mask = (1, 1, 0, 1, 0, 0, 1)
    recording = tiny.base(model).recording
    plan = tiny.plan(model, ["output"], [[m] for m in mask])
    net = tiny.compiled(model, plan)
    runner = OutputRunner(tiny.module(model), recording, Layout(recording, 2), mask, 1)
    coefficients = {step: [1.0] for step, full in enumerate(mask) if not full}
    runner.begin(coefficients, None, None)
    expected = tiny.generate(model, tiny.denoise_with(net), 5)
    actual = tiny.generate(model, tiny.denoise_with(runner), 5)
    for (out, sample), (ours, our_sample) in zip(expected, actual, strict=True):
        assert torch.allclose(out, ours, atol=1e-5) and torch.allclose(sample, our_sample, atol=1e-5)


@pytest.mark.parametrize("model", ["dit", "unet-sd"])
def test_a_trace_holds_states_and_outputs_of_every_step(model: str) -> None:
    recording = tiny.base(model).recording
    tracer = Tracer(tiny.module(model), recording, Layout(recording, 2))
    run = tiny.generate(model, tiny.denoise_with(tracer), 1)
    assert len(tracer.trace.samples) == len(tracer.trace.outputs) == tiny.STEPS
    assert torch.equal(tracer.trace.samples[1], run[0][1].flatten(1))
    assert torch.equal(tracer.trace.outputs[3][0], run[3][0].flatten(1))
