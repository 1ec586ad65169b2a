"""The search for plans, on a made-up denoiser whose quality is known, and its parts."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dcc.errors import BudgetError, PromptError
from dcc.plans.plan import make_plan
from dcc.plans.predictors import Predictor
from dcc.record.target import Samples
from dcc.search.closed_loop import Candidate, Outcome
from dcc.search.fit import FitOptions
from dcc.search.solver import EFFORTS, Goal, Problem, Search, reached, solve, split, start_masks

STEPS = 20
BEST = (0, 2, 7, 8, 15)  # anchors of the made-up optimum


class Loop:
    """Quality falls with the distance of the anchors to the best ones, and rises 3 dB with every full step."""

    fits, data_range = True, 1.0

    def __init__(self, penalty: float = 0.0) -> None:
        self.penalty, self.asked, self.known = penalty, [], {}
        images = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(1))
        self.batches = [type("Batch", (), {"reference": Samples(images, images)})]

    def quality(self, candidate: Candidate) -> float:
        if candidate.full == STEPS:
            return 120.0
        anchors = [s for s, full in enumerate(candidate.mask) if full]
        distance = sum(min(abs(a - b) for a in anchors) for b in BEST)
        if len(anchors) == len(BEST):
            distance = sum(abs(a - b) for a, b in zip(anchors, BEST, strict=True))
        bonus = {"output": 1.0, "stack": 0.0}[candidate.site] + (candidate.fitted and 0.5)
        return 20.0 + 3.0 * candidate.full - distance + bonus - self.penalty

    def score(self, candidate: Candidate, best: Outcome | None = None) -> Outcome:
        self.asked.append(candidate)
        value = self.quality(candidate)
        return Outcome((value - 0.1, value, value + 0.1), {s: [1.0] for s, f in enumerate(candidate.mask) if not f})

    def check(self, candidate: Candidate, coefficients: dict[int, list[float]]) -> tuple[Outcome, Samples]:
        reference = self.batches[0].reference
        torch.manual_seed(0)
        noise = 10 ** (-self.quality(candidate) / 20) * torch.randn_like(reference.images)
        return self.score(candidate), Samples(reference.images + noise, reference.images)


def problem(penalty: float = 0.0, **changes: Any) -> Problem:
    def plan(candidate: Candidate, coefficients: dict[int, list[float]]) -> Any:
        return make_plan(
            model="m",
            scheduler="s",
            levels=range(STEPS, 0, -1),
            sites=[candidate.site],
            schedule=[[full] for full in candidate.mask],
            predictors=[Predictor("copy")],
            policy="p",
            parameters={},
        )

    fields: dict[str, Any] = {
        "steps": STEPS,
        "flops": 100,
        "forecast_flops": {"output": 0, "stack": 10},
        "anchor_bytes": {"output": 8, "stack": 80},
        "fitting": Loop(),
        "held_back": Loop(penalty),
        "plan": plan,
        "fewer": lambda steps: 12.5,
    }
    return Problem(**fields | changes)


def quiet(line: str) -> None:
    pass


def test_the_search_finds_anchors_near_the_best_and_reports_them() -> None:
    plan = solve(problem(), Goal(speedup=4.0), "normal", 0, quiet)
    assert sum(plan.steps_mask) == 5
    assert plan.steps_mask == [int(s in BEST) for s in range(STEPS)]
    assert plan.policy == "solver" and plan.parameters == {"speedup": 4.0, "effort": "normal"}
    assert plan.measured["prompts"] == 3 and plan.measured["psnr_mean"] == pytest.approx(36.5)
    assert plan.measured["psnr_worst"] == pytest.approx(36.4)
    assert 0.5 < plan.measured["ssim_mean"] <= 1
    assert (plan.measured["fewer_steps"], plan.measured["fewer_steps_psnr"]) == (5, 12.5)
    assert "12.5 dB" in str(plan) and "held-back" in str(plan)


def test_the_search_is_the_same_for_the_same_seed() -> None:
    plans = [solve(problem(), Goal(speedup=3.0), "normal", 7, quiet) for _ in range(2)]
    assert plans[0] == plans[1]


@pytest.mark.parametrize("effort", EFFORTS)
def test_effort_bounds_the_runs(effort: str) -> None:
    made = problem()
    solve(made, Goal(speedup=5.0), effort, 0, quiet)
    assert len(made.fitting.asked) <= 1.4 * EFFORTS[effort] + 10


@given(st.floats(1.0, 15.0))
def test_no_candidate_exceeds_the_flops(speedup: float) -> None:
    made = problem()
    search = Search(made, Goal(speedup=speedup), 0, random.Random(0), quiet)
    for site, forecast in made.forecast_flops.items():
        full = search.full_steps(site, speedup)
        if full:
            assert (full * 100 + (STEPS - full) * forecast) * speedup <= STEPS * 100 * (1 + 1e-6)
        if full < STEPS:
            assert ((full + 1) * 100 + (STEPS - full - 1) * forecast) * speedup > STEPS * 100 * (1 - 1e-6)


def test_a_quality_target_takes_the_fewest_steps_that_hold() -> None:
    plan = solve(problem(), Goal(quality=33.0), "normal", 0, quiet)
    assert plan.measured["psnr_mean"] >= 33.0
    assert sum(plan.steps_mask) <= 5
    assert sum(solve(problem(), Goal(quality=45.0), "fast", 0, quiet).steps_mask) > sum(plan.steps_mask)


def test_a_quality_target_that_the_held_back_prompts_miss_costs_more_steps() -> None:
    easy = solve(problem(), Goal(quality=40.0), "fast", 0, quiet)
    hard = solve(problem(penalty=6.0), Goal(quality=40.0), "fast", 0, quiet)
    assert hard.measured["psnr_mean"] >= 40.0
    assert sum(hard.steps_mask) > sum(easy.steps_mask)


def test_a_quality_that_no_cache_reaches_computes_everything() -> None:
    assert sum(solve(problem(), Goal(quality=110.0), "fast", 0, quiet).steps_mask) == STEPS


def test_the_cache_limit_decides_between_sites() -> None:
    made = problem()
    solve(made, Goal(speedup=3.0, cache_bytes=100), "fast", 0, quiet)
    assert {candidate.site for candidate in made.fitting.asked} == {"output"}
    with pytest.raises(BudgetError, match=r"cache_bytes=15 holds no two anchors of any site; the least is 16"):
        solve(problem(), Goal(speedup=3.0, cache_bytes=15), "fast", 0, quiet)


def test_a_speedup_out_of_reach_says_what_is() -> None:
    with pytest.raises(BudgetError, match=r"speedup=50 is out of reach in 20 steps; at most 20\.0"):
        solve(problem(), Goal(speedup=50.0), "fast", 0, quiet)


def test_without_a_linear_sampler_nothing_is_fitted() -> None:
    made = problem()
    made.fitting.fits = False
    solve(made, Goal(speedup=3.0), "fast", 0, quiet)
    assert not any(candidate.fitted for candidate in made.fitting.asked)


@pytest.mark.parametrize(
    "bad",
    [{}, {"speedup": 2, "quality": 3}, {"speedup": True}, {"quality": float("nan")}, {"speedup": 2, "cache_bytes": 0}],
)
def test_bad_goals_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(BudgetError, match=r"budget|positive number"):
        Goal(**bad)


@given(st.integers(4, 60))
def test_a_fifth_and_at_least_two_prompts_are_held_back(count: int) -> None:
    fitting, held = split(["x"] * count)
    assert sorted(fitting + held) == list(range(count))
    assert len(held) == max(2, count // 5)


def test_too_few_prompts_are_refused() -> None:
    with pytest.raises(PromptError, match=r"at least 4 prompts.*got 3.*policy="):
        split(["a", "b", "c"])


@given(st.integers(2, 60), st.data())
def test_start_masks_have_the_asked_number_of_full_steps(steps: int, data: Any) -> None:
    full = data.draw(st.integers(1, steps))
    masks = start_masks(steps, full)
    assert masks and len(set(masks)) == len(masks)
    for mask in masks:
        assert len(mask) == steps and sum(mask) == full and mask[0] == 1


def test_quality_is_reached_by_the_mean_less_its_standard_error() -> None:
    assert reached(Outcome((40.0, 40.0), {}), 40.0)
    assert not reached(Outcome((35.0, 45.5), {}), 40.0)
    assert reached(Outcome((41.0,), {}), 40.0)


def test_candidates_say_what_they_are() -> None:
    assert str(Candidate("output", FitOptions(3), (1, 0))) == "output, fitted 3, ridge 1e-06"
    assert str(Candidate("stack", Predictor("newton", 2), (1, 0))) == "stack, newton 2"
    assert Candidate("stack", Predictor("newton", 1), (1, 1, 0)).polynomial() == {2: [2.0, -1.0]}
