"""Whole pipelines: dcc.compile on the two trained ones, through diffusers' own loops."""

from __future__ import annotations

import copy
import re
import threading
from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, FirstBlockCacheConfig

import dcc
from dcc import errors
from dcc.record.seam import handler_of

pytestmark = pytest.mark.usefixtures("graphs")

PIPELINES = {"mmdit": "transformer", "unet": "unet"}
PROMPTS = dcc.demo.prompts("test")[:2]


@pytest.fixture(scope="module", params=PIPELINES)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def loaded(name: str) -> DiffusionPipeline:
    return dcc.demo.load(name)


@pytest.fixture
def pipe(loaded: DiffusionPipeline, name: str):
    yield loaded
    if handler_of(denoiser(loaded)) is not None:
        dcc.restore(loaded)


def denoiser(pipe: DiffusionPipeline) -> Any:
    return getattr(pipe, "transformer", None) or pipe.unet


def net_of(pipe: DiffusionPipeline) -> dcc.CompiledDenoiser:
    return dcc.compiled(pipe)


def settings(name: str, steps: int = 8) -> dict[str, Any]:
    return {**dcc.demo.settings(name), "num_inference_steps": steps}


def generate(pipe: DiffusionPipeline, name: str, prompt: Any, seed: int = 0, **kwargs: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return pipe(prompt, generator=generator, output_type="pt", **{**settings(name), **kwargs}).images


def compiled(pipe: DiffusionPipeline, name: str, **kwargs: Any) -> DiffusionPipeline:
    return dcc.compile(pipe, PROMPTS, backend="eager", **{**settings(name), **kwargs})


def test_interval_one_is_the_original_bit_for_bit(pipe: DiffusionPipeline, name: str) -> None:
    expected = generate(pipe, name, PROMPTS[0])
    for policy in ("interval", "taylorseer"):
        assert compiled(pipe, name, policy=policy, interval=1) is pipe
        assert denoiser(pipe).plan.steps_mask == [1] * 8
        assert torch.equal(generate(pipe, name, PROMPTS[0]), expected)
        assert "nothing is saved" in str(denoiser(pipe).summary())
        dcc.restore(pipe)


def test_restore_gives_the_very_same_pipeline_back(pipe: DiffusionPipeline, name: str) -> None:
    original, config, names = denoiser(pipe), dict(pipe.config), sorted(vars(denoiser(pipe)))
    keys, expected = list(original.state_dict()), generate(pipe, name, PROMPTS[0])
    compiled(pipe, name, policy="interval")
    assert list(denoiser(pipe).state_dict()) == keys
    assert denoiser(pipe) is original and net_of(pipe).module is original
    assert dcc.restore(pipe) is pipe
    assert denoiser(pipe) is original
    assert dict(pipe.config) == config
    assert sorted(vars(original)) == names
    assert torch.equal(generate(pipe, name, PROMPTS[0]), expected)


def test_cached_images_are_near_and_the_summary_counts_every_call(pipe: DiffusionPipeline, name: str) -> None:
    expected = generate(pipe, name, PROMPTS[0], num_inference_steps=12)
    compiled(pipe, name, policy="taylorseer", interval=2, num_inference_steps=12)
    plan = denoiser(pipe).plan
    assert plan.steps_mask == [1, 1, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0]
    assert plan.flops < 0.8 * plan.flops_uncached and plan.cache_bytes > 0
    image = generate(pipe, name, PROMPTS[0], num_inference_steps=12)
    error = (image - expected).square().mean()
    assert 0 < error < 0.01
    summary = denoiser(pipe).summary()
    assert (summary.computed, summary.forecast, summary.missed) == (7, 5, 0)
    assert summary.captures == 1 and summary.sessions == 1
    assert "7 computed, 5 forecast" in str(summary)
    assert net_of(pipe).sessions.streams == {}


def test_a_batch_needs_no_new_capture_and_equals_single_images(pipe: DiffusionPipeline, name: str) -> None:
    compiled(pipe, name, policy="taylorseer", interval=2)
    singles = torch.cat([generate(pipe, name, prompt, seed=3) for prompt in PROMPTS])
    generators = [torch.Generator().manual_seed(3) for _ in PROMPTS]
    batch = pipe(list(PROMPTS), generator=generators, output_type="pt", **settings(name)).images
    assert denoiser(pipe).summary().captures == 1
    assert torch.allclose(batch, singles, atol=1e-3)


def test_generations_in_lockstep_and_in_threads_equal_one_after_the_other(pipe: DiffusionPipeline, name: str) -> None:
    compiled(pipe, name, policy="taylorseer", interval=3)
    alone = [generate(pipe, name, prompt, seed) for seed, prompt in enumerate(PROMPTS)]
    images: list[Any] = [None, None]
    barrier = threading.Barrier(2, timeout=120)
    pipes = [pipe, type(pipe)(**_parts(pipe))]

    def run(index: int) -> None:
        def step_end(*_: Any) -> dict[str, Any]:
            barrier.wait()  # the denoiser's calls of the two generations alternate step by step
            return {}

        images[index] = generate(pipes[index], name, PROMPTS[index], index, callback_on_step_end=step_end)

    threads = [threading.Thread(target=run, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(a, b) for a, b in zip(images, alone, strict=True))
    assert denoiser(pipe).summary().missed == 0


def _parts(pipe: DiffusionPipeline) -> dict[str, Any]:
    """The parts of a second pipeline on the same compiled denoiser, with a scheduler and tokenizers of its own.

    A fast tokenizer keeps its padding as state, and pipelines call it with two paddings: shared between threads, a
    prompt sometimes comes out at another length, with or without dcc.
    """
    parts = {**pipe.components, "scheduler": type(pipe.scheduler).from_config(pipe.scheduler.config)}
    parts.update({key: copy.deepcopy(part) for key, part in parts.items() if key.startswith("tokenizer")})
    if "requires_safety_checker" in pipe.config:
        parts["requires_safety_checker"] = False
    return parts


def test_separate_guidance_calls_are_two_streams() -> None:
    pipe = dcc.demo.load("mmdit")
    kwargs = {"negative_prompt": "", "true_cfg_scale": 2.0}
    expected = generate(pipe, "mmdit", PROMPTS[0], **kwargs)
    compiled(pipe, "mmdit", policy="interval", interval=1, **kwargs)
    assert torch.equal(generate(pipe, "mmdit", PROMPTS[0], **kwargs), expected)
    dcc.restore(pipe)
    compiled(pipe, "mmdit", policy="taylorseer", interval=2, **kwargs)
    assert denoiser(pipe).plan.steps == 8
    image = generate(pipe, "mmdit", PROMPTS[0], **kwargs)
    summary = denoiser(pipe).summary()
    assert (summary.computed, summary.forecast, summary.missed, summary.sessions) == (10, 6, 0, 2)
    assert (image - expected).square().mean() < 0.01


def test_a_plan_file_gives_the_same_images_and_refuses_another_run(
    pipe: DiffusionPipeline, name: str, tmp_path: Any
) -> None:
    compiled(pipe, name, policy="taylorseer", steps_mask=[1, 1, 0, 1, 0, 0, 1, 0], order=2, site="output")
    expected = generate(pipe, name, PROMPTS[0])
    denoiser(pipe).plan.save(tmp_path / "plan.json")
    dcc.restore(pipe)
    plan = dcc.Plan.load(tmp_path / "plan.json")
    assert plan.steps_mask == [1, 1, 0, 1, 0, 0, 1, 0]
    compiled(pipe, name, plan=plan)
    assert torch.equal(generate(pipe, name, PROMPTS[0]), expected)
    dcc.restore(pipe)
    other = replace(plan, scheduler="OtherScheduler")
    with pytest.raises(errors.PlanError, match=r"the plan is for scheduler OtherScheduler, this run uses \w+"):
        compiled(pipe, name, plan=other)
    assert handler_of(denoiser(pipe)) is None


@pytest.mark.parametrize("steps", [6, 11, 16])
def test_another_step_count_is_mapped_by_noise_level_and_said_so(
    pipe: DiffusionPipeline, name: str, steps: int
) -> None:
    expected = generate(pipe, name, PROMPTS[0], num_inference_steps=steps)
    compiled(pipe, name, policy="taylorseer", steps_mask=[1, 1, 1, 0, 1, 0, 1, 0])
    image = generate(pipe, name, PROMPTS[0], num_inference_steps=steps)
    summary = denoiser(pipe).summary()
    assert 0 < (image - expected).square().mean() < 0.01
    assert summary.computed + summary.forecast == steps
    assert 3 <= summary.computed <= 5
    assert "other noise levels" in str(summary)
    assert torch.equal(generate(pipe, name, PROMPTS[0], num_inference_steps=steps), image)


def test_at_noise_levels_far_from_the_plans_the_original_runs_and_the_remedy_is_said(
    pipe: DiffusionPipeline, name: str
) -> None:
    compiled(pipe, name, policy="interval")
    call = net_of(pipe).recording.first.arguments()
    call = {**call, "timestep": call["timestep"] * 0 - 5000.0}
    with torch.no_grad():
        served = denoiser(pipe)(**call)[0]
        with dcc.disabled(pipe):
            assert torch.equal(served, denoiser(pipe)(**call)[0])
    (said,) = [line for line in denoiser(pipe).summary().problems if "original ran" in line]
    assert re.search(r"outside the plan's levels.*compile it for this run", said)


def test_weights_stay_live(pipe: DiffusionPipeline, name: str) -> None:
    compiled(pipe, name, policy="interval", interval=1)
    weight = next(p for p in denoiser(pipe).parameters() if p.dim() == 2)
    saved = weight.data.clone()
    before = generate(pipe, name, PROMPTS[0])
    weight.data.mul_(1.5)
    try:
        after, summary = generate(pipe, name, PROMPTS[0]), denoiser(pipe).summary()
        dcc.restore(pipe)
        assert torch.equal(generate(pipe, name, PROMPTS[0]), after)
    finally:
        weight.data.copy_(saved)
    assert not torch.equal(before, after)
    assert summary.captures == 1


def test_stands_in_for_the_denoiser(pipe: DiffusionPipeline, name: str) -> None:
    original = denoiser(pipe)
    compiled(pipe, name, policy="interval")
    net = denoiser(pipe)
    assert net.config is original.config and net.dtype == torch.float32 and net.device == original.device
    assert net.to(torch.float32) is net and pipe.to("cpu") is pipe
    assert isinstance(net, torch.nn.Module) and not net.training
    assert [n for n, _ in net.named_parameters()] == [n for n, _ in original.named_parameters()]
    assert type(original).__name__ in repr(net)


def test_returns_what_the_original_returns(pipe: DiffusionPipeline, name: str) -> None:
    original = denoiser(pipe)
    compiled(pipe, name, policy="interval", interval=1)
    for return_dict in (True, False):
        arguments = {**net_of(pipe).recording.first.arguments(), "return_dict": return_dict}
        with torch.no_grad():
            with dcc.disabled(pipe):
                expected = original(**arguments)
            actual = denoiser(pipe)(**arguments)
        assert type(actual) is type(expected)
        assert torch.equal(actual[0], expected[0])


BAD_COMPILES = {
    "no prompts": (errors.PromptError, "empty", {"calib_prompts": []}),
    "a bare string": (errors.PromptError, "must be a list", {"calib_prompts": "a red circle"}),
    "prompts of a wrong type": (errors.PromptError, r"calib_prompts\[1\] is a int", {"calib_prompts": ["a", 3]}),
    "unknown policy": (errors.PolicyError, "there are: interval, deepcache", {"policy": "teacup"}),
    "unknown keyword": (errors.PolicyError, "'intervall'.*it takes: interval", {"policy": "interval", "intervall": 2}),
    "a policy's keyword alone": (errors.PolicyError, "of a policy.*policy='interval'", {"interval": 2}),
    "policy and budget": (errors.PolicyError, "speedup: a budget is for", {"policy": "interval", "speedup": 2}),
    "two budgets": (errors.BudgetError, "speedup and quality are two budgets", {"speedup": 2, "quality": 30}),
    "a budget that is no number": (errors.BudgetError, "speedup='3x' must be a positive", {"speedup": "3x"}),
    "a speed-up below one": (errors.BudgetError, "speedup=0.5 must be at least 1", {"speedup": 0.5}),
    "unknown effort": (errors.BudgetError, "there are: fast, normal", {"speedup": 2, "effort": "max"}),
    "too few prompts to plan": (errors.PromptError, "needs at least 4 prompts", {"speedup": 2}),
    "bad interval": (errors.PolicyError, "interval=0 must be", {"policy": "interval", "interval": 0}),
    "bad order": (errors.PolicyError, "order=9", {"policy": "taylorseer", "order": 9}),
    "bad mask": (errors.PolicyError, "must begin with 1", {"policy": "interval", "steps_mask": [0] * 8}),
    "short mask": (errors.PolicyError, "8 numbers", {"policy": "interval", "steps_mask": [1]}),
    "unknown site": (
        errors.SiteError,
        "no site 'outputs'.*did you mean 'output'",
        {"policy": "interval", "site": "outputs"},
    ),
    "policy and plan": (errors.PolicyError, "not both", {"policy": "interval", "plan": object()}),
    "not a plan": (errors.PlanError, "must be a dcc.Plan", {"plan": "plan.json"}),
    "unknown backend": (errors.LoweringError, "inductor, eager", {"backend": "tensorrt"}),
    "sample for a pipeline": (errors.PipelineError, "bare nn.Module", {"sample": print}),
}


@pytest.mark.parametrize("bad", BAD_COMPILES)
def test_bad_input_is_refused_and_the_pipeline_stays_as_it_was(pipe: DiffusionPipeline, name: str, bad: str) -> None:
    kind, message, kwargs = BAD_COMPILES[bad]
    original = denoiser(pipe)
    kwargs = {"calib_prompts": PROMPTS, "backend": "eager", **settings(name), **kwargs}
    with pytest.raises(kind, match=message) as caught:
        dcc.compile(pipe, **kwargs)
    assert isinstance(caught.value, errors.DccError)
    assert denoiser(pipe) is original


def test_state_of_the_pipeline_is_checked(pipe: DiffusionPipeline, name: str) -> None:
    with pytest.raises(errors.PipelineError, match="nothing to restore"):
        dcc.restore(pipe)
    compiled(pipe, name, policy="interval")
    with pytest.raises(errors.AlreadyCompiledError, match=r"dcc\.restore it first"):
        compiled(pipe, name, policy="interval")
    with pytest.raises(errors.PipelineError, match="got str"):
        dcc.compile("pipe", PROMPTS)
    with pytest.raises(errors.PipelineError, match="needs sample=fn"):
        dcc.compile(torch.nn.Linear(2, 2), PROMPTS)


def test_a_peers_cache_is_refused() -> None:
    pipe = dcc.demo.load("mmdit")
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.1))
    with pytest.raises(errors.PeerCacheError, match=r"another cache is active on .* disable_cache"):
        compiled(pipe, "mmdit")
    pipe.transformer.disable_cache()
    compiled(pipe, "mmdit", policy="interval")


def test_an_interrupted_compile_leaves_the_pipeline_usable(
    pipe: DiffusionPipeline, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, expected = denoiser(pipe), generate(pipe, name, PROMPTS[0])

    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    for place in (
        "dcc.record.recorder.Recorder.call",
        "dcc.discover.subject.find_sites",
        "dcc.serve.denoiser.CompiledDenoiser.warm",
    ):
        with monkeypatch.context() as patch:
            patch.setattr(place, interrupt)
            with pytest.raises(KeyboardInterrupt):
                compiled(pipe, name, policy="interval")
        assert denoiser(pipe) is original and handler_of(original) is None
    assert torch.equal(generate(pipe, name, PROMPTS[0]), expected)
