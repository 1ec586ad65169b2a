"""Forms of forecasts: how one value is made of more than one combination of its anchors; and the node that does it.

A row of a schedule names one for each group of sites it forecasts (base.Row.forms). Each takes `rows` rows of the
coefficient input. What a form needs besides is a graph input too, a Constant, which the runtime makes and binds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from dcc.errors import PassError
from dcc.kernels import band_split, combine
from dcc.passes.base import Form, Port, Row, Site, identifier
from dcc.passes.graph import add_placeholder, insert_call, shape, sizes


@dataclass(frozen=True)
class Bands(Form):
    """Low frequencies of one combination, high ones of another (kernels/band_split.py).

    Of a site with several values the largest is split; the others are forecast as its high frequencies are.
    """

    transform: str
    cutoff: float
    grid: tuple[int, int] | None = None
    rows: ClassVar[int] = 2


@dataclass(frozen=True)
class Clusters(Form):
    """A row of coefficients for every cluster of channels; `of_channel` names each channel's."""

    of_channel: tuple[int, ...]

    @property
    def rows(self) -> int:
        """One a cluster."""
        return max(self.of_channel) + 1


@dataclass(frozen=True)
class Constant:
    """A graph input that a form needs: its name, and the whole numbers that it holds."""

    name: str
    numbers: tuple[int, ...] = ()

    def make(self) -> Tensor:
        """The value on the CPU."""
        return torch.tensor(self.numbers, dtype=torch.int64)


def constants(row: Row) -> list[Constant]:
    """The constants that the forms of a row take."""
    found = []
    for group, sites in enumerate(row.forecast):
        form = row.form(group)
        if isinstance(form, Clusters):
            found.extend(Constant(_channels_name(site), form.of_channel) for site in sites)
    return found


def insert_read(
    graph_module: GraphModule, row: Row, group: int, site: Site, port: Port, coefficients: Node, anchors: list[Node]
) -> Node:
    """A forecast of one value of a site of `group`, at the graph's present insertion point.

    Raises PassError for clusters of another number of channels than the value has.
    """
    form, first = row.form(group), row.start(group)
    per_sample = str(shape(anchors[0])[0]) == str(shape(coefficients)[1])

    def combined(at: int) -> Node:
        return insert_call(graph_module, combine.reference, coefficients, at, anchors, per_sample)

    if isinstance(form, Bands):
        high = combined(first + 1)
        if port != largest(graph_module, site):
            return high
        with graph_module.graph.inserting_after(high):
            low = combined(first)
        with graph_module.graph.inserting_after(low):
            args = (low, high, form.transform, form.cutoff, form.grid)
            value = graph_module.graph.call_function(band_split.reference, args)
        value.meta["val"] = high.meta["val"]  # not run: its bases would fix a symbolic number of tokens
        return value
    if isinstance(form, Clusters):
        channels = sizes(anchors[0])[combine.channel_dim(len(shape(anchors[0])))]
        if channels != len(form.of_channel):
            raise PassError(
                f"{site.name!r}: clusters of {len(form.of_channel)} channels do not fit a value of {channels}"
            )
        name = _channels_name(site)
        found = [node for node in graph_module.graph.nodes if node.name == name]
        like = coefficients.meta["val"].new_empty((channels,), dtype=torch.int64)
        own = found[0] if found else add_placeholder(graph_module, name, like)
        return insert_call(graph_module, combine.by_channel, coefficients, first, anchors, per_sample, own)
    return combined(first)


def largest(graph_module: GraphModule, site: Site) -> Port:
    """The port of a site with the most numbers, the first of equal ones."""
    nodes = {node.name: node for node in graph_module.graph.nodes}

    def numbers(port: Port) -> int:
        return torch.Size(sizes(nodes[port.out])).numel()

    return max(site.ports, key=numbers)


def _channels_name(site: Site) -> str:
    return f"channels_{identifier(site.name)}"
