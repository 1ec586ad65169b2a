"""Forms of forecasts in graphs: what is inserted, numbers against plain torch, constants, refusals."""

import pytest
import torch

from dcc.errors import PassError
from dcc.kernels import band_split
from dcc.passes.base import Port, Site
from dcc.passes.forms import Bands, Clusters, largest
from dcc.passes.insert_cache_reads import InsertCacheReads, Reads
from dcc.passes.insert_forecasts import InsertForecasts
from dcc.passes.text import text
from dcc.passes.values import VALUE, Channels
from dcc.passes.verify import verify

from ..rows import row_of

aten = torch.ops.aten
NEG = Site("n", "value", (Port("neg_default"),))
PAIR = Site("pair", "value", (Port("neg_default"), Port("exp_default")))
DCT = Bands("dct", 0.3, (2, 3))


def negated(x):
    return (aten.exp.default(aten.neg.default(x)),)


def two_streams(x, y):
    a, b = aten.neg.default(x), aten.exp.default(y)
    return (aten.add.Tensor(aten.sum.default(a), b),)


def read(build, x, form, anchors=2):
    graph_module = build(negated, x=x)
    InsertCacheReads().run(graph_module, row_of(forecast=((NEG,),), anchors=anchors, forms=(form,)))
    verify(graph_module, "test")
    return graph_module


def channels_of(graph_module):
    """The clusters of channels that a graph takes."""
    found = [node.meta.get(VALUE) for node in graph_module.graph.nodes if node.op == "placeholder"]
    return [value for value in found if isinstance(value, Channels)]


def test_rows_of_groups():
    reads = row_of(forecast=((NEG,), (PAIR,), (NEG,)), forms=(DCT, None, Clusters((0, 2, 1)))).order(Reads)
    assert [*(group.first for group in reads.groups), reads.table.rows] == [0, 2, 3, 6]
    plain = row_of(forecast=((NEG,), (PAIR,))).order(Reads)
    assert [*(group.first for group in plain.groups), plain.table.rows] == [0, 1, 2]
    assert reads.groups[1].form is None and plain.groups[0].form is None


def test_bands_in_the_graph(build):
    graph_module = read(build, torch.ones(2, 6, 3), DCT)
    assert text(graph_module) == (
        "%0 = input x  # f32[2, 6, 3]\n"
        "%1 = input coefficients  # f32[2, 2, 2]\n"
        "%2 = input anchor_n_0_0  # f32[2, 6, 3]\n"
        "%3 = input anchor_n_0_1  # f32[2, 6, 3]\n"
        "%4 = aten.neg.default(%0)  # f32[2, 6, 3]\n"
        "%5 = dcc.kernels.combine.reference(%1, 1, [%2, %3], True)  # f32[2, 6, 3]\n"
        "%6 = dcc.kernels.combine.reference(%1, 0, [%2, %3], True)  # f32[2, 6, 3]\n"
        "%7 = dcc.kernels.band_split.reference(%6, %5, 'dct', 0.3, (2, 3))  # f32[2, 6, 3]\n"
        "%8 = aten.exp.default(%7)  # f32[2, 6, 3]\n"
        "return (%8,)\n"
    )
    assert InsertForecasts().run(graph_module, row_of()) == 2  # both reads are spelled out, the filter stays a call


def test_clusters_in_the_graph(build):
    graph_module = read(build, torch.ones(2, 6, 3), Clusters((0, 1, 1)))
    assert text(graph_module) == (
        "%0 = input x  # f32[2, 6, 3]\n"
        "%1 = input coefficients  # f32[2, 2, 2]\n"
        "%2 = input anchor_n_0_0  # f32[2, 6, 3]\n"
        "%3 = input anchor_n_0_1  # f32[2, 6, 3]\n"
        "%4 = input channels_n  # i64[3]\n"
        "%5 = aten.neg.default(%0)  # f32[2, 6, 3]\n"
        "%6 = dcc.kernels.combine.by_channel(%1, 0, [%2, %3], True, %4)  # f32[2, 6, 3]\n"
        "%7 = aten.exp.default(%6)  # f32[2, 6, 3]\n"
        "return (%7,)\n"
    )


def test_bands_agree_with_two_whole_forecasts(build, run):
    new, old, x = torch.randn(3, 2, 6, 3)
    graph_module = read(build, x, DCT)
    InsertForecasts().run(graph_module, row_of())
    coefficients = torch.randn(2, 2, 2)
    (output,) = run(graph_module, x=x, coefficients=coefficients, anchor_n_0_0=new, anchor_n_0_1=old)
    low, high = (c[:, 0, None, None] * new + c[:, 1, None, None] * old for c in coefficients)
    lows = band_split.low_pass(low, "dct", 0.3, (2, 3)), band_split.low_pass(high, "dct", 0.3, (2, 3))
    torch.testing.assert_close(output, (lows[0] + high - lows[1]).exp())


def test_clusters_agree_with_a_loop_over_channels(build, run):
    new, old, x = torch.randn(3, 2, 6, 3)
    form = Clusters((1, 0, 1))
    graph_module = read(build, x, form)
    coefficients = torch.randn(2, 2, 2)
    (constant,) = channels_of(graph_module)
    values = {"anchor_n_0_0": new, "anchor_n_0_1": old, constant.name: torch.tensor(constant.of_channel)}
    (output,) = run(graph_module, x=x, coefficients=coefficients, **values)
    for channel, cluster in enumerate(form.of_channel):
        weights = coefficients[cluster]
        expected = weights[:, 0, None] * new[..., channel] + weights[:, 1, None] * old[..., channel]
        torch.testing.assert_close(output[..., channel], expected.exp())


def test_the_largest_value_is_split_and_others_follow_the_high_band(build):
    graph_module = build(two_streams, x=torch.ones(2, 6, 3), y=torch.ones(2, 4, 3))
    assert largest(graph_module, PAIR) == PAIR.ports[0]
    InsertCacheReads().run(graph_module, row_of(forecast=((PAIR,),), forms=(DCT,)))
    written = text(graph_module)
    assert written.count("band_split") == 1
    assert "dcc.kernels.combine.reference(%2, 1, [%3], True)  # f32[2, 4, 3]" in written
    verify(graph_module, "test")


def test_a_group_after_another_reads_the_rows_after(build):
    graph_module = build(two_streams, x=torch.ones(2, 6, 3), y=torch.ones(2, 4, 3))
    other = Site("e", "value", (Port("exp_default"),))
    InsertCacheReads().run(graph_module, row_of(forecast=((NEG,), (other,)), forms=(Clusters((0, 2, 1)), None)))
    assert "input coefficients  # f32[4, 2, 1]" in text(graph_module)
    assert "combine.reference(%2, 3, [%3], True)" in text(graph_module)


def test_constants_are_named_after_their_sites(build):
    graph_module = build(two_streams, x=torch.ones(2, 6, 3), y=torch.ones(2, 4, 2))
    pair = Site("pair", "value", (Port("exp_default"),))
    order = row_of(forecast=((NEG,), (pair,)), forms=(None, Clusters((1, 0))))
    InsertCacheReads().run(graph_module, order)
    (constant,) = channels_of(graph_module)
    assert (constant.name, list(constant.of_channel)) == ("channels_pair", [1, 0])


def test_clusters_of_other_channels_are_refused(build):
    with pytest.raises(PassError, match="'n': clusters of 2 channels do not fit a value of 3"):
        read(build, torch.ones(2, 6, 3), Clusters((0, 1)))


@pytest.mark.parametrize("form", [DCT, Bands("fft", 0.2), Clusters((0, 1, 0, 1, 2, 0, 0, 1))], ids=["dct", "fft", "c"])
def test_sizes_stay_symbolic(stack, run, form):
    graph_module = stack.graph()
    site = Site("stack", "residual", (Port("add_1", "x"),))
    InsertCacheReads().run(graph_module, row_of(forecast=((site,),), anchors=1, forms=(form,)))
    InsertForecasts().run(graph_module, row_of())
    verify(graph_module, "test")
    for batch, length in ((3, 6), (2, 24)):
        x, past = torch.randn(batch, length, 8), torch.randn(batch, length, 8)
        ones = torch.ones(form.rows, batch, 1)
        values = stack.values(x, torch.rand(batch)) | {"anchor_stack_0_0": past, "coefficients": ones}
        values |= {c.name: torch.tensor(c.of_channel) for c in channels_of(graph_module)}
        (output,) = run(graph_module, **values)
        torch.testing.assert_close(output, stack.module.head(x + past))
