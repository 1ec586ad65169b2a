"""The guard: more full steps for prompts that are harder than those a plan was made for."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

import dcc
from dcc import errors
from dcc.serve.guard import SLACK, Guard, anchor_error, extra_step, limits

from . import tiny

pytestmark = pytest.mark.usefixtures("graphs")

MODEL = "dit"
MASK = (1, 1, 1, 0, 0, 0, 1)
SCHEDULE = [[full] for full in MASK]


def net(limit: float | None) -> dcc.CompiledDenoiser:
    """Forecasts steps 3 to 5; with a limit on the error at step 2 where one is given."""
    plan = tiny.plan(MODEL, ["output"], SCHEDULE, [tiny.Predictor("newton", 2)])
    if limit is not None:
        plan = replace(plan, limits=(0.0, 0.0, limit, 0.0, 0.0, 0.0, 0.0))
    return tiny.compiled(MODEL, plan, Guard(plan) if limit is not None else None)


def run(made: dcc.CompiledDenoiser, seed: int = 4) -> torch.Tensor:
    return tiny.generate(MODEL, tiny.denoise_with(made), seed)[-1][1]


def test_an_easy_prompt_runs_as_planned() -> None:
    guarded = net(1e3)
    assert torch.equal(run(guarded), run(net(None)))
    assert guarded.sessions.counts.guarded == 0 and guarded.sessions.counts.computed == 4


def test_a_hard_prompt_gets_one_more_step_in_the_next_gap_and_a_better_sample() -> None:
    guarded, plain = net(1e-9), net(None)
    exact = run(tiny.module(MODEL))
    before, after = (run(made) - exact for made in (plain, guarded))
    counts = guarded.sessions.counts
    assert (counts.guarded, counts.computed, counts.forecast) == (1, 5, 2)
    assert after.norm() < before.norm()
    assert "the guard computed 1 steps more than planned" in str(guarded.summary())
    assert torch.equal(run(guarded), run(guarded))


def test_the_added_step_stays_with_its_own_request() -> None:
    guarded = net(1e-9)
    alone = [run(guarded, seed) for seed in (1, 2)]
    runs = [tiny.generation(MODEL, tiny.denoise_with(guarded), seed, tiny.prompt(MODEL, seed)) for seed in (1, 2)]
    last: list[Any] = [None, None]
    for pair in zip(*runs, strict=True):
        last = [sample for _, sample in pair]
    assert all(torch.equal(a, b) for a, b in zip(last, alone, strict=True))


def test_errors_are_those_of_extrapolation_by_sample() -> None:
    base = torch.ones(2, 4)
    line = [(4, (4 * base,)), (2, (2 * base,)), (1, (base,))]
    assert anchor_error(line).tolist() == pytest.approx([0.0, 0.0], abs=1e-6)
    bent = [(4, (torch.stack([4 * base[0], 8 * base[0]]),)), *line[1:]]
    assert anchor_error(bent).tolist() == pytest.approx([0.0, 0.5], abs=1e-6)
    assert anchor_error(line[:2]).tolist() == pytest.approx([0.5, 0.5])
    assert anchor_error(line[:1]) is None


def test_limits_are_the_largest_error_and_some_slack() -> None:
    assert limits({1: [0.2, 0.5]}, 3) == (0.0, SLACK * 0.5, 0.0)
    assert limits({}, 3) == ()


def test_extra_steps_are_in_the_middle_of_the_next_gap() -> None:
    plan = replace(tiny.plan(MODEL, ["output"], SCHEDULE), limits=(0.0, 0.1, 0.1, 0.0, 0.0, 0.0, 0.1))
    assert extra_step(plan, 2, 0.2) == 4
    assert extra_step(plan, 2, 0.1) is None  # within the limit
    assert extra_step(plan, 1, 0.2) is None  # no gap after it
    assert extra_step(plan, 6, 0.2) is None  # nothing after it at all
    assert extra_step(replace(plan, limits=()), 2, 0.2) is None


def test_a_guard_without_a_searched_plan_is_refused() -> None:
    pipe = dcc.demo.load("mmdit")
    with pytest.raises(errors.PolicyError, match="needs a plan that was searched"):
        dcc.compile(
            pipe, ["a red circle"], policy="interval", guard=True, backend="eager", **dcc.demo.settings("mmdit")
        )
