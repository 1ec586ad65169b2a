"""Runs of one step: nothing can be forecast in them, so that everything computes, and says so."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dcc
from dcc.errors import BudgetError

pytestmark = pytest.mark.usefixtures("graphs")

PROMPTS = [1.0, 2.0, 3.0, 4.0]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        return x + torch.tanh(self.linear(x)) * time[:, None]


class OneStep(nn.Module):
    """Three blocks between an embedder and a head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Linear(4, 8), nn.Linear(8, 4)
        self.blocks = nn.ModuleList([Block() for _ in range(3)])

    def forward(self, x: Tensor, time: Tensor, prompt: Tensor) -> Tensor:
        x = self.embed(x + prompt)
        for block in self.blocks:
            x = block(x, time)
        return self.head(x)


def sample(net: Any, prompt: float) -> Tensor:
    """One call, as distilled models take."""
    with torch.no_grad():
        return net(torch.randn(2, 4), torch.full((2,), 0.999), torch.full((2, 1), prompt))


def guided(net: Any, prompt: float) -> Tensor:
    """Two calls at the one step, each in its stream."""
    x, time = torch.randn(2, 4), torch.full((2,), 0.999)
    found = {}
    for name, value in (("cond", prompt), ("uncond", 0.0)):
        with net.cache_context(name), torch.no_grad():
            found[name] = net(x, time, torch.full((2, 1), value))
    return found["uncond"] + 3 * (found["cond"] - found["uncond"])


class Named(OneStep):
    """With the context manager that diffusers' denoisers have."""

    def cache_context(self, name: str) -> Any:
        return torch.no_grad()


LOOPS = {"one call": (OneStep, sample), "two streams": (Named, guided)}


@pytest.fixture(params=LOOPS)
def case(request: pytest.FixtureRequest) -> tuple[nn.Module, Any]:
    make, loop = LOOPS[request.param]
    return make().eval().requires_grad_(False), loop


def uncached(net: nn.Module, loop: Any, prompt: float, seed: int) -> Tensor:
    torch.manual_seed(seed)
    return loop(net, prompt)


@pytest.mark.parametrize("policy", ["interval", "taylorseer", "fbcache", "dbprune", "fora"])
def test_every_policy_computes_the_one_step(case: tuple[nn.Module, Any], policy: str):
    net, loop = case
    parameters = {"threshold": 0.1} if policy == "fbcache" else {}
    expected = [uncached(net, loop, prompt, seed) for seed, prompt in enumerate(PROMPTS)]
    dcc.compile(net, PROMPTS[:1], sample=loop, policy=policy, backend="eager", **parameters)
    for seed, prompt in enumerate(PROMPTS):
        assert torch.equal(uncached(net, loop, prompt, seed), expected[seed])
    summary = dcc.summary(net)
    assert summary.forecast == summary.missed == 0 and summary.computed == len(PROMPTS) * (2 if loop is guided else 1)
    assert any("nothing is saved" in said for said in summary.problems)
    assert dcc.compiled(net).plan.steps_mask == [1] or dcc.compiled(net).plan.trigger


def test_sites_are_found(case: tuple[nn.Module, Any]):
    net, loop = case
    assert {"output", "stack"} <= {site.name for site in dcc.sites(net, PROMPTS, sample=loop)}


def test_a_budget_that_one_step_keeps_gives_the_plan_that_computes_it(case: tuple[nn.Module, Any]):
    net, loop = case
    for budget in ({}, {"quality": 80}, {"speedup": 1}, {"latency": 1e9}):
        plan = dcc.plan(net, PROMPTS, sample=loop, effort="fast", backend="eager", **budget)
        assert plan.steps_mask == [1] and plan.speedup == 1 and plan.measured["psnr_worst"] == 120.0


def test_a_budget_that_one_step_cannot_keep_says_so(case: tuple[nn.Module, Any]):
    net, loop = case
    with pytest.raises(BudgetError, match=r"speedup=2 is out of reach in 1 step; at most 1\.0"):
        dcc.plan(net, PROMPTS, sample=loop, speedup=2, effort="fast", backend="eager")
    with pytest.raises(BudgetError, match="is out of reach: an uncached run takes"):
        dcc.plan(net, PROMPTS, sample=loop, latency=1e-6, effort="fast", backend="eager")


def test_a_guarded_plan_of_one_step_compiles(case: tuple[nn.Module, Any]):
    net, loop = case
    expected = uncached(net, loop, 2.0, 1)
    dcc.compile(net, PROMPTS, sample=loop, quality=30, guard=True, effort="fast", backend="eager")
    assert torch.equal(uncached(net, loop, 2.0, 1), expected)


def test_it_is_calibrated_and_compared(case: tuple[nn.Module, Any]):
    net, loop = case
    profile = dcc.calibrate(net, PROMPTS, sample=loop)
    assert profile.steps == 1 and profile.prompts == 4 and profile.sensitivity.tolist() == [1.0]
    assert profile.similarity("output").tolist() == [[pytest.approx(1.0)]] and "1 step" in str(profile)
    report = dcc.evaluate(net, ["interval", "taylorseer"], PROMPTS, sample=loop, backend="eager")
    assert [row.error for row in report.rows] == [None, None]
    assert all(value == float("inf") for row in report.rows for value in row.psnr)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mmdit", "unet"])
def test_a_pipeline_of_one_step(name: str):
    pipe, call = dcc.demo.load(name), dcc.demo.settings(name) | {"num_inference_steps": 1}
    prompts = dcc.demo.prompts("calib")[:4]
    for policy in ("interval", "taylorseer"):
        dcc.compile(pipe, prompts, policy=policy, backend="eager", **call)
        assert dcc.compiled(pipe).plan.steps_mask == [1]
        dcc.restore(pipe)
    plan = dcc.plan(pipe, prompts, quality=40, effort="fast", backend="eager", **call)
    assert plan.steps_mask == [1] and plan.measured["psnr_worst"] == 120.0
    assert dcc.calibrate(pipe, prompts[:1], **call).steps == 1
    report = dcc.evaluate(pipe, {"plan": plan}, prompts[:1], backend="eager", **call)
    assert report["plan"].error is None and report["plan"].psnr == [float("inf")]
