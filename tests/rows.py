"""Short spellings for tests of passes: what a row asks for, and the names of inputs and outputs."""

from __future__ import annotations

from collections.abc import Sequence

from dcc.passes import PASSES
from dcc.passes.base import VARIANT, Correction, Form, Group, Look, Port, Refresh, Row, Site, Table
from dcc.passes.hoist_invariants import Hoists
from dcc.passes.insert_correctors import Corrections
from dcc.passes.insert_measures import Measures
from dcc.passes.insert_sketches import Sketches
from dcc.passes.refresh_tokens import Refreshes
from dcc.passes.values import Anchor, Distance, Factor, Once, Seen, Watched, Write
from dcc.variants.selection import cache_orders

ROW_PASSES = tuple(pass_ for pass_ in PASSES if pass_.stage == VARIANT)


def row_of(
    computed: Sequence[Site] = (),
    forecast: Sequence[Sequence[Site]] = (),
    anchors: int = 1,
    refreshed: Sequence[Refresh] = (),
    watched: Sequence[Port] = (),
    looks: Sequence[Look] = (),
    forms: Sequence[Form | None] = (),
    corrections: Sequence[Correction] = (),
    hoisted: Sequence[str] = (),
    sketched: Sequence[Site] = (),
    sample: str = "",
) -> Row:
    """A row that computes and keeps some sites and forecasts groups of others from `anchors` values."""
    groups, first = [], 0
    for sites, form in zip(forecast, forms or [None] * len(forecast), strict=True):
        groups.append(Group(tuple(sites), first, form))
        first += form.rows if form else 1
    orders = [
        Corrections(tuple(corrections)),
        Refreshes(tuple(refreshed)),
        *cache_orders(computed, groups, Table(first, anchors)),
        Measures(tuple(watched), tuple(looks), anchors),
        Hoists(tuple(hoisted)),
    ]
    return Row((*orders, Sketches(tuple(sketched), sample)) if sketched else tuple(orders))


def anchor_name(site: Site, port: int, age: int) -> str:
    return Anchor(site.name, port, age).name


def write_name(site: Site, port: int) -> str:
    return Write(site.name, port).name


def watch_name(port: Port) -> str:
    return Watched(port).name


def seen_name(port: Port, which: str | int) -> str:
    return Seen(port, which).name


def look_name(look: Look) -> str:
    return Distance(look).name


def once_name(node: str) -> str:
    return Once(node).name


def factor_names(correction: Correction) -> list[str]:
    return [Factor(correction, index).name for index in range(len(correction.shapes))]
