"""insert_correctors: fires, refuses, numbers agree, order declared."""

import pytest
import torch

from dcc.errors import PassError
from dcc.passes.base import Correction, Port, Site
from dcc.passes.insert_cache_reads import InsertCacheReads
from dcc.passes.insert_cache_writes import InsertCacheWrites
from dcc.passes.insert_correctors import InsertCorrectors
from dcc.passes.text import text
from dcc.variants.observe import Observer

from ..rows import factor_names, row_of

aten = torch.ops.aten
LOW_RANK = Correction("h", 0, "x", ((2, 6), (4, 2)), weight="w")
LINEAR = Correction("h", 0, "x", ((4, 6), (4,)), file="maps.safetensors", key="h")
SITE = Site("h", "linear", (Port("linear_default", "map_h_0"),))


def layer(x, w):
    return (aten.gelu.default(aten.linear.default(x, w)),)


def examples():
    return {"x": torch.randn(2, 5, 6), "w": torch.randn(4, 6)}


def factors(correction):
    return {name: torch.randn(size) for name, size in zip(factor_names(correction), correction.shapes, strict=True)}


def test_fires(build):
    graph_module = build(layer, **examples())
    assert InsertCorrectors().run(graph_module, row_of(corrections=(LOW_RANK,))) == 1
    assert text(graph_module) == (
        "%0 = input x  # f32[2, 5, 6]\n"
        "%1 = input w  # f32[4, 6]\n"
        "%2 = input factor_h_0_0  # f32[2, 6]\n"
        "%3 = input factor_h_0_1  # f32[4, 2]\n"
        "%4 = aten.linear.default(%0, %2, None)  # f32[2, 5, 2]\n"
        "%5 = aten.linear.default(%4, %3, None)  # f32[2, 5, 4]\n"
        "%6 = aten.linear.default(%0, %1)  # f32[2, 5, 4]\n"
        "%7 = aten.gelu.default(%6)  # f32[2, 5, 4]\n"
        "return (%7,)\n"
    )


def test_a_row_without_corrections_is_left_alone(build):
    graph_module = build(layer, **examples())
    before = text(graph_module)
    assert InsertCorrectors().run(graph_module, row_of(computed=(Site("h", "linear", (Port("linear_default"),)),))) == 0
    assert text(graph_module) == before


@pytest.mark.parametrize(
    ("correction", "message"),
    [
        (Correction("h", 0, "nowhere", ((4, 6), (4,))), "no node 'nowhere'"),
        (Correction("h", 0, "x", ((4, 7), (4,))), "'h': a map of 7 channels does not fit the value 'x' of 6"),
    ],
)
def test_refuses(build, correction, message):
    with pytest.raises(PassError, match=message):
        InsertCorrectors().run(build(layer, **examples()), row_of(corrections=(correction,)))


@pytest.mark.parametrize("correction", [LOW_RANK, LINEAR], ids=["low rank", "linear"])
def test_what_changed_since_the_anchor_goes_through_the_map(build, run, correction):
    """Written at one x and forecast at another: y_c + map(x) - map(x_c)."""
    old, made = examples(), factors(correction)
    writing = build(layer, **old)
    Observer().run_all(writing, row_of(computed=(SITE,), corrections=(correction,)), "full")
    output, anchor = run(writing, **old, **made)
    torch.testing.assert_close(output, aten.gelu.default(old["x"] @ old["w"].T))

    new = {**old, "x": torch.randn(2, 5, 6)}
    reading = build(layer, **old)
    Observer().run_all(reading, row_of(forecast=((SITE,),), corrections=(correction,)), "forecast")
    (forecast,) = run(reading, **new, **made, anchor_h_0_0=anchor, coefficients=torch.ones(1, 2, 1))
    first, second = made.values()

    def mapped(x):
        return x @ first.T @ second.T if correction is LOW_RANK else x @ first.T + second

    expected = old["x"] @ old["w"].T + mapped(new["x"]) - mapped(old["x"])
    torch.testing.assert_close(forecast, aten.gelu.default(expected), atol=1e-4, rtol=1e-4)
    assert "w" not in [n.name for n in reading.graph.nodes if n.users]  # the layer itself is dead


def test_comes_before_writes_and_reads():
    assert "insert_correctors" in InsertCacheWrites.after
    assert "insert_cache_writes" in InsertCacheReads.after
