"""Sessions: whatever happens around a generation, it gives the images it gives alone, and leaves nothing behind."""

from __future__ import annotations

import gc
import re
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import dcc
from dcc.plans.plan import make_plan
from dcc.plans.predictors import Predictor
from dcc.serve.session import MAX_STREAMS

from . import tiny

pytestmark = pytest.mark.usefixtures("graphs")

MODEL = "pixart"
ALL_MODELS = ("flux", "pixart", "unet-sd")
MASK = (1, 1, 0, 1, 0, 0, 1)  # forecasts with one, two and two anchors; the last step computes
RANDOM = settings(derandomize=True, max_examples=15, deadline=None, database=None)

Outputs = list[tuple[Tensor, Tensor]]


def net_for(model: str = MODEL, site: str = "", mask: tuple[int, ...] = MASK, order: int = 1) -> dcc.CompiledDenoiser:
    """A compiled denoiser with no state yet; order 0 copies, others are Taylor's."""
    site = site or ("cut:0" if model == "unet-sd" else "stack")
    rule = Predictor("taylor", order) if order else tiny.COPY
    return tiny.compiled(model, tiny.plan(model, [site], [[full] for full in mask], [rule]))


@cache
def alone(seed: int, model: str = MODEL, prompt: int | None = None, **kwargs: Any) -> Outputs:
    """What a generation gives when its denoiser serves nothing else."""
    return tiny.generate(model, tiny.denoise_with(net_for(model, **kwargs)), seed, prompt)


def assert_same(actual: Outputs, expected: Outputs) -> None:
    """Bit for bit: the same graphs on the same values."""
    assert len(actual) == len(expected)
    for step, ((output, sample), (other_output, other_sample)) in enumerate(zip(actual, expected, strict=True)):
        assert torch.equal(output, other_output), f"output of step {step}"
        assert torch.equal(sample, other_sample), f"sample after step {step}"


def interleave(generations: list[Iterator[Any]], order: list[int]) -> list[list[Any]]:
    """Advances generations one step at a time, in the given order."""
    found: list[list[Any]] = [[] for _ in generations]
    for index in order:
        found[index].append(next(generations[index]))
    return found


orders = st.permutations([0] * tiny.STEPS + [1] * tiny.STEPS)


@RANDOM
@given(stops=st.lists(st.tuples(st.integers(1, tiny.STEPS - 1), st.booleans()), min_size=1, max_size=3))
def test_abandoned_generations_leave_the_next_one_as_it_is(stops: list[tuple[int, bool]]) -> None:
    """Interrupted after any number of steps, with the very prompt tensors of the next generation or with others."""
    net, prompt = net_for(), tiny.prompt(MODEL, 1)
    for index, (stop, shared) in enumerate(stops):
        own = prompt if shared else tiny.prompt(MODEL, 5 + index)
        unfinished = tiny.generation(MODEL, tiny.denoise_with(net), 7 + index, own)
        for _ in range(stop):
            next(unfinished)
    assert_same(list(tiny.generation(MODEL, tiny.denoise_with(net), 1, prompt)), alone(1))
    assert net.sessions.counts.missed == 0


@pytest.mark.parametrize("model", ALL_MODELS)
@RANDOM
@given(order=orders)
def test_two_interleaved_generations_equal_one_after_the_other(model: str, order: list[int]) -> None:
    net = net_for(model)
    both = [tiny.generation(model, tiny.denoise_with(net), seed, tiny.prompt(model, seed)) for seed in (1, 2)]
    first, second = interleave(both, order)
    assert_same(first, alone(1, model))
    assert_same(second, alone(2, model))
    assert net.sessions.counts.sessions == 2
    assert not net.sessions.streams


@pytest.mark.parametrize("shared", [False, True], ids=["prompts of their own", "the same prompt tensors"])
def test_generations_in_threads_equal_one_after_the_other(shared: bool) -> None:
    """Threads start every step together; the prompt tensors of all may be the same objects."""
    net, seeds = net_for(), (1, 2, 3)
    barrier = threading.Barrier(len(seeds), timeout=60)
    common = tiny.prompt(MODEL, 9)

    def work(seed: int) -> Outputs:
        def denoise(step: int, kwargs: dict[str, Any]) -> Tensor:
            barrier.wait()
            return net(**kwargs)[0]

        return list(tiny.generation(MODEL, denoise, seed, common if shared else tiny.prompt(MODEL, seed)))

    with ThreadPoolExecutor(len(seeds)) as pool:
        results = list(pool.map(work, seeds))
    for seed, result in zip(seeds, results, strict=True):
        assert_same(result, alone(seed, prompt=9 if shared else seed))
    counts = net.sessions.counts
    assert (counts.computed, counts.forecast, counts.missed) == (3 * sum(MASK), 3 * (tiny.STEPS - sum(MASK)), 0)
    assert not net.sessions.streams


@RANDOM
@given(order=orders)
def test_explicit_sessions_may_share_the_very_same_prompt_tensors(order: list[int]) -> None:
    net, prompt = net_for(), tiny.prompt(MODEL, 9)

    def one(seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        def denoise(step: int, kwargs: dict[str, Any]) -> Tensor:
            with net.session(f"request {seed}"):
                return net(**kwargs)[0]

        return tiny.generation(MODEL, denoise, seed, prompt)

    first, second = interleave([one(1), one(2)], order)
    assert_same(first, alone(1, prompt=9))
    assert_same(second, alone(2, prompt=9))
    assert not net.sessions.streams


def test_an_unnamed_session_is_new_each_time() -> None:
    """A generation begun outside goes on undisturbed after a whole one inside with the same prompt tensors."""
    net, prompt = net_for(), tiny.prompt(MODEL, 9)
    outer = tiny.generation(MODEL, tiny.denoise_with(net), 1, prompt)
    begun = [next(outer) for _ in range(3)]
    for seed in (2, 3):
        with net.session():
            assert_same(list(tiny.generation(MODEL, tiny.denoise_with(net), seed, prompt)), alone(seed, prompt=9))
    assert_same([*begun, *outer], alone(1, prompt=9))


Call = Callable[[str, int, dict[str, Any]], Tensor]  # (stream, step, arguments) -> output


def guided(call: Call, prompts: dict[str, dict[str, Any]]) -> list[Tensor]:
    """Classifier-free guidance in two denoiser calls per step; returns the sample after each step."""
    sample, found = tiny.noise(MODEL, 1), []
    for step in range(tiny.STEPS):
        arguments = {name: tiny.arguments(MODEL, prompt, sample, step) for name, prompt in prompts.items()}
        with torch.no_grad():
            cond, uncond = (call(name, step, arguments[name]) for name in ("cond", "uncond"))
        sample = tiny.euler(sample, uncond + 2 * (cond - uncond))
        found.append(sample)
    return found


def apart(prompts: dict[str, dict[str, Any]]) -> list[Tensor]:
    """The guided samples where each stream has a denoiser of its own, which sees nothing of the other."""
    nets = {name: net_for() for name in prompts}
    return guided(lambda name, step, kwargs: nets[name](**kwargs)[0], prompts)


@pytest.mark.parametrize("how", ["context", "context, one prompt", "position", "identity", "views"])
def test_cond_and_uncond_as_separate_calls(how: str) -> None:
    """Told apart by `cache_context`, whatever their prompts are, or without it by the memory of their prompts."""
    net = net_for()
    prompts = {"cond": tiny.prompt(MODEL, 1), "uncond": tiny.prompt(MODEL, 2)}
    if how == "context, one prompt":
        prompts["uncond"] = prompts["cond"]

    def context(name: str, step: int) -> AbstractContextManager[None]:
        if how.startswith("context"):
            return net.cache_context(name)
        if how == "position":
            return net.cache_context(name, step_index=step, num_inference_steps=tiny.STEPS)
        return nullcontext()

    def call(name: str, step: int, kwargs: dict[str, Any]) -> Tensor:
        if how == "views":  # halves of one batch, cut out anew at each step: other objects, the same memory
            kwargs = {key: value[:] if isinstance(value, Tensor) else value for key, value in kwargs.items()}
        with context(name, step):
            return net(**kwargs)[0]

    samples = guided(call, prompts)
    assert all(torch.equal(a, b) for a, b in zip(samples, apart(prompts), strict=True))
    counts = net.sessions.counts
    assert (counts.sessions, counts.computed, counts.missed) == (2, 2 * sum(MASK), 0)
    assert not net.sessions.streams


@pytest.mark.parametrize("last", [0, 1], ids=["last step forecast", "last step computed"])
def test_a_finished_generation_holds_nothing(last: int) -> None:
    """Neither anchors nor the prompt: only a generation that is under way holds them, at most J anchors per site."""
    net, prompt = net_for(mask=(*MASK[:-1], last)), tiny.prompt(MODEL, 1)
    held = weakref.ref(prompt["encoder_hidden_states"])
    unfinished = tiny.generation(MODEL, tiny.denoise_with(net), 1, prompt)
    for _ in range(5):
        next(unfinished)
    (stream,) = net.sessions.streams.values()
    assert stream.steps("stack") == [3, 1]
    assert stream.bytes() == net.summary().cache_bytes == 2 * tiny.sites(MODEL)["stack"].bytes
    list(unfinished)
    assert not net.sessions.streams
    del stream, unfinished, prompt
    gc.collect()
    assert held() is None


@pytest.mark.parametrize(
    ("site", "order"), [("output", 0), ("output", 1), ("stack", 1), ("transformer_blocks.2", 0), ("branches", 0)]
)
def test_the_caller_may_write_into_what_it_passed_and_got(site: str, order: int) -> None:
    """The output and the sample are overwritten after each step; no anchor may be the same memory."""
    net, prompt, sample = net_for(site=site, order=order), tiny.prompt(MODEL, 1), tiny.noise(MODEL, 1)
    found = []
    for step in range(tiny.STEPS):
        with torch.no_grad():
            output = net(**tiny.arguments(MODEL, prompt, sample, step))[0]
        found.append((output.clone(), tiny.euler(sample, output)))
        output.fill_(float("nan"))
        sample.fill_(float("nan"))
        sample = found[-1][1].clone()
    assert_same(found, alone(1, site=site, order=order))


def assert_original(net: dcc.CompiledDenoiser, kwargs: dict[str, Any], said: str) -> None:
    """The module's own answer is returned, and the summary says why."""
    with torch.no_grad():
        assert torch.equal(net(**kwargs)[0], tiny.module(MODEL)(**kwargs)[0])
    assert [line for line in net.summary().problems if re.search(f"the original ran: .*{said}", line)]


def test_at_an_unknown_timestep_the_original_runs_and_nothing_is_disturbed() -> None:
    net, prompt = net_for(), tiny.prompt(MODEL, 1)
    running = tiny.generation(MODEL, tiny.denoise_with(net), 1, prompt)
    begun = [next(running) for _ in range(3)]
    wrong = tiny.arguments(MODEL, prompt, tiny.noise(MODEL, 1), 0) | {"timestep": torch.tensor([5000, 5000])}
    assert_original(net, wrong, r"timestep is outside the plan's levels \(900 to 100\)")
    assert_same([*begun, *running], alone(1))
    assert net.sessions.counts.computed == sum(MASK)


def test_several_noise_levels_in_one_batch_run_the_original() -> None:
    kwargs = tiny.arguments(MODEL, tiny.prompt(MODEL, 1), tiny.noise(MODEL, 1), 0)
    kwargs["timestep"] = torch.tensor([900, 800])
    assert_original(net_for(), kwargs, "'timestep' holds several noise levels in one batch")


@pytest.mark.parametrize(("index", "steps"), [(7, 7), (-1, None)])
def test_at_a_position_outside_of_the_plan_the_original_runs(index: int, steps: int | None) -> None:
    net = net_for()
    kwargs = tiny.arguments(MODEL, tiny.prompt(MODEL, 1), tiny.noise(MODEL, 1), 0)
    with net.cache_context("cond", step_index=index, num_inference_steps=steps):
        assert_original(net, kwargs, rf"step {index} of {steps} does not fit a plan of 7 steps")


@pytest.mark.parametrize("mask", [(1,) * 5, (1, 0, 1, 0, 1), (1, 0, 1, 1, 0)])
def test_a_run_may_be_longer_than_the_plan_at_both_ends(mask: tuple[int, ...]) -> None:
    """What is served is said to be computed or forecast as it was; all-compute plans compute everything."""
    levels, steps = tiny.levels(MODEL)[1:-1], [[full] for full in mask]
    plan = make_plan(
        model=tiny.plan(MODEL, ["output"], [[1]] * tiny.STEPS).model, scheduler="sample", levels=levels,
        sites=["output"], schedule=steps, predictors=[tiny.COPY], policy="test", parameters={},
    )  # fmt: skip
    net, prompt, sample = tiny.compiled(MODEL, plan), tiny.prompt(MODEL, 1), tiny.noise(MODEL, 1)
    found, right = [], []
    for step in range(tiny.STEPS):
        kwargs = tiny.arguments(MODEL, prompt, sample, step)
        with torch.no_grad():
            found.append(net(**kwargs)[0])
            right.append(tiny.module(MODEL)(**kwargs)[0])
        sample = tiny.euler(sample, right[-1])
    computed = [torch.equal(a, b) for a, b in zip(found, right, strict=True)]
    assert computed[0] and (all(computed) or not all(mask))
    counts = net.sessions.counts
    assert counts.computed + counts.originals == sum(computed)
    assert counts.computed + counts.forecast + counts.originals == tiny.STEPS


def test_the_position_of_the_context_goes_before_the_timestep() -> None:
    """A denoiser may be fed a noise level that the plan does not list, as long as the loop says which step it is."""
    net, prompt, sample = net_for(order=0), tiny.prompt(MODEL, 1), tiny.noise(MODEL, 1)
    off = torch.tensor([650, 650])
    outputs = []
    for step in (0, 1, 2):
        with net.cache_context("cond", step_index=step, num_inference_steps=tiny.STEPS), torch.no_grad():
            outputs.append(net(**(tiny.arguments(MODEL, prompt, sample, step) | {"timestep": off}))[0])
    assert torch.equal(outputs[0], outputs[1])
    assert torch.allclose(outputs[1], outputs[2], atol=1e-5)  # a copied residual of the same input
    assert (net.summary().computed, net.summary().forecast) == (2, 1)


def test_the_summary_reports_hits() -> None:
    net = net_for()
    for seed in (1, 2):
        tiny.generate(MODEL, tiny.denoise_with(net), seed)
    summary = net.summary()
    assert (summary.computed, summary.forecast, summary.missed, summary.sessions) == (8, 6, 0, 2)
    assert "14: 8 computed, 6 forecast, 0 missed, in 2 sessions" in str(summary)
    assert not summary.problems


def test_a_generation_that_starts_late_computes_and_says_so() -> None:
    """From the second step on (image to image): forecasts whose anchors are missing are computed, and counted."""
    net = net_for(mask=(1, 0, 0, 1, 0, 1, 0), order=0)
    prompt, sample = tiny.prompt(MODEL, 1), tiny.noise(MODEL, 1)
    for step in range(1, tiny.STEPS):
        kwargs = tiny.arguments(MODEL, prompt, sample, step)
        with torch.no_grad():
            output = net(**kwargs)[0]
            if step < 4:
                assert torch.equal(output, tiny.module(MODEL)(**kwargs)[0]), f"step {step}"
        sample = tiny.euler(sample, output)
    summary = net.summary()
    assert (summary.computed, summary.forecast, summary.missed) == (2, 2, 2)
    assert "2 planned forecasts were computed, because their anchors were not there" in summary.problems


def test_too_many_unfinished_generations_are_forgotten_the_oldest_first() -> None:
    """A forgotten generation that goes on computes what it can no longer forecast."""
    net = net_for(mask=(1, 0, 0, 0, 0, 0, 0), order=0)
    prompts = [tiny.prompt(MODEL, seed) for seed in range(MAX_STREAMS + 2)]
    unfinished = [tiny.generation(MODEL, tiny.denoise_with(net), seed, p) for seed, p in enumerate(prompts)]
    for one in unfinished:
        next(one)
    assert len(net.sessions.streams) == MAX_STREAMS
    assert "2 unfinished generations were forgotten" in net.summary().problems
    next(unfinished[-1])
    assert (net.summary().forecast, net.summary().missed) == (1, 0)
    next(unfinished[0])
    assert (net.summary().forecast, net.summary().missed) == (1, 1)
