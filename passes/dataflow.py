"""Analysis: the graph as a networkx digraph, which tells what a forecast makes dead, dominators and cheapest cuts."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterable, Mapping

import networkx as nx
from torch.fx import GraphModule, Node

from dcc.passes.base import Port
from dcc.passes.costs import Cost
from dcc.passes.graph import carries_tensors

OUTPUT = "output"


class Dataflow:
    """Data flow of one graph. The digraph's nodes are the graph's node names; the graph's output is `OUTPUT`."""

    def __init__(self, graph_module: GraphModule) -> None:
        self.digraph = nx.DiGraph()
        self.data = {_name(node) for node in graph_module.graph.nodes if node.op == "output" or carries_tensors(node)}
        for node in graph_module.graph.nodes:
            self.digraph.add_node(_name(node))
            self.digraph.add_edges_from((_name(node), _name(user)) for user in node.users)

    def needed(self, forecast: Iterable[Port] = ()) -> set[str]:
        """Names of the nodes that still run when the ports' values are forecast instead of computed."""
        return self.needed_for([OUTPUT], forecast)

    def needed_for(self, wanted: Iterable[str], forecast: Iterable[Port] = ()) -> set[str]:
        """Names of the nodes that still run to compute the `wanted` ones when the ports' values are forecast."""
        bases = {port.out: port.base for port in forecast}
        alive: set[str] = set()
        todo = list(wanted)
        while todo:
            name = todo.pop()
            if name in bases:  # not computed: forecast from its anchors and its base
                base = bases[name]
                if base is not None and base not in alive:
                    todo.append(base)
            elif name not in alive:
                alive.add(name)
                todo.extend(self.digraph.predecessors(name))
        return alive

    def spared(self, forecast: Iterable[Port]) -> set[str]:
        """Names of the needed nodes that do not run when the ports' values are forecast.

        The same as `needed() - needed(forecast)`, but found by walking back from the ports: the time grows with the
        number of nodes spared, not with the graph.
        """
        bases = {port.out: port.base for port in forecast if port.out in self.users}
        left = Counter(base for base in bases.values() if base is not None)  # change in the number of a node's users
        gone = set(bases)
        lost = [source for name in bases for source in self.digraph.predecessors(name)]  # one entry per lost user
        while lost:
            name = lost.pop()
            left[name] -= 1
            if self.users[name] + left[name] > 0:
                continue
            if name not in bases:
                gone.add(name)
                lost.extend(self.digraph.predecessors(name))
            elif bases[name] is not None:  # its forecast is not needed either, and takes its base no more
                lost.append(bases[name])
        return gone

    @functools.cached_property
    def users(self) -> dict[str, int]:
        """How many needed nodes take the value of each needed node; the output counts as taken."""
        needed = self.needed()
        return {name: sum(u in needed for u in self.digraph.successors(name)) or 1 for name in needed}

    def flops(self, costs: Mapping[str, Cost], forecast: Iterable[Port] = ()) -> int:
        """FLOPs of one call in which the ports' values are forecast."""
        return sum(costs[name].flops for name in self.needed(forecast) if name in costs)

    def depends_on(self, sources: Iterable[str]) -> set[str]:
        """Names of the nodes that some source reaches, the sources included."""
        sources = list(sources)
        return set(sources).union(*(nx.descendants(self.digraph, source) for source in sources))

    def dominators(self, source: str) -> list[str]:
        """Values that all data from `source` passes on its way to the output, the last one first; without both ends.

        Data means tensors: sizes that are read off the source do not count as a path.
        """
        dominator = nx.immediate_dominators(self.digraph.subgraph(self.data), source)
        chain: list[str] = []
        node = dominator.get(OUTPUT, source)
        while node != source and node is not None:
            chain.append(node)
            node = dominator.get(node)
        return chain

    def cheapest_cut(self, sources: Iterable[str], sinks: Iterable[str], costs: Mapping[str, Cost]) -> list[str]:
        """The values of least total bytes that separate `sources` from `sinks`; empty where nothing separates them.

        A minimum vertex cut: each value is an edge whose capacity is its bytes, data flow has no capacity limit, and
        a value that is no tensor cannot be cut.
        """
        split = nx.DiGraph()
        for name in self.digraph.nodes:
            size = costs[name].bytes if name in costs else 0
            split.add_edge((name, 0), (name, 1), **({"capacity": size} if size else {}))
        for a, b in self.digraph.edges:
            split.add_edge((a, 1), (b, 0))
        split.add_edges_from(("source", (name, 0)) for name in sources)
        split.add_edges_from(((name, 0), "sink") for name in sinks)
        try:
            _, (left, _) = nx.minimum_cut(split, "source", "sink")
        except nx.NetworkXUnbounded:
            return []
        return [name for name in self.digraph.nodes if (name, 0) in left and (name, 1) not in left]


def _name(node: Node) -> str:
    return OUTPUT if node.op == "output" else node.name
