"""Sites whose forecasts share their coefficients become one where they follow each other on a residual stream.

    x1 = x0 + r1; x2 = x1 + r2, both forecast by sum_j c_j    -->    x2 = x0 + sum_j c_j (R1 + R2)_j

Forecasts commute with sums, so one tensor per residual stream is kept instead of one per block or branch: memory is
O(J), not O(J * sites). Exact up to float rounding. A branch with something between it and its sum stays as it is,
because that (a gate above all) changes from step to step. Rewrites which sites are cached, before any row is made; the
graph is only read. Refuses nothing: sites that cannot be joined stay as they are.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Protocol

import networkx as nx
import torch
from torch.fx import GraphModule, Node

from dcc.passes.base import GUIDANCE, SITES, Order, Pass, Port, Site
from dcc.passes.costs import Cost
from dcc.passes.dataflow import OUTPUT, Dataflow
from dcc.passes.graph import nodes_by_name
from dcc.passes.same_sizes import same_shape


class Facts(Protocol):
    """What is known of the captured graph; dcc.discover.sites.Sites implements it."""

    @property
    def flops(self) -> int:
        """FLOPs of one call."""
        ...

    @property
    def graph_module(self) -> GraphModule:
        """The captured graph."""
        ...

    @property
    def costs(self) -> dict[str, Cost]:
        """The cost of every node."""
        ...

    @property
    def flow(self) -> Dataflow:
        """The graph's data flow."""
        ...


@dataclass
class Selected(Order):
    """The sites of each selector, which the pass rewrites; `joins` says for each whether its sites may be joined."""

    groups: list[tuple[Site, ...]]
    joins: tuple[bool, ...]
    facts: Facts


class CoalesceForecasts(Pass):
    """Keeps one tensor where several would be forecast with the same coefficients and summed."""

    name: ClassVar[str] = "coalesce_forecasts"
    stage: ClassVar[str] = SITES
    takes = Selected

    def apply(self, graph_module: GraphModule, order: Selected) -> int:
        before, given = sum(map(len, order.groups)), list(order.groups)
        for k, group in enumerate(given):
            if order.joins[k]:
                others = [site for other in given if other is not group for site in other]
                order.groups[k] = coalesced(group, order.facts, others)
        return before - sum(map(len, order.groups))


def coalesced(group: Sequence[Site], sites: Facts, others: Iterable[Site] = ()) -> tuple[Site, ...]:
    """The sites of one selector, with those that follow each other joined; `others` are sites of other selectors."""
    if len(group) < 2 or any(site.kind == GUIDANCE for site in group):
        return tuple(group)
    flow, nodes = sites.flow, nodes_by_name(sites.graph_module)
    ports = {(site.name, port): port for site in group for port in site.ports}
    alive = flow.needed(ports.values())
    kept = {name for site in others for port in site.ports for name in (port.out, port.base)} | {OUTPUT}
    stream = nx.DiGraph()  # values of the residual streams; an edge is a forecast that is added between two of them
    for key, port in ports.items():
        link = _link(port, nodes, alive, {p.out for p in ports.values()})
        if link is not None and link[1] not in stream:
            stream.add_edge(*link, key=key)
    joined: dict[tuple[str, Port], int] = {}
    made: list[Site] = []
    for path in _paths(stream, flow, alive, kept):
        keys = [stream.edges[edge]["key"] for edge in nx.utils.pairwise(path)]
        joined |= dict.fromkeys(keys, len(made))
        fact = sites.costs.get(path[-1], Cost(0, 0, ()))
        name = f"{keys[0][0]}..{keys[-1][0]}"
        name += f":{len(made)}" if any(name == site.name for site in made) else ""
        saved = sites.flops - flow.flops(sites.costs, [Port(path[-1], path[0])])
        made.append(Site(name, "residual", (Port(path[-1], path[0]),), (fact.shape,), fact.bytes, saved))
    result = [*made, *(part for site in group if (part := _rest(site, joined)) is not None)]
    before, after = (flow.flops(sites.costs, [p for s in some for p in s.ports]) for some in (group, result))
    return tuple(result) if after == before else tuple(group)


def _link(port: Port, nodes: dict[str, Node], alive: set[str], outs: set[str]) -> tuple[str, str] | None:
    """The residual stream's values before and after the port's forecast is added; None where it is not just added."""
    if port.base is not None:
        return port.base, port.out
    users = [user for user in nodes[port.out].users if user.name in alive]
    if len(users) != 1 or users[0].name in outs or users[0].target is not torch.ops.aten.add.Tensor:
        return None
    (add,) = users
    sources = [arg for arg in add.args if isinstance(arg, Node) and arg.name != port.out]
    if add.kwargs or len(sources) != 1 or not same_shape(sources[0], add) or not same_shape(nodes[port.out], add):
        return None
    return sources[0].name, add.name


def _paths(stream: nx.DiGraph, flow: Dataflow, alive: set[str], kept: set[str | None]) -> list[list[str]]:
    """The longest runs of links in which each value between two links is used by the next link only."""

    def passed(value: str) -> bool:
        if stream.in_degree(value) != 1 or stream.out_degree(value) != 1 or value in kept:
            return False
        (after,) = stream.successors(value)
        return not (set(flow.digraph.successors(value)) & (alive | {OUTPUT})) - {after}

    found = []
    for value in stream.nodes:
        for after in list(stream.successors(value)) if not passed(value) else ():
            path = [value, after]
            while passed(path[-1]):
                path.append(next(stream.successors(path[-1])))
            if len(path) > 2:
                found.append(path)
    return found


def _rest(site: Site, joined: dict[tuple[str, Port], int]) -> Site | None:
    """The site with those of its ports that were not joined; None where all were."""
    left = [index for index, port in enumerate(site.ports) if (site.name, port) not in joined]
    if len(left) == len(site.ports):
        return site
    if not left:
        return None
    return replace(
        site,
        ports=tuple(site.ports[i] for i in left),
        shapes=tuple(site.shapes[i] for i in left if i < len(site.shapes)),
    )
