"""A plan applied to a captured graph: the sites of each selector as they are kept, and what rows ask of the passes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dcc.decisions import Decision
from dcc.discover.sites import Sites
from dcc.passes.base import GUIDANCE, SITES, Correction, Form, Group, Order, Row, Site, Table
from dcc.passes.coalesce_forecasts import Selected
from dcc.passes.hoist_invariants import Hoists
from dcc.passes.insert_cache_reads import Reads
from dcc.passes.insert_cache_writes import Writes
from dcc.passes.insert_correctors import Corrections
from dcc.passes.insert_guidance import Guidance
from dcc.passes.refresh_tokens import Refreshes
from dcc.plans.forms import Form as PlanForm
from dcc.plans.plan import Plan
from dcc.variants.correctors import corrected, corrections
from dcc.variants.forms import form_of
from dcc.variants.hoisted import hoisted
from dcc.variants.observe import Observer
from dcc.variants.refresh import refreshes

Groups = tuple[tuple[Site, ...], ...]


@dataclass(frozen=True)
class Selection:
    """The sites that a plan selects in one captured graph.

    `groups` are those of each selector as the plan names them, `joined` those that are kept: several may have become
    one (passes/coalesce_forecasts.py). `forms` say how a selector's sites are forecast, None where plain; `maps` are
    what corrected sites are kept relative to; `once` names the nodes that are computed once per request.
    """

    plan: Plan
    sites: Sites
    groups: Groups
    joined: Groups
    forms: tuple[Form | None, ...] = ()
    maps: tuple[Correction, ...] = ()
    once: tuple[str, ...] = ()

    @classmethod
    def of(cls, plan: Plan, sites: Sites, observer: Observer, hoist: bool = True) -> Selection:
        """The selection for one captured graph; `hoist` takes what no step changes out of variants, where that pays.

        Raises PlanError where a form does not fit its sites.
        """
        groups = tuple(sites.select(name) for name in plan.sites)
        if plan.trigger:
            return cls(plan, sites, groups, groups)
        used = used_forms(plan)
        forms = tuple(form_of(*each) for each in zip(used, groups, plan.sites, strict=True))
        maps = tuple(made for form, group in zip(used, groups, strict=True) for made in corrections(form, group, sites))
        selected = Selected(list(groups), tuple(not form for form in used), sites)
        observer.run_all(sites.graph_module, Row((selected,)), "plan", stage=SITES)
        joined = tuple(selected.groups)
        return cls(plan, sites, groups, joined, forms, maps, hoisted(sites, joined) if hoist else ())

    @property
    def kept(self) -> Groups:
        """The sites of each selector as variants write and read them: relative to the maps that variants compute."""
        return tuple(tuple(corrected(site, self.maps) for site in group) for group in self.joined)

    def row(self, decisions: Sequence[int]) -> Row:
        """What a row of the schedule asks of the passes."""
        kept, groups, first = self.kept, [], 0
        for sites, form, decision in zip(kept, self.forms, decisions, strict=True):
            if decision != Decision.COMPUTE:
                groups.append(Group(sites, first, form))
                first += form.rows if form else 1
        stored = [k for k, d in enumerate(decisions) if d == Decision.COMPUTE and _forecasts(self.plan, k)]
        computed = [site for k in stored for site in kept[k]]
        orders = [
            Corrections(self.maps),
            Refreshes(refreshes(self.sites, self.joined, used_forms(self.plan), decisions)),
            *cache_orders(computed, groups, Table(first, self.plan.anchors)),
            Hoists(self.once),
        ]
        return Row(tuple(orders))


def cache_orders(computed: Sequence[Site], groups: Sequence[Group], table: Table) -> list[Order]:
    """The orders that keep the computed sites and forecast the groups; guidance sites have a pass of their own."""

    def parts(guidance: bool) -> tuple[tuple[Site, ...], tuple[Group, ...]]:
        some = [
            Group(tuple(s for s in group.sites if (s.kind == GUIDANCE) == guidance), group.first, group.form)
            for group in groups
        ]
        return tuple(s for s in computed if (s.kind == GUIDANCE) == guidance), tuple(g for g in some if g.sites)

    (sites, reads), (kept, joined) = parts(guidance=False), parts(guidance=True)
    return [Writes(sites), Reads(reads, table), Guidance(kept, joined, table)]


def used_forms(plan: Plan) -> list[PlanForm | None]:
    """The plan's form for each selector, None where it is plain and where every step computes."""
    return [plan.form(k) if _forecasts(plan, k) else None for k in range(len(plan.sites))]


def _forecasts(plan: Plan, selector: int) -> bool:
    return any(row[selector] != Decision.COMPUTE for row in plan.schedule)
