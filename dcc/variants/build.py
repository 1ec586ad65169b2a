"""Builds the variants of a plan for one captured graph."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field

from dcc.capture.captured import Captured
from dcc.discover.sites import Sites
from dcc.errors import PlanError
from dcc.passes.base import Site
from dcc.plans.plan import Plan
from dcc.variants.guidance import check_halves, check_plan, forecasts_guidance
from dcc.variants.hoisted import Prologue, prologue
from dcc.variants.observe import Observer
from dcc.variants.selection import Selection
from dcc.variants.trigger_graphs import TriggerGraphs
from dcc.variants.variant import Variant, variant


@dataclass
class Family:
    """One captured graph, the sites of the plan in it, and one variant per distinct row."""

    captured: Captured
    sites: Sites
    selectors: tuple[tuple[Site, ...], ...]
    variants: dict[tuple[int, ...], Variant]
    graphs: TriggerGraphs | None = None  # where the plan has a trigger
    prologue: Prologue = field(default_factory=Prologue)  # computes what no step changes

    @property
    def halves(self) -> bool:
        """Whether some row runs the conditional half of a guidance batch only."""
        return any(forecasts_guidance(row, self.selectors) for row in self.variants)


def build(plan: Plan, sites: Sites, observer: Observer, hoist: bool = True) -> Family:
    """The variants of a plan for one captured graph: a copy of the graph per distinct row, rewritten by the passes.

    `hoist` takes what no step changes out of them, where that pays; a plan with a trigger computes all at every step.
    """
    captured = sites.captured
    if plan.trigger and captured.problem:
        raise PlanError(f"a trigger looks inside the denoiser, which cannot be exported: {captured.problem}")
    selection = Selection.of(plan, sites, observer, hoist)
    if plan.trigger:
        make = functools.partial(variant, captured, observer=observer)
        return Family(captured, sites, selection.groups, {}, TriggerGraphs(plan, sites, selection.groups, make))
    if any(forecasts_guidance(row, selection.groups) for row in plan.rows):
        check_plan(plan, selection.groups)
        check_halves(sites)
    variants = {row: variant(captured, selection.row(row), f"row{k}", observer) for k, row in enumerate(plan.rows)}
    return Family(captured, sites, selection.kept, variants, prologue=prologue(sites, selection.once))
