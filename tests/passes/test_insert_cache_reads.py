"""insert_cache_reads: fires, refuses, numbers agree, order declared."""

import pytest
import torch

from dcc.errors import PassError
from dcc.passes.base import Port, Site
from dcc.passes.drop_dead_nodes import DropDeadNodes
from dcc.passes.graph import nodes_by_name
from dcc.passes.insert_cache_reads import InsertCacheReads
from dcc.passes.insert_cache_writes import InsertCacheWrites
from dcc.passes.text import text
from dcc.passes.verify import verify

from ..rows import anchor_name, row_of

aten = torch.ops.aten
RESIDUAL = Site("h", "residual", (Port("add_tensor", "x"),))
BLOCKS = (Site("blocks.0", "residual", (Port("add", "x"),)), Site("blocks.1", "residual", (Port("add_1", "add"),)))


def residual(x, w):
    h = aten.add.Tensor(x, aten.linear.default(x, w))
    return (aten.gelu.default(h),)


def two_streams(x, y):
    a, b = aten.neg.default(x), aten.exp.default(y)
    return (aten.add.Tensor(a, aten.sum.dim_IntList(b, [1], True)),)


TWO_PORTS = Site("pair", "value", (Port("neg_default"), Port("exp_default")))


def examples():
    return {"x": torch.randn(2, 3), "w": torch.randn(3, 3)}


def test_fires(build):
    graph_module = build(residual, **examples())
    assert InsertCacheReads().run(graph_module, row_of(forecast=((RESIDUAL,),), anchors=2)) == 1
    assert text(graph_module) == (
        "%0 = input x  # f32[2, 3]\n"
        "%1 = input w  # f32[3, 3]\n"
        "%2 = input coefficients  # f32[1, 2, 2]\n"
        "%3 = input anchor_h_0_0  # f32[2, 3]\n"
        "%4 = input anchor_h_0_1  # f32[2, 3]\n"
        "%5 = aten.linear.default(%0, %1)  # f32[2, 3]\n"
        "%6 = aten.add.Tensor(%0, %5)  # f32[2, 3]\n"
        "%7 = dcc.kernels.combine.reference(%2, 0, [%3, %4], True)  # f32[2, 3]\n"
        "%8 = aten.add.Tensor(%0, %7)  # f32[2, 3]\n"
        "%9 = aten.gelu.default(%8)  # f32[2, 3]\n"
        "return (%9,)\n"
    )
    verify(graph_module, "test")
    assert not nodes_by_name(graph_module)["add_tensor"].users  # left dead, for drop_dead_nodes


def test_fires_on_a_site_with_two_ports(build):
    graph_module = build(two_streams, x=torch.ones(2, 3), y=torch.ones(2, 5))
    assert InsertCacheReads().run(graph_module, row_of(forecast=((TWO_PORTS,),), anchors=1)) == 2
    assert text(graph_module) == (
        "%0 = input x  # f32[2, 3]\n"
        "%1 = input y  # f32[2, 5]\n"
        "%2 = input coefficients  # f32[1, 2, 1]\n"
        "%3 = input anchor_pair_1_0  # f32[2, 5]\n"
        "%4 = input anchor_pair_0_0  # f32[2, 3]\n"
        "%5 = aten.neg.default(%0)  # f32[2, 3]\n"
        "%6 = dcc.kernels.combine.reference(%2, 0, [%4], True)  # f32[2, 3]\n"
        "%7 = aten.exp.default(%1)  # f32[2, 5]\n"
        "%8 = dcc.kernels.combine.reference(%2, 0, [%3], True)  # f32[2, 5]\n"
        "%9 = aten.sum.dim_IntList(%8, [1], True)  # f32[2, 1]\n"
        "%10 = aten.add.Tensor(%6, %9)  # f32[2, 3]\n"
        "return (%10,)\n"
    )


def test_leaves_a_row_that_forecasts_nothing_alone(build):
    graph_module = build(residual, **examples())
    before = text(graph_module)
    assert InsertCacheReads().run(graph_module, row_of(computed=(RESIDUAL,), anchors=2)) == 0
    assert text(graph_module) == before


@pytest.mark.parametrize("port", [Port("nowhere"), Port("add_tensor", "nowhere")], ids=["out", "base"])
def test_refuses_a_site_that_is_not_in_the_graph(build, port):
    graph_module = build(residual, **examples())
    with pytest.raises(PassError, match=r"insert_cache_reads.*nowhere"):
        InsertCacheReads().run(graph_module, row_of(forecast=((Site("h", "value", (port,)),),)))


def test_newest_anchor_alone_gives_its_value(build, run):
    values = examples()
    graph_module = build(residual, **values)
    InsertCacheReads().run(graph_module, row_of(forecast=((RESIDUAL,),), anchors=2))
    new, old = torch.randn(2, 3), torch.randn(2, 3)
    coefficients = torch.tensor([1.0, 0.0]).expand(1, 2, 2)
    (output,) = run(graph_module, **values, anchor_h_0_0=new, anchor_h_0_1=old, coefficients=coefficients)
    assert torch.equal(output, aten.gelu.default(values["x"] + new))


def test_each_group_reads_its_own_row_of_coefficients(build, run):
    groups = (
        (Site("a", "value", (Port("neg_default"),)),),
        (Site("b", "value", (Port("exp_default"),)),),
    )
    graph_module = build(two_streams, x=torch.ones(2, 3), y=torch.ones(2, 5))
    InsertCacheReads().run(graph_module, row_of(forecast=groups, anchors=1))
    a, b = torch.randn(2, 3), torch.randn(2, 5)
    values = {"x": a, "y": b, "anchor_a_0_0": a, "anchor_b_0_0": b}
    coefficients = torch.tensor([2.0, 3.0])[:, None, None].expand(2, 2, 1)
    (output,) = run(graph_module, **values, coefficients=coefficients)
    torch.testing.assert_close(output, 2 * a + (3 * b).sum(1, keepdim=True))


def test_base_that_is_itself_forecast_is_replaced(stack, run):
    graph_module = stack.graph()
    assert InsertCacheReads().run(graph_module, row_of(forecast=(BLOCKS,), anchors=1)) == 2
    DropDeadNodes().run(graph_module, row_of())
    assert not any("blocks" in node.name for node in graph_module.graph.nodes if node.name.startswith("p_"))
    x, r0, r1 = torch.randn(3, 3, 7, 8)
    values = stack.values(x, torch.rand(3)) | {
        anchor_name(BLOCKS[0], 0, 0): r0,
        anchor_name(BLOCKS[1], 0, 0): r1,
        "coefficients": torch.ones(1, 3, 1),
    }
    (output,) = run(graph_module, **values)
    torch.testing.assert_close(output, stack.module.head(x + r0 + r1))


def test_true_anchors_give_the_output(stack, run):
    x, t = torch.randn(3, 7, 8), torch.rand(3)
    writing, reading = stack.graph(), stack.graph()
    InsertCacheWrites().run(writing, row_of(computed=BLOCKS))
    output, first, second = run(writing, **stack.values(x, t))
    InsertCacheReads().run(reading, row_of(forecast=(BLOCKS,), anchors=2))
    values = stack.values(x, t) | {"coefficients": torch.tensor([1.0, 0.0]).expand(1, 3, 2)}
    for site, write in zip(BLOCKS, (first, second), strict=True):
        values |= {anchor_name(site, 0, 0): write, anchor_name(site, 0, 1): torch.full_like(write, 9.0)}
    (forecast,) = run(reading, **values)
    torch.testing.assert_close(forecast, output)


def test_a_write_whose_base_is_forecast_subtracts_the_forecast(stack, run):
    graph_module = stack.graph()
    row = row_of(computed=(BLOCKS[1],), forecast=((BLOCKS[0],),), anchors=1)
    InsertCacheWrites().run(graph_module, row)
    InsertCacheReads().run(graph_module, row)
    x, t, r0 = torch.randn(3, 7, 8), torch.rand(3), torch.randn(3, 7, 8)
    values = stack.values(x, t) | {anchor_name(BLOCKS[0], 0, 0): r0, "coefficients": torch.ones(1, 3, 1)}
    output, write = run(graph_module, **values)
    h = x + r0
    out = stack.module.blocks[1](h, t[:, None, None])
    torch.testing.assert_close(write, out - h)
    torch.testing.assert_close(output, stack.module.head(out))


def test_coefficients_are_one_vector_a_sample(build, run):
    values = examples()
    graph_module = build(residual, **values)
    InsertCacheReads().run(graph_module, row_of(forecast=((Site("h", "value", (Port("add_tensor"),)),),), anchors=1))
    anchor = torch.randn(2, 3)
    (output,) = run(graph_module, **values, anchor_h_0_0=anchor, coefficients=torch.tensor([[[1.0], [-2.0]]]))
    torch.testing.assert_close(output, aten.gelu.default(anchor * torch.tensor([[1.0], [-2.0]])))


def test_a_value_without_the_batch_uses_the_first_sample(build, run):
    def shared(x, table):
        return (aten.add.Tensor(x, aten.sum.default(aten.neg.default(table))),)

    graph_module = build(shared, x=torch.ones(2, 3), table=torch.ones(5, 4))
    InsertCacheReads().run(graph_module, row_of(forecast=((Site("n", "value", (Port("neg_default"),)),),), anchors=1))
    x, anchor = torch.randn(2, 3), torch.randn(5, 4)
    coefficients = torch.tensor([[[3.0], [7.0]]])
    (output,) = run(graph_module, x=x, table=anchor, anchor_n_0_0=anchor, coefficients=coefficients)
    torch.testing.assert_close(output, x + 3 * anchor.sum())


def test_forecast_output_is_read_too(build, run):
    values = examples()
    graph_module = build(residual, **values)
    site = Site("output", "output", (Port("gelu_default"),))
    InsertCacheReads().run(graph_module, row_of(forecast=((site,),), anchors=1))
    anchor = torch.randn(2, 3)
    (output,) = run(graph_module, **values, anchor_output_0_0=anchor, coefficients=torch.ones(1, 2, 1))
    assert torch.equal(output, anchor)


def test_order_is_declared():
    assert InsertCacheReads.after == ("insert_cache_writes",)
    assert not InsertCacheReads.optional
