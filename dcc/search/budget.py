"""What the solver is given: the runs, costs and candidate plans of one denoiser, for one budget."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from dcc import arguments
from dcc.discover.subject import Subject
from dcc.errors import BudgetError, ProfileError
from dcc.measure.profile import Profile
from dcc.plans.plan import Plan
from dcc.plans.predictors import Predictor
from dcc.record.seam import Handler
from dcc.record.target import installed
from dcc.search.closed_loop import Candidate, ClosedLoop, prepare
from dcc.search.proposals import propose
from dcc.search.solver import EFFORTS, Goal, Problem, solve, split
from dcc.serve.denoiser import CompiledDenoiser
from dcc.serve.guard import Errors
from dcc.variants.build import Family, build
from dcc.variants.cost import planned
from dcc.variants.observe import Observer

Effort = Literal["fast", "normal", "thorough"]  # the keys of EFFORTS
DEFAULT_EFFORT: Effort = "normal"
DEFAULT_QUALITY = 35.0  # dB; differences are then hard to see side by side
SITES = ("output", "hidden", "stack", "cut:0")  # whole-model sites that the search compares
SMALL = 50e9  # FLOPs of a call up to which prompts are run in batches: a small model gains, a large one needs memory
BATCH = 8
TIMED_RUNS = 3


@dataclass
class Candidates:
    """Makes plans and denoisers of a subject's candidates; those of one site, rows and anchor count share graphs."""

    subject: Subject
    backend: str
    families: dict[Any, list[Family]] = field(default_factory=dict)

    def plan(self, candidate: Candidate, coefficients: dict[int, list[float]]) -> Plan:
        """A candidate as a Plan with its costs."""
        return planned(
            self.subject,
            sites=[candidate.site],
            schedule=[[full] for full in candidate.mask],
            predictors=[_Given(coefficients)],
            policy="solver",
            parameters={},
        )

    def usual_errors(
        self, candidate: Candidate, coefficients: dict[int, list[float]], loop: ClosedLoop
    ) -> dict[int, list[float]]:
        """By step, the forecast errors of every sample that the guard would see at the candidate's anchors."""
        errors = Errors()
        net = self.net(candidate, coefficients, guard=errors)
        for batch in loop.batches:
            loop.generate(net, batch)
        return errors.found

    def net(
        self,
        candidate: Candidate,
        coefficients: dict[int, list[float]],
        backend: str = "eager",
        guard: Errors | None = None,
    ) -> CompiledDenoiser:
        """A denoiser that runs the candidate."""
        plan = self.plan(candidate, coefficients)
        key = (plan.sites, tuple(plan.rows), plan.anchors)
        if key not in self.families:
            self.families[key] = [build(plan, self.subject.sites, Observer())]
        return CompiledDenoiser(self.subject, plan, backend=backend, guard=guard, families=list(self.families[key]))


@dataclass(frozen=True)
class _Given:
    """Takes a predictor's place with coefficients that are known already."""

    values: dict[int, list[float]]

    def coefficients(self, step: int, anchors: Sequence[int]) -> list[float]:
        return self.values[step]


@dataclass(frozen=True)
class Budget:
    """A goal as the user names it; `latency` in milliseconds becomes a speed-up as soon as a run has been timed."""

    goal: Goal | None
    latency: float | None
    cache_bytes: int | None
    effort: str


def budget_of(
    speedup: float | None,
    quality: float | None,
    latency: float | None,
    cache_bytes: int | None,
    effort: str,
    prompts: Sequence[Any],
) -> Budget:
    """The budget named by compile's keywords; the default quality where none is.

    Raises BudgetError for bad ones and PromptError for too few prompts, before any work.
    """
    named = [n for n, v in {"speedup": speedup, "quality": quality, "latency": latency}.items() if v is not None]
    if len(named) > 1:
        raise BudgetError(f"{' and '.join(named)} are two budgets; name one (cache_bytes combines with any)")
    check_effort(effort)
    if latency is not None:
        latency = arguments.positive("latency", latency, BudgetError, unit="milliseconds")
    if cache_bytes is not None:
        cache_bytes = arguments.whole("cache_bytes", cache_bytes, 1, error=BudgetError)
    if speedup is not None:
        speedup = arguments.positive("speedup", speedup, BudgetError)
    if quality is not None:
        quality = arguments.positive("quality", quality, BudgetError, unit="dB")
    goal = Goal(speedup, quality if named else DEFAULT_QUALITY, cache_bytes) if latency is None else None
    split(prompts)
    return Budget(goal, latency, cache_bytes, effort)


def check_effort(effort: Any) -> None:
    """Raises BudgetError, listing what there is, for an unknown effort."""
    arguments.chosen("effort", effort, EFFORTS, BudgetError)


def plan_within(
    candidates: Candidates,
    budget: Budget,
    prompts: Sequence[Any],
    *,
    seed: int,
    data_range: float | None,
    progress: Callable[[str], None],
    profile: Profile | None = None,
) -> Plan:
    """The best plan for a budget, searched on `prompts`; the noise of prompt i comes from seed + i."""
    subject, (fitting, held_back) = candidates.subject, split(prompts)
    if profile is not None:
        profile.check(subject.module, subject.target.scheduler)
        if profile.steps != subject.steps:
            raise ProfileError(f"the profile has {profile.steps} steps, this run {subject.steps}; calibrate this run")
    goal = budget.goal or Goal(_speedup_for(candidates, budget, prompts[0], seed, progress), None, budget.cache_bytes)
    loops = [
        _loop(candidates, prompts, chosen, seed, data_range, traced, progress)
        for chosen, traced in ((fitting, True), (held_back, False))
    ]
    names = [name for name in SITES if name in subject.sites]
    flow, costs = subject.sites.flow, subject.sites.costs
    problem = Problem(
        steps=subject.steps,
        flops=subject.sites.flops,
        forecast_flops={name: flow.flops(costs, subject.sites[name].ports) for name in names},
        anchor_bytes={name: subject.sites[name].bytes for name in names},
        fitting=loops[0],
        held_back=loops[1],
        plan=candidates.plan,
        fewer=lambda steps: _fewer_steps(loops[1], steps),
        proposals=lambda site, full: [propose(profile, site, full)] if profile is not None else [],
        usual_errors=lambda candidate, coefficients: candidates.usual_errors(candidate, coefficients, loops[0]),
    )
    return solve(problem, goal, budget.effort, seed, progress)


def _loop(
    candidates: Candidates,
    prompts: Sequence[Any],
    chosen: Sequence[int],
    seed: int,
    data_range: float | None,
    traced: bool,
    progress: Callable[[str], None],
) -> ClosedLoop:
    """The uncached runs of the chosen prompts, which are named by their place among all."""
    subject = candidates.subject
    batch_size = BATCH if subject.sites.flops < SMALL and subject.target.batches else 1
    return prepare(
        subject,
        candidates.net,
        [prompts[i] for i in chosen],
        [seed + i for i in chosen],
        batch_size=batch_size,
        data_range=data_range,
        traced=traced,
        names=[f"prompt {i + 1}" for i in chosen],
        progress=progress,
    )


def _fewer_steps(loop: ClosedLoop, steps: int) -> float | None:
    """Mean PSNR in dB of simply running this many sampler steps, None where the loop does not take a number."""
    target = loop.subject.target.fewer_steps(steps)
    if target is None:
        return None
    values: list[float] = []
    for batch in loop.batches:
        values += loop.psnr(target.generate(batch.prompts, batch.seeds), batch)
    return statistics.fmean(values)


class _Clock(Handler):
    """Adds up the seconds spent in the denoiser."""

    def __init__(self, net: CompiledDenoiser) -> None:
        super().__init__(net.module)
        self.net, self.seconds = net, 0.0

    def call(self, *args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        outputs = self.net(*args, **kwargs)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds += time.perf_counter() - start
        return outputs


def _speedup_for(
    candidates: Candidates, budget: Budget, prompt: Any, seed: int, progress: Callable[[str], None]
) -> float:
    """The ratio of denoiser FLOPs at which a run takes `latency`, from timed uncached runs on the plan's backend."""
    subject = candidates.subject
    whole = Candidate("output", Predictor("copy"), (1,) * subject.steps)
    clock = _Clock(candidates.net(whole, {}, candidates.backend))
    times = []
    with installed(subject.target, clock):
        for index in range(TIMED_RUNS + 1):
            progress(f"timing uncached runs: {index} of {TIMED_RUNS}")
            clock.seconds = 0.0
            start = time.perf_counter()
            subject.target.generate([prompt], [seed])
            times.append((time.perf_counter() - start, clock.seconds))
    total, denoiser = (statistics.median(column) for column in zip(*times[1:], strict=True))
    assert budget.latency is not None
    wanted = budget.latency / 1e3
    rest = total - denoiser
    if wanted <= rest + denoiser / subject.steps:
        raise BudgetError(
            f"latency={budget.latency:g} ms is out of reach: an uncached run takes {total * 1e3:.0f} ms, of which "
            f"{rest * 1e3:.0f} ms are outside the denoiser"
        )
    return max(1.0, denoiser / (wanted - rest))
