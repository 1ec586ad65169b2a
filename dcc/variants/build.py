"""From a plan to the graphs of its variants, and what they cost."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from dcc.capture.captured import Captured
from dcc.discover.sites import PROBE, Sites, find_sites
from dcc.errors import PlanError
from dcc.lower.program import Variant
from dcc.passes.base import GUIDANCE, Correction, Form, Row, Site
from dcc.passes.forms import constants
from dcc.passes.graph import copy_of, output_node
from dcc.plans.forms import form_of
from dcc.plans.plan import Plan, with_costs
from dcc.serve.denoiser import Family
from dcc.variants.coalesce import coalesced
from dcc.variants.correctors import corrected, corrections, map_flops
from dcc.variants.guidance import check_halves, check_plan, forecasts_guidance
from dcc.variants.hoisted import hoisted, prologue
from dcc.variants.observe import Observer
from dcc.variants.refresh import refresh_flops, refreshes, state_bytes
from dcc.variants.trigger_graphs import TriggerGraphs


def cost(plan: Plan, sites: Sites) -> Plan:
    """The plan with its expected FLOPs and cache bytes at the recorded shapes."""
    selected = [sites.select(name) for name in plan.sites]
    for name, group in zip(plan.sites, selected, strict=True):
        if any(site.kind == PROBE for site in group):
            raise PlanError(f"{name!r} can be looked at by a trigger, not cached; choose another site")
    for row in plan.rows:
        owner: dict[str, str] = {}
        for k, name in enumerate(plan.sites):
            inside = [site for site in selected[k] if row[k] != 1 and site.kind != GUIDANCE]
            for out in [port.out for site in inside for port in site.ports]:
                if owner.setdefault(out, name) != name:
                    raise PlanError(
                        f"a step forecasts both {owner[out]!r} and {name!r}, which are one value; choose one"
                    )
    forms = _used_forms(plan)
    _ = _row_forms(plan, selected)  # raises where one does not fit its sites
    selected = _coalesced(plan, selected, sites)
    maps = _corrections(plan, sites, selected)
    relative = [[corrected(site, maps, live=False) for site in group] for group in selected]
    flops = {row: row_flops(sites, relative, row, forms) for row in plan.rows}
    priced = with_costs(plan, flops, sum(site.bytes for group in selected for site in group))
    return replace(
        priced,
        flops=priced.flops + plan.steps * map_flops(maps, sites),
        cache_bytes=priced.cache_bytes + state_bytes(selected, forms),
    )


def row_flops(
    sites: Sites,
    selected: Sequence[Sequence[Site]],
    row: Sequence[int],
    forms: Sequence[dict[str, Any]] = (),
) -> int:
    """FLOPs of one call that forecasts the sites that the row does not compute, but for the tokens it refreshes."""
    skipped = [s for k, decision in enumerate(row) if decision != 1 for s in selected[k]]
    forecast = [p for s in skipped if s.kind != GUIDANCE for p in s.ports]
    whole = refresh_flops(sites, forecast, refreshes(sites, selected, forms, row))
    return whole // 2 if any(s.kind == GUIDANCE for s in skipped) else whole


def build(captured: Captured, plan: Plan, observer: Observer, sites: Sites | None = None, hoist: bool = True) -> Family:
    """The variants of a plan for one captured graph: a copy of the graph per distinct row, rewritten by the passes.

    `hoist` takes what no step changes out of them, where that pays; a plan with a trigger computes all at every step.
    """
    sites = sites or find_sites(captured, captured.call)
    selected = tuple(sites.select(name) for name in plan.sites)
    if plan.trigger:
        if captured.problem:
            raise PlanError(f"a trigger looks inside the denoiser, which cannot be exported: {captured.problem}")
        make = functools.partial(_made, captured, observer)
        graphs = TriggerGraphs(captured, plan, sites, selected, make)
        return Family(captured, selected, {}, graphs)
    if any(forecasts_guidance(row, selected) for row in plan.rows):
        check_plan(plan, selected)
        check_halves(captured)
    cached = [any(row[k] != 1 for row in plan.schedule) for k in range(len(plan.sites))]
    forms, maps = _row_forms(plan, selected), _corrections(plan, sites, selected)
    selected = _coalesced(plan, selected, sites)
    once = hoisted(captured, sites, selected) if hoist else ()
    selected = tuple(tuple(corrected(site, maps) for site in group) for group in selected)
    variants = {}
    for index, decisions in enumerate(plan.rows):
        row = Row(
            computed=tuple(s for k, d in enumerate(decisions) if d == 1 and cached[k] for s in selected[k]),
            forecast=tuple(selected[k] for k, d in enumerate(decisions) if d != 1),
            anchors=plan.anchors,
            refreshed=refreshes(sites, selected, _used_forms(plan), decisions),
            forms=tuple(form for form, d in zip(forms, decisions, strict=True) if d != 1),
            corrections=tuple(maps),
            hoisted=once,
        )
        variants[decisions] = variant(captured, row, f"row{index}", observer)
    return Family(captured, selected, variants, prologue=prologue(captured, once))


def _coalesced(plan: Plan, selected: Sequence[tuple[Site, ...]], sites: Sites) -> tuple[tuple[Site, ...], ...]:
    """The sites of each selector, joined where one tensor does for several; not those of a form or a trigger."""
    if plan.trigger:
        return tuple(selected)
    return tuple(
        group if form else coalesced(group, sites, [site for other in selected if other is not group for site in other])
        for group, form in zip(selected, _used_forms(plan) or [{}] * len(plan.sites), strict=True)
    )


def _used_forms(plan: Plan) -> list[dict[str, Any]]:
    """The plan's forms, empty for sites that every step computes."""
    return [form if any(row[k] != 1 for row in plan.schedule) else {} for k, form in enumerate(plan.forms)]


def _row_forms(plan: Plan, selected: Sequence[Sequence[Site]]) -> list[Form | None]:
    """How passes forecast the sites of each selector. Raises PlanError where a form does not fit its sites."""
    forms = _used_forms(plan) or [{}] * len(plan.sites)
    return [form_of(*each) for each in zip(forms, selected, plan.sites, strict=True)]


def _corrections(plan: Plan, sites: Sites, selected: Sequence[Sequence[Site]]) -> list[Correction]:
    """The maps beside the sites of each selector that is ever forecast."""
    forms = zip(_used_forms(plan), selected, strict=False)  # no forms where all are plain
    return [correction for form, group in forms for correction in corrections(form, group, sites)]


def _made(captured: Captured, observer: Observer, row: Row, name: str) -> Variant:
    return variant(captured, row, name, observer)


def variant(captured: Captured, row: Row, name: str, observer: Observer) -> Variant:
    """One variant: `(inputs, anchors, coefficients) -> (outputs, writes)`, a pure function of tensors."""
    graph_module = copy_of(captured.graph_module)
    own = len(output_node(graph_module).args[0])
    observer.run_all(graph_module, row, name)
    names = [node.name for node in output_node(graph_module).args[0]]
    inputs = tuple(node.name for node in graph_module.graph.nodes if node.op == "placeholder")
    own_constants = tuple(constant for constant in constants(row) if constant.name in inputs)
    maps = tuple(correction for correction in row.corrections if set(correction.inputs) & set(inputs))
    return Variant(name, graph_module, inputs, own, tuple(names[own:]), own_constants, maps)
