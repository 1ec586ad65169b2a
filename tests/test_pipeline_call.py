"""Arguments of the pipeline's call in dcc's own runs: the caller's callback, the form of results, listed noise levels;
and methods of the pipeline that look for its denoiser while that is compiled."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers.callbacks import PipelineCallback
from torch import Tensor, nn

import dcc
from dcc.record.target import PipelineTarget

from .truth.loops import Loop, dit

pytestmark = pytest.mark.usefixtures("graphs")

PROMPTS = dcc.demo.prompts("calib")[:4]
PARTS = {"mmdit": "transformer", "unet": "unet"}


def settings(name: str) -> dict[str, Any]:
    return {**dcc.demo.settings(name), "num_inference_steps": 3}


@pytest.fixture(scope="module", params=PARTS)
def named(request: pytest.FixtureRequest) -> tuple[str, Any]:
    return request.param, dcc.demo.load(request.param)


def by_hand(named: tuple[str, Any], **call: Any) -> Tensor:
    """What the pipeline itself gives for the first two prompts and seeds 0 and 1."""
    name, pipe = named
    generators = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
    call = {"generator": generators, "return_dict": False, **settings(name), **call}
    return pipe(PROMPTS[:2], **call)[0]


@pytest.mark.parametrize("given", ["pil", "np", "pt", None])
def test_samples_are_decoded_whatever_form_the_caller_s_results_have(named: tuple[str, Any], given: Any):
    name, pipe = named
    call = settings(name) | ({} if given is None else {"output_type": given}) | {"return_dict": True}
    target = PipelineTarget(pipe, call)
    assert target.data_range == 1.0
    samples = target.generate(PROMPTS[:2], [0, 1])
    assert torch.equal(samples.images, by_hand(named, output_type="pt"))


def test_latents_are_compared_as_latents(named: tuple[str, Any]):
    name, pipe = named
    target = PipelineTarget(pipe, settings(name) | {"output_type": "latent"})
    samples = target.generate(PROMPTS[:2], [0, 1])
    assert target.data_range is None and len(samples.images) == 2
    for part in (samples.images, samples.raw, samples.state):
        assert part is not None and torch.equal(part, by_hand(named, output_type="latent"))


@pytest.mark.slow
def test_a_plan_is_searched_and_a_policy_judged_by_latents(named: tuple[str, Any]):
    name, pipe = named
    call = settings(name) | {"output_type": "latent"}
    plan = dcc.plan(pipe, PROMPTS, speedup=1.4, effort="fast", backend="eager", **call)
    assert plan.measured["psnr_worst"] > 15 and "ssim_mean" not in plan.measured
    report = dcc.evaluate(pipe, {"plan": plan}, PROMPTS[:2], backend="eager", batch_size=2, **call)
    assert report["plan"].error is None and min(report["plan"].psnr) > 15


def test_the_caller_s_callback_is_called_and_may_change_the_run(named: tuple[str, Any]):
    name, pipe = named
    seen: list[int] = []

    def halve(pipe: Any, step: int, timestep: Any, values: dict[str, Tensor]) -> dict[str, Tensor]:
        seen.append(step)
        return {"latents": values["latents"] / 2}

    samples = PipelineTarget(pipe, settings(name) | {"callback_on_step_end": halve}).generate(PROMPTS[:2], [0, 1])
    assert seen == [0, 1, 2]
    assert torch.equal(samples.images, by_hand(named, output_type="pt", callback_on_step_end=halve))
    assert not torch.equal(samples.images, by_hand(named, output_type="pt"))
    last = by_hand(named, output_type="latent", callback_on_step_end=halve)
    assert samples.state is not None and torch.equal(samples.state, last)


class Halve(PipelineCallback):
    """A callback of diffusers' own kind, which says what it wants to see."""

    tensor_inputs = ["latents"]  # noqa: RUF012 - as diffusers declares it

    def callback_fn(
        self, pipeline: Any, step_index: int, timestep: Any, callback_kwargs: dict[str, Any]
    ) -> dict[str, Any]:
        return {"latents": callback_kwargs["latents"] / 2}


def test_diffusers_own_callbacks_are_given_what_they_want_to_see():
    pipe = dcc.demo.load("unet")
    callback = Halve(cutoff_step_ratio=None, cutoff_step_index=1)
    samples = PipelineTarget(pipe, settings("unet") | {"callback_on_step_end": callback}).generate(PROMPTS[:2], [0, 1])
    expected = by_hand(("unet", pipe), output_type="pt", callback_on_step_end=callback)
    assert torch.equal(samples.images, expected)


def test_fewer_steps_are_not_counted_where_the_levels_are_listed():
    pipe = dcc.demo.load("unet")
    fewer = PipelineTarget(pipe, settings("unet")).fewer_steps(2)
    assert fewer is not None and fewer.call_kwargs["num_inference_steps"] == 2
    for listed in ({"timesteps": [900, 500, 100]}, {"sigmas": [10.0, 2.0, 0.5]}):
        assert PipelineTarget(pipe, settings("unet") | listed).fewer_steps(2) is None
        assert PipelineTarget(pipe, settings("unet") | dict.fromkeys(listed)).fewer_steps(2) is not None


def adapter(name: str, net: nn.Module) -> dict[str, Tensor]:
    """A small LoRA of every query projection, in the form of its file."""
    generator = torch.Generator().manual_seed(3)
    weights = {}
    for path, part in net.named_modules():
        if path.endswith("to_q") and isinstance(part, nn.Linear):
            for side, shape in (("lora_A", (2, part.in_features)), ("lora_B", (part.out_features, 2))):
                weights[f"{PARTS[name]}.{path}.{side}.weight"] = torch.randn(*shape, generator=generator)
    assert weights
    return weights


@pytest.mark.parametrize("name", PARTS)
def test_methods_of_the_pipeline_reach_the_compiled_denoiser(name: str):
    """Each method does to the weights and adapters of a compiled denoiser what it does to an uncompiled one."""
    plain, compiled = dcc.demo.load(name), dcc.demo.load(name)
    dcc.compile(compiled, PROMPTS[:1], policy="interval", backend="eager", **settings(name))
    steps = {
        "load": lambda pipe: pipe.load_lora_weights(adapter(name, getattr(pipe, PARTS[name])), adapter_name="a"),
        "scale": lambda pipe: pipe.set_adapters(["a"], [0.5]),
        "fuse": lambda pipe: pipe.fuse_lora(),
        "unfuse": lambda pipe: pipe.unfuse_lora(),
        "disable": lambda pipe: pipe.disable_lora(),
        "unload": lambda pipe: pipe.unload_lora_weights(),
    }
    states = []
    for step, change in steps.items():
        for pipe in (plain, compiled):
            change(pipe)
        theirs, ours = (getattr(pipe, PARTS[name]).state_dict() for pipe in (plain, compiled))
        assert list(ours) == list(theirs), step
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs), step
        assert compiled.get_list_adapters() == plain.get_list_adapters()
        states.append(theirs)
        states[-1] = {key: value.clone() for key, value in theirs.items()}
    fused, unfused = states[2], states[3]
    assert any(not torch.equal(fused[key], unfused[key]) for key in fused)  # else fusing would have shown nothing
    assert isinstance(dcc.compiled(compiled), dcc.CompiledDenoiser)


def test_another_denoiser_of_the_pipeline_is_said() -> None:
    """A budget is one of FLOPs of the denoiser that is compiled: what another one takes is not part of it."""
    pipe = dcc.demo.load("mmdit")
    second = Loop(dit())
    pipe.refiner = second.net

    def refine(pipe: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        if step == 0:
            second()
        return values

    call = dcc.demo.settings("mmdit") | {"num_inference_steps": 4, "callback_on_step_end": refine}
    dcc.compile(pipe, dcc.demo.prompts("calib")[:1], policy="interval", interval=2, backend="eager", **call)
    said = [line for line in dcc.summary(pipe).problems if "another denoiser" in line]
    assert said == [
        "refiner (4 calls) is another denoiser of this pipeline, which is not cached: FLOPs and budgets leave it out"
    ]
    assert not second.net._forward_pre_hooks
