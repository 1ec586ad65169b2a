"""Tiny denoisers compiled once per test run, a short sampling loop for them, and other plans for the same capture."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

import dcc
from dcc.plans.plan import Plan, make_plan
from dcc.plans.predictors import Predictor
from dcc.record.fingerprint import fingerprint
from dcc.variants.build import Family, build
from dcc.variants.observe import Observer

from .denoisers import CASES, Case
from .nets import apart

LEVELS = (900, 800, 700, 500, 400, 300, 100)  # uneven, so that no two forecasts see the same spacing of noise
STEPS = len(LEVELS)
COPY = Predictor("copy")

Denoise = Callable[[int, dict[str, Any]], Tensor]  # (step, arguments of the denoiser) -> its first output


@cache
def case(model: str) -> Case:
    """The case of this name."""
    return next(case for case in CASES if case.name == model)


@cache
def module(model: str) -> nn.Module:
    """The eager denoiser."""
    return case(model).build()


def prompt(model: str, seed: int, batch: int = 2) -> dict[str, Any]:
    """New prompt-side arguments; to be passed at every step of a generation, as a pipeline does."""
    inputs = case(model).inputs(batch=batch, seed=seed)
    return {name: value for name, value in inputs.items() if name not in ("hidden_states", "sample", "timestep")}


def noise(model: str, seed: int, batch: int = 2) -> Tensor:
    """The sample that a generation starts from."""
    return case(model).inputs(batch=batch, seed=seed)[_sample_name(model)].clone()


def arguments(model: str, prompt: dict[str, Any], sample: Tensor, step: int) -> dict[str, Any]:
    """All arguments of the denoiser's call at a step."""
    timestep = case(model).inputs(batch=len(sample), timestep=LEVELS[step])["timestep"]
    return prompt | {_sample_name(model): sample, "timestep": timestep}


def euler(sample: Tensor, output: Tensor) -> Tensor:
    """One step of the loop; a variance that the denoiser predicts beside the noise is ignored."""
    return sample - 0.2 * output.narrow(1, 0, sample.shape[1])


def generation(model: str, denoise: Denoise, seed: int, prompt: dict[str, Any]) -> Iterator[tuple[Tensor, Tensor]]:
    """One generation, a step at a time: yields the denoiser's output and the sample after it."""
    sample = noise(model, seed)
    for step in range(STEPS):
        with torch.no_grad():
            output = denoise(step, arguments(model, prompt, sample, step))
        sample = euler(sample, output)
        yield output, sample


def generate(model: str, denoise: Denoise, seed: int, prompt_seed: int | None = None) -> list[tuple[Tensor, Tensor]]:
    """A whole generation with a prompt of its own."""
    return list(generation(model, denoise, seed, prompt(model, seed if prompt_seed is None else prompt_seed)))


def denoise_with(net: nn.Module) -> Denoise:
    """Calls a denoiser as the loop does; the step is for it to find out."""
    return lambda step, kwargs: net(**kwargs)[0]


@cache
def levels(model: str) -> tuple[float, ...]:
    """The timestep values of a generation."""
    inputs = [case(model).inputs(timestep=level)["timestep"] for level in LEVELS]
    return tuple(float(timestep.flatten()[0]) for timestep in inputs)


def plan(
    model: str, sites: Sequence[str], schedule: Sequence[Sequence[int]], predictors: Sequence[Predictor] | None = None
) -> Plan:
    """A plan for generations of `model`; predictors are copies where not given."""
    return make_plan(
        model=fingerprint(module(model)),
        scheduler="sample",
        levels=levels(model),
        sites=sites,
        schedule=schedule,
        predictors=predictors or [COPY] * len(sites),
        policy="test",
        parameters={},
    )


@cache
def base(model: str) -> dcc.CompiledDenoiser:
    """The denoiser compiled once, through the public interface, for a plan that forecasts every other output."""
    first = plan(model, ["output"], [[1 - step % 2] for step in range(STEPS)])
    return apart(
        module(model),
        [0],
        sample=lambda net, seed: generate(model, denoise_with(net), seed),
        plan=first,
        backend="eager",
    )


@cache
def sites(model: str) -> Any:
    """The sites of the compiled denoiser."""
    return dcc.sites(base(model))


def compiled(model: str, plan: Plan, guard: Any = None) -> dcc.CompiledDenoiser:
    """A compiled denoiser for another plan, from the capture and the recording of `base`; its state is its own."""
    return dcc.CompiledDenoiser(base(model).subject, plan, guard=guard, families=[_family(model, plan)])


_families: dict[Any, Family] = {}


def _family(model: str, plan: Plan) -> Family:
    """The variants of a plan; they are pure functions, so denoisers may share them."""
    key = (model, plan.sites, plan.schedule, plan.anchors)
    if key not in _families:
        _families[key] = build(plan, sites(model), Observer())
    return _families[key]


def _sample_name(model: str) -> str:
    return "sample" if case(model).family == "unet" else "hidden_states"
