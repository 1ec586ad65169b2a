"""Analysis: the skip connections and resolution levels of a U-Net, and where to cut below each of them.

A skip connection is a concatenation of a value with an older value that it was made from. Caching the newer one leaves
only the work around the skip: that is DeepCache (arXiv 2312.00858), whose branch 0 is the outermost skip.

A level is a spatial size at which convolutions run. Level 0 is the finest. The cut at level k is the set of values of
least bytes that separates all work at level k and deeper from the convolutions of the finer levels after it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import networkx as nx
from torch.fx import GraphModule

from dcc.passes.costs import Cost
from dcc.passes.dataflow import Dataflow
from dcc.passes.graph import op_name


def levels(graph_module: GraphModule, costs: Mapping[str, Cost]) -> list[set[str]]:
    """Names of the convolutions at each spatial size, finest first; sizes are products of all dimensions after two."""
    by_size: dict[int, set[str]] = {}
    for node in graph_module.graph.nodes:
        if op_name(node).startswith("conv") and len(costs[node.name].shape) >= 4:
            by_size.setdefault(math.prod(costs[node.name].shape[2:]), set()).add(node.name)
    return [by_size[size] for size in sorted(by_size, reverse=True)]


def level_cut(level: int, all_levels: list[set[str]], flow: Dataflow, costs: Mapping[str, Cost]) -> list[str]:
    """Names of the values to cache at `level` (1 is the first below the finest); empty where no cut exists."""
    deep = set().union(*all_levels[level:])
    shallow = set().union(*all_levels[:level])
    after = flow.depends_on(deep) & shallow
    return flow.cheapest_cut(deep, after, costs) if after else []


def skip_pairs(graph_module: GraphModule, flow: Dataflow) -> list[tuple[str, str]]:
    """Names of the newer and the older operand of all skip connections, outermost (last executed) first."""
    names = [node.name for node in graph_module.graph.nodes]
    position = {name: index for index, name in enumerate(names)}
    pairs = []
    for node in graph_module.graph.nodes:
        operands = node.all_input_nodes if op_name(node) == "cat" else []
        if len(operands) == 2:
            older, newer = sorted((operand.name for operand in operands), key=position.__getitem__)
            between = flow.digraph.subgraph(names[position[older] : position[newer] + 1])  # all that a path may pass
            if nx.has_path(between, older, newer):
                pairs.append((newer, older))
    return pairs[::-1]
