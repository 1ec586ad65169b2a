"""refresh_tokens: fires, refuses, numbers agree, order declared."""

import dataclasses

import pytest
import torch

from dcc.errors import PassError
from dcc.kernels import select_tokens as tokens
from dcc.passes.base import Port, Refresh, Site
from dcc.passes.drop_dead_nodes import DropDeadNodes
from dcc.passes.graph import nodes_by_name, output_node
from dcc.passes.insert_cache_reads import InsertCacheReads
from dcc.passes.insert_cache_writes import InsertCacheWrites
from dcc.passes.insert_forecasts import InsertForecasts
from dcc.passes.refresh_tokens import RefreshTokens
from dcc.passes.text import text
from dcc.passes.token_wise import residual_ends, token_region
from dcc.passes.verify import verify

from ..rows import anchor_name, row_of

aten = torch.ops.aten
SITE = Site("h", "mlp", (Port("linear_default"),))
RANDOM = Refresh(SITE, 2, "random", 0.25, ("linear_default",), frozenset({"x"}))
NORM = dataclasses.replace(RANDOM, select="norm", options=(("sign", 1), ("age", 0.25)))
CLUSTER = dataclasses.replace(
    RANDOM, select="cluster", options=(("clusters", 3), ("share", 0.1)), tokens="add_tensor", leader="h"
)
NOISE = dataclasses.replace(RANDOM, select="noise", options=(("starvation", 0.1), ("sign", 1)))


def residual(x, w):
    return (aten.add.Tensor(x, aten.linear.default(x, w)),)


def examples():
    return {"x": torch.randn(2, 8, 3), "w": torch.randn(3, 3)}


def row(refresh, anchors=1):
    full = refresh.decision == 1
    return row_of(
        computed=(refresh.site,) if full else (),
        forecast=() if full else ((refresh.site,),),
        anchors=anchors,
        refreshed=(refresh,),
    )


def rewritten(graph_module, refresh, anchors=1):
    for rewrite in (InsertCacheWrites(), RefreshTokens(), InsertCacheReads(), InsertForecasts(), DropDeadNodes()):
        rewrite.run(graph_module, row(refresh, anchors))
        verify(graph_module, rewrite.name)
    return graph_module


def state(value, refresh=RANDOM, anchor=None):
    """What a session holds after a full step whose value of the site was `anchor`."""
    anchor = torch.zeros_like(value) if anchor is None else anchor
    return {
        "coefficients": torch.ones(1, len(value), 1),
        anchor_name(SITE, 0, 0): anchor,
        "state_correction_h": torch.zeros_like(value),
        "state_age_h": torch.zeros(value.shape[:2]),
        "state_noise": torch.rand(value.shape[:2]),
        "state_drops": torch.zeros(value.shape[:2]),
        "state_labels_h": torch.arange(value.shape[1]).remainder(3).expand(len(value), -1),
        "step": torch.tensor([1]),
    }


def test_fires(build):
    graph_module = build(residual, **examples())
    assert RefreshTokens().run(graph_module, row(RANDOM)) == 1
    assert text(graph_module) == (
        "%0 = input x  # f32[2, 8, 3]\n"
        "%1 = input w  # f32[3, 3]\n"
        "%2 = input state_correction_h  # f32[2, 8, 3]\n"
        "%3 = input step  # i64[1]\n"
        "%4 = aten.linear.default(%0, %1)  # f32[2, 8, 3]\n"
        "%5 = aten.add.Tensor(%4, %2)  # f32[2, 8, 3]\n"
        "%6 = dcc.kernels.select_tokens.random_score(%3, %5, 0)  # f32[2, 8]\n"
        "%7 = dcc.kernels.select_tokens.top(%6, 0.25)  # i64[2, 2]\n"
        "%8 = dcc.kernels.select_tokens.gather(%0, %7)  # f32[2, 2, 3]\n"
        "%9 = aten.linear.default(%8, %1)  # f32[2, 2, 3]\n"
        "%10 = dcc.kernels.select_tokens.scatter(%5, %7, %9)  # f32[2, 8, 3]\n"
        "%11 = aten.sub.Tensor(%10, %4)  # f32[2, 8, 3]\n"
        "%12 = aten.add.Tensor(%0, %10)  # f32[2, 8, 3]\n"
        "%13 = aten.clone.default(%11, memory_format=torch.contiguous_format)  # f32[2, 8, 3]\n"
        "return (%12, %13)\n"
    )
    verify(graph_module, "test")
    assert output_node(graph_module).args[0][1].name == "next_state_correction_h"


def test_a_plain_forecast_adds_what_was_corrected(build, run):
    values = examples()
    graph_module = rewritten(build(residual, **values), dataclasses.replace(RANDOM, decision=0))
    anchor, correction = torch.randn(2, 2, 8, 3)
    given = state(values["x"], anchor=anchor) | {"state_correction_h": correction}
    (output,) = run(graph_module, **values, **given)
    torch.testing.assert_close(output, values["x"] + anchor + correction)


@pytest.mark.parametrize("refresh", [RANDOM, NORM, CLUSTER, NOISE], ids=lambda r: r.select)
def test_a_computed_site_starts_its_state(build, run, refresh):
    values = examples()
    graph_module = rewritten(build(residual, **values), dataclasses.replace(refresh, decision=1))
    names = [node.name for node in output_node(graph_module).args[0]][1:]
    outputs = dict(zip(names, run(graph_module, **values)[1:], strict=True))
    assert torch.equal(outputs.pop("next_state_correction_h"), torch.zeros(2, 8, 3))
    torch.testing.assert_close(outputs.pop("write_h_0"), values["x"] @ values["w"].T)
    if refresh.select == "norm":
        assert torch.equal(outputs.pop("next_state_age_h"), torch.zeros(2, 8))
    if refresh.select == "cluster":
        labels = outputs.pop("next_state_labels_h")
        assert torch.equal(labels, tokens.cluster(residual(**values)[0], 3))
    if refresh.select == "noise":
        assert torch.equal(outputs.pop("next_state_drops"), torch.zeros(2, 8))
        torch.testing.assert_close(outputs.pop("next_state_noise"), residual(**values)[0].std(2))
    assert outputs == {}


@pytest.mark.parametrize("refresh", [RANDOM, NORM, NOISE], ids=lambda r: r.select)
def test_chosen_tokens_are_computed_and_others_forecast(build, run, refresh):
    values = examples()
    graph_module = rewritten(build(residual, **values), refresh)
    anchor = torch.randn(2, 8, 3)
    output, *_ = run(graph_module, **values, **state(values["x"], refresh, anchor))
    true, forecast = residual(**values)[0], values["x"] + anchor
    computed = torch.isclose(output, true).all(2)
    assert computed.sum(1).tolist() == [2, 2]
    assert torch.equal(output[~computed], forecast[~computed])


@pytest.mark.parametrize("refresh", [RANDOM, NORM, NOISE], ids=lambda r: r.select)
def test_all_tokens_are_the_computed_site(build, run, refresh):
    values = examples()
    graph_module = rewritten(build(residual, **values), dataclasses.replace(refresh, ratio=1.0))
    output, *_ = run(graph_module, **values, **state(values["x"], refresh, torch.randn(2, 8, 3)))
    assert torch.equal(output, residual(**values)[0])


@pytest.mark.parametrize("refresh", [RANDOM, NORM, NOISE, CLUSTER], ids=lambda r: r.select)
def test_exact_forecasts_stay_exact(build, run, refresh):
    values = examples()
    graph_module = rewritten(build(residual, **values), refresh)
    anchor = values["x"] @ values["w"].T
    names = [node.name for node in output_node(graph_module).args[0]]
    outputs = run(graph_module, **values, **state(values["x"], refresh, anchor))
    output, correction = outputs[0], outputs[names.index("next_state_correction_h")]
    if refresh is not CLUSTER:  # which draws tokens together even where they were right
        torch.testing.assert_close(output, residual(**values)[0])
        torch.testing.assert_close(correction, torch.zeros_like(anchor), atol=1e-6, rtol=0)
    else:
        assert (output - residual(**values)[0]).norm() < 0.2 * (anchor[:, :1] - anchor).norm()


def test_a_cluster_follows_its_fresh_token(build, run):
    values = examples()
    graph_module = rewritten(build(residual, **values), CLUSTER)
    given = state(values["x"], CLUSTER)
    output, correction = run(graph_module, **values, **given)
    true, labels = values["x"] @ values["w"].T, given["state_labels_h"]
    score = tokens.random_score(given["step"], true, 0)
    for sample in range(2):
        for cluster in range(3):
            members = (labels[sample] == cluster).nonzero().flatten()
            fresh = members[score[sample, members].argmax()]
            for token in members:
                share = 1.0 if token == fresh else 0.1
                torch.testing.assert_close(correction[sample, token], share * true[sample, fresh])
    torch.testing.assert_close(output, values["x"] + correction)


def test_later_forecasts_use_the_fresh_tokens(build, run):
    """A copied forecast over two refreshes: the same as scattering fresh tokens into the anchor."""
    values = examples()
    graph_module = rewritten(build(residual, **values), RANDOM)
    anchor = torch.randn(2, 8, 3)
    given, cache = state(values["x"], anchor=anchor), anchor.clone()
    for step in (3, 4):
        values["x"] = torch.randn(2, 8, 3)
        given["step"] = torch.tensor([step])
        output, given["state_correction_h"] = run(graph_module, **values, **given)
        index = tokens.top(tokens.random_score(given["step"], cache, 0), 0.25)
        cache = tokens.scatter(cache, index, tokens.gather(values["x"] @ values["w"].T, index))
        torch.testing.assert_close(output, values["x"] + cache)


def test_the_trend_of_a_forecast_of_several_anchors_goes_on(build, run):
    values = examples()
    graph_module = rewritten(build(residual, **values), RANDOM, anchors=2)
    given = state(values["x"]) | {
        "coefficients": torch.tensor([1.5, -0.5]).expand(1, 2, 2),
        anchor_name(SITE, 0, 0): torch.full((2, 8, 3), 4.0),
        anchor_name(SITE, 0, 1): torch.full((2, 8, 3), 2.0),
    }
    output, correction = run(graph_module, **values, **given)
    torch.testing.assert_close(output - values["x"], 5.0 + correction)
    plain = rewritten(build(residual, **values), dataclasses.replace(RANDOM, decision=0), anchors=2)
    later = given | {"coefficients": torch.tensor([2.0, -1.0]).expand(1, 2, 2), "state_correction_h": correction}
    torch.testing.assert_close(run(plain, **values, **later)[0] - values["x"], 6.0 + correction)


def test_tokens_that_waited_are_chosen_next(build, run):
    values = examples()
    graph_module = rewritten(build(residual, **values), dataclasses.replace(NORM, options=(("sign", 1), ("age", 9.0))))
    given = state(values["x"], NORM, torch.rand(2, 8, 3)) | {"state_age_h": torch.arange(8.0).expand(2, 8)}
    names = [node.name for node in output_node(graph_module).args[0]]
    outputs = dict(zip(names, run(graph_module, **values, **given), strict=True))
    assert outputs["next_state_age_h"].tolist() == [[1, 2, 3, 4, 5, 6, 0, 0]] * 2


def test_a_captured_mlp_runs_on_some_tokens(transformer, run):
    """On symbolic shapes, with a norm, a gate and another batch than the capture's."""
    graph_module = transformer.graph()
    nodes = nodes_by_name(graph_module)
    value = next(n for name, n in nodes.items() if name.startswith("linear") and "mlp_2" in str(n.args[1]))
    region = token_region(value, residual_ends(value)[0])
    site = Site("h", "mlp", (Port(value.name),))
    refresh = dataclasses.replace(RANDOM, site=site, nodes=region.nodes, ends=region.ends, ratio=1.0)
    rewritten(graph_module, refresh)
    x, t = torch.randn(5, 6, 4), torch.rand(5)
    values = transformer.values(x, t) | state(torch.zeros(5, 6, 8))
    output, _ = run(graph_module, **values)
    with torch.no_grad():
        torch.testing.assert_close(output, transformer.module(x, t))


@pytest.mark.parametrize("part", ["out", "nodes", "ends"])
def test_refuses_what_is_not_in_the_graph(build, part):
    other = {
        "out": {"site": Site("h", "mlp", (Port("nowhere"),))},
        "nodes": {"nodes": ("nowhere",)},
        "ends": {"ends": frozenset({"nowhere"})},
    }[part]
    with pytest.raises(PassError, match=r"refresh_tokens.*nowhere"):
        RefreshTokens().run(build(residual, **examples()), row(dataclasses.replace(RANDOM, **other)))


def test_leaves_a_row_without_tokens_alone(build):
    graph_module = build(residual, **examples())
    before = text(graph_module)
    assert RefreshTokens().run(graph_module, row_of(forecast=((SITE,),))) == 0
    assert text(graph_module) == before


def test_order_is_declared():
    assert RefreshTokens.after == ("insert_cache_writes",)
    assert not RefreshTokens.optional
