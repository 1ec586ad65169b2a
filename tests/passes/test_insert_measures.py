"""insert_measures: fires, refuses, numbers agree, order declared."""

import pytest
import torch

from dcc.errors import PassError
from dcc.passes import PASSES
from dcc.passes.base import Look, Port, Site
from dcc.passes.graph import output_node
from dcc.passes.insert_cache_reads import InsertCacheReads
from dcc.passes.insert_measures import InsertMeasures
from dcc.passes.text import text
from dcc.passes.verify import verify

from ..rows import anchor_name, look_name, row_of, seen_name, watch_name

aten = torch.ops.aten
RESIDUAL, VALUE = Port("add_tensor", "x"), Port("add_tensor")


def residual(x, w):
    h = aten.add.Tensor(x, aten.linear.default(x, w))
    return (aten.gelu.default(h),)


def two(x, w):
    h = aten.add.Tensor(x, aten.linear.default(x, w))
    g = aten.add.Tensor(h, aten.gelu.default(h))
    return (g,)


def examples():
    return {"x": torch.randn(2, 3), "w": torch.randn(3, 3)}


def row(*looks, **kwargs):
    return row_of(watched=tuple(dict.fromkeys(look.port for look in looks)), looks=looks, **kwargs)


def test_fires(build):
    graph_module = build(residual, **examples())
    assert InsertMeasures().run(graph_module, row(Look(VALUE, "previous", "rel_l1"))) == 2
    verify(graph_module, "test")
    lines = text(graph_module).splitlines()
    assert lines[2].startswith("%2 = input seen_add_tensor_itself_previous")
    assert any("dcc.kernels.distance.reference(%4, %2, 'rel_l1'" in line for line in lines)
    names = [node.name for node in output_node(graph_module).args[0]]
    assert names[1:] == ["watch_add_tensor_itself", "look_add_tensor_itself_previous_rel_l1"]


def test_nothing_watched_nothing_done(build):
    graph_module = build(residual, **examples())
    before = text(graph_module)
    assert InsertMeasures().run(graph_module, row_of()) == 0
    assert text(graph_module) == before


def test_refuses_a_node_that_is_not_there(build):
    with pytest.raises(PassError, match="insert_measures: the graph has no node 'nowhere'"):
        InsertMeasures().run(build(residual, **examples()), row_of(watched=(Port("nowhere"),)))


@pytest.mark.parametrize(
    ("against", "which"), [("previous", "previous"), ("anchor", 0), ("older", 1), ("zero", None)], ids=str
)
def test_numbers_agree_with_eager(build, run, against, which):
    values = examples()
    graph_module = build(residual, **values)
    look = Look(RESIDUAL, against, "l1")
    InsertMeasures().run(graph_module, row(look))
    other = torch.zeros(2, 3) if which is None else torch.randn(2, 3)
    outputs = run(graph_module, **values, **({} if which is None else {seen_name(RESIDUAL, which): other}))
    truth = values["x"] @ values["w"].T
    assert torch.equal(outputs[0], torch.nn.functional.gelu(values["x"] + truth))
    assert torch.allclose(outputs[1], truth, atol=1e-6)
    assert torch.allclose(outputs[2], (truth - other).abs().mean(1), atol=1e-6)


def test_a_drafted_forecast_is_compared_with_the_truth_that_the_draft_gives(build, run):
    values = examples()
    graph_module = build(two, **values)
    cached = Site("h", "value", (VALUE,))
    look = Look(Port("add_tensor_1", "add_tensor"), "forecast", "mse")
    drafted = row(look, forecast=((cached,),), anchors=2)
    InsertCacheReads().run(graph_module, drafted)
    InsertMeasures().run(graph_module, drafted)
    anchors, seen = torch.randn(2, 2, 3), torch.randn(2, 2, 3)
    weights = torch.tensor([[[2.0, -1.0]] * 2, [[0.5, 0.25]] * 2])
    given = {anchor_name(cached, 0, age): anchors[age] for age in range(2)}
    given |= {seen_name(look.port, age): seen[age] for age in range(2)}
    outputs = run(graph_module, **values, **given, **{"coefficients": weights})
    draft = 2 * anchors[0] - anchors[1]
    truth = torch.nn.functional.gelu(draft)
    assert torch.allclose(outputs[0], draft + truth, atol=1e-6)
    assert torch.allclose(outputs[2], (truth - 0.5 * seen[0] - 0.25 * seen[1]).square().mean(1), atol=1e-6)
    names = [node.name for node in output_node(graph_module).args[0]]
    assert names[1:] == [watch_name(look.port), look_name(look)]


def test_it_runs_after_the_reads():
    names = [pass_.name for pass_ in PASSES]
    assert names.index("insert_cache_reads") < names.index("insert_measures") < names.index("insert_forecasts")
    assert InsertMeasures.after == ("insert_cache_reads",)
