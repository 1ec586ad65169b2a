"""insert_guidance: fires, refuses, numbers agree, order declared."""

import pytest
import torch

from dcc.errors import PassError
from dcc.passes.base import GUIDANCE, Port, Site
from dcc.passes.drop_dead_nodes import DropDeadNodes
from dcc.passes.graph import output_node
from dcc.passes.insert_cache_reads import InsertCacheReads
from dcc.passes.insert_cache_writes import InsertCacheWrites
from dcc.passes.insert_forecasts import InsertForecasts
from dcc.passes.insert_guidance import InsertGuidance
from dcc.passes.text import text
from dcc.passes.verify import verify

from ..rows import row_of

aten = torch.ops.aten
ANCHOR, WRITE = "anchor_uncond_0_0", "write_uncond_0"
SITE = Site("uncond", GUIDANCE, (Port("gelu_default"),))
BLOCK = Site("blocks.1", "residual", (Port("add_1", "add"),))


def layer(x, w):
    return (aten.gelu.default(aten.linear.default(x, w)),)


def examples(batch=4):
    return {"x": torch.randn(batch, 3), "w": torch.randn(3, 3)}


def guided(graph_module):
    """The guidance site of a captured graph."""
    return Site("uncond", GUIDANCE, (Port(output_node(graph_module).args[0][0].name),))


def rewritten(graph_module, row):
    """After all passes that come before and after it in the pipeline."""
    for each in (InsertCacheWrites(), InsertCacheReads(), InsertGuidance(), InsertForecasts(), DropDeadNodes()):
        each.run(graph_module, row)
        verify(graph_module, each.name)
    return graph_module


def merged(images=2):
    """Inputs of a merged batch: equal samples in both halves, another prompt-side value in each."""
    x = torch.randn(images, 7, 8)
    return torch.cat([x, x]), torch.rand(2 * images)


def test_fires_where_the_site_is_computed(build):
    graph_module = build(layer, **examples())
    assert InsertGuidance().run(graph_module, row_of(computed=(SITE,))) == 1
    assert text(graph_module) == (
        "%0 = input x  # f32[4, 3]\n"
        "%1 = input w  # f32[3, 3]\n"
        "%2 = aten.linear.default(%0, %1)  # f32[4, 3]\n"
        "%3 = aten.gelu.default(%2)  # f32[4, 3]\n"
        "%4 = aten.chunk.default(%3, 2)\n"
        "%5 = _operator.getitem(%4, 0)  # f32[4, 3]\n"
        "%6 = _operator.getitem(%4, 1)  # f32[4, 3]\n"
        "%7 = aten.sub.Tensor(%5, %6)  # f32[4, 3]\n"
        "return (%3, %7)\n"
    )
    verify(graph_module, "test")


def test_fires_where_the_site_is_forecast(build, run):
    values = examples(batch=2)
    graph_module = build(layer, **values)
    assert InsertGuidance().run(graph_module, row_of(forecast=((SITE,),))) == 1
    names = [node.name for node in graph_module.graph.nodes if node.op == "placeholder"]
    assert names == ["x", "w", "coefficients", ANCHOR]
    verify(graph_module, "test")
    anchor = torch.randn(2, 3)
    (output,) = run(graph_module, **values, **{"coefficients": torch.full((1, 2, 1), 0.5), ANCHOR: anchor})
    (conditional,) = layer(**values)
    assert torch.equal(output, torch.cat([conditional + 0.5 * anchor, conditional]))


def test_leaves_rows_without_guidance_alone(build):
    graph_module = build(layer, **examples())
    before = text(graph_module)
    value = Site("h", "value", (Port("gelu_default"),))
    assert InsertGuidance().run(graph_module, row_of(computed=(value,), forecast=((value,),))) == 0
    assert text(graph_module) == before


@pytest.mark.parametrize("side", ["computed", "forecast"])
def test_refuses_a_site_of_another_graph(build, side):
    other = Site("uncond", GUIDANCE, (Port("nowhere"),))
    row = row_of(computed=(other,)) if side == "computed" else row_of(forecast=((other,),))
    with pytest.raises(PassError, match=r"insert_guidance.*nowhere"):
        InsertGuidance().run(build(layer, **examples()), row)


@pytest.mark.parametrize("images", [1, 3])
def test_half_a_batch_and_an_exact_difference_are_the_whole_batch(stack, run, images):
    x, t = merged(images)
    whole = rewritten(stack.graph(), row_of(computed=(guided(stack.graph()),)))
    output, difference = run(whole, **stack.values(x, t))
    assert torch.equal(output, stack.module(x, t))
    assert torch.equal(difference, output[:images] - output[images:])
    half = rewritten(stack.graph(), row_of(forecast=((guided(stack.graph()),),)))
    given = {"coefficients": torch.ones(1, images, 1), ANCHOR: difference}
    (made,) = run(half, **stack.values(x[images:], t[images:]), **given)
    torch.testing.assert_close(made, output)


def test_sites_forecast_in_the_same_row_are_forecast_at_half_the_batch(stack, run):
    x, t = merged()
    whole = rewritten(stack.graph(), row_of(computed=(BLOCK, guided(stack.graph()))))
    output, block, difference = run(whole, **stack.values(x, t))
    half = rewritten(stack.graph(), row_of(forecast=((BLOCK,), (guided(stack.graph()),))))
    used = {node.target for node in half.graph.nodes if node.op == "placeholder"}
    assert not any(name.startswith("p_blocks_1") for name in used)  # the block itself is gone
    given = {"coefficients": torch.ones(2, 2, 1), "anchor_blocks_1_0_0": block[2:], ANCHOR: difference}
    (made,) = run(half, **stack.values(x[2:], t[2:]), **given)
    torch.testing.assert_close(made, output)


def test_a_coefficient_of_zero_gives_both_halves_the_conditional_output(stack, run):
    x, t = merged()
    half = rewritten(stack.graph(), row_of(forecast=((guided(stack.graph()),),)))
    given = {"coefficients": torch.zeros(1, 2, 1), ANCHOR: torch.randn(2, 7, 8)}
    (made,) = run(half, **stack.values(x[2:], t[2:]), **given)
    assert torch.equal(made[:2], made[2:])
    torch.testing.assert_close(made[2:], stack.module(x, t)[2:])


def test_order_is_declared():
    assert InsertGuidance.after == ("insert_cache_reads",)
    assert not InsertGuidance.optional  # without it the output would be half a batch
