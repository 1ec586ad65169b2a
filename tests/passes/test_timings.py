"""timings: every node has its seconds, and the slow one has the most."""

import torch

from dcc.passes.timings import timings

aten = torch.ops.aten


def product(x, w):
    small = aten.add.Tensor(x, 1)
    large = aten.mm.default(w, w)
    return (aten.mm.default(small, large),)


def test_every_node_is_timed(build):
    values = {"x": torch.randn(1, 512), "w": torch.randn(512, 512)}
    graph_module = build(product, **values)
    seconds = timings(graph_module, list(values.values()))
    assert set(seconds) == {node.name for node in graph_module.graph.nodes}
    assert all(value >= 0 for value in seconds.values())
    assert max(seconds, key=seconds.__getitem__) == "mm_default"


def test_the_median_leaves_one_slow_call_out(build, monkeypatch):
    """The clock shows 1 s for nodes of the first call, 5 s for those of one other, 2 s else; 4 nodes per call."""
    values = {"x": torch.randn(1, 4), "w": torch.randn(4, 4)}
    graph_module = build(product, **values)
    nodes = len(graph_module.graph.nodes)
    per_call = [1.0, 2.0, 5.0, 2.0]
    ticks = [tick for call in per_call for _ in range(nodes) for tick in (0.0, call)]
    monkeypatch.setattr("dcc.passes.timings.time.perf_counter", iter(ticks).__next__)
    assert set(timings(graph_module, list(values.values())).values()) == {2.0}
