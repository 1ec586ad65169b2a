"""A variant: the graph of one row of the schedule, a pure function of tensors that says what it takes and gives."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

from torch.fx import GraphModule

from dcc.capture.captured import Captured
from dcc.passes.base import Pass, Row
from dcc.passes.graph import copy_of, returned
from dcc.passes.values import VALUE, Input, Next, Output, Write
from dcc.variants.observe import Observer


@dataclass(eq=False)
class Variant:
    """A graph `(inputs) -> (the denoiser's own outputs, then others)`; the first `outputs` are the denoiser's own."""

    name: str
    graph_module: GraphModule
    outputs: int

    @functools.cached_property
    def takes(self) -> tuple[Input, ...]:
        """What each input is, in order."""
        return tuple(node.meta[VALUE] for node in self.graph_module.graph.nodes if node.op == "placeholder")

    @functools.cached_property
    def gives(self) -> tuple[Output | str, ...]:
        """What each output after the denoiser's own is, in order; a node's name where a split hands it over."""
        nodes = returned(self.graph_module)[self.outputs :]
        return tuple(node.meta.get(VALUE, node.name) for node in nodes)

    @functools.cached_property
    def inputs(self) -> tuple[str, ...]:
        """Names of the inputs, in order."""
        return tuple(node.name for node in self.graph_module.graph.nodes if node.op == "placeholder")

    @functools.cached_property
    def writes(self) -> tuple[str, ...]:
        """Names of the outputs after the denoiser's own, in order."""
        return tuple(node.name for node in returned(self.graph_module)[self.outputs :])

    @functools.cached_property
    def states(self) -> tuple[str, ...]:
        """Names of the states of token selection that it returns anew."""
        return tuple(given.state.name for given in self.gives if isinstance(given, Next))

    @functools.cached_property
    def kept(self) -> tuple[tuple[str, tuple[int, ...]], ...]:
        """For every site that it keeps, the places of its ports' values among the outputs."""
        found: dict[str, dict[int, int]] = {}
        for index, given in enumerate(self.gives):
            if isinstance(given, Write):
                found.setdefault(given.site, {})[given.port] = self.outputs + index
        return tuple((site, tuple(places[port] for port in sorted(places))) for site, places in found.items())


def variant(
    captured: Captured, row: Row, name: str, observer: Observer, passes: Sequence[Pass] | None = None
) -> Variant:
    """The variant that the passes make of a copy of the captured graph."""
    graph_module = copy_of(captured.graph_module)
    own = len(returned(graph_module))
    observer.run_all(graph_module, row, name, passes)
    return Variant(name, graph_module, own)
