"""Run-time triggers in real denoisers: exact where they always compute, one read and two regions per step, and every
sample of a batch on its own."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

import dcc
from dcc.errors import PlanError, PolicyError
from dcc.plans.plan import Plan, make_plan
from dcc.plans.triggers import Accumulate, Layerwise
from dcc.policies import Setting, make_policy
from dcc.policies.setting import plan_for

from . import tiny

pytestmark = pytest.mark.usefixtures("graphs")

MODEL = "flux"
# small thresholds compute at every step, large ones at the forced steps only
RUNS = {
    "fbcache": {"threshold": 0.8},
    "teacache": {"threshold": 0.7, "coefficients": [1.0, 0.0]},
    "dicache": {"threshold": 0.5, "retention_ratio": 0.1},
    "easycache": {"threshold": 0.4, "first": 2},
    "dbcache": {"threshold": 0.8, "front": 1, "warmup": 2},
    "adacache": {"codebook": {9.0: 2}},
    "bwcache": {"threshold": 9.0},
    "dbprune": {"threshold": 0.8, "warmup": 2},
    "speca": {"base": 0.75, "decay": 1.0, "first": 2, "min_skip": 1, "order": 1},
    "mixcache": {"threshold": 9.0, "first": 2},
    "foresight": {"gamma": 9.0, "warmup": 3},
}
NEVER = {
    "adacache": {"codebook": {0.0: 2}},
    "foresight": {"gamma": 0.0, "warmup": 3},
    "mixcache": {"threshold": 0.0, "block_threshold": 0.0, "first": 2},
    "speca": {"base": 0.0, "decay": 0.0, "floor": 0.0, "min_skip": 0, "first": 7},
}
BETWEEN = ("adacache", "bwcache", "dbprune", "mixcache", "foresight")  # decide at computed steps for the next ones


def plan_of(policy: str, parameters: dict[str, Any], model: str = MODEL) -> Plan:
    base = tiny.base(model)
    setting = Setting(base.plan.levels, tiny.sites(model))
    return plan_for(make_policy(policy, setting, parameters), base.subject, policy, parameters)


def net_for(policy: str, parameters: dict[str, Any] | None = None, model: str = MODEL) -> dcc.CompiledDenoiser:
    return tiny.base(model).with_plan(plan_of(policy, RUNS[policy] if parameters is None else parameters, model))


@cache
def eager(seed: int, model: str = MODEL) -> list[tuple[Tensor, Tensor]]:
    return tiny.generate(model, tiny.denoise_with(tiny.module(model)), seed)


@pytest.mark.parametrize("policy", RUNS)
def test_what_always_computes_is_the_original_bit_for_bit(policy: str) -> None:
    parameters = RUNS[policy] | NEVER.get(policy, {"threshold": 0.0})
    net = net_for(policy, parameters)
    for (output, _), (expected, _) in zip(tiny.generate(MODEL, tiny.denoise_with(net), 1), eager(1), strict=True):
        assert torch.equal(output, expected)
    counts = net.sessions.counts
    assert (counts.computed, counts.forecast) == (tiny.STEPS, 0)
    assert counts.flops == counts.flops_uncached
    assert any("nothing is saved" in problem for problem in net.summary().problems)


@pytest.mark.parametrize("policy", RUNS)
def test_forecasts_save_work_with_one_read_and_two_regions_a_step_at_most(policy: str) -> None:
    regions: list[int] = []
    syncs: list[int] = []

    def counting(net: dcc.CompiledDenoiser) -> None:
        regions.append(net.sessions.counts.regions - sum(regions))
        syncs.append(net.sessions.counts.syncs - sum(syncs))

    outputs, net = samples_of(policy, (1,), counting)
    counts = net.sessions.counts
    assert counts.forecast > 0 and counts.flops < counts.flops_uncached
    assert max(syncs) <= 1 and syncs[0] == 0
    assert max(regions) <= (1 if policy in BETWEEN or policy == "speca" else 2)
    assert all(output.isfinite().all() for output in outputs)
    assert net.sessions.streams == {}  # the last step closed the stream


def samples_of(
    policy: str,
    seeds: tuple[int, ...],
    after: Callable[[dcc.CompiledDenoiser], None] = lambda net: None,
    parameters: dict[str, Any] | None = None,
) -> tuple[list[Tensor], dcc.CompiledDenoiser]:
    """Outputs of a batch made of the first samples of these seeds, step by step."""
    net = net_for(policy, parameters)
    prompts = [tiny.prompt(MODEL, seed) for seed in seeds]
    prompt = {
        name: torch.cat([p[name][:1] for p in prompts])
        if isinstance(value, Tensor) and value.dim() > 0 and len(value) == 2
        else value
        for name, value in prompts[0].items()
    }
    # louder samples move their features more, so that decisions differ
    sample = torch.cat([tiny.noise(MODEL, seed)[:1] * (1 + 3 * (seed % 2)) for seed in seeds])
    found = []
    for step in range(tiny.STEPS):
        with torch.no_grad():
            output = net(**tiny.arguments(MODEL, prompt, sample, step))[0]
        sample = tiny.euler(sample, output)
        found.append(output)
        after(net)
    return found, net


@pytest.mark.parametrize("policy", ["fbcache", "teacache", "dicache", "easycache", "dbprune", "speca"])
def test_samples_of_a_batch_decide_each_on_their_own(policy: str) -> None:
    together, _ = samples_of(policy, (1, 2, 3))
    computed = set()
    for index, seed in enumerate((1, 2, 3)):
        alone, net = samples_of(policy, (seed,))
        computed.add(net.sessions.counts.computed)
        for ours, own in zip(together, alone, strict=True):
            assert torch.allclose(ours[index], own[0], rtol=1e-4, atol=1e-5)
    assert len(computed) > 1 or policy == "dbprune"  # else the batch never had to part; blocks are not counted


def test_interleaved_generations_keep_their_own_triggers() -> None:
    net = net_for("fbcache")
    generations = [tiny.generation(MODEL, tiny.denoise_with(net), seed, tiny.prompt(MODEL, seed)) for seed in (1, 2)]
    found: list[list[Tensor]] = [[], []]
    for _ in range(tiny.STEPS):
        for index, generation in enumerate(generations):
            found[index].append(next(generation)[0])
    for index, seed in enumerate((1, 2)):
        alone = tiny.generate(MODEL, tiny.denoise_with(net_for("fbcache")), seed)
        assert all(torch.equal(a, b) for a, (b, _) in zip(found[index], alone, strict=True))


def test_a_dicache_forecast_is_the_published_formula() -> None:
    """One forecast against plain arithmetic on the eager module's own values."""
    net = net_for("dicache", {"threshold": 1e9, "retention_ratio": 0.3})  # two computed steps, then forecasts
    outputs = [output for output, _ in tiny.generate(MODEL, tiny.denoise_with(net), 1)]
    assert net.plan.schedule[:3] == ((1,), (1,), (0,))
    sites = tiny.sites(MODEL)
    probe = max(sites["blocks[0:1]"].ports, key=lambda p: sites.costs[p.out].bytes)
    stack = sites["stack"].ports[0]
    prompt, sample = tiny.prompt(MODEL, 1), tiny.noise(MODEL, 1)
    values = []
    for step in range(3):
        call = _call(net, tiny.arguments(MODEL, prompt, sample, step))
        values.append(_values(net, call))
        if step < 2:
            sample = tiny.euler(sample, outputs[step])
    p0, p1, p2 = (v[probe.out] - v[probe.base] for v in values)
    gain = ((p2 - p0).abs().flatten(1).mean(1) / (p1 - p0).abs().flatten(1).mean(1)).clamp(1, 1.5)[:, None, None]
    r0, r1 = (v[stack.out] - v[stack.base] for v in values[:2])
    head = values[2][stack.base] + r0 + gain * (r1 - r0)
    assert torch.allclose(
        _after(net, _call(net, tiny.arguments(MODEL, prompt, sample, 2)), stack.out, head), outputs[2], atol=1e-4
    )


def _call(net: dcc.CompiledDenoiser, kwargs: dict[str, Any]) -> Any:
    from dcc.record.call import bind

    return bind(net.module, (), kwargs, net.recording.as_tensors)


class _Values(torch.fx.Interpreter):
    """Every value of a graph by node name; `given` values stand in for what the graph computes."""

    def __init__(self, graph_module: torch.fx.GraphModule, given: dict[str, Tensor]) -> None:
        super().__init__(graph_module, garbage_collect_values=False)
        self.given, self.values = given, {}

    def run_node(self, n: torch.fx.Node) -> Any:
        self.values[n.name] = self.given[n.name] if n.name in self.given else super().run_node(n)
        return self.values[n.name]


def _values(net: dcc.CompiledDenoiser, call: Any, given: dict[str, Tensor] | None = None) -> dict[str, Any]:
    captured = net.families[0].captured
    with torch.no_grad():
        run = _Values(captured.graph_module, given or {})
        run.run(*captured.inputs_of(call))
    return run.values


def _after(net: dcc.CompiledDenoiser, call: Any, name: str, value: Tensor) -> Tensor:
    values = _values(net, call, {name: value})
    from dcc.passes.graph import output_node

    return values[output_node(net.families[0].captured.graph_module).args[0][0].name]


def test_a_plan_with_a_trigger_survives_its_file(tmp_path: Any) -> None:
    plan = plan_of("dicache", RUNS["dicache"])
    plan.save(tmp_path / "plan.json")
    loaded = Plan.load(tmp_path / "plan.json")
    assert loaded == plan and "aligned_probe" in str(loaded)
    first, again = (tiny.generate(MODEL, tiny.denoise_with(tiny.base(MODEL).with_plan(p)), 1) for p in (plan, loaded))
    assert all(torch.equal(a, b) for (a, _), (b, _) in zip(first, again, strict=True))


def test_a_trigger_may_not_look_after_what_it_caches() -> None:
    base = tiny.base(MODEL)
    plan = make_plan(
        model=base.plan.model,
        scheduler="sample",
        levels=base.plan.levels,
        sites=["blocks[0:1]"],
        schedule=[[int(step == 0)] for step in range(tiny.STEPS)],
        predictors=[tiny.COPY],
        policy="test",
        parameters={},
        trigger=Accumulate("hidden", 0.1),
    )
    with pytest.raises(PolicyError, match=r"the trigger looks after the cached site 'blocks\[0:1\]'"):
        base.with_plan(plan)


def test_what_is_only_looked_at_cannot_be_cached() -> None:
    with pytest.raises(PlanError, match="'latent' can be looked at by a trigger, not cached"):
        from dcc.variants.cost import cost

        base = tiny.base(MODEL)
        cost(tiny.plan(MODEL, ["latent"], [[1 - s % 2] for s in range(tiny.STEPS)]), tiny.sites(MODEL))
        assert base


@pytest.mark.parametrize("limit", [2, 3, 5])
def test_a_batch_that_asks_for_more_rows_than_are_lowered_computes(limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three samples ask for a row of their own at every step; the trigger's own decisions are not used."""
    monkeypatch.setattr("dcc.variants.trigger_graphs.MAX_ROWS", limit)
    draw, asked = random.Random(0), []

    def decide(self: Layerwise, memory: Any, step: int, values: Any) -> tuple[int, ...]:
        asked.append((1, *draw.choices((0, 1), k=len(self.sites) - 2), 0))
        return asked[-1]

    monkeypatch.setattr(Layerwise, "decide", decide)
    outputs, net = samples_of("dbprune", (1, 2, 3))
    graphs = net.families[0].graphs
    assert graphs is not None and len(graphs.rows) == limit < len(set(asked))
    assert all(output.isfinite().all() for output in outputs)
    if limit == 2:  # all computed and all forecast: each row asked for computes something, so everything is computed
        monkeypatch.undo()
        expected, _ = samples_of("dbprune", (1, 2, 3), parameters={"threshold": 0.0, "warmup": 2})
        assert all(torch.equal(a, b) for a, b in zip(outputs, expected, strict=True))


@pytest.mark.parametrize("row", [(0,), (1, 0, 1, 0, 1, 0, 1), (5, 5), "all"])
def test_a_row_that_does_not_fit_the_plan_computes(row: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    width = len(plan_of("dbprune", RUNS["dbprune"]).sites)
    asked = (7,) * width if row == "all" else row
    assert row == "all" or len(row) != width
    monkeypatch.setattr(Layerwise, "decide", lambda *_: asked)
    outputs, net = samples_of("dbprune", (1, 2))
    assert net.sessions.counts.forecast == 0 and len(outputs) == tiny.STEPS


@pytest.mark.slow
def test_lowered_by_inductor_decisions_and_numbers_stay() -> None:
    lowered = tiny.base(MODEL).with_plan(plan_of("fbcache", RUNS["fbcache"]), "inductor")
    plain = net_for("fbcache")
    ours = tiny.generate(MODEL, tiny.denoise_with(lowered), 1)
    theirs = tiny.generate(MODEL, tiny.denoise_with(plain), 1)
    for (output, _), (expected, _) in zip(ours, theirs, strict=True):
        assert torch.allclose(output, expected, rtol=1e-3, atol=1e-4)
    assert lowered.sessions.counts.forecast == plain.sessions.counts.forecast > 0
    assert lowered.summary().problems == ()
    programs = len(lowered.programs)
    tiny.generate(MODEL, tiny.denoise_with(lowered), 2)
    assert len(lowered.programs) <= programs + 2  # start, prefix and two rows; samples apart are another shape
