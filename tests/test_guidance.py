"""Guidance in one merged batch: when a run has it, what half of the batch costs and gives, and what is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import dcc
from dcc.capture.export import capture
from dcc.discover.sites import find_sites
from dcc.errors import PlanError, SiteError
from dcc.measure.instrument import floating
from dcc.passes.base import GUIDANCE
from dcc.plans.forms import TokensForm
from dcc.plans.plan import make_plan
from dcc.plans.predictors import Predictor
from dcc.record.call import bind
from dcc.record.recorder import Recorder, Recording
from dcc.variants.build import build
from dcc.variants.cost import cost
from dcc.variants.guidance import check_call, check_halves, check_plan
from dcc.variants.observe import Observer

from .demo_runs import STEPS, demo_run

COPY, ZERO = Predictor("copy"), Predictor("zero")


class Net(nn.Module):
    """A tiny denoiser of a sample [B, 4, 8] and a prompt [B, 8]; `mixed` lets samples see each other."""

    def __init__(self, mixed: bool = False) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])
        self.mixed = mixed

    def forward(self, sample: Tensor, time: Tensor, text: Tensor) -> Tensor:
        sample = sample + (text * time[:, None])[:, None]
        for block in self.blocks:
            sample = sample + block(sample)
        return sample + sample.mean(0, keepdim=True) if self.mixed else sample


def recorded(samples, texts, times=(9.0, 5.0, 1.0), net=None):
    """What a run of these samples, one for every step, shows."""
    recorder = Recorder(net or Net().eval())
    for time, sample in zip(times, samples, strict=True):
        recorder(sample=sample, time=torch.full((len(sample),), time), text=texts)
    return recorder.result()


def merged(steps=3, images=1):
    return [torch.randn(images, 4, 8).repeat(2, 1, 1) for _ in range(steps)]


def test_a_run_is_guided_where_the_halves_repeat_samples_under_other_prompts():
    assert recorded(merged(), torch.randn(2, 8)).guided
    assert recorded(merged(images=3), torch.randn(6, 8)).guided


def test_a_run_is_not_guided_otherwise():
    own = [torch.randn(2, 4, 8) for _ in range(3)]
    assert not recorded(own, torch.randn(2, 8)).guided  # two images
    assert not recorded([own[0][:1].repeat(2, 1, 1), *own[1:]], torch.randn(2, 8)).guided  # of one seed
    assert not recorded([torch.randn(1, 4, 8) for _ in range(3)], torch.randn(1, 8)).guided
    assert not recorded(merged(), torch.randn(1, 8).repeat(2, 1)).guided  # nothing tells the halves apart


def test_moving_inputs_beside_the_sample_do_not_make_a_run_guided():
    class PerToken(nn.Module):
        def forward(self, sample: Tensor, times: Tensor, time: Tensor, text: Tensor) -> Tensor:
            return sample * times[..., None] + time + text[:, None]

    recorder = Recorder(PerToken())
    text = torch.randn(2, 8)
    for time in (9.0, 5.0, 1.0):  # two images at one level per token, as some video models are called
        recorder(sample=torch.randn(2, 4, 8), times=torch.full((2, 4), time), time=torch.tensor(time), text=text)
    assert not recorder.result().guided


def test_demo_pipelines_show_whether_they_are_guided():
    assert "uncond" in demo_run("unet").sites
    site = demo_run("unet").sites["uncond"]
    assert (site.kind, site.flops) == (GUIDANCE, demo_run("unet").sites.flops // 2)
    assert "uncond" not in demo_run("mmdit").sites
    with pytest.raises(SiteError, match=r"'uncond'.*merged guidance batch.*two calls"):
        demo_run("mmdit").sites["uncond"]


def plan_of(sites, schedule, predictors=None, levels=None, forms=None):
    """A plan of these sites; one string of digits per site."""
    return make_plan(
        model="", scheduler="s", levels=levels or tuple(range(len(schedule[0]), 0, -1)), sites=list(sites),
        schedule=[tuple(map(int, row)) for row in zip(*schedule, strict=True)],
        predictors=predictors or [COPY] * len(sites), policy="own", parameters={},
        forms=forms or [{} for _ in sites],
    )  # fmt: skip


def test_a_step_of_half_the_batch_costs_half():
    run = demo_run("unet")
    levels = run.base.plan.levels
    plan = cost(plan_of(["uncond"], ["1" + "0" * (STEPS - 1)], levels=levels), run.sites)
    assert plan.flops == run.sites.flops + (STEPS - 1) * (run.sites.flops // 2)
    both = cost(plan_of(["uncond", "cut:0"], ["10" * (STEPS // 2)] * 2, levels=levels), run.sites)
    saved = run.sites.flops - run.sites["cut:0"].flops
    assert both.flops == STEPS // 2 * (run.sites.flops + saved // 2)


def wired(module=None, guided=True, sample=None, text=None):
    """A captured tiny denoiser and its sites."""
    module = (module or Net()).eval().requires_grad_(False)
    sample = torch.randn(1, 4, 8).repeat(2, 1, 1) if sample is None else sample
    text = torch.randn(2, 8) if text is None else text
    call = bind(module, (), {"sample": sample, "time": torch.ones(len(sample)), "text": text}, frozenset())
    captured = capture(module, call)
    assert captured.problem is None, captured.problem
    moving = frozenset({"sample", "time"})
    run = Recording(call, 1, "time", (1.0,), moving, ("text",), frozenset(), guided=guided)
    return captured, find_sites(captured, call, run)


def test_a_denoiser_whose_samples_are_apart_gives_its_half():
    captured, sites = wired()
    check_halves(sites)
    whole = captured.graph_module(*captured.inputs_of(captured.call))[0]
    half = captured.part(captured.call, slice(1, None))
    torch.testing.assert_close(captured.graph_module(*captured.inputs_of(half))[0], whole[1:])


def test_refuses_a_denoiser_whose_samples_see_each_other():
    _, sites = wired(Net(mixed=True))
    with pytest.raises(PlanError, match="something else for the conditional half"):
        build(plan_of(["uncond"], ["100"]), sites, Observer())
    assert build(plan_of(["uncond"], ["111"]), sites, Observer()).variants  # nothing is left out


def test_refuses_a_size_that_capture_fixed():
    class Folded(Net):
        def forward(self, sample: Tensor, time: Tensor, text: Tensor) -> Tensor:
            return super().forward(sample, time, text).reshape(2, 4, 8)

    _, sites = wired(Folded())
    assert "uncond" not in sites  # the batch is fixed: there is nothing to halve


def test_refuses_anchors_of_half_a_batch_where_the_whole_runs():
    selected = [wired()[1].select(name) for name in ("uncond", "delta")]
    with pytest.raises(PlanError, match=r"step 3 runs the whole batch and forecasts 'delta' from step 2"):
        check_plan(plan_of(["uncond", "delta"], ["1001", "1010"]), selected)
    check_plan(plan_of(["uncond", "delta"], ["1000", "1010"]), selected)
    check_plan(plan_of(["uncond", "delta"], ["1001", "1001"]), selected)


def test_refuses_tokens_refreshed_at_half_a_batch():
    selected = [wired()[1].select(name) for name in ("uncond", "delta")]
    plan = plan_of(["uncond", "delta"], ["100", "100"])
    tokens = TokensForm("norm", 0.1, (("sign", 1.0), ("age", 0.0)))
    with pytest.raises(PlanError, match=r"step 1 .*refreshes tokens of 'delta'"):
        check_plan(_with_forms(plan, (None, tokens)), selected)


def _with_forms(plan, forms):
    """The plan with forms that are not checked on their own."""
    changed = replace(plan)
    object.__setattr__(changed, "forms", forms)
    return changed


def test_refuses_calls_whose_halves_are_other_samples():
    def call(sample):
        inputs = {"sample": sample, "time": torch.ones(len(sample)), "text": torch.randn(len(sample), 8)}
        return bind(Net(), (), inputs, frozenset())

    one = torch.randn(1, 4, 8)
    check_call(call(one.repeat(2, 1, 1)), {"sample", "time"})
    for sample in (one, torch.randn(2, 4, 8), torch.randn(3, 4, 8)):
        with pytest.raises(PlanError, match="sample: the plan leaves out the unconditional half"):
            check_call(call(sample), {"sample", "time"})


def test_a_pipeline_called_without_guidance_is_refused_not_drawn_wrongly():
    run = demo_run("unet")
    net = run.base.with_plan(run.plan("fastercache"))
    unguided = {**run.call, "guidance_scale": 1.0}
    target = run.target
    target.install(net)
    try:
        with pytest.raises(PlanError, match="different samples"):
            run.pipe(["a red circle", "a blue square"], output_type="pt", **unguided)
    finally:
        dcc.restore(run.pipe)


def test_a_profile_says_nothing_of_half_a_batch():
    assert "uncond" not in {site.name for site in floating(demo_run("unet").sites)}
