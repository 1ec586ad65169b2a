"""Contestants of quality.py that need no other library: fewer steps, dcc's policies, dcc's plan files."""

from __future__ import annotations

import contextlib
import hashlib
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from subjects import Changes, Contestant, Knob, Subject, budgets, count_knob, evenly, interval_knob

import dcc
from dcc.plans.plan import Plan
from dcc.plans.predictors import Predictor
from dcc.variants.cost import planned

PLANS = Path(__file__).parent / "results" / "plans"


def baselines(subject: Subject) -> Iterator[Contestant]:
    """All of them, at every budget; a plan file counts at its own."""
    yield Contestant("uncached, one by one", "uncached", uncached, dynamic=True, shared=True)
    yield Contestant("uncached, 200 steps", "uncached", fewer_steps, {"full_steps": 200})
    yield from budgets(_fewer_steps(subject))
    yield from budgets(_dcc_policies(subject))
    yield from solver_plans(subject)


@contextlib.contextmanager
def uncached(subject: Subject, pipe: Any) -> Iterator[None]:
    """The reference itself: how much of the difference is arithmetic in batches of another size."""
    yield


@contextlib.contextmanager
def fewer_steps(subject: Subject, pipe: Any, full_steps: int, scheduler: str = "", **options: Any) -> Iterator[Changes]:
    """The uncached denoiser called less often, by the pipeline's own scheduler or by another of diffusers."""
    import diffusers

    if scheduler:
        settings = dict(pipe.scheduler.config)
        if subject.name == "mmdit":
            # FluxPipeline hands its own sigmas over unless use_flow_sigmas is set, and then a shift mu, which these
            # schedulers take as exp(mu): with both shifts at log(shift) they get the pipeline's own
            shift = math.log(settings["shift"])
            settings |= {"base_shift": shift, "max_shift": shift, "use_dynamic_shifting": True}
            options |= {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
        pipe.scheduler = getattr(diffusers, scheduler).from_config(settings, **options)
    yield {"num_inference_steps": full_steps}


def _fewer_steps(subject: Subject) -> Iterator[Contestant]:
    knob, flow = count_knob(subject), subject.name == "mmdit"
    own = "Euler" if flow else "DDIM"
    yield Contestant(f"fewer steps, {own}", "fewer steps", fewer_steps, {}, knob)
    multistep = "fewer steps, multistep"
    for order in (2, 3):
        for scheduler, short in (
            ("DPMSolverMultistepScheduler", "DPM++"),
            ("UniPCMultistepScheduler", "UniPC"),
            ("DEISMultistepScheduler", "DEIS"),
        ):
            options = {"scheduler": scheduler, "solver_order": order}
            yield Contestant(f"fewer steps, {short} order {order}", multistep, fewer_steps, options, knob)
        if not flow:  # where the pipeline's DDIM ends, which these reach by a first-order step only
            options = {"scheduler": "DPMSolverMultistepScheduler", "solver_order": order}
            options |= {"final_sigmas_type": "sigma_min", "euler_at_final": True}
            yield Contestant(f"fewer steps, DPM++ order {order}, sigma_min", multistep, fewer_steps, options, knob)


@contextlib.contextmanager
def dcc_plan(subject: Subject, pipe: Any, plan: Plan) -> Iterator[Changes]:
    """A plan, on the eager backend."""
    target = subject.target(pipe)
    target.install(subject.compiled.with_plan(plan))
    try:
        yield {"num_inference_steps": plan.steps}
    finally:
        dcc.restore(pipe)


@contextlib.contextmanager
def dcc_policy(
    subject: Subject, pipe: Any, policy: str, site: str, newton: int = 0, full_steps: int = 0, **options: Any
) -> Iterator[Changes]:
    """A policy by its parameters. `full_steps` spreads that many evenly; `newton` is an order of true polynomials."""
    if full_steps:
        options["steps_mask"] = evenly(subject.steps, full_steps)
    parameters = {"site": site, **options}
    plan = subject.plan(policy, parameters)
    if newton:
        plan = planned(
            subject.compiled.subject,
            sites=plan.sites,
            schedule=plan.schedule,
            predictors=[Predictor("newton", newton)] * len(plan.sites),
            policy="newton",
            parameters={"order": newton, "site": site},
        )
    with dcc_plan(subject, pipe, plan) as changes:
        yield changes


def _dcc_policies(subject: Subject) -> Iterator[Contestant]:
    places: Sequence[str] = ("output", "stack", "hidden") if subject.name == "mmdit" else ("output", "cut:0", "hidden")

    def policy(family: str, label: str, knob: Knob, **options: Any) -> Contestant:
        return Contestant(f"dcc {label}", f"dcc {family}", dcc_policy, options, knob, shared=True)

    by_interval, by_count = interval_knob(subject), count_knob(subject)
    for site in places:
        yield policy("interval", f"interval, {site}", by_interval, policy="interval", site=site)
        for order in (1, 2):
            label = f"taylorseer {order}, {site}"
            yield policy("taylorseer", label, by_interval, policy="taylorseer", site=site, order=order)
            label = f"even taylor {order}, {site}"
            yield policy("even forecasts", label, by_count, policy="taylorseer", site=site, order=order)
        # at order 1 the published Taylor form is the true polynomial
        yield policy("even forecasts", f"even newton 2, {site}", by_count, policy="taylorseer", site=site, newton=2)


def solver_plans(subject: Subject) -> Iterator[Contestant]:
    """The plans that lie in results/plans/<pipeline>_<speed-up>x.json."""
    for path in sorted(PLANS.glob(f"{subject.name}_*x.json")):
        speedup = float(path.stem.removeprefix(f"{subject.name}_").removesuffix("x"))
        parameters = {"plan": path.name, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()[:16]}
        yield Contestant(
            f"dcc solver @ {speedup:g}x", "dcc solver", solver_plan, parameters, budget=speedup, shared=True
        )


@contextlib.contextmanager
def solver_plan(subject: Subject, pipe: Any, plan: str, sha256: str) -> Iterator[Changes]:
    """A plan file, compiled as a user would."""
    loaded = Plan.load(PLANS / plan)
    changes = {"num_inference_steps": loaded.steps}
    dcc.compile(pipe, dcc.demo.prompts("calib"), plan=loaded, backend="eager", **(subject.call | changes))
    try:
        yield changes
    finally:
        dcc.restore(pipe)
