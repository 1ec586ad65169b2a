"""Token forms of plans: what is checked, what they cost, and which sites refuse."""

import dataclasses

import pytest

from dcc.discover.sites import find_sites
from dcc.errors import PlanError
from dcc.passes.graph import nodes_by_name
from dcc.plans.forms import Form, TokensForm
from dcc.plans.plan import Plan, make_plan
from dcc.plans.predictors import Predictor
from dcc.plans.triggers import Verify
from dcc.variants.build import build
from dcc.variants.cost import cost
from dcc.variants.observe import Observer
from dcc.variants.refresh import holds_output_tokens, refreshes, region_of

COPY = Predictor("copy")
NORM = {"select": "norm", "ratio": 0.5, "sign": 1, "age": 0.1}
MLP = "blocks.0/mlp"


def plan(form, schedule=((1,), (2,), (0,)), sites=(MLP,)):
    return make_plan(
        model="m",
        scheduler="s",
        levels=range(len(schedule), 0, -1),
        sites=sites,
        schedule=schedule,
        predictors=[COPY] * len(sites),
        policy="test",
        parameters={},
        forms=[form] * len(sites),
    )


@pytest.fixture(scope="session")
def sites(transformer):
    return find_sites(transformer.captured, transformer.call)


def test_a_partial_step_reads_anchors_as_a_forecast_does():
    made = plan({"tokens": NORM})
    assert made.coefficients == (((),), ((1.0,),), ((1.0,),))
    assert made.steps_mask == [1, 0, 0]
    assert made.anchor_steps(2, 0) == [0]
    assert made.rows == [(1,), (2,), (0,)]  # the all-compute row first


def test_a_plan_with_tokens_survives_a_file(tmp_path):
    made = plan({"tokens": NORM | {"ratio": [0.5]}})
    made.save(tmp_path / "plan.json")
    loaded = Plan.load(tmp_path / "plan.json")
    assert loaded.schedule == made.schedule
    assert loaded.forms == made.forms and isinstance(loaded.forms[0], TokensForm)


def test_a_two_needs_a_form_with_tokens():
    with pytest.raises(PlanError, match="2 where the site's form has 'tokens'"):
        plan({})


@pytest.mark.parametrize(
    ("spec", "problem"),
    [
        ({"select": "magic"}, "'select' is one of norm, random, cluster, noise"),
        ("norm", "'select' is one of"),
        ({"select": "random"}, "must have ratio, select"),
        ({"select": "random", "ratio": 0.5, "sign": 1}, "must have ratio, select"),
        ({"select": "cluster", "ratio": 0.5, "clusters": 4, "share": 0}, "must have clusters, select, share"),
        ({"select": "random", "ratio": 0.0}, "a ratio in"),
        ({"select": "random", "ratio": [0.5, 1.2]}, "a ratio in"),
        ({"select": "random", "ratio": "half"}, "must hold finite numbers"),
    ],
)
def test_bad_forms_are_refused(spec, problem):
    with pytest.raises(PlanError, match=problem):
        plan({"tokens": spec})


def test_flops_of_a_partial_row(sites):
    made = cost(plan({"tokens": NORM}, ((1,), (2,), (0,))), sites)
    mlp = sites[MLP].flops
    assert mlp == 2 * 2 * 6 * 8 * 16 * 2  # two linear layers on 2 x 6 tokens
    assert made.flops == 3 * sites.flops - mlp - mlp // 2
    assert made.flops_uncached == 3 * sites.flops
    assert made.cache_bytes == 2 * sites[MLP].bytes  # an anchor and what refreshes corrected


def test_a_ratio_a_site_of_a_group(sites):
    form = {"tokens": NORM | {"ratio": [0.5, 1.0]}}
    found = refreshes(sites, [sites.select("mlp")], [Form.from_json(form)], [2])
    assert [refresh.ratio for refresh in found] == [0.5, 1.0]
    assert [refresh.salt for refresh in found] == [0, 1]
    with pytest.raises(PlanError, match="3 ratios for 2 sites"):
        refreshes(sites, [sites.select("mlp")], [Form.from_json({"tokens": NORM | {"ratio": [0.5] * 3}})], [2])


def test_clusters_are_led_by_the_last_site_of_as_many_tokens(sites):
    form = {"tokens": {"select": "cluster", "clusters": 3, "share": 0.1}}
    found = refreshes(sites, [sites.select("mlp")], [Form.from_json(form)], [2])
    assert {refresh.leader for refresh in found} == {"blocks.1/mlp"}
    nodes = nodes_by_name(sites.captured.graph_module)
    assert {refresh.tokens for refresh in found} == {region_of(sites, nodes, sites["blocks.1/mlp"])[1].name}
    with pytest.raises(PlanError, match="fewer tokens than 7 clusters"):
        refreshes(sites, [sites.select("mlp")], [Form.from_json({"tokens": form["tokens"] | {"clusters": 7}})], [2])


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("blocks.0/attn", "cannot be computed by tokens: "),
        ("blocks.0", "no single value to compute by tokens; choose branches"),
    ],
)
def test_sites_that_refuse(sites, name, reason):
    with pytest.raises(PlanError, match=reason):
        cost(plan({"tokens": NORM}, sites=(name,)), sites)


def test_an_output_of_tokens_is_known(sites):
    assert all(holds_output_tokens(sites, site) for site in sites.select("mlp"))


def test_every_row_becomes_a_variant_with_its_states(sites, transformer):
    family = build(plan({"tokens": NORM}), sites, Observer())
    full, partial, forecast = (family.variants[row] for row in ((1,), (2,), (0,)))
    states = {"state_correction_blocks_0_mlp", "state_age_blocks_0_mlp"}
    assert set(full.states) == states and not states & set(full.inputs)
    assert set(partial.states) == states and states <= set(partial.inputs)
    assert forecast.states == () and "state_correction_blocks_0_mlp" in forecast.inputs


def test_ones_only_make_no_state(sites, transformer):
    family = build(plan({"tokens": NORM}, ((1,), (1,))), sites, Observer())
    assert {row: variant.states for row, variant in family.variants.items()} == {(1,): ()}
    assert cost(plan({"tokens": NORM}, ((1,), (1,))), sites).cache_bytes == 0


def test_a_trigger_is_refused():
    with pytest.raises(PlanError, match="in a static schedule only"):
        dataclasses.replace(
            plan({"tokens": NORM}, ((1,), (1,))),
            trigger=Verify("stack", 0.1, 0.1, 0.1).as_json(),
            predictors=(COPY.as_json(),),
            coefficients=(((),), ((),)),
        )
