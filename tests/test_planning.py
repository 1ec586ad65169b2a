"""Plans searched on real pipelines and on a bare module, through the public interface."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import dcc
from dcc import errors
from dcc.quality import psnr
from dcc.report.evaluate import evaluate

from . import tiny
from .nets import apart

pytestmark = pytest.mark.usefixtures("graphs")

PROMPTS = dcc.demo.prompts("calib")[:6]
STEPS = 9


def settings(name: str) -> dict[str, Any]:
    return {**dcc.demo.settings(name), "num_inference_steps": STEPS}


@pytest.fixture(scope="module", params=["mmdit", "unet"])
def planned(request: pytest.FixtureRequest) -> tuple[str, dcc.Plan]:
    pipe = dcc.demo.load(request.param)
    return request.param, dcc.plan(pipe, PROMPTS, speedup=2.5, effort="fast", **settings(request.param))


def quality(name: str, plan: dcc.Plan, prompts: list[str]) -> float:
    report = evaluate(dcc.demo.load(name), {"plan": plan}, prompts, backend="eager", seed=100, **settings(name))
    return sum(report["plan"].psnr) / len(prompts)


def test_a_searched_plan_keeps_its_budget_and_its_promise(planned: tuple[str, dcc.Plan]) -> None:
    _, plan = planned
    assert plan.speedup >= 2.5 * (1 - 1e-6)
    assert plan.measured["prompts"] == 2
    assert plan.measured["psnr_mean"] > plan.measured["fewer_steps_psnr"]
    assert plan.measured["psnr_worst"] <= plan.measured["psnr_mean"]
    judged = [step for step, full in enumerate(plan.steps_mask) if full][1:]  # the first has nothing before it
    assert [step for step, limit in enumerate(plan.limits) if limit > 0] == judged


def test_it_beats_evenly_spread_extrapolation_on_other_prompts(planned: tuple[str, dcc.Plan]) -> None:
    name, plan = planned
    full = sum(plan.steps_mask)
    even = [0] * STEPS
    for position in torch.linspace(0, STEPS - 1, full).round().int().tolist():
        even[position] = 1
    pipe = dcc.demo.load(name)
    dcc.compile(
        pipe, PROMPTS, policy="taylorseer", order=1, site="output", steps_mask=even, backend="eager", **settings(name)
    )
    rival = dcc.compiled(pipe)
    prompts = dcc.demo.prompts("test")[:3]
    assert quality(name, plan, prompts) > quality(name, rival.plan, prompts) + 0.5


def test_the_same_seed_gives_the_same_plan() -> None:
    pipe, call = dcc.demo.load("mmdit"), {**settings("mmdit"), "num_inference_steps": 6}
    plans = [dcc.plan(pipe, PROMPTS[:4], speedup=2, effort="fast", seed=3, **call) for _ in range(2)]
    assert plans[0] == plans[1]


def test_a_profile_adds_candidates_and_must_fit_the_run() -> None:
    pipe, call = dcc.demo.load("mmdit"), {**settings("mmdit"), "num_inference_steps": 6}
    profile = dcc.calibrate(pipe, PROMPTS[:2], **call)
    plan = dcc.plan(pipe, PROMPTS[:4], profile, speedup=2, **call)
    assert plan.speedup >= 2
    with pytest.raises(errors.ProfileError, match="the profile has 6 steps, this run 5"):
        dcc.plan(pipe, PROMPTS[:4], profile, speedup=2, **{**call, "num_inference_steps": 5})
    with pytest.raises(errors.ProfileError):
        dcc.plan(dcc.demo.load("unet"), PROMPTS[:4], profile, speedup=2, **settings("unet"))


def test_compile_with_a_budget_serves_the_plan_it_found() -> None:
    pipe = dcc.demo.load("mmdit")
    lines: list[str] = []
    dcc.compile(pipe, PROMPTS, quality=30, effort="fast", backend="eager", progress=lines.append, **settings("mmdit"))
    plan = pipe.transformer.plan
    assert plan.policy == "solver" and plan.parameters == {"quality": 30, "effort": "fast"}
    assert plan.measured["psnr_mean"] >= 30
    assert plan.speedup > 1.5
    assert any("full steps" in line for line in lines)
    pipe(PROMPTS[0], **settings("mmdit"))
    summary = pipe.transformer.summary()
    assert (summary.computed, summary.missed) == (sum(plan.steps_mask), 0)
    assert "held-back" in str(plan)


def test_a_latency_becomes_a_speedup_or_says_what_takes_the_time() -> None:
    pipe = dcc.demo.load("mmdit")
    kwargs = {"effort": "fast", "backend": "eager", **settings("mmdit")}
    with pytest.raises(errors.BudgetError, match=r"latency=0\.1 ms is out of reach: an uncached run takes \d+ ms"):
        dcc.plan(pipe, PROMPTS[:4], latency=0.1, **kwargs)
    assert dcc.plan(pipe, PROMPTS[:4], latency=1e6, **kwargs).speedup == 1.0


def loop(net: torch.nn.Module, label: int) -> torch.Tensor:
    """A bare sampling loop: a label instead of a prompt, noise from torch's global generator."""
    sample = torch.randn(2, *tiny.noise("dit", 0).shape[1:])
    prompt = tiny.prompt("dit", label)
    for step in range(tiny.STEPS):
        sample = tiny.euler(sample, net(**tiny.arguments("dit", prompt, sample, step))[0])
    return sample


def test_a_bare_module_with_labels_is_planned_too() -> None:
    net = apart(tiny.module("dit"), list(range(5)), sample=loop, speedup=1.7, effort="fast", backend="eager")
    assert net.plan.speedup >= 1.7 and net.plan.measured["prompts"] == 2
    assert "fewer_steps" not in net.plan.measured
    torch.manual_seed(11)
    with torch.no_grad():
        cached = loop(net, 3)
        torch.manual_seed(11)
        whole = loop(tiny.module("dit"), 3)
    spread = float(whole.max() - whole.min())
    assert psnr(cached[None], whole[None], spread)[0] > 25


def test_a_loop_that_returns_nothing_is_refused() -> None:
    def silent(net: torch.nn.Module, label: int) -> None:
        loop(net, label)

    with pytest.raises(errors.PipelineError, match="must return the final sample"):
        dcc.compile(tiny.module("dit"), list(range(5)), sample=silent, speedup=2, backend="eager")
