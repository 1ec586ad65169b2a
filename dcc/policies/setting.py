"""The setting of a policy for a live model: what it may measure is measured here, once, when it first asks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from dcc.discover.subject import Subject
from dcc.errors import ProfileError
from dcc.measure.calibrate import measure
from dcc.measure.profile import Profile
from dcc.measure.values import recorded_values
from dcc.plans.plan import Plan
from dcc.policies.base import DEFAULT_SITE, Policy, Setting
from dcc.search.closed_loop import ClosedLoop, prepare
from dcc.serve.denoiser import CompiledDenoiser
from dcc.variants.cost import planned

SCORED = 8  # prompts that a policy's own search runs on


def setting_of(
    subject: Subject,
    prompts: Sequence[Any],
    *,
    seed: int = 0,
    progress: Callable[[str], None],
    profile: Profile | None = None,
) -> Setting:
    """A Setting of a subject. Raises ProfileError for a profile of another model or run."""
    target = subject.target
    if profile is not None:
        profile.check(subject.module, target.scheduler)
        if profile.steps != subject.steps:
            raise ProfileError(f"the profile has {profile.steps} steps, this run {subject.steps}; calibrate this run")

    def calibrated() -> Profile:
        if profile is not None:
            return profile
        settings = getattr(target, "call_kwargs", {})
        return measure(subject, prompts, seed=seed, progress=progress, settings=settings)

    def values(site: str) -> Tensor:
        progress(f"recording the values of {site}")
        return recorded_values(subject, site, prompts[0], seed)

    loops: list[ClosedLoop] = []

    def score(policy: Policy) -> float:
        if not loops:
            chosen = list(prompts[:SCORED])
            seeds = [seed + i for i in range(len(chosen))]
            size = SCORED if target.batches else 1
            loops.append(
                prepare(subject, no_candidates, chosen, seeds, batch_size=size, traced=False, progress=progress)
            )
        net = CompiledDenoiser(subject, plan_for(policy, subject, "score", {}))
        found = [value for batch in loops[0].batches for value in loops[0].psnr(loops[0].generate(net, batch), batch)]
        return sum(found) / len(found)

    return Setting(subject.run.levels, subject.sites, calibrated, values, score)


def no_candidates(candidate: Any, coefficients: Any) -> Any:
    """Stands in for what makes the denoisers of candidates in a loop whose plans are no candidates."""
    raise NotImplementedError


def plan_for(policy: Policy, subject: Subject, name: str, parameters: dict[str, Any]) -> Plan:
    """The plan of a policy for a subject; `name` and `parameters` are what the plan says it came from."""
    names = [subject.sites.default if c.site == DEFAULT_SITE else c.site for c in policy.caches]
    for site in names:
        subject.sites.select(site)
    return planned(
        subject,
        sites=names,
        schedule=list(zip(*(c.mask for c in policy.caches), strict=True)),
        predictors=[c.predictor for c in policy.caches],
        policy=name,
        parameters=parameters,
        trigger=policy.trigger,
        forms=[c.form for c in policy.caches],
    )
