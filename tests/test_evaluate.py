"""Evaluations of a bare module and a demo pipeline: what is measured, what is a row with its error, what is refused."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dcc
from dcc.errors import LoweringError, PipelineError, PolicyError, PromptError
from dcc.lower.program import lower
from dcc.record.seam import handler_of
from dcc.report.evaluate import named
from dcc.serve.denoiser import CompiledDenoiser

from .conftest import Stack
from .nets import apart

pytestmark = pytest.mark.usefixtures("graphs")

STEPS = 6


def loop(net: nn.Module, prompt: float, shape: tuple[int, ...] = (1, 40, 8)) -> Tensor:
    """A short sampling loop whose sample [1, 40, 8] depends on the prompt and on the global generator."""
    x, scale = torch.randn(shape), torch.full((1,), 0.1)
    for step in range(STEPS):
        x = x - 0.1 * net(x, torch.full((1,), 1.0 - step / STEPS)) + scale * prompt
    return x


def as_image(net: nn.Module, prompt: float) -> Tensor:
    """The loop with an image [3, 16, 40] in [0, 1] for its sample."""
    return loop(net, prompt, (1, 240, 8)).sigmoid().reshape(3, 16, 40)


@pytest.fixture
def module() -> nn.Module:
    return Stack().eval().requires_grad_(False)


@pytest.fixture
def pipe() -> Any:
    return dcc.demo.load("mmdit")


def call(steps: int = 4) -> dict[str, Any]:
    return dcc.demo.settings("mmdit") | {"num_inference_steps": steps}


WANTED = {
    "copy": ("interval", {"interval": 2}),
    "taylor": ("taylorseer", {"interval": 3, "first": 2}),
    "all": ("interval", {"interval": 1}),
}


def test_a_bare_module_with_samples_of_any_shape(module: nn.Module):
    lines: list[str] = []
    report = dcc.evaluate(
        module, WANTED, [1.0, 2.0, 3.0], sample=loop, backend="eager", progress=lines.append, data_range=2.0
    )
    assert [row.name for row in report.rows] == ["copy", "taylor", "all"]
    assert report.prompts == ["1.0", "2.0", "3.0"]
    for row in report.rows:
        assert row.error is None and len(row.seconds) == len(row.psnr) == len(row.psnr_raw) == 3
        assert row.ssim == [] and row.pictures == {}
    assert all(20 < value < 120 for value in report["copy"].psnr)
    assert all(math.isinf(value) for value in report["all"].psnr)
    assert report["copy"].notes == [] and "computes every step" in report["all"].notes[0]
    assert report.reference.notes == [] and report.reference.psnr == []
    assert lines[0] == "uncached: recording one run"
    assert lines[-1] == "prompts: 3 of 3, all"


def test_calls_and_memory_are_counted(module: nn.Module):
    report = dcc.evaluate(module, WANTED, [1.0, 2.0], sample=loop, backend="eager")
    copy, runs = report["copy"], 3  # a warm-up and two prompts
    assert (copy.computed, copy.forecast, copy.missed) == (3 * runs, 3 * runs, 0)
    assert copy.cache_bytes == 40 * 8 * 4 == copy.plan.cache_bytes
    assert report.reference.cache_bytes == 0 and report.reference.computed == STEPS * runs
    assert sum(copy.plan.steps_mask) == 3 and copy.plan.speedup == 1.5


def test_psnr_is_that_of_the_final_samples(module: nn.Module):
    report = dcc.evaluate(module, WANTED, [1.0, 2.0], sample=loop, backend="eager", seed=7)
    net = apart(module, [1.0], policy="interval", interval=2, sample=loop, backend="eager")
    for i, prompt in enumerate([1.0, 2.0]):
        samples = []
        for denoiser in (module, net):
            torch.manual_seed(7 + i)
            with torch.no_grad():
                samples.append(loop(denoiser, prompt))
        error = (samples[0] - samples[1]).square().mean().item()
        width = (samples[0].max() - samples[0].min()).item()
        assert report["copy"].psnr[i] == pytest.approx(10 * math.log10(width**2 / error), rel=1e-4)


def test_samples_that_are_images_have_ssim_and_pictures(module: nn.Module):
    report = dcc.evaluate(module, WANTED, [1.0, 2.0, 3.0], sample=as_image, backend="eager", shown=1)
    row = report["copy"]
    assert len(row.ssim) == 3 and all(0 < value <= 1 for value in row.ssim)
    assert set(row.pictures) == {0, row.worst}
    reference, own = row.pictures[0]
    assert reference.shape == own.shape == (3, 16, 40) and reference.dtype == torch.float16
    assert not torch.equal(reference, own)


def test_a_pipeline_is_measured_before_and_after_the_clamp_and_left_as_it_was(pipe: Any):
    original, prompts = pipe.transformer, dcc.demo.prompts("test")[:3]
    brightness = pipe.vae.decoder.conv_out.bias.data
    brightness += 0.2  # so that some pixels are beyond the clamp
    try:
        report = dcc.evaluate(pipe, [("interval", {"interval": 2}), "taylorseer"], prompts, backend="eager", **call())
    finally:
        brightness -= 0.2
    assert pipe.transformer is original
    assert [row.name for row in report.rows] == ["interval interval=2", "taylorseer"]
    row = report.rows[0]
    assert row.error is None and len(row.psnr) == len(row.ssim) == len(row.psnr_raw) == len(row.ssim_raw) == 3
    assert row.psnr != row.psnr_raw and row.psnr == pytest.approx(row.psnr_raw, abs=1)
    assert report.reference.plan.steps == 4 and "4 steps" in report.facts["scheduler"]


def test_batches_measure_quality_and_single_prompts_time(pipe: Any):
    prompts = dcc.demo.prompts("test")[:3]
    kinds = {"copy": ("interval", {"interval": 2})}
    single = dcc.evaluate(pipe, kinds, prompts, backend="eager", **call(3))["copy"]
    batched = dcc.evaluate(pipe, kinds, prompts, backend="eager", batch_size=2, **call(3))["copy"]
    assert batched.psnr == pytest.approx(single.psnr, abs=0.1)
    assert len(batched.seconds) == 2 and len(single.seconds) == 3


def test_a_compiled_model_is_evaluated_and_stays_compiled(pipe: Any, module: nn.Module):
    prompts = dcc.demo.prompts("test")[:1]
    dcc.compile(pipe, prompts, policy="interval", interval=2, backend="eager", **call())
    compiled = dcc.compiled(pipe)
    row = dcc.evaluate(pipe, {"mine": compiled.plan}, prompts, backend="eager", **call())["mine"]
    assert dcc.compiled(pipe) is compiled and row.error is None and row.plan.schedule == compiled.plan.schedule
    net = dcc.compile(module, [1.0], policy="interval", sample=loop, backend="eager")
    assert net is module and isinstance(dcc.compiled(net), CompiledDenoiser)
    assert dcc.evaluate(net, [net.plan], [1.0], sample=loop, backend="eager").rows[0].error is None


def test_plans_of_the_same_variants_are_lowered_once(module: nn.Module, monkeypatch: pytest.MonkeyPatch):
    lowered: list[str] = []

    def counting(variant: Any, *args: Any) -> Any:
        lowered.append(variant.name)
        return lower(variant, *args)

    monkeypatch.setattr("dcc.lower.program.lower", counting)
    alone, together = {"a": ("interval", {"interval": 2})}, {"b": ("interval", {"interval": 3})}
    kwargs = {"sample": loop, "backend": "eager"}
    expected = dcc.evaluate(module, together, [1.0], **kwargs)["b"].psnr
    lowered.clear()
    report = dcc.evaluate(module, alone | together, [1.0], **kwargs)
    assert lowered == ["row0", "row0", "row1"]  # the reference's, then those of both plans
    assert report["b"].psnr == expected and report["a"].psnr != expected
    assert [row.forecast for row in report.rows] == [3 * 2, 4 * 2]


def test_what_fails_is_a_row_with_its_error_and_the_others_go_on(module: nn.Module):
    other = dcc.evaluate(
        Stack().eval(), ["interval"], [1.0], sample=lambda net, p: loop(net, p)[:, :5], backend="eager"
    )
    foreign = replace(other.rows[0].plan, model="feedfeedfeedfeed")
    calls = {"n": 0}

    def failing(net: nn.Module, prompt: float) -> Tensor:
        handler = handler_of(net)
        plan = handler.plan if isinstance(handler, CompiledDenoiser) else None
        if plan is not None and plan.policy == "taylorseer" and prompt == 2.0:
            calls["n"] += 1
            raise RuntimeError("out of memory")
        sample = loop(net, prompt)
        first_copy = plan is not None and plan.parameters.get("interval") == 4
        return sample * math.nan if first_copy else sample

    wanted = {
        "nowhere": ("interval", {"site": "nowhere"}),
        "zero": ("interval", {"interval": 0}),
        "foreign": foreign,
        "fails": "taylorseer",
        "nan": ("interval", {"interval": 4}),
        "good": ("interval", {"interval": 2}),
    }
    report = dcc.evaluate(module, wanted, [1.0, 2.0, 3.0], sample=failing, backend="eager")
    errors = {row.name: row.error for row in report.rows}
    assert errors["good"] is None and len(report["good"].psnr) == 3
    assert "planning: SiteError: no site 'nowhere'" in errors["nowhere"]
    assert "interval=0" in errors["zero"] and report["zero"].plan is None
    assert "another denoiser" in errors["foreign"]
    assert errors["fails"] == "prompt 2: RuntimeError: out of memory" and calls["n"] == 1
    assert len(report["fails"].psnr) == 1
    assert "prompt 1: ValueError" in errors["nan"] and "not finite" in errors["nan"]


def test_a_reference_that_fails_is_an_error(module: nn.Module):
    with pytest.raises(PipelineError, match="not finite"):
        dcc.evaluate(module, ["interval"], [1.0], sample=lambda net, p: loop(net, p) / 0, backend="eager")
    with pytest.raises(PipelineError, match="returned None"):
        dcc.evaluate(module, ["interval"], [1.0], sample=lambda net, p: print(loop(net, p).sum()), backend="eager")


def test_a_pipeline_that_fails_gets_its_denoiser_back(pipe: Any, monkeypatch: pytest.MonkeyPatch):
    original = pipe.transformer

    def fail(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("dcc.record.target.PipelineTarget.generate", fail)
    with pytest.raises(KeyboardInterrupt):
        dcc.evaluate(pipe, ["interval"], ["a red circle"], backend="eager", **call(2))
    assert pipe.transformer is original


def test_names_are_made_up_readably():
    entries = [
        "interval",
        ("taylorseer", {"interval": 4, "order": 2}),
        "interval",
        ("interval", {"steps_mask": [1, 0]}),
    ]
    assert list(named(entries)) == [
        "interval",
        "taylorseer interval=4 order=2",
        "interval #2",
        "interval steps_mask=10",
    ]
    (long,) = named([("interval", {"steps_mask": [1, 0] * 50})])
    assert len(long) == 48 and long.endswith("…")


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ([], "is empty"),
        ("interval", "must be a list, or a dict"),
        ([3], "entry 0 of plans_or_policies must be a dcc.Plan"),
        ({"mine": ("interval", 3)}, "entry mine"),
        (["magic"], "'magic'; there are: interval"),
        ({"mine": ("interval", {"order": 1})}, "entry mine: policy 'interval' takes no parameter 'order'"),
        ({"uncached": "interval"}, "'uncached' is taken"),
    ],
)
def test_malformed_entries_are_refused_before_any_work(wanted: Any, message: str):
    with pytest.raises(PolicyError, match=message):
        dcc.evaluate(None, wanted, ["a"])


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"prompts": []}, PromptError, "at least one prompt"),
        ({"backend": "gcc"}, LoweringError, "'gcc'"),
        ({"batch_size": 0}, PipelineError, "batch_size=0"),
        ({"data_range": 0}, PipelineError, "data_range=0"),
        ({"interval": 3}, PipelineError, "unknown keyword 'interval'.*go beside its name"),
    ],
)
def test_bad_arguments_are_refused(module: nn.Module, arguments: dict[str, Any], error: type[Exception], message: str):
    given = {"prompts": [1.0], "sample": loop, "backend": "eager"} | arguments
    with pytest.raises(error, match=message):
        dcc.evaluate(module, ["interval"], **given)
