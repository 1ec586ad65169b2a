"""What a plan costs at the recorded shapes: FLOPs of each row, bytes of the cache. Plans are priced when made."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from dcc.decisions import Decision
from dcc.discover.sites import PROBE, Sites
from dcc.discover.subject import Subject
from dcc.errors import PlanError
from dcc.passes.base import GUIDANCE, Site
from dcc.plans.forms import Form
from dcc.plans.plan import Plan, make_plan, with_costs
from dcc.variants.correctors import corrected, map_flops
from dcc.variants.observe import Observer
from dcc.variants.refresh import refresh_flops, refreshes, state_bytes
from dcc.variants.selection import Selection, used_forms


def planned(subject: Subject, **parts: Any) -> Plan:
    """A plan for the subject's denoiser, scheduler and noise levels, with its costs.

    `parts` are the other arguments of `make_plan`: sites, schedule, predictors, policy, parameters, trigger and forms.
    Raises PlanError where a site is forecast before it was ever computed, or the sites do not go together.
    """
    plan = make_plan(model=subject.model, scheduler=subject.target.scheduler, levels=subject.run.levels, **parts)
    return cost(plan, subject.sites)


def cost(plan: Plan, sites: Sites) -> Plan:
    """The plan with its expected FLOPs and cache bytes at the recorded shapes.

    Raises PlanError where a site may only be looked at, where two selectors meet in one value, and where a form does
    not fit its sites.
    """
    _check(plan, [sites.select(name) for name in plan.sites])
    selection, forms = Selection.of(plan, sites, Observer(), hoist=False), used_forms(plan)
    relative = [[corrected(site, selection.maps, live=False) for site in group] for group in selection.joined]
    flops = {row: row_flops(sites, relative, row, forms) for row in plan.rows}
    priced = with_costs(plan, flops, sum(site.bytes for group in selection.joined for site in group))
    return replace(
        priced,
        flops=priced.flops + plan.steps * map_flops(selection.maps, sites),
        cache_bytes=priced.cache_bytes + state_bytes(selection.joined, forms),
    )


def row_flops(
    sites: Sites, selected: Sequence[Sequence[Site]], row: Sequence[int], forms: Sequence[Form | None] = ()
) -> int:
    """FLOPs of one call that forecasts the sites that the row does not compute, except the tokens it refreshes."""
    skipped = [s for k, decision in enumerate(row) if decision != Decision.COMPUTE for s in selected[k]]
    forecast = [p for s in skipped if s.kind != GUIDANCE for p in s.ports]
    whole = refresh_flops(sites, forecast, refreshes(sites, selected, forms, row))
    return whole // 2 if any(s.kind == GUIDANCE for s in skipped) else whole


def _check(plan: Plan, groups: Sequence[Sequence[Site]]) -> None:
    for name, group in zip(plan.sites, groups, strict=True):
        if any(site.kind == PROBE for site in group):
            raise PlanError(f"{name!r} can be looked at by a trigger, not cached; choose another site")
    for row in plan.rows:
        owner: dict[str, str] = {}
        for k, name in enumerate(plan.sites):
            inside = [site for site in groups[k] if row[k] != Decision.COMPUTE and site.kind != GUIDANCE]
            for out in [port.out for site in inside for port in site.ports]:
                if owner.setdefault(out, name) != name:
                    raise PlanError(
                        f"a step forecasts both {owner[out]!r} and {name!r}, which are one value; choose one"
                    )
