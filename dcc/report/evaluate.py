"""Runs the same prompts and seeds uncached and through several plans, and reports time and fidelity of each."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from dcc import arguments
from dcc.compiler import check_plan, compile, compiled, cost
from dcc.discover.subject import Subject
from dcc.errors import PipelineError, PolicyError
from dcc.lower.program import Backend, check_backend
from dcc.measure.finite import all_finite, not_finite
from dcc.plans.plan import Plan
from dcc.policies import Setting, make_policy, parameter_names
from dcc.policies.setting import plan_for, setting_of
from dcc.quality import are_images, frames, psnr, spread, ssim
from dcc.record.seam import installed
from dcc.record.target import (
    Samples,
    Target,
    call_parameters,
    check_model,
    check_prompts,
    denoiser_of,
    is_pipeline,
    make_target,
    restore_target,
)
from dcc.report.report import Report, Row
from dcc.serve.denoiser import CompiledDenoiser
from dcc.text import count

LONGEST_NAME = 48  # characters of a made-up name
UNCACHED = "uncached"
SHARED = ("sites", "anchors", "rows", "forms", "trigger")  # plans equal in these share their variants

Wanted = Plan | tuple[str, dict[str, Any]]


def evaluate(
    model: Any,
    plans_or_policies: Any,
    prompts: Sequence[Any],
    *,
    calib_prompts: Sequence[Any] | None = None,
    sample: Callable[[nn.Module, Any], Any] | None = None,
    seed: int = 0,
    batch_size: int | None = None,
    backend: Backend = "inductor",
    data_range: float | None = None,
    shown: int = 4,
    progress: Callable[[str], None] | None = None,
    **pipeline_kwargs: Any,
) -> Report:
    """Compares plans and policies with the uncached model, on the same prompts and seeds.

    The reference is the plan that computes every step, through the same backend. Each prompt goes through the reference
    and every plan in turn, after one warm-up run of each, so that whatever else the machine does slows all alike. A
    plan that does not fit or fails is a row of the report with its error; the others go on.

    Args:
        model: a DiffusionPipeline or an nn.Module, compiled by dcc or not; it is left as it was.
        plans_or_policies: a dict of names to, or a list of: a Plan, the name of a policy, or
            (name of a policy, its parameters), e.g. {"fast": ("taylorseer", {"interval": 6}), "mine": plan}.
        prompts: what to sample; the noise of prompt i comes from seed + i alone.
        calib_prompts: the prompts that calibrated policies measure on. Without any they measure on `prompts`, on which
            they are also scored, and their rows say so.
        sample: for a bare module: sample(net, prompt) runs one sampling loop with `net` and returns the final sample
            (tensor, array or image of any shape).
        batch_size: prompts per run that measures quality, 1 if not given. Time is always measured with single prompts:
            all of them, or the first of each batch.
        backend: "inductor" or "eager".
        data_range: the range of PSNR and SSIM. Default: 1 for the images of a pipeline, otherwise the distance from
            the lowest to the highest value of each prompt's reference sample.
        shown: how many prompts' pictures the report keeps and shows, besides the worst of each plan.
        progress: called with one line, "what: detail", before each piece of work.
        pipeline_kwargs: arguments of the pipeline's call (num_inference_steps, height, ...).

    Raises a subclass of DccError for malformed arguments before any work, and where the model cannot be run uncached.
    """
    wanted = named(plans_or_policies)
    say, seed = arguments.progress_of(progress), arguments.seed_of(seed)
    if calib_prompts is not None:
        check_prompts(calib_prompts, is_pipeline(model), "calib_prompts")
    prompts = _check(model, prompts, sample, batch_size, backend, data_range, shown, pipeline_kwargs)
    with _uncompiled(model) as original, torch.no_grad():
        base = _uncached(original, prompts, sample, backend, say, pipeline_kwargs)
        target = make_target(original, sample, pipeline_kwargs)
        reference = Arm(Row(UNCACHED, base.plan), base)
        subject = replace(base.subject, target=target)
        calibration = prompts if calib_prompts is None else list(calib_prompts)
        setting = setting_of(subject, calibration, seed=seed, progress=say)
        arms: list[Arm] = []
        for name, value in wanted.items():
            asked = len(setting.asked)
            arms.append(_prepare(name, value, base, [arm.net for arm in arms if arm.net], setting, subject, say))
            if calib_prompts is None and len(setting.asked) > asked:
                arms[-1].row.notes.append("calibrated on the prompts that it is scored on; give calib_prompts=")
        scoring = _Scoring(data_range, is_pipeline(model), shown)
        _take_turns(target, reference, arms, prompts, seed, batch_size or 1, scoring, say)
    for arm in (reference, *arms):
        arm.count()
    facts = _facts(base, prompts, seed, batch_size or 1)
    return Report(reference.row, [arm.row for arm in arms], [str(prompt) for prompt in prompts], facts, shown)


def named(plans_or_policies: Any) -> dict[str, Wanted]:
    """Plans and (policy, parameters) by name. Raises PolicyError, naming the entry, for anything else."""
    how = "a dcc.Plan, the name of a policy, or (name, {parameter: value})"
    if isinstance(plans_or_policies, Mapping):
        entries = [(str(name), value) for name, value in plans_or_policies.items()]
    elif isinstance(plans_or_policies, Sequence) and not isinstance(plans_or_policies, str):
        entries = [("", value) for value in plans_or_policies]
    else:
        got = type(plans_or_policies).__name__
        raise PolicyError(f"plans_or_policies must be a list, or a dict of names to entries, each {how}; got {got}")
    if not entries:
        raise PolicyError(f"plans_or_policies is empty; give at least one entry: {how}")
    found: dict[str, Wanted] = {}
    for index, (name, value) in enumerate(entries):
        value = (value, {}) if isinstance(value, str) else value
        if isinstance(value, Plan):
            policy, parameters = value.policy, value.parameters
        elif isinstance(value, Sequence) and [type(v) for v in value] == [str, dict]:
            policy, parameters = value
            known = parameter_names(policy)
            unknown = [key for key in parameters if key not in known]
            if unknown:
                raise PolicyError(
                    f"entry {name or index}: policy {policy!r} takes no parameter {arguments.listed(unknown, known)}; "
                    f"it takes: {', '.join(known)}"
                )
            value = (policy, dict(parameters))
        else:
            raise PolicyError(f"entry {name or index} of plans_or_policies must be {how}; got {value!r:.80}")
        name = name or _made_up(policy, parameters)
        repeats = sum(other == name or other.startswith(f"{name} #") for other in found)
        found[f"{name} #{repeats + 1}" if repeats else name] = value
    if UNCACHED in found:
        raise PolicyError(f"the name {UNCACHED!r} is taken by the reference; choose another")
    return found


@dataclass
class Arm:
    """One of the things compared: its row of the report, and the denoiser for its plan, None where that failed."""

    row: Row
    net: CompiledDenoiser | None = None

    @contextmanager
    def attempt(self, what: str) -> Iterator[None]:
        """Turns a failure inside the context into the row's error: it must not cost the results of other plans."""
        try:
            yield
        except Exception as error:  # whatever a plan, a loop or a backend raises
            message = str(error).strip() or "no message"
            self.row.error = f"{what}: {type(error).__name__}: {message}"

    def run(self, target: Target, prompts: Sequence[Any], seeds: Sequence[int]) -> tuple[Samples, float]:
        """The samples of one batch and its seconds; it runs again where a new shape had to be lowered on the way."""
        net = self.net
        assert net is not None  # an arm that has not failed

        def once() -> tuple[Samples, float]:
            start = time.perf_counter()
            samples = target.generate(prompts, seeds)  # ends with a copy to the CPU, which waits for the device
            return samples, time.perf_counter() - start

        target.install(net)
        lowered = len(net.programs)
        first = once()
        return first if len(net.programs) == lowered else once()

    def turn(self, target: Target, prompts: Sequence[Any], seeds: Sequence[int]) -> Samples:
        """The samples of a batch; only a run of its first prompt alone is timed."""
        samples, seconds = self.run(target, prompts[:1], seeds[:1])
        self.row.seconds.append(seconds)
        return samples if len(prompts) == 1 else self.run(target, prompts, seeds)[0]

    def count(self) -> None:
        """Copies to the row what the denoiser counted in all runs, and what did not go as asked."""
        if self.net is None:
            return
        summary, row = self.net.summary(), self.row
        row.computed, row.forecast, row.missed = summary.computed, summary.forecast, summary.missed
        row.cache_bytes = summary.cache_bytes
        row.realised = summary.speedup if row.plan is not None and row.plan.trigger else None
        saves_nothing = "this plan computes every step"
        row.notes += [p for p in summary.problems if row.name != UNCACHED or not p.startswith(saves_nothing)]


@dataclass(frozen=True)
class _Scoring:
    """How samples are scored: in which range (the caller's, that of pixels, or that of the reference sample), and how
    many are shown."""

    given: float | None
    of_pipeline: bool
    shown: int

    def range_of(self, reference: Tensor) -> float:
        if self.given is not None:
            return self.given
        return 1.0 if self.of_pipeline and are_images(reference) else spread(reference)


def _uncached(
    model: Any, prompts: list[Any], sample: Any, backend: Backend, say: Callable[[str], None], call: dict[str, Any]
) -> CompiledDenoiser:
    """The denoiser compiled for the plan that computes every step; `model` itself is left as it was."""
    compile(
        model,
        prompts,
        policy="interval",
        interval=1,
        sample=sample,
        backend=backend,
        progress=lambda line: say(f"{UNCACHED}: {line}"),
        **call,
    )
    net = compiled(model)
    restore_target(model)
    return net


def _prepare(
    name: str,
    wanted: Wanted,
    base: CompiledDenoiser,
    others: Sequence[CompiledDenoiser],
    setting: Setting,
    subject: Subject,
    say: Callable[[str], None],
) -> Arm:
    """Plans, rewrites and lowers one entry, with the captured graph and the recording of the reference.

    Variants are pure functions of (sites, anchors, row): programs that one of the `others` has already are used again.
    """
    arm = Arm(Row(name, wanted if isinstance(wanted, Plan) else None))
    with arm.attempt("planning"):
        say(f"{name}: planning")
        plan = wanted if isinstance(wanted, Plan) else _planned(*wanted, setting, subject)
        check_plan(plan, subject)
        arm.row.plan = plan = cost(plan, subject.sites)
        alike = [other for other in others if all(getattr(plan, p) == getattr(other.plan, p) for p in SHARED)]
        families, programs = (alike[-1].families, alike[-1].programs) if alike else (None, None)
        net = CompiledDenoiser(
            subject, plan, backend=base.backend, mode=base.mode, families=families, programs=programs
        )
        net.warm(subject.run.first, lambda line: say(f"{name}: {line}"))
        arm.net = net
    return arm


def _planned(policy: str, parameters: dict[str, Any], setting: Setting, subject: Subject) -> Plan:
    return plan_for(make_policy(policy, setting, parameters), subject, policy, parameters)


def _take_turns(
    target: Target,
    reference: Arm,
    arms: Sequence[Arm],
    prompts: Sequence[Any],
    seed: int,
    size: int,
    scoring: _Scoring,
    say: Callable[[str], None],
) -> None:
    """A warm-up of all; then every batch through the reference and through each arm that has not failed."""
    say(f"warm-up: {UNCACHED}")
    reference.run(target, prompts[:1], [seed])
    for arm in (arm for arm in arms if not arm.row.error):
        say(f"warm-up: {arm.row.name}")
        with arm.attempt("warm-up"):
            arm.run(target, prompts[:1], [seed])
    for first in range(0, len(prompts), size):
        batch = prompts[first : first + size]
        seeds = [seed + first + i for i in range(len(batch))]
        say(f"prompts: {first + 1} of {len(prompts)}, {UNCACHED}")
        truth = reference.turn(target, batch, seeds)
        for i, sample in enumerate(truth.images.reshape(len(batch), -1)):
            if not all_finite(sample):
                assert reference.net is not None  # the reference has run
                raise PipelineError(not_finite(reference.net.subject, batch[i], seeds[i], f"prompt {first + i + 1}"))
        for arm in (arm for arm in arms if not arm.row.error):
            say(f"prompts: {first + 1} of {len(prompts)}, {arm.row.name}")
            with arm.attempt(f"prompt {first + 1}"):
                _score(arm.row, arm.turn(target, batch, seeds), truth, scoring)


def _score(row: Row, own: Samples, truth: Samples, scoring: _Scoring) -> None:
    """Adds PSNR, SSIM and, of the first prompts and the worst, the pictures of a batch to a row."""
    if own.images.shape != truth.images.shape:
        raise ValueError(f"the sample is {list(own.images.shape)}, the uncached one {list(truth.images.shape)}")
    if not bool(own.images.isfinite().all()):
        raise ValueError("the sample has values that are not finite")
    visible = are_images(truth.images)
    for i in range(len(own.images)):
        image, raw, reference, reference_raw = (
            part[i : i + 1] for part in (own.images, own.raw, truth.images, truth.raw)
        )
        data_range = scoring.range_of(reference)
        row.psnr += psnr(image, reference, data_range)
        row.psnr_raw += psnr(raw, reference_raw, data_range)
        if visible:
            row.ssim += ssim(image, reference, data_range)
            row.ssim_raw += ssim(raw, reference_raw, data_range)
            row.keep(len(row.psnr) - 1, picture(reference), picture(image), scoring.shown)


def picture(sample: Tensor) -> Tensor:
    """One image of a sample [1, ...], of a video its middle frame: float16 [3, h, w] in [0, 1]."""
    shown = frames(sample)
    assert shown is not None  # called for images only
    shown = shown[0, shown.shape[1] // 2].expand(3, -1, -1)
    return ((shown + 1) / 2 if float(sample.min()) < 0 else shown).clamp(0, 1).half()


@contextmanager
def _uncompiled(model: Any) -> Iterator[Any]:
    """Takes off the model what dcc has set on it, inside the context, and always puts it back."""
    with installed(denoiser_of(model), None):
        yield model


def _made_up(policy: str, parameters: Mapping[str, Any]) -> str:
    """A name such as "taylorseer interval=4 order=1", cut where it gets long; a steps mask is written as digits."""

    def short(value: Any) -> str:
        return "".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)

    text = " ".join([policy, *(f"{name}={short(value)}" for name, value in parameters.items())])
    return text if len(text) <= LONGEST_NAME else f"{text[: LONGEST_NAME - 1]}…"


def _check(
    model: Any,
    prompts: Any,
    sample: Any,
    batch_size: Any,
    backend: str,
    data_range: Any,
    shown: Any,
    call: dict[str, Any],
) -> list[Any]:
    """The prompts as a list. Raises PromptError, LoweringError or PipelineError for malformed arguments."""
    checked = check_prompts(prompts, is_pipeline(model))
    check_backend(backend)
    arguments.whole("shown", shown)
    if batch_size is not None:
        arguments.whole("batch_size", batch_size, 1, error=PipelineError)
    if data_range is not None:
        arguments.positive("data_range", data_range, PipelineError)
    unknown = [name for name in call if name not in call_parameters(model)]
    if unknown:
        raise PipelineError(
            f"unknown keyword {arguments.listed(unknown, call_parameters(model))}: not an argument of the pipeline's "
            "call. Parameters of a policy go beside its name: ('taylorseer', {'interval': 4})"
        )
    check_model(model, sample, call)
    if sample is None and not is_pipeline(model):
        raise PipelineError("a bare nn.Module needs sample=fn, where fn(net, prompt) runs one full sampling loop")
    return checked


def _facts(net: CompiledDenoiser, prompts: Sequence[Any], seed: int, size: int) -> dict[str, str]:
    """What a reader must know to judge the numbers, by name."""
    weight = next(net.module.parameters(), torch.empty(0))
    if weight.is_cuda:
        device = torch.cuda.get_device_name(weight.device)
    else:
        device = f"{weight.device.type}, {platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
    return {
        "denoiser": type(net.module).__name__,
        "scheduler": f"{net.plan.scheduler}, {net.plan.steps} steps",
        "prompts": f"{count(len(prompts), 'prompt')}, seeds from {seed}",
        "batch": f"1 for time, {size} for quality",
        "backend": net.backend,
        "dtype": str(weight.dtype).removeprefix("torch."),
        "device": device,
        "CPU threads": f"{torch.get_num_threads()} of {os.cpu_count()} cores",
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": platform.system(),
    }
