"""insert_sketches: fires, refuses, numbers agree, order declared."""

import pytest
import torch

from dcc.errors import PassError
from dcc.kernels import sketch
from dcc.passes import PASSES, insert_sketches
from dcc.passes.base import Port, Site
from dcc.passes.insert_sketches import InsertSketches, Sketches, groups
from dcc.passes.text import text
from dcc.passes.verify import verify

aten = torch.ops.aten
RESIDUAL = Site("h", "residual", (Port("add_tensor", "x"),))
OUTPUT = Site("output", "output", (Port("gelu_default"),))


def residual(x, w):
    h = aten.add.Tensor(x, aten.linear.default(x, w))
    return (aten.gelu.default(h),)


def examples(dtype=torch.float32):
    return {"x": torch.randn(2, 3, dtype=dtype), "w": torch.randn(3, 3, dtype=dtype)}


def test_fires(build):
    graph_module = build(residual, **examples())
    assert InsertSketches().apply(graph_module, Sketches((RESIDUAL,), "x")) == 2
    assert text(graph_module) == (
        "%0 = input x  # f32[2, 3]\n"
        "%1 = input w  # f32[3, 3]\n"
        "%2 = aten.linear.default(%0, %1)  # f32[2, 3]\n"
        "%3 = aten.add.Tensor(%0, %2)  # f32[2, 3]\n"
        "%4 = aten.stack.default([%0, %3])  # f32[2, 2, 3]\n"
        "%5 = dcc.kernels.sketch.reference(%4, %0)  # f32[2, 2, 3]\n"
        "%6 = dcc.kernels.sketch.coordinates(%4, %0)  # f32[2, 2, 3]\n"
        "%7 = aten.gelu.default(%3)  # f32[2, 3]\n"
        "return (%7, %5, %6)\n"
    )
    verify(graph_module, "test")


def test_a_value_of_several_sites_is_sketched_once(build):
    graph_module = build(residual, **examples())
    again = Site("again", "value", (Port("add_tensor"), Port("gelu_default")))
    assert groups(graph_module, [RESIDUAL, OUTPUT, again]) == [["x", "add_tensor", "gelu_default"]]


def test_large_values_do_not_wait_for_each_other(build, monkeypatch):
    monkeypatch.setattr(insert_sketches, "TOGETHER", 13)
    graph_module = build(residual, **examples())
    sites = [RESIDUAL, OUTPUT]
    assert groups(graph_module, sites) == [["x", "add_tensor"], ["gelu_default"]]
    monkeypatch.setattr(insert_sketches, "TOGETHER", 1)
    assert groups(graph_module, sites) == [["x"], ["add_tensor"], ["gelu_default"]]
    assert InsertSketches().apply(graph_module, Sketches(tuple(sites), "x")) == 6


def test_leaves_a_row_without_sites_alone(build):
    graph_module = build(residual, **examples())
    before = text(graph_module)
    assert InsertSketches().apply(graph_module, Sketches((), "x")) == 0
    assert text(graph_module) == before


@pytest.mark.parametrize("port", [Port("nowhere"), Port("add_tensor", "nowhere")], ids=["out", "base"])
def test_refuses_a_site_that_is_not_in_the_graph(build, port):
    graph_module = build(residual, **examples())
    with pytest.raises(PassError, match=r"insert_sketches.*nowhere"):
        InsertSketches().apply(graph_module, Sketches((Site("h", "value", (port,)),), "x"))


def test_refuses_a_sample_that_is_not_in_the_graph(build):
    graph_module = build(residual, **examples())
    with pytest.raises(PassError, match=r"insert_sketches.*nowhere"):
        InsertSketches().apply(graph_module, Sketches((RESIDUAL,), "nowhere"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def test_numbers_agree_with_eager(build, run, dtype):
    values = examples(dtype)
    expected = residual(**values)[0]
    graph_module = build(residual, **values)
    InsertSketches().apply(graph_module, Sketches((RESIDUAL, OUTPUT), "x"))
    output, sketches, chosen = run(graph_module, **values)
    stacked = torch.stack([values["x"], values["x"] + values["x"] @ values["w"].T, expected])
    assert torch.equal(output, expected)
    assert torch.equal(sketches, sketch.reference(stacked, values["x"]))
    assert torch.equal(chosen, sketch.coordinates(stacked, values["x"]))


def test_sketches_follow_other_shapes_than_the_captured(transformer, run):
    """The tiny transformer was captured for two samples of six tokens."""
    graph_module = transformer.graph()
    names = [node.name for node in graph_module.graph.nodes if node.target is aten.add.Tensor]
    site = Site("sum", "value", (Port(names[-1]),))
    before = len(run(transformer.graph(), **transformer.values()))
    InsertSketches().apply(graph_module, Sketches((site,), transformer.captured.inputs["x"]))
    x, t = torch.randn(3, 9, 4), torch.rand(3)
    outputs = run(graph_module, **transformer.values(x, t))
    assert torch.equal(outputs[0], transformer.module(x, t))
    assert outputs[before].shape == (1, 3, 9 * 8)


def test_order_is_declared():
    assert InsertSketches.after == ("drop_asserts",)
    assert InsertSketches.name not in [pass_.name for pass_ in PASSES]  # of calibration only, no part of a variant
