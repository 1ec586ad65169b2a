"""insert_forecasts: fires, leaves alone, numbers agree, order declared."""

import pytest
import torch

from dcc.kernels import combine
from dcc.passes.base import Port, Site
from dcc.passes.insert_cache_reads import InsertCacheReads
from dcc.passes.insert_forecasts import InsertForecasts, is_cache_read
from dcc.passes.text import text
from dcc.passes.verify import verify

from ..rows import row_of

aten = torch.ops.aten


def negated(x):
    return (aten.exp.default(aten.neg.default(x)),)


NEG = Site("n", "value", (Port("neg_default"),))


def with_reads(build, x, sites=(NEG,), anchors=2):
    graph_module = build(negated, x=x)
    InsertCacheReads().run(graph_module, row_of(forecast=(sites,), anchors=anchors))
    return graph_module


def test_fires(build):
    graph_module = with_reads(build, torch.ones(2, 3))
    assert InsertForecasts().run(graph_module, row_of()) == 1
    assert text(graph_module) == (
        "%0 = input x  # f32[2, 3]\n"
        "%1 = input coefficients  # f32[1, 2, 2]\n"
        "%2 = input anchor_n_0_0  # f32[2, 3]\n"
        "%3 = input anchor_n_0_1  # f32[2, 3]\n"
        "%4 = aten.neg.default(%0)  # f32[2, 3]\n"
        "%5 = aten.select.int(%1, 0, 0)  # f32[2, 2]\n"
        "%6 = aten.select.int(%5, 1, 0)  # f32[2]\n"
        "%7 = aten.view.default(%6, [-1, 1])  # f32[2, 1]\n"
        "%8 = aten.mul.Tensor(%2, %7)  # f32[2, 3]\n"
        "%9 = aten.select.int(%5, 1, 1)  # f32[2]\n"
        "%10 = aten.view.default(%9, [-1, 1])  # f32[2, 1]\n"
        "%11 = aten.mul.Tensor(%3, %10)  # f32[2, 3]\n"
        "%12 = aten.add.Tensor(%8, %11)  # f32[2, 3]\n"
        "%13 = aten.exp.default(%12)  # f32[2, 3]\n"
        "return (%13,)\n"
    )
    verify(graph_module, "test")


def test_fires_in_bfloat16_with_float32_sums(build, golden):
    graph_module = with_reads(build, torch.ones(2, 3, 4, dtype=torch.bfloat16))
    assert InsertForecasts().run(graph_module, row_of()) == 1
    golden(text(graph_module))


def test_fires_on_a_value_without_the_batch(build, golden):
    def shared(x, table):
        return (aten.add.Tensor(x, aten.sum.default(aten.neg.default(table))),)

    graph_module = build(shared, x=torch.ones(2, 3), table=torch.ones(5, 4))
    InsertCacheReads().run(graph_module, row_of(forecast=((NEG,),), anchors=1))
    assert InsertForecasts().run(graph_module, row_of()) == 1
    golden(text(graph_module))


def test_leaves_other_calls_alone(build):
    graph_module = build(negated, x=torch.ones(2, 3))
    before = text(graph_module)
    assert InsertForecasts().run(graph_module, row_of(anchors=2)) == 0
    assert text(graph_module) == before


def test_spells_out_every_read(build):
    sites = (NEG, Site("e", "value", (Port("exp_default"),)))
    graph_module = with_reads(build, torch.ones(2, 3), sites, anchors=3)
    assert sum(map(is_cache_read, graph_module.graph.nodes)) == 2
    assert InsertForecasts().run(graph_module, row_of()) == 2
    assert not any(map(is_cache_read, graph_module.graph.nodes))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["f32", "bf16", "f16"])
@pytest.mark.parametrize("anchors", [1, 2, 4])
def test_numbers_agree_with_the_reference(build, run, dtype, anchors):
    x = torch.randn(3, 5, 7, dtype=dtype)
    past = [torch.randn(3, 5, 7, dtype=dtype) for _ in range(anchors)]
    coefficients = torch.randn(1, 3, anchors)
    graph_module = with_reads(build, x, anchors=anchors)
    values = {f"anchor_n_0_{age}": anchor for age, anchor in enumerate(past)}
    (eager,) = run(graph_module, x=x, coefficients=coefficients, **values)
    InsertForecasts().run(graph_module, row_of())
    (spelled,) = run(graph_module, x=x, coefficients=coefficients, **values)
    assert torch.equal(spelled, eager)
    assert torch.equal(spelled, combine.reference(coefficients, 0, past, True).exp())


def test_bfloat16_accumulates_in_float32(build, run):
    x = torch.zeros(1, 1, dtype=torch.bfloat16)
    graph_module = with_reads(build, x)
    InsertForecasts().run(graph_module, row_of())
    new, old = torch.full_like(x, 1.0078125), torch.ones_like(x)  # neighbours in bfloat16
    coefficients = torch.tensor([[[100.5, -100.5]]])  # 100.5 * 1.0078125 needs more than 8 bits
    (output,) = run(graph_module, x=x, coefficients=coefficients, anchor_n_0_0=new, anchor_n_0_1=old)
    exact = torch.tensor(100.5 * 0.0078125).bfloat16()
    assert torch.equal(output, exact.exp().view(1, 1))
    in_bfloat16 = new * coefficients[..., 0].bfloat16() + old * coefficients[..., 1].bfloat16()
    assert not torch.equal(in_bfloat16, exact.view(1, 1))  # so the test could tell


def test_every_sample_has_its_own_coefficients(build, run):
    x = torch.randn(2, 3)
    graph_module = with_reads(build, x)
    InsertForecasts().run(graph_module, row_of())
    new, old = torch.randn(2, 3), torch.randn(2, 3)
    coefficients = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])
    (output,) = run(graph_module, x=x, coefficients=coefficients, anchor_n_0_0=new, anchor_n_0_1=old)
    assert torch.equal(output, torch.stack([new[0], old[1]]).exp())


def test_batch_stays_symbolic(stack, run):
    graph_module = stack.graph()
    site = Site("stack", "residual", (Port("add_1", "x"),))
    InsertCacheReads().run(graph_module, row_of(forecast=((site,),), anchors=1))
    InsertForecasts().run(graph_module, row_of())
    for batch, length in ((3, 4), (5, 1)):
        x, past, scale = torch.randn(batch, length, 8), torch.randn(batch, length, 8), torch.randn(batch)
        values = stack.values(x, torch.rand(batch)) | {"anchor_stack_0_0": past, "coefficients": scale.view(1, -1, 1)}
        (output,) = run(graph_module, **values)
        torch.testing.assert_close(output, stack.module.head(x + past * scale[:, None, None]))


def test_order_is_declared():
    assert InsertForecasts.after == ("insert_cache_reads",)
