"""The graphs of a plan with a trigger: a prefix that ends where the trigger looks, and one suffix per row.

    prefix (inputs, seen) -> (watched values, numbers, tensors that suffixes take)
    suffix of a row (inputs, tensors, anchors, coefficients, seen) -> (outputs, writes, watched values, numbers)

A row holds 1 for a site that is computed and kept, 0 for one that is forecast and IDLE for one that is neither: what
comes before a forecast is not needed. The first call of a stream has nothing to compare with: it runs `start`, the
whole denoiser in one region.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from dcc.decisions import Decision
from dcc.discover.sites import Sites
from dcc.errors import PolicyError
from dcc.passes.base import GUIDANCE, Group, Look, Port, Row, Site, Table
from dcc.passes.graph import nodes_by_name, returned
from dcc.passes.insert_measures import Measures
from dcc.passes.same_sizes import carries_batch
from dcc.passes.split_at import ancestors, prefix, suffix
from dcc.passes.values import Distance, Watched, emitted
from dcc.plans.plan import Plan, is_full
from dcc.plans.triggers import BEFORE, Measure
from dcc.torch_internals import symbols_of
from dcc.variants.selection import cache_orders
from dcc.variants.variant import Variant

MAX_ROWS = 16  # distinct rows that one captured graph is lowered for


class TriggerGraphs:
    """The prefix and suffixes of one captured graph, made when a row is first asked for.

    `make(row, name)` runs the passes on a copy of the graph.
    """

    def __init__(
        self, plan: Plan, sites: Sites, selected: Sequence[Sequence[Site]], make: Callable[[Row, str], Variant]
    ) -> None:
        self.plan, self.sites, self.selected, self.make = plan, sites, selected, make
        self.captured = captured = sites.captured
        trigger = plan.trigger
        assert trigger is not None  # graphs are built for plans that have one
        self.measures = trigger.measures
        self.full = (1,) * len(plan.sites)
        self.ports = {measure: self._port(measure) for measure in self.measures}
        before = [self.ports[m] for m in self.measures if m.when == BEFORE]
        self.inside = ancestors(captured.graph_module, [n for p in before for n in (p.out, p.base) if n is not None])
        for group, name in zip(selected, plan.sites, strict=True):
            if any(port.out in self.inside for site in group for port in site.ports):
                raise PolicyError(f"the trigger looks after the cached site {name!r}; cache what comes later")
        self.nodes = nodes_by_name(captured.graph_module)
        self.batch = str(returned(captured.graph_module)[0].meta["val"].shape[0])
        if any(site.kind == GUIDANCE for group in selected for site in group):
            raise PolicyError("a trigger cannot forecast the site 'uncond'; give it a schedule of its own")
        self.head: tuple[Variant | None, tuple[str, ...]] = (None, ())  # the prefix, and what it hands to the suffixes
        self.rows: dict[tuple[int, ...], Variant] = {}  # the suffixes
        self.flops: dict[tuple[int, ...], int] = {}
        self.start = make(self._row(self.full, measured=False), "start")
        self._add(self.full)
        self._add(trigger.sample_row(len(self.full)))

    def _add(self, row: tuple[int, ...]) -> None:
        """Makes the suffix of a row, and the prefix anew where it takes more from it than those so far."""
        if row in self.rows:
            return
        whole = self.make(self._row(row, measured=True), "row" + "".join(map(str, row)))
        graph_module, taken = suffix(whole.graph_module, self.inside, ())
        before, handed = self.head
        new = tuple(name for name in taken if name not in handed)
        if new or before is None:
            self.head = self._prefix(handed + new), handed + new
        self.flops[row] = self._flops(row)
        self.rows[row] = Variant(whole.name, graph_module, whole.outputs)

    def known(self, row: tuple[int, ...]) -> tuple[int, ...]:
        """The row itself, with its suffix made where it is new; not for two threads at once.

        Where MAX_ROWS are there already, it is the cheapest of them that computes all that the row computes. A row that
        does not fit the plan, as a trigger of the user's own may decide, is the one that computes everything.
        """
        if row in self.rows:
            return row
        if len(row) != len(self.full) or not set(row) <= {Decision.COMPUTE, Decision.FORECAST, Decision.IDLE}:
            return self.full
        if len(self.rows) < MAX_ROWS:
            self._add(row)
            return row
        covering = [known for known in self.rows if all(k in (1, r) for k, r in zip(known, row, strict=True))]
        return min(covering, key=lambda known: self.flops[known])

    def batched(self, name: str) -> bool:
        """Whether a value has the samples of the batch as its first dimension."""
        return carries_batch(self.captured.graph_module, self.nodes[name])

    @property
    def separable(self) -> bool:
        """Whether samples can run apart: all that is handed over or kept has the batch first or not at all."""
        if self.batch.isdigit():
            return False
        names = [*self.head[1], *self.captured.inputs.values(), *(p.out for p in self.ports.values())]
        names += [port.out for group in self.selected for site in group for port in site.ports]
        shapes = {name: self.nodes[name].meta["val"].shape for name in names if name in self.nodes}
        return all(self.batched(n) or not any(self.batch in symbols_of(size) for size in s) for n, s in shapes.items())

    def looks(self, row: tuple[int, ...] | None) -> list[Measure]:
        """What is measured in a row, or, for None, before the decision."""
        if row is None:
            return [m for m in self.measures if m.when == BEFORE]
        drafted = not is_full(row)
        return [m for m in self.measures if m.when != BEFORE and (m.against == "forecast") == drafted]

    def watched(self, row: tuple[int, ...] | None) -> list[Port]:
        """Values that are returned in a row, or, for None, by the prefix."""
        if row is None:
            wanted = [self.ports[m] for m in self.looks(None)]
        else:
            wanted = [self.ports[m] for m in self.measures if m.when != BEFORE] if is_full(row) else []
            wanted = [port for port in wanted if port not in self.watched(None)]
        return list(dict.fromkeys(wanted))

    def _prefix(self, handed: Sequence[str]) -> Variant | None:
        """What comes before the decision, with all that the suffixes take; None where nothing is looked at."""
        ports, looks = self.watched(None), self.looks(None)
        if not looks:
            return None
        order = Measures(tuple(ports), tuple(self.look(m) for m in looks), self.plan.anchors)
        whole = self.make(Row((order,)), "prefix")
        returned = [*map(Watched, ports), *(Distance(look) for look in order.looks)]
        nodes = [emitted(whole.graph_module, value) for value in returned]
        names = [*(node.name for node in nodes if node is not None), *handed]
        return Variant("prefix", prefix(whole.graph_module, names), 0)

    def _row(self, row: tuple[int, ...], measured: bool) -> Row:
        """The passes' row: at the start everything is watched, later only what the prefix does not give."""
        watched = self.watched(row) if measured else [*self.watched(None), *self.watched(self.full)]
        looks = [self.look(m) for m in self.looks(row)] if measured else []
        ports = dict.fromkeys([*watched, *(look.port for look in looks)])
        computed = [s for group, d in zip(self.selected, row, strict=True) if d == Decision.COMPUTE for s in group]
        forecast = [tuple(group) for group, d in zip(self.selected, row, strict=True) if d == Decision.FORECAST]
        groups = [Group(sites, index) for index, sites in enumerate(forecast)]
        orders = cache_orders(computed, groups, Table(len(groups), self.plan.anchors))
        return Row((*orders, Measures(tuple(ports), tuple(looks), self.plan.anchors)))

    def look(self, measure: Measure) -> Look:
        """What the graph has to return for a trigger's measure."""
        return Look(self.ports[measure], measure.against, measure.norm)

    def _port(self, measure: Measure) -> Port:
        """The largest port of the measured site, with its base where the residual is meant."""
        (site,) = self.sites.select(measure.site)[:1]
        port = max(site.ports, key=lambda p: self.sites.costs[p.out].bytes)
        return port if measure.residual else Port(port.out)

    def _flops(self, row: tuple[int, ...]) -> int:
        flow, costs = self.sites.flow, self.sites.costs
        groups = [group for group, d in zip(self.selected, row, strict=True) if d == Decision.FORECAST]
        forecast = [port for group in groups for site in group for port in site.ports]
        verified = [self.ports[m].out for m in self.looks(row)]
        needed = flow.needed(forecast) | self.inside
        needed |= flow.needed_for(verified, forecast)
        return sum(costs[name].flops for name in needed if name in costs)
