"""Chooses a plan from measurements: which site, which anchors, which forecasts, for a budget the user names.

Candidates are cheap to propose and expensive to judge. Errors move the trajectory and the denoiser corrects some of
them, so no error model of a single step ranks plans well; every candidate is run on calibration prompts and judged by
its final samples. A fifth of the prompts is held back, only to report and to confirm what was chosen.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from dcc.errors import BudgetError, PromptError
from dcc.plans.plan import Plan
from dcc.plans.predictors import Predictor
from dcc.quality import frames, ssim
from dcc.search.closed_loop import Candidate, ClosedLoop, Outcome
from dcc.search.fit import FitOptions
from dcc.serve.guard import limits
from dcc.text import count

EFFORTS = {"fast": 40, "normal": 120, "thorough": 400}  # about how many cached runs of all fitting prompts
LEAST_PROMPTS = 4  # two to fit, two to hold back
RULES = (FitOptions(3), FitOptions(4), FitOptions(3, ridge=1.0), Predictor("newton", 1), Predictor("newton", 2))
RIVAL = 1.5  # dB below the leader up to which another site's anchors are searched too
MOVES = (-3, -2, -1, -1, 1, 1, 2, 3)  # steps by which the search shifts an anchor


@dataclass(frozen=True)
class Goal:
    """One of `speedup` (ratio of denoiser FLOPs of a run) or `quality` (PSNR in dB); `cache_bytes` limits either."""

    speedup: float | None = None
    quality: float | None = None
    cache_bytes: int | None = None

    def __post_init__(self) -> None:
        named = {name: value for name, value in vars(self).items() if value is not None}
        for name, value in named.items():
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or value <= 0:
                raise BudgetError(f"{name}={value!r} must be a positive number")
        if (self.speedup is None) == (self.quality is None):
            raise BudgetError("name one budget: speedup= (ratio of denoiser FLOPs) or quality= (PSNR in dB)")
        if self.speedup is not None and self.speedup < 1:
            raise BudgetError(f"speedup={self.speedup:g} must be at least 1")


@dataclass
class Problem:
    """A denoiser to plan for: FLOPs of a full call, FLOPs of a forecast call and bytes of an anchor by site, the two
    closed loops, and how a candidate becomes a Plan. `fewer(steps)` is the PSNR of that many plain steps, or None;
    `usual_errors` are the forecast errors at a candidate's anchors by step, for the guard."""

    steps: int
    flops: int
    forecast_flops: dict[str, int]
    anchor_bytes: dict[str, int]
    fitting: ClosedLoop
    held_back: ClosedLoop
    plan: Callable[[Candidate, dict[int, list[float]]], Plan]
    fewer: Callable[[int], float | None]
    usual_errors: Callable[[Candidate, dict[int, list[float]]], dict[int, list[float]]] = field(default=lambda c, k: {})
    proposals: Callable[[str, int], list[tuple[int, ...]]] = field(default=lambda site, full: [])


def solve(problem: Problem, goal: Goal, effort: str, seed: int, progress: Callable[[str], None]) -> Plan:
    """The best plan found within the budget, with what the held-back prompts say of it in `measured`.

    Raises BudgetError where no plan keeps the budget, saying what would.
    """
    search = Search(problem, goal, EFFORTS[effort], random.Random(seed), progress)
    if goal.speedup is not None:
        return _finish(problem, search, *search.at_speedup(goal.speedup), effort)
    assert goal.quality is not None  # a goal names one of the two
    return _finish(problem, search, *search.at_quality(goal.quality), effort)


def split(prompts: Sequence[Any]) -> tuple[list[int], list[int]]:
    """Indices of the prompts to fit to and of those to hold back: every fifth, at least two.

    Raises PromptError where there are fewer than four.
    """
    if len(prompts) < LEAST_PROMPTS:
        raise PromptError(
            f"planning needs at least {LEAST_PROMPTS} prompts, two to fit to and two to check on; got {len(prompts)}. "
            'Give more, or name a policy, e.g. policy="taylorseer"'
        )
    held = set(np.linspace(len(prompts) - 1, 0, max(2, len(prompts) // 5), endpoint=False).round().astype(int).tolist())
    return [i for i in range(len(prompts)) if i not in held], sorted(held)


class Search:
    """The candidates of one problem and the closed-loop runs spent on them."""

    def __init__(
        self, problem: Problem, goal: Goal, budget: int, rng: random.Random, say: Callable[[str], None]
    ) -> None:
        self.problem, self.goal, self.budget, self.rng, self.say = problem, goal, budget, rng, say
        self.families = self._families()
        if not self.families:
            least = min(problem.anchor_bytes.values()) * 2
            raise BudgetError(f"cache_bytes={goal.cache_bytes} holds no two anchors of any site; the least is {least}")

    def at_speedup(self, speedup: float) -> tuple[Candidate, Outcome]:
        """The best candidate that computes at most 1/speedup of the FLOPs."""
        if all(self.full_steps(site, speedup) < 1 for site, _ in self.families):
            most = max(self.problem.steps * self._ratio(site) for site, _ in self.families)
            steps = count(self.problem.steps, "step")
            raise BudgetError(f"speedup={speedup:g} is out of reach in {steps}; at most {most:.1f}")
        counts = {site: self.full_steps(site, speedup) for site, _ in self.families}
        return self.best(counts, self.budget)

    def at_quality(self, quality: float) -> tuple[Candidate, Outcome]:
        """The candidate of fewest FLOPs whose PSNR, less its standard error, reaches `quality` on both sets of prompts.

        Bisects over the number of full steps with unrefined candidates, then searches from there, and adds full steps
        until the held-back prompts agree.
        """
        low, high = 1, self.problem.steps
        while low < high:
            middle = (low + high) // 2
            _, outcome = self.best(self._equal_cost(middle), 0)
            low, high = (low, middle) if reached(outcome, quality) else (middle + 1, high)
        last: tuple[Candidate, Outcome] | None = None
        for full in range(low - 1, 0, -1):  # searching buys a few dB, so fewer steps may do
            found = self.best(self._equal_cost(full), self.budget // 2)
            if not self._holds(*found, quality):
                break
            last = found
        full = low
        while last is None and full <= self.problem.steps:
            found = self.best(self._equal_cost(full), self.budget // 2)
            if self._holds(*found, quality):
                last = found
            full += 1
        if last is None:
            raise BudgetError(f"quality={quality:g} dB is not reached even by computing every step")
        return last

    def best(self, counts: dict[str, int], budget: int) -> tuple[Candidate, Outcome]:
        """The best candidate with these numbers of full steps by site: start masks first, then `budget` moves."""
        scored: dict[Candidate, Outcome] = {}
        for site, rule in self.families:
            if 1 <= counts[site]:
                self._starts(site, rule, counts[site], scored, few=budget <= EFFORTS["fast"])
        moves = max(budget - len(scored), budget // 3)
        leader = max(scored, key=lambda c: scored[c].mean)
        rivals = [c for c in scored if c.site != leader.site and scored[c].mean > scored[leader].mean - RIVAL]
        if rivals:
            rival = max(rivals, key=lambda c: scored[c].mean)
            self._climb(rival, scored, moves // 4)
            moves -= moves // 4
        leader = self._climb(leader, scored, moves // 2)
        if moves:  # the anchors of one rule often suit the others of its site
            for site, rule in self.families:
                if site == leader.site:
                    self._try(replace(leader, rule=rule), scored)
        winner = self._climb(max(scored, key=lambda c: scored[c].mean), scored, moves - moves // 2)
        self.say(f"searching: {winner.full} full steps, best of {len(scored)}: {scored[winner].mean:.1f} dB, {winner}")
        return winner, scored[winner]

    def full_steps(self, site: str, speedup: float) -> int:
        """The most full steps that keep a run's FLOPs at 1/speedup, 0 where none do."""
        flops, forecast, steps = self.problem.flops, self.problem.forecast_flops[site], self.problem.steps
        if flops == 0:  # nothing inside the denoiser is known: count calls
            return int(steps / speedup + 1e-9)
        return max(0, min(steps, int((steps * flops / speedup - steps * forecast) / max(flops - forecast, 1) + 1e-9)))

    def _families(self) -> list[tuple[str, Any]]:
        """(site, rule) pairs that fit the cache limit; fitted rules on the raw output of a linear sampler only."""
        result = []
        for site, rule in itertools.product(self.problem.forecast_flops, RULES):
            fitted = isinstance(rule, FitOptions)
            if fitted and (site != "output" or not self.problem.fitting.fits):
                continue
            limit = self.goal.cache_bytes
            if limit is None or rule.anchors * self.problem.anchor_bytes[site] <= limit:
                result.append((site, rule))
        return result

    def _ratio(self, site: str) -> float:
        """The speed-up of a run with one full step only, divided by the number of its steps."""
        flops, forecast, steps = self.problem.flops or 1, self.problem.forecast_flops[site], self.problem.steps
        return flops / (flops + (steps - 1) * forecast)

    def _equal_cost(self, full: int) -> dict[str, int]:
        """By site, how many full steps cost as much as `full` of them would if forecasts were free."""
        return {site: self.full_steps(site, self.problem.steps / full) for site, _ in self.families}

    def _starts(self, site: str, rule: Any, full: int, scored: dict[Candidate, Outcome], few: bool) -> None:
        even, *others = start_masks(self.problem.steps, full)
        masks = [even, *others[:1]] if few else [even, *self.problem.proposals(site, full), *others][:6]
        for mask in masks:
            self._try(Candidate(site, rule, mask), scored)

    def _try(self, candidate: Candidate, scored: dict[Candidate, Outcome]) -> None:
        """Scores a candidate on all prompts, unless the first of them show that it is hopeless."""
        best = max(scored.values(), key=lambda o: o.mean, default=None)
        outcome = self.problem.fitting.score(candidate, best)
        if outcome.complete:
            scored[candidate] = outcome
        self.say(f"searching: {candidate.full} full steps, {outcome.mean:.1f} dB, {candidate}")

    def _climb(self, best: Candidate, scored: dict[Candidate, Outcome], budget: int) -> Candidate:
        """Shifts one anchor at a time while that helps; stops after `budget` runs or when no move is left untried."""
        outcome = scored[best]
        tried = {best.mask}
        for _ in range(budget):
            mask = self._neighbour(best.mask, tried)
            if mask is None:
                break
            tried.add(mask)
            candidate = replace(best, mask=mask)
            new = self.problem.fitting.score(candidate, outcome)
            if new.complete and new.mean > outcome.mean:
                best, outcome = candidate, new
                scored[best] = outcome
                self.say(f"searching: {best.full} full steps, {outcome.mean:.1f} dB, {best}")
        return best

    def _neighbour(self, mask: tuple[int, ...], tried: set[tuple[int, ...]]) -> tuple[int, ...] | None:
        """An untried mask with one anchor shifted, None where there is none."""
        anchors = [step for step in range(1, len(mask)) if mask[step]]
        moves = [(a, a + m) for a in anchors for m in sorted(set(MOVES)) if 0 < a + m < len(mask) and not mask[a + m]]
        weights = [MOVES.count(b - a) for a, b in moves]
        while moves:
            index = self.rng.choices(range(len(moves)), weights)[0]
            (a, b), _ = moves.pop(index), weights.pop(index)
            moved = tuple(1 if s == b else 0 if s == a else v for s, v in enumerate(mask))
            if moved not in tried:
                return moved
        return None

    def _holds(self, candidate: Candidate, outcome: Outcome, quality: float) -> bool:
        """Whether the fitting prompts and the held-back ones both reach `quality`."""
        if not reached(outcome, quality):
            return False
        checked, _ = self.problem.held_back.check(candidate, outcome.coefficients)
        return reached(checked, quality)


def reached(outcome: Outcome, quality: float) -> bool:
    """Whether the mean PSNR less its standard error is at least `quality`."""
    spread = float(np.std(outcome.psnr, ddof=1)) / math.sqrt(len(outcome.psnr)) if len(outcome.psnr) > 1 else 0.0
    return outcome.mean - spread >= quality


def start_masks(steps: int, full: int) -> list[tuple[int, ...]]:
    """Step masks with `full` ones, step 0 among them: spread evenly, denser at either end, and every N-th step."""
    masks = []
    for bend, last in itertools.product((1.0, 1.3, 0.75), (1.0, 1.0 - 0.6 / full)):
        positions = np.linspace(0, 1, full) ** bend * (steps - 1) * (last if full > 1 else 1)
        masks.append(_distinct(positions.tolist(), steps))
    if full > 4:  # the usual schedule of published policies: the first three, then every N-th
        masks.append(_distinct([0, 1, *np.linspace(2, steps, full - 1)[:-1]], steps))
    return list(dict.fromkeys(masks))


def _distinct(positions: Sequence[float], steps: int) -> tuple[int, ...]:
    """A mask with ones at the rounded positions; those that collide move to the next free step."""
    mask = [0] * steps
    for position in positions:
        step = min(round(float(position)), steps - 1)
        while mask[step]:
            step = (step + 1) % steps
        mask[step] = 1
    return tuple(mask)


def _finish(problem: Problem, search: Search, candidate: Candidate, outcome: Outcome, effort: str) -> Plan:
    """The plan, with the quality on the prompts that were held back."""
    loop = problem.held_back
    checked, samples = loop.check(candidate, outcome.coefficients)
    for judge, found in ((problem.fitting, outcome), (loop, checked)):
        if found.failed is not None:
            raise BudgetError(
                f"with this budget the best plan found ({candidate.full} of {problem.steps} steps computed) gives "
                f"values that are not finite on {judge.names[found.failed]}; allow more full steps, or leave it out"
            )
    reference = torch.cat([batch.reference.images for batch in loop.batches])
    measured: dict[str, Any] = {
        "prompts": len(checked.psnr),
        "psnr_mean": checked.mean,
        "psnr_worst": min(checked.psnr),
        "fitted_psnr_mean": outcome.mean,
        "candidates": len(problem.fitting.known),
        "forecast": str(candidate),
    }
    if frames(reference) is not None:
        similar = ssim(samples.images, reference, loop.data_range)
        measured |= {"ssim_mean": sum(similar) / len(similar), "ssim_worst": min(similar)}
    plan = problem.plan(candidate, outcome.coefficients)
    steps = max(1, math.floor(problem.steps / plan.speedup + 1e-6)) if math.isfinite(plan.speedup) else 1
    fewer = problem.fewer(steps)
    if fewer is not None:
        measured |= {"fewer_steps": steps, "fewer_steps_psnr": fewer}
        if fewer > checked.mean:
            search.say(f"note: {steps} plain steps reach {fewer:.1f} dB, more than this plan's {checked.mean:.1f} dB")
    goal = {name: value for name, value in vars(search.goal).items() if value is not None}
    return replace(
        plan,
        policy="solver",
        parameters={**goal, "effort": effort},
        measured=measured,
        limits=limits(problem.usual_errors(candidate, outcome.coefficients), problem.steps),
    )
