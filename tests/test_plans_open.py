"""A new predictor, trigger or policy is one definition: typed in from dcc/README.md, it goes through files and runs."""

from __future__ import annotations

import gc
import itertools

import pytest
import torch

from dcc.plans.plan import Plan, make_plan
from dcc.plans.predictors import ORDERS, RULES
from dcc.policies import POLICIES

from . import tiny
from .documents import ARCHITECTURE, typed_in
from .nets import apart

MODEL = "dit"


@pytest.fixture
def space():
    """The names that a block defines; what it added to dcc is taken out again."""
    names: dict[str, object] = {}
    known = [(registry, set(registry)) for registry in (RULES, ORDERS, POLICIES)]
    yield names
    for registry, before in known:
        for name in set(registry) - before:
            del registry[name]
    names.clear()
    gc.collect()  # a trigger is known for as long as its class is there


def test_a_new_predictor_is_one_function(tmp_path, space):
    predictor = typed_in(ARCHITECTURE, "@rule(", space)["predictor"]
    plan = tiny.plan(MODEL, ["output"], [[1 - step % 2] for step in range(tiny.STEPS)], [predictor])
    plan.save(tmp_path / "plan.json")
    net = tiny.compiled(MODEL, Plan.load(tmp_path / "plan.json"))
    outputs = [output for output, _ in tiny.generate(MODEL, tiny.denoise_with(net), 1)]
    assert torch.allclose(outputs[1], outputs[0] / 4) and torch.allclose(outputs[5], outputs[4] / 4)


def test_a_new_trigger_is_one_class(tmp_path, space):
    Growing = typed_in(ARCHITECTURE, "Growing(Trigger)", space)["Growing"]
    base = tiny.base(MODEL)
    plan = make_plan(
        model=base.plan.model, scheduler="sample", levels=base.plan.levels, sites=["output"],
        schedule=[[int(step == 0)] for step in range(tiny.STEPS)], predictors=[tiny.COPY], policy="test",
        parameters={}, trigger=Growing("output"),
    )  # fmt: skip
    plan.save(tmp_path / "plan.json")
    loaded = Plan.load(tmp_path / "plan.json")
    assert loaded.trigger == Growing("output")
    net = base.with_plan(loaded)
    outputs = [output for output, _ in tiny.generate(MODEL, tiny.denoise_with(net), 1)]
    same = [torch.equal(a, b) for a, b in itertools.pairwise(outputs)]
    assert same == [True, False, True, True, False, True]  # computed at 0, 2 and 5


def test_a_new_policy_is_one_function(space):
    typed_in(ARCHITECTURE, "@method(", space)
    net = apart(
        tiny.module(MODEL),
        [0],
        sample=lambda net, seed: tiny.generate(MODEL, tiny.denoise_with(net), seed),
        policy="late_newton",
        interval=2,
        order=1,
        backend="eager",
    )
    assert net.plan.steps_mask == [1, 1, 0, 1, 0, 1, 0] and net.plan.policy == "late_newton"
    assert net.plan.coefficients[2][0] == (2.0, -1.0)  # the line through the last two anchors
    tiny.generate(MODEL, tiny.denoise_with(net), 1)
    assert (net.sessions.counts.computed, net.sessions.counts.forecast) == (4, 3)
