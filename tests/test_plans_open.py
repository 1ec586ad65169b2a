"""A new predictor and a new trigger are one definition each: typed in, they go through plans, files and runs."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from dcc.plans.plan import Plan, make_plan
from dcc.plans.predictors import ORDERS, RULES, Predictor, rule
from dcc.plans.triggers import AFTER, Measure, Trigger

from . import tiny

MODEL = "dit"


def test_a_new_predictor_is_one_function(tmp_path):
    @rule(0, 0)
    def halved(step, anchors, by=2.0):
        """The newest anchor divided by a number."""
        return np.array([1 / by])

    try:
        predictor = Predictor("halved", 0, (("by", 4.0),))
        plan = tiny.plan(MODEL, ["output"], [[1 - step % 2] for step in range(tiny.STEPS)], [predictor])
        plan.save(tmp_path / "plan.json")
        net = tiny.compiled(MODEL, Plan.load(tmp_path / "plan.json"))
        outputs = [output for output, _ in tiny.generate(MODEL, tiny.denoise_with(net), 1)]
        assert torch.allclose(outputs[1], outputs[0] / 4) and torch.allclose(outputs[5], outputs[4] / 4)
    finally:
        del RULES["halved"], ORDERS["halved"]


def test_a_new_trigger_is_one_class(tmp_path):
    @dataclass(frozen=True)
    class Growing(Trigger):
        """Forecasts one step more after every computed one; looks at the output and keeps what it saw."""

        site: str
        kind: ClassVar[str] = "growing_gaps"

        @property
        def measures(self):
            return (Measure(self.site, "zero", "l1", when=AFTER, residual=False),)

        def decide(self, memory, step, values):
            return memory.skipped >= memory.numbers.get("gap", 1)

        def learn(self, memory, step, computed, values):
            if computed and memory.last >= 0:
                memory.numbers["gap"] = memory.numbers.get("gap", 1) + 1
                memory.numbers["size"] = values[self.measures[0].name]

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
