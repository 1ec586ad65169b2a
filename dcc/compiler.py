"""The compiler, top to bottom: `compile` reads like the list in DESIGN section 3."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.fx import Graph, GraphModule

from dcc.capture import Call, Captured, capture
from dcc.errors import LoweringError, PlanError, PolicyError
from dcc.fingerprint import fingerprint
from dcc.lower import BACKENDS, Variant
from dcc.observe import Observer
from dcc.passes.base import Row
from dcc.passes.dataflow import Dataflow
from dcc.passes.graph import output_node
from dcc.pipeline import (
    Target,
    call_parameters,
    check_prompts,
    denoiser_of,
    make_target,
    recording,
    restore_target,
)
from dcc.plan import Plan, make_plan, with_costs
from dcc.policies import DEFAULT_POLICY, DEFAULT_SITE, make_policy, parameter_names
from dcc.record import Recording
from dcc.runtime import CompiledDenoiser, Family
from dcc.sites import Sites, find_sites


def compile(
    model: Any,
    calib_prompts: Sequence[Any],
    *,
    policy: str | None = None,
    plan: Plan | None = None,
    sample: Callable[[nn.Module, Any], Any] | None = None,
    backend: str = "inductor",
    progress: Callable[[str], None] | None = None,
    **parameters: Any,
) -> Any:
    """Compiles the denoiser of a diffusers pipeline, or a bare denoiser, with feature caching.

    Args:
        model: a DiffusionPipeline (returned itself, its denoiser replaced), or an nn.Module (a CompiledDenoiser is
            returned).
        calib_prompts: prompts like those to be served; one run of the first is recorded.
        policy: a name of `dcc.policies.POLICIES`; "taylorseer" where neither policy nor plan is given.
        plan: a Plan, instead of a policy.
        sample: for a bare module: sample(net, prompt) runs one full sampling loop with `net`.
        backend: "inductor" or "eager".
        progress: called with one line before each stage.
        parameters: parameters of the policy (interval, order, site, steps_mask, ...) and arguments of the pipeline's
            call (num_inference_steps, height, width, guidance_scale, ...) as they will be served.

    Raises a subclass of DccError, with `model` unchanged, for anything it refuses.
    """
    say = progress or (lambda line: None)
    start = time.perf_counter()
    policy_kwargs, call_kwargs = _split(model, policy, plan, backend, parameters)
    target = make_target(model, sample, call_kwargs)
    prompts = check_prompts(calib_prompts, text=not isinstance(model, nn.Module))

    # one real run: noise levels, streams, which inputs move; and the inputs of a batch of two
    say("recording one run")
    run, wide = record(target, prompts)

    # the denoiser once, as one functional ATen graph whose weights are inputs
    say("capturing the denoiser")
    captured = capture(target.module, wide)
    captured.varying = run.varying

    # every value that may be cached, with what it costs and saves
    sites = find_sites(captured, run.first)

    # which of them to compute or forecast at which step
    plan = plan or plan_for(policy or DEFAULT_POLICY, policy_kwargs, sites, run, target)
    check_plan(plan, run, target)
    plan = cost(plan, sites)

    # one variant per distinct row of the schedule, lowered and compared with eager on the recorded inputs
    observer = Observer()
    net = CompiledDenoiser(target.module, plan, run, lambda c, p: build(c, p, observer), backend)
    net.families.append(build(captured, plan, observer, sites))
    net.__dict__["capture_seconds"] = time.perf_counter() - start
    net.warm(run.first, say)
    return target.install(net)


def record(target: Target, prompts: Sequence[Any]) -> tuple[Recording, Call]:
    """One whole run of the first prompt, and the first call of a batch of two, which keeps the batch symbolic.

    Where the loop takes no batch, the two are the same, and another batch size will be captured when it comes.
    """
    with recording(target) as recorder:
        target.sample(prompts[:1])
    run = recorder.result()
    if all(t.dim() == 0 or t.shape[0] > 1 for t in run.first.tensors):
        return run, run.first
    try:
        with recording(target, only_first=True) as recorder:
            target.sample([prompts[0], prompts[-1]])
    except (TypeError, ValueError, RuntimeError):  # a loop for one image at a time, or arguments that are per image
        return run, run.first
    wide = recorder.first
    return run, wide if wide is not None and wide.signature == run.first.signature else run.first


def plan_for(name: str, kwargs: dict[str, Any], sites: Sites, run: Recording, target: Target) -> Plan:
    """The plan of a named policy for the recorded run."""
    decided = make_policy(name, len(run.levels), kwargs)
    site = sites.default if decided.site == DEFAULT_SITE else decided.site
    sites.select(site)
    return make_plan(
        model=fingerprint(target.module),
        scheduler=target.scheduler,
        levels=run.levels,
        sites=[site],
        schedule=[[computed] for computed in decided.mask],
        predictors=[decided.predictor],
        policy=name,
        parameters=kwargs,
    )


def cost(plan: Plan, sites: Sites) -> Plan:
    """The plan with its expected FLOPs and cache bytes at the recorded shapes."""
    selected = [sites.select(name) for name in plan.sites]
    for row in plan.rows:
        owner: dict[str, str] = {}
        for k, name in enumerate(plan.sites):
            for out in () if row[k] else [port.out for site in selected[k] for port in site.ports]:
                if owner.setdefault(out, name) != name:
                    raise PlanError(
                        f"a step forecasts both {owner[out]!r} and {name!r}, which are one value; choose one"
                    )
    flow = Dataflow(sites.captured.graph_module)
    flops = {
        row: flow.flops(
            sites.costs, [p for k, full in enumerate(row) if not full for s in selected[k] for p in s.ports]
        )
        for row in plan.rows
    }
    return with_costs(plan, flops, sum(site.bytes for group in selected for site in group))


def build(captured: Captured, plan: Plan, observer: Observer, sites: Sites | None = None) -> Family:
    """The variants of a plan for one captured graph: a copy of the graph per distinct row, rewritten by the passes."""
    sites = sites or find_sites(captured, captured.call)
    selected = tuple(sites.select(name) for name in plan.sites)
    cached = [any(not row[k] for row in plan.schedule) for k in range(len(plan.sites))]
    variants = {}
    for index, decisions in enumerate(plan.rows):
        row = Row(
            computed=tuple(s for k, full in enumerate(decisions) if full and cached[k] for s in selected[k]),
            forecast=tuple(selected[k] for k, full in enumerate(decisions) if not full),
            anchors=plan.anchors,
        )
        variants[decisions] = variant(captured, row, f"row{index}", observer)
    return Family(captured, selected, variants)


def variant(captured: Captured, row: Row, name: str, observer: Observer) -> Variant:
    """One variant: `(inputs, anchors, coefficients) -> (outputs, writes)`, a pure function of tensors."""
    graph = Graph()
    graph.output(graph.graph_copy(captured.graph_module.graph, {}))
    graph_module = GraphModule(captured.graph_module, graph)
    own = len(output_node(graph_module).args[0])
    observer.run_all(graph_module, row, name)
    names = [node.name for node in output_node(graph_module).args[0]]
    inputs = tuple(node.name for node in graph.nodes if node.op == "placeholder")
    return Variant(name, graph_module, inputs, own, tuple(names[own:]))


def check_plan(plan: Plan, run: Recording, target: Target) -> None:
    """Raises PlanError, naming the field, where the plan was made for another model, scheduler or run."""
    own = fingerprint(target.module)
    if plan.model != own:
        raise PlanError(f"the plan is for another denoiser (model {plan.model}, this one is {own}); plan for this one")
    if plan.scheduler != target.scheduler:
        raise PlanError(
            f"the plan is for scheduler {plan.scheduler}, this run uses {target.scheduler}; plan for this one"
        )
    if plan.steps != len(run.levels):
        raise PlanError(
            f"the plan has {plan.steps} steps, this run has {len(run.levels)}; pass num_inference_steps={plan.steps} "
            "or plan for this step count"
        )
    if not torch.allclose(torch.tensor(plan.levels), torch.tensor(run.levels), rtol=1e-3):
        raise PlanError(
            f"the plan's noise levels ({plan.levels[0]:.5g} ... {plan.levels[-1]:.5g}) are not this run's "
            f"({run.levels[0]:.5g} ... {run.levels[-1]:.5g}); the scheduler's settings differ, plan for this one"
        )


def restore(model: Any) -> Any:
    """The original denoiser back: returns the pipeline, or the original module of a compiled one."""
    return restore_target(model)


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
    compiled = denoiser_of(model)
    if isinstance(compiled, CompiledDenoiser):
        return find_sites(compiled.families[0].captured, compiled.recording.first)
    target = make_target(model, sample, call_kwargs)
    with recording(target, only_first=True) as recorder:
        target.sample(check_prompts([""] if prompts is None else prompts, text=not isinstance(model, nn.Module))[:1])
    first = recorder.first or recorder.result().first
    with torch.no_grad():
        target.module(**first.arguments())  # modules that fill a cache at their first run would fill it while exporting
    return find_sites(capture(target.module, first), first)


def _split(
    model: Any, policy: str | None, plan: Plan | None, backend: str, parameters: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Separates policy parameters from arguments of the pipeline's call; refuses what is neither."""
    if backend not in BACKENDS:
        raise LoweringError(f"unknown backend {backend!r}; there are: {', '.join(BACKENDS)}")
    if plan is not None and policy is not None:
        raise PolicyError("give policy= or plan=, not both")
    if plan is not None and not isinstance(plan, Plan):
        raise PlanError(f"plan must be a dcc.Plan, e.g. dcc.Plan.load(path); got {type(plan).__name__}")
    policy = policy or DEFAULT_POLICY
    own = [] if plan is not None else parameter_names(policy)
    known = call_parameters(model)
    unknown = [name for name in parameters if name not in own and name not in known]
    if unknown:
        raise PolicyError(
            f"unknown keyword {', '.join(map(repr, unknown))}: neither a parameter of "
            f"{f'policy {policy!r}' if plan is None else 'a given plan'} (it takes: {', '.join(own) or 'none'}) "
            "nor an argument of the pipeline's call"
        )
    return {k: v for k, v in parameters.items() if k in own}, {k: v for k, v in parameters.items() if k not in own}
