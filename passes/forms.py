"""Forms of forecasts: how one value is made of more than one combination of its anchors, and the nodes that do it.

A group of sites names its form (base.Group). Each form takes `rows` rows of the coefficient input. Whatever else a form
needs is a graph input too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule, Node

from dcc.errors import PassError
from dcc.kernels import band_split, combine
from dcc.passes.base import Form, Group, Port, Site, Table
from dcc.passes.graph import insert_call, is_tensor, shape, sizes
from dcc.passes.values import Channels, Coefficients, declare


@dataclass(frozen=True)
class Bands(Form):
    """Low frequencies from one combination, high ones from another (kernels/band_split.py).

    Where a site has several ports, only the largest is split; the others are forecast as its high frequencies are.
    """

    transform: str
    cutoff: float
    grid: tuple[int, int] | None = None

    @property
    def rows(self) -> int:
        """Two coefficient rows: of the low frequencies and of the high ones."""
        return 2


@dataclass(frozen=True)
class Clusters(Form):
    """One row of coefficients per cluster of channels; `of_channel` is the cluster of each channel."""

    of_channel: tuple[int, ...]

    @property
    def rows(self) -> int:
        """Number of coefficient rows: one per cluster."""
        return max(self.of_channel) + 1


def coefficient_input(graph_module: GraphModule, table: Table, batch: Any) -> Node:
    """The graph input of coefficients [rows, batch, J] float32."""
    some = next(node.meta["val"] for node in graph_module.graph.nodes if is_tensor(node))
    return declare(
        graph_module, Coefficients(), some.new_empty((table.rows, batch, table.anchors), dtype=torch.float32)
    )


def insert_read(
    graph_module: GraphModule, group: Group, site: Site, port: Port, coefficients: Node, anchors: list[Node]
) -> Node:
    """Inserts the forecast of one port of a site of `group` at the graph's present insertion point; returns its node.

    Raises PassError where the clusters are of another number of channels than the value has.
    """
    form, first = group.form, group.first
    per_sample = str(next(iter(shape(anchors[0])), 1)) == str(shape(coefficients)[1])

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
        value.meta["val"] = high.meta["val"]  # not run on fake tensors: its bases would fix a symbolic number of tokens
        return value
    if isinstance(form, Clusters):
        channels = sizes(anchors[0])[combine.channel_dim(len(shape(anchors[0])))]
        if channels != len(form.of_channel):
            raise PassError(
                f"{site.name!r}: clusters of {len(form.of_channel)} channels do not fit a value of {channels}"
            )
        like = coefficients.meta["val"].new_empty((channels,), dtype=torch.int64)
        own = declare(graph_module, Channels(site.name, form.of_channel), like)
        return insert_call(graph_module, combine.by_channel, coefficients, first, anchors, per_sample, own)
    return combined(first)


def largest(graph_module: GraphModule, site: Site) -> Port:
    """The port of a site with the most numbers, the first of equal ones."""
    nodes = {node.name: node for node in graph_module.graph.nodes}

    def numbers(port: Port) -> int:
        return torch.Size(sizes(nodes[port.out])).numel()

    return max(site.ports, key=numbers)
