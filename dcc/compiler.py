"""The compiler, top to bottom: `compile` records a run, captures the denoiser, plans, rewrites, lowers and installs."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from dcc import arguments
from dcc.capture.export import capture
from dcc.capture.preserve import preserved
from dcc.discover.sites import Sites, find_sites
from dcc.discover.subject import Subject
from dcc.errors import CaptureError, PipelineError, PlanError, PolicyError, ProfileError
from dcc.lower.program import Backend, Mode, check_backend, start_inductor
from dcc.measure.profile import Profile
from dcc.plans import mapping
from dcc.plans.plan import Plan
from dcc.policies import POLICIES, make_policy, parameter_names
from dcc.policies.setting import plan_for, setting_of
from dcc.record.call import Call
from dcc.record.recorder import Recorder
from dcc.record.seam import disabled as plain
from dcc.record.seam import handler_of
from dcc.record.target import (
    call_parameters,
    check_model,
    check_prompts,
    denoiser_of,
    is_pipeline,
    make_target,
    recording,
    restore_target,
)
from dcc.search.budget import DEFAULT_EFFORT, Candidates, Effort, budget_of, check_effort, plan_within
from dcc.serve.denoiser import CompiledDenoiser
from dcc.serve.guard import Guard
from dcc.serve.summary import Summary
from dcc.variants.cost import cost


def compile(
    model: Any,
    calib_prompts: Sequence[Any],
    *,
    speedup: float | None = None,
    quality: float | None = None,
    latency: float | None = None,
    cache_bytes: int | None = None,
    effort: Effort = DEFAULT_EFFORT,
    guard: bool = False,
    policy: str | None = None,
    plan: Plan | None = None,
    profile: Profile | None = None,
    sample: Callable[[nn.Module, Any], Any] | None = None,
    data_range: float | None = None,
    seed: int = 0,
    backend: Backend = "inductor",
    mode: Mode = "default",
    progress: Callable[[str], None] | None = None,
    **parameters: Any,
) -> Any:
    """Compiles the denoiser of a diffusers pipeline, or a bare denoiser, with feature caching.

    Args:
        model: a DiffusionPipeline or an nn.Module; this same object is returned. The denoiser is compiled in place: it
            stays the object and class that it was.
        calib_prompts: prompts like those to be served. A policy or a plan needs one, a budget at least four, of which
            a fifth (two or more) are held back for the quality that the plan reports.
        speedup: search the best plan with at least this ratio of denoiser FLOPs over a whole run, uncached to cached.
        quality: search the fastest plan whose final samples reach this PSNR in dB to the uncached ones; 35 where no
            budget, policy or plan is given.
        latency: search the best plan of at most this many milliseconds per run, measured on this machine.
        cache_bytes: limit of the anchors' bytes of one stream; combines with the other budgets.
        effort: "fast", "normal" or "thorough": about 40, 120 or 400 cached runs of the calibration prompts.
        guard: for a searched plan, compute more steps than planned for prompts that turn out harder than the
            calibration prompts (serve/guard.py); one host synchronisation per anchor.
        policy: a name of `dcc.policies.POLICIES`, instead of a budget.
        plan: a Plan, instead of a policy or a budget.
        profile: a Profile of `dcc.calibrate`, for policies that are calibrated (else they calibrate on
            `calib_prompts`) and as one more source of candidates for a budget.
        sample: for a bare module: sample(net, prompt) runs one full sampling loop with `net`; it returns the final
            sample (tensor, array or image) where a budget is given.
        data_range: range of the final samples, for PSNR; by default 1 for a pipeline's pixels, else the range of the
            uncached samples.
        seed: seed of the search and of the first prompt's noise.
        backend: "inductor" or "eager".
        mode: as in torch.compile: "default", "reduce-overhead" (CUDA graphs, lower/cuda_graphs.py), "max-autotune"
            (those, and kernels chosen by timing) or "max-autotune-no-cudagraphs".
        progress: called with one line before each stage.
        parameters: parameters of the policy (interval, order, site, steps_mask, ...) and arguments of the pipeline's
            call (num_inference_steps, height, width, guidance_scale, ...) as they will be served.

    Raises a subclass of DccError, with `model` unchanged, for anything it refuses.
    """
    start = time.perf_counter()
    check_model(model, sample, {})
    arguments.flag("guard", guard)
    say, seed, data_range = _check_common(backend, mode, seed, data_range, profile, progress)
    budgets = {"speedup": speedup, "quality": quality, "latency": latency, "cache_bytes": cache_bytes}
    policy_kwargs, call_kwargs = _split(model, policy, plan, budgets, parameters)
    target = make_target(model, sample, call_kwargs)
    prompts = check_prompts(calib_prompts, is_pipeline(model), "calib_prompts")
    check_effort(effort)
    budget = None if policy or plan else budget_of(**budgets, effort=effort, prompts=prompts)
    if guard and budget is None and not (plan and plan.limits):
        raise PolicyError(
            "guard=True needs a plan that was searched (speedup=, quality=): a policy knows no usual error"
        )

    if backend == "inductor" and all(weight.device.type == "cpu" for weight in target.module.parameters()):
        start_inductor()  # it finds out what the processor can do while the denoiser is recorded

    # one real run, the denoiser as one graph, and every value in it that may be cached
    subject = Subject.of(target, prompts, say)
    captured_after = time.perf_counter() - start

    # which of them to compute or forecast at which step: given, a published policy, or searched within a budget
    if plan is not None:
        check_plan(plan, subject)
        plan = cost(plan, subject.sites)
    elif policy is not None:
        setting = setting_of(subject, prompts, seed=seed, progress=say, profile=profile)
        plan = plan_for(make_policy(policy, setting, policy_kwargs), subject, policy, policy_kwargs)
    else:
        assert budget is not None
        candidates = Candidates(subject, backend)
        plan = plan_within(candidates, budget, prompts, seed=seed, data_range=data_range, progress=say, profile=profile)
    # one variant per distinct row of the schedule, lowered and compared with eager on the recorded inputs
    watch = Guard(plan) if guard else None
    net = CompiledDenoiser(subject, plan, backend=backend, mode=mode, guard=watch)
    net.compile_seconds = captured_after
    for other in subject.run.others:
        net.note(f"{other} is another denoiser of this pipeline, which is not cached: FLOPs and budgets leave it out")
    with preserved(target.module):
        net.warm(subject.run.first, say)
    return target.install(net)


def check_plan(plan: Plan, subject: Subject) -> None:
    """Raises PlanError, naming the field, where the plan was made for another model, scheduler or run."""
    run, target = subject.run, subject.target
    if plan.model != subject.model:
        raise PlanError(
            f"the plan is for another denoiser (model {plan.model}, this one is {subject.model}); plan for this one"
        )
    if plan.scheduler != target.scheduler:
        raise PlanError(
            f"the plan is for scheduler {plan.scheduler}, this run uses {target.scheduler}; plan for this one"
        )
    if all(mapping.position(plan.levels, level) is not None for level in run.levels):
        return
    if not torch.allclose(torch.tensor(plan.levels), torch.tensor(run.levels), rtol=1e-3):
        raise PlanError(
            f"the plan's {plan.steps} noise levels ({plan.levels[0]:.5g} ... {plan.levels[-1]:.5g}) do not cover this "
            f"run's {len(run.levels)} ({run.levels[0]:.5g} ... {run.levels[-1]:.5g}); the scheduler's settings differ, "
            "plan for this one"
        )


def restore(model: Any) -> Any:
    """Undoes `compile` on a pipeline or module, and returns it."""
    return restore_target(model)


def compiled(model: Any) -> CompiledDenoiser:
    """The CompiledDenoiser that runs in the place of a compiled pipeline's denoiser or of a compiled module.

    Raises PipelineError where `model` is not compiled.
    """
    handler = model if isinstance(model, CompiledDenoiser) else handler_of(denoiser_of(model))
    if not isinstance(handler, CompiledDenoiser):
        raise PipelineError(f"this {type(model).__name__} is not compiled by dcc; call dcc.compile first")
    return handler


def summary(model: Any) -> Summary:
    """What a compiled pipeline or module was planned to do and has done so far; prints as a table.

    Raises PipelineError where `model` is not compiled.
    """
    return compiled(model).summary()


@contextlib.contextmanager
def disabled(model: Any) -> Iterator[None]:
    """Runs the original denoiser inside the context, in this thread or task; `model` is a compiled one."""
    with plain(compiled(model).module):
        yield


def sites(
    model: Any,
    prompts: Sequence[Any] | None = None,
    *,
    sample: Callable[[nn.Module, Any], Any] | None = None,
    **call_kwargs: Any,
) -> Sites:
    """The sites of a pipeline's or module's denoiser, with shapes, bytes and share of FLOPs; prints as a tree.

    Runs the loop up to its first denoiser call, for `prompts` (default: one empty prompt). A bare module needs
    `sample`, as in `compile`; a compiled one gives the sites it was compiled with.
    """
    check_model(model.module if isinstance(model, CompiledDenoiser) else model, sample, call_kwargs)
    chosen = check_prompts([""] if prompts is None else prompts, is_pipeline(model))
    if isinstance(model, CompiledDenoiser) or isinstance(handler_of(denoiser_of(model)), CompiledDenoiser):
        return compiled(model).subject.sites
    target = make_target(model, sample, call_kwargs)
    found: list[Sites] = []

    def at_first(call: Call) -> None:
        found.append(find_sites(capture(target.module, call), call))

    with preserved(target.module), recording(target, Recorder(target.module, at_first)):
        target.sample(chosen[:1])
    if not found:
        raise CaptureError(f"the run never called the denoiser ({type(target.module).__name__})")
    return found[0]


def plan(
    model: Any,
    prompts: Sequence[Any],
    profile: Profile | None = None,
    *,
    speedup: float | None = None,
    quality: float | None = None,
    latency: float | None = None,
    cache_bytes: int | None = None,
    effort: Effort = DEFAULT_EFFORT,
    sample: Callable[[nn.Module, Any], Any] | None = None,
    data_range: float | None = None,
    seed: int = 0,
    backend: Backend = "inductor",
    progress: Callable[[str], None] | None = None,
    **call_kwargs: Any,
) -> Plan:
    """The plan that `compile` would search for a budget, without compiling; the arguments are those of `compile`.

    A `profile` of `dcc.calibrate` adds to the candidates anchors that its similarities suggest. Raises ProfileError
    where it is another model's.
    """
    say, seed, data_range = _check_common(backend, "default", seed, data_range, profile, progress)
    target = make_target(model, sample, call_kwargs)
    checked = check_prompts(prompts, is_pipeline(model))
    budget = budget_of(speedup, quality, latency, cache_bytes, effort, checked)
    candidates = Candidates(Subject.of(target, checked, say), backend)
    return plan_within(candidates, budget, checked, seed=seed, data_range=data_range, progress=say, profile=profile)


def _check_common(
    backend: Any, mode: Any, seed: Any, data_range: Any, profile: Any, progress: Any
) -> tuple[Callable[[str], None], int, float | None]:
    """What to call with progress, the seed and the range, as they are used. Raises a DccError for bad ones."""
    check_backend(backend, mode)
    if profile is not None and not isinstance(profile, Profile):
        raise ProfileError(
            f"profile={arguments.shown(profile)} must be a dcc.Profile, e.g. of dcc.Profile.load(path) or dcc.calibrate"
        )
    spread = None if data_range is None else arguments.positive("data_range", data_range)
    return arguments.progress_of(progress), arguments.seed_of(seed), spread


def _split(
    model: Any,
    policy: str | None,
    plan: Plan | None,
    budgets: dict[str, float | None],
    parameters: dict[str, Any],
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Separates policy parameters from arguments of the pipeline's call; refuses what is neither."""
    if plan is not None and policy is not None:
        raise PolicyError("give policy= or plan=, not both")
    if plan is not None and not isinstance(plan, Plan):
        raise PlanError(f"plan must be a dcc.Plan, e.g. dcc.Plan.load(path); got {type(plan).__name__}")
    named = [name for name, value in budgets.items() if value is not None]
    if named and (policy is not None or plan is not None):
        raise PolicyError(f"{', '.join(named)}: a budget is for the search; give it, or policy=, or plan=, not two")
    own = parameter_names(policy) if policy is not None else []
    known = call_parameters(model)
    unknown = [name for name in parameters if name not in own and name not in known]
    owners = [p for p in POLICIES if policy is None and plan is None and set(unknown) & set(parameter_names(p))]
    if owners:
        raise PolicyError(
            f"{', '.join(unknown)}: a parameter of a policy; name it, e.g. policy={owners[0]!r}, or give a budget "
            "(speedup=, quality=) and leave it out"
        )
    if unknown:
        all_known = [*own, *known, *(compile.__kwdefaults__ or ())]
        raise PolicyError(
            f"unknown keyword {arguments.listed(unknown, all_known)}: neither a parameter of "
            f"{f'policy {policy!r}' if policy else 'a plan or a budget'} (it takes: {', '.join(own) or 'none'}) "
            "nor an argument of the pipeline's call"
        )
    return {k: v for k, v in parameters.items() if k in own}, {k: v for k, v in parameters.items() if k not in own}
