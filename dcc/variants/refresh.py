"""Which tokens of which sites a row computes afresh: what a plan's TokensForms ask of passes/refresh_tokens.py."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch.fx import Node

from dcc.decisions import Decision
from dcc.discover.sites import Sites
from dcc.errors import PlanError
from dcc.passes.base import Refresh, Site
from dcc.passes.dataflow import OUTPUT
from dcc.passes.graph import arguments, nodes_by_name, op_name, returned, shape, sizes
from dcc.passes.stream_walk import SHAPE_CHANGES, SUMS
from dcc.passes.token_wise import Region, residual_ends, token_region
from dcc.plans.forms import Form, TokensForm


def refreshes(
    sites: Sites, selected: Sequence[Sequence[Site]], forms: Sequence[Form | None], row: Sequence[int]
) -> tuple[Refresh, ...]:
    """What a row of the schedule does with each site whose form has tokens. Raises PlanError where one cannot."""
    if not any(isinstance(form, TokensForm) for form in forms):
        return ()
    nodes = nodes_by_name(sites.captured.graph_module)
    output = returned(sites.captured.graph_module)[0]
    found: list[Refresh] = []
    sums: dict[str, Node] = {}
    for k, form in enumerate(forms):
        if not isinstance(form, TokensForm):
            continue
        ratios = form.ratios
        if len(ratios) not in (1, len(selected[k])):
            raise PlanError(
                f"'tokens' has {len(ratios)} ratios for {len(selected[k])} sites; give one, or one per site"
            )
        for index, site in enumerate(selected[k]):
            region, sums[site.name] = region_of(sites, nodes, site)
            found.append(
                Refresh(
                    site,
                    row[k],
                    form.select,
                    float(ratios[index % len(ratios)]),
                    region.nodes,
                    region.ends,
                    tuple((name, float(value)) for name, value in form.options),
                    salt=len(found),
                    last=_output_last(nodes, site, output) if form.select == "noise" else None,
                )
            )
    return tuple(_led(refresh, found, nodes, sums) for refresh in found)


def region_of(sites: Sites, nodes: dict[str, Node], site: Site) -> tuple[Region, Node]:
    """What makes a site's value token by token, and the sum that the value is added in (or the value itself).

    Raises PlanError, with the reason, where there is none.
    """
    if len(site.ports) != 1 or site.ports[0].base is not None:
        raise PlanError(f"{site.name!r} has no single value to compute by tokens; choose branches, such as 'mlp'")
    value = nodes[site.ports[0].out]
    ends, addition = residual_ends(value)
    block = site.name.rpartition("/")[0]
    ends |= {port.out for name in (f"{block}/heads",) if site.kind == "attn+mlp" for port in sites[name].ports}
    ends |= {port.out for name in ("hidden",) if site.kind == "output" and name in sites for port in sites[name].ports}
    region = token_region(value, ends)
    if isinstance(region, str):
        raise PlanError(f"{site.name!r} cannot be computed by tokens: {region}")
    return region, addition or value


def holds_output_tokens(sites: Sites, site: Site) -> bool:
    """Whether the site has the tokens of the model's output, with or without others around them."""
    graph_module = sites.captured.graph_module
    try:
        _output_last(nodes_by_name(graph_module), site, returned(graph_module)[0])
    except PlanError:
        return False
    return True


def refresh_flops(sites: Sites, forecast: Sequence[Any], refreshed: Sequence[Refresh]) -> int:
    """FLOPs of one call: what forecasts leave to be computed, and the computed share of each refreshed region.

    The choice of tokens is not counted.
    """
    flow, fresh = sites.flow, [refresh for refresh in refreshed if refresh.decision == Decision.REFRESH]
    taken = {
        name
        for refresh in fresh
        for node in refresh.nodes
        for name in flow.digraph.predecessors(node)
        if name not in refresh.nodes
    }
    alive = flow.needed_for([OUTPUT, *sorted(taken)], forecast)
    nodes = nodes_by_name(sites.captured.graph_module)
    total = sum(sites.costs[name].flops for name in alive if name in sites.costs)
    for refresh in fresh:
        share = _share(refresh, nodes, sites)
        total += round(share * sum(sites.costs[name].flops for name in refresh.nodes if name not in alive))
    return total


def state_bytes(selected: Sequence[Sequence[Site]], forms: Sequence[Form | None]) -> int:
    """Bytes of the corrections that refreshed sites keep besides their anchors; scores and labels are not counted."""
    return sum(site.bytes for k, form in enumerate(forms) if isinstance(form, TokensForm) for site in selected[k])


def _share(refresh: Refresh, nodes: dict[str, Node], sites: Sites) -> float:
    tokens = sites.costs[refresh.site.ports[0].out].shape[1]
    if refresh.select == "cluster":
        return min(refresh.option("clusters") / tokens, 1.0)
    if refresh.last is None:
        return max(round(refresh.ratio * tokens), 1) / tokens
    own = sites.costs[returned(sites.captured.graph_module)[0].name].shape[1]
    return (max(round(refresh.ratio * own), 1) + tokens - own) / tokens


def _led(refresh: Refresh, found: list[Refresh], nodes: dict[str, Node], sums: dict[str, Node]) -> Refresh:
    """The refresh with its leader, whose clusters it shares: the last clustered site with as many tokens."""
    if refresh.select != "cluster":
        return refresh
    own = _tokens(nodes, refresh.site)
    alike = [r.site for r in found if r.select == "cluster" and _tokens(nodes, r.site) == own]
    leader = max(alike, key=lambda site: nodes[site.ports[0].out])
    clusters = refresh.option("clusters")
    if clusters > sizes(nodes[refresh.site.ports[0].out])[1]:
        raise PlanError(f"{refresh.site.name!r} has fewer tokens than {clusters:.0f} clusters; ask for fewer")
    return replace(refresh, tokens=sums[leader.name].name, leader=leader.name)


def _output_last(nodes: dict[str, Node], site: Site, output: Node) -> bool | None:
    """Whether the model output's tokens are the last (True) or first ones of the site's; None where it has no others.

    Found at the concatenation of tokens that the site's residual stream comes from. Raises PlanError where none is.
    """
    if len(shape(output)) != 3:
        raise PlanError(
            f"the model's output has shape {list(sizes(output))}, not [batch, tokens, channels]: it does not say by "
            "itself which tokens it is made of"
        )
    value = nodes[site.ports[0].out]
    own, wanted = str(shape(value)[1]), str(shape(output)[1])
    if own == wanted:
        return None
    todo, seen = [nodes[name] for name in residual_ends(value)[0]], set()
    while todo:
        node = todo.pop()
        if node in seen:
            continue
        seen.add(node)
        if op_name(node) == "cat" and arguments(node)[1:] == (1,) and str(shape(node)[1]) == own:
            places = [i for i, part in enumerate(arguments(node)[0]) if str(shape(part)[1]) == wanted]
            if len(places) == 1 and places[0] in (0, len(arguments(node)[0]) - 1):
                return places[0] > 0
        if op_name(node) in SUMS | SHAPE_CHANGES | {"getitem"}:
            todo.extend(node.all_input_nodes)
    raise PlanError(f"{site.name!r} has other tokens than the model's output, and where those stand is not known")


def _tokens(nodes: dict[str, Node], site: Site) -> str:
    return str(shape(nodes[site.ports[0].out])[1])
