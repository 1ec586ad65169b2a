"""The setting of a policy for a live model: what it may measure is measured here, once, when it first asks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from dcc.capture.captured import Captured
from dcc.discover.sites import Sites
from dcc.errors import ProfileError
from dcc.lower.program import Variant
from dcc.measure.calibrate import measure
from dcc.measure.profile import Profile
from dcc.passes.base import Row, write_name
from dcc.plans.plan import Plan, make_plan
from dcc.policies.base import DEFAULT_SITE, Policy, Setting
from dcc.record.call import bind
from dcc.record.fingerprint import fingerprint
from dcc.record.recorder import Recording
from dcc.record.seam import DenoiserProxy
from dcc.record.target import Target, installed
from dcc.search.closed_loop import ClosedLoop, prepare
from dcc.serve.triggered import denoiser_for
from dcc.variants.build import build, variant
from dcc.variants.observe import Observer

SCORED = 8  # prompts that a policy's own search runs on


def setting_of(
    target: Target,
    run: Recording,
    captured: Captured,
    sites: Sites,
    prompts: Sequence[Any],
    *,
    seed: int = 0,
    progress: Callable[[str], None],
    profile: Profile | None = None,
) -> Setting:
    """A Setting of a recorded and captured denoiser. Raises ProfileError for a profile of another model or run."""
    if profile is not None:
        profile.check(target.module, target.scheduler)
        if profile.steps != len(run.levels):
            raise ProfileError(f"the profile has {profile.steps} steps, this run {len(run.levels)}; calibrate this run")

    def calibrated() -> Profile:
        if profile is not None:
            return profile
        settings = getattr(target, "call_kwargs", {})
        return measure(target, run, captured, sites, prompts, seed=seed, progress=progress, settings=settings)

    def values(site: str) -> Tensor:
        progress(f"recording the values of {site}")
        net = _ValueRecorder(target, run, captured, sites, site)
        with installed(target, net):
            target.generate(prompts[:1], [seed])
        return torch.stack(net.values)

    loops: list[ClosedLoop] = []

    def score(policy: Policy) -> float:
        if not loops:
            chosen = list(prompts[:SCORED])
            seeds = [seed + i for i in range(len(chosen))]
            size = SCORED if target.batches else 1
            loops.append(
                prepare(target, run, lambda c, k: None, chosen, seeds, batch_size=size, traced=False, progress=progress)
            )
        plan = plan_for(policy, setting, run, target, "score", {})
        net = denoiser_for(target.module, plan, run, lambda c, p: build(c, p, Observer()), "eager")
        net.families.append(build(captured, plan, Observer(), sites))
        found = [value for batch in loops[0].batches for value in loops[0].psnr(loops[0].generate(net, batch), batch)]
        return sum(found) / len(found)

    setting = Setting(run.levels, sites, calibrated, values, score)
    return setting


def plan_for(
    policy: Policy, setting: Setting, run: Recording, target: Target, name: str, parameters: dict[str, Any]
) -> Plan:
    """The plan of a policy for the recorded run; `name` and `parameters` are what the plan says it came from."""
    names = [setting.sites.default if c.site == DEFAULT_SITE else c.site for c in policy.caches]
    for site in names:
        setting.sites.select(site)
    return make_plan(
        model=fingerprint(target.module),
        scheduler=target.scheduler,
        levels=run.levels,
        sites=names,
        schedule=list(zip(*(c.mask for c in policy.caches), strict=True)),
        predictors=[c.predictor for c in policy.caches],
        policy=name,
        parameters=parameters,
        trigger=policy.trigger,
        forms=[c.form for c in policy.caches],
    )


class _ValueRecorder(DenoiserProxy):
    """Runs the denoiser as it is and keeps the true values of one site, the largest port's, on the CPU."""

    def __init__(self, target: Target, run: Recording, captured: Captured, sites: Sites, name: str) -> None:
        super().__init__(target.module)
        (site,) = sites.select(name)[:1]
        port = max(range(len(site.ports)), key=lambda index: sites.costs[site.ports[index].out].bytes)
        program: Variant = variant(captured, Row(computed=(site,)), "values", Observer())
        self.__dict__.update(
            run=run, captured=captured, program=program, values=[], index=program.writes.index(write_name(site, port))
        )

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        call = bind(self.original, args, kwargs, self.run.as_tensors)
        bound = self.captured.bindings(call)
        outputs = self.program.graph_module(*(bound[name] for name in self.program.inputs))
        self.values.append(outputs[self.program.outputs + self.index].detach().cpu())
        return torch.utils._pytree.tree_unflatten(outputs[: self.program.outputs], self.captured.out_spec)
