"""Forms of forecasts in plans: coefficients of several predictors, files, checks, mapping."""

import dataclasses

import pytest
import torch

from dcc.errors import PlanError
from dcc.kernels.band_split import low_pass
from dcc.passes.base import Port, Site
from dcc.passes.forms import Bands, Clusters
from dcc.plans import mapping
from dcc.plans.forms import Form, flat, split
from dcc.plans.plan import Plan, make_plan
from dcc.plans.predictors import Predictor
from dcc.plans.triggers import Verify
from dcc.record.fingerprint import fingerprint
from dcc.report import page, tables
from dcc.variants import forms as variant_forms

from . import tiny

COPY, LINE = Predictor("copy"), Predictor("taylor", 1)
PREDICTORS = [COPY.as_json(), LINE.as_json()]
BANDS = {"bands": {"transform": "dct", "cutoff": 0.1, "grid": [4, 6], "predictors": PREDICTORS}}
CLUSTERS = {"clusters": {"of_channel": [1, 0, 1], "predictors": PREDICTORS}}
TOKENS = Site("h", "value", (Port("h"),), ((2, 24, 3),))
PIXELS = Site("p", "cut", (Port("p"),), ((2, 3, 8, 8),))


def plan(form, schedule=((1,), (0,), (1,), (0,), (0,)), **more):
    return make_plan(
        model="m", scheduler="s", levels=range(len(schedule), 0, -1), sites=["h"] * len(schedule[0]),
        schedule=schedule, predictors=[COPY] * len(schedule[0]), policy="test", parameters={},
        forms=[form] * len(schedule[0]), **more,
    )  # fmt: skip


def form_of(form, sites, name):
    return variant_forms.form_of(Form.from_json(form), sites, name)


def test_rows_of_coefficients_stand_one_after_another():
    assert flat(Form.from_json(BANDS), None, 4, [2, 0]) == (1.0, 0.0, 2.0, -1.0)  # a copy, padded, then a line
    assert flat(None, LINE, 4, [2, 0]) == (2.0, -1.0)
    assert split((1.0, 0.0, 2.0, -1.0), 2) == [(1.0, 0.0), (2.0, -1.0)]
    assert split((), 2) == [(), ()]
    assert Form.from_json({}) is None
    assert (Form.from_json(BANDS).rows, Form.from_json({"tokens": {"select": "random", "ratio": 0.1}}).rows) == (2, 1)
    assert Form.from_json(CLUSTERS).predictors == (COPY, LINE)


def test_a_plan_says_its_form():
    assert "form        bands by dct over 4x6 tokens, cutoff 0.1: low copy, high taylor 1" in str(plan(BANDS))
    assert "form        clusters of channels: 1 copy, 2 taylor 1" in str(plan(CLUSTERS))
    line = {"bands": BANDS["bands"] | {"transform": "fft", "grid": None}}
    assert "bands by fft, cutoff 0.1" in str(plan(line))
    assert "form        tokens: select=random, ratio=0.1" in str(plan({"tokens": {"select": "random", "ratio": 0.1}}))
    assert "form" not in str(plan({})).replace("forms", "")


def test_tables_show_every_part():
    made = plan(BANDS)
    assert page._forecast(made, 3, 0) == "forecast, +1 of step 2, +0 of step 0; +1.5 of step 2, -0.5 of step 0"
    cells = list(tables.steps_table(made).columns[2].cells)
    assert [str(cell) for cell in cells[2:4]] == ["computed", "+1 of 2, +0 of 0; +1.5 of 2, -0.5 of 0"]


@pytest.mark.parametrize("form", [BANDS, CLUSTERS], ids=["bands", "clusters"])
def test_a_plan_keeps_forms_in_a_file(tmp_path, form):
    made = plan(form)
    assert made.coefficients[1:] == (((1.0, 1.0),), ((),), ((1.0, 0.0, 1.5, -0.5),), ((1.0, 0.0, 2.0, -1.0),))
    assert (made.anchors, made.parts(0)) == (2, 2)
    assert made.weights(3, 0) == [(1.0, 0.0), (1.5, -0.5)]
    made.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == made


@pytest.mark.parametrize(
    ("form", "problem"),
    [
        ({"magic": {}}, "one of the keys .*bands, clusters; got"),
        (BANDS | CLUSTERS, "one of the keys"),
        ({"bands": {"cutoff": 0.1}}, "'bands' must be an object of transform, cutoff, grid, predictors"),
        ({"bands": BANDS["bands"] | {"transform": "haar"}}, "a transform of dct, fft"),
        ({"bands": BANDS["bands"] | {"cutoff": 1.5}}, "a cutoff from 0 to 1"),
        ({"bands": BANDS["bands"] | {"grid": [4]}}, "a grid of two whole numbers"),
        ({"bands": BANDS["bands"] | {"grid": [4, 0.5]}}, "a grid of two whole numbers"),
        ({"bands": BANDS["bands"] | {"predictors": PREDICTORS[:1]}}, "two predictors, low and high"),
        ({"clusters": CLUSTERS["clusters"] | {"of_channel": [0, 0]}}, "one of the 2 clusters for each channel"),
        ({"clusters": CLUSTERS["clusters"] | {"of_channel": [0, 2, 1]}}, "one of the 2 clusters for each channel"),
        ({"clusters": CLUSTERS["clusters"] | {"predictors": []}}, "a list of predictors"),
    ],
)
def test_bad_forms_are_refused(form, problem):
    good = plan({})
    with pytest.raises(PlanError, match=problem):
        dataclasses.replace(good, forms=(form,))


def test_an_unknown_predictor_of_a_form_is_refused():
    form = {"bands": BANDS["bands"] | {"predictors": [PREDICTORS[0], {"name": "magic", "order": 1, "options": {}}]}}
    with pytest.raises(PlanError, match="unknown predictor 'magic'"):
        dataclasses.replace(plan(BANDS), forms=(form,))


def test_coefficients_must_fit_the_parts():
    with pytest.raises(PlanError, match="1 to 1 numbers, one an anchor for each of 2 parts"):
        dataclasses.replace(plan({}), forms=(BANDS,))


def test_a_trigger_is_refused():
    trigger = Verify("h", 0.1, 0.1, 0.1, 1, 2)
    with pytest.raises(PlanError, match="may have 'bands' in a static schedule only"):
        plan(BANDS, trigger=trigger)


def test_forms_become_what_passes_take():
    assert form_of({}, [TOKENS], "h") is None
    assert form_of(BANDS, [TOKENS], "h") == Bands("dct", 0.1, (4, 6))
    assert form_of(CLUSTERS, [TOKENS, PIXELS], "h") == Clusters((1, 0, 1))
    pixels = {"bands": BANDS["bands"] | {"grid": None}}
    assert form_of(pixels, [PIXELS], "p") == Bands("dct", 0.1, None)


@pytest.mark.parametrize(
    ("form", "site", "problem"),
    [
        ({"bands": BANDS["bands"] | {"grid": [5, 5]}}, TOKENS, "'h': 24 tokens do not fill the grid 5x5"),
        ({"bands": BANDS["bands"] | {"grid": None}}, TOKENS, "of no known size"),
        ({"bands": BANDS["bands"] | {"transform": "fft"}}, PIXELS, r"bands by 'fft' need \[batch, tokens, channels\]"),
        (BANDS, Site("o", "value", (Port("o"),), ((2, 3),)), "need tokens or pixels"),
        (CLUSTERS, Site("o", "value", (Port("o"),), ((2, 24, 4),)), "clusters of 3 channels do not fit 'o'"),
    ],
)
def test_sites_that_do_not_fit_are_refused(form, site, problem):
    with pytest.raises(PlanError, match=problem):
        form_of(form, [site], site.name)


def test_each_part_is_mapped_to_other_levels():
    made = plan(BANDS, ((1,), (0,), (1,), (0,), (0,), (1,)))
    both = mapping.coefficients(made, 0, 3.5, [2.0, 0.0])
    low = dataclasses.replace(made, forms=(), coefficients=tuple((made.weights(s, 0)[0],) for s in range(6)))
    high = dataclasses.replace(made, forms=(), coefficients=tuple((made.weights(s, 0)[1],) for s in range(6)))
    parts = [mapping.coefficients(alone, 0, 3.5, [2.0, 0.0]) for alone in (low, high)]
    assert both == pytest.approx([*parts[0], *parts[1]])
    assert parts[0] == pytest.approx([1.0, 0.0]) and parts[1] == pytest.approx([1.75, -0.75])


@pytest.mark.parametrize("name", ["dct", "fft", "clusters"])
def test_whole_runs_forecast_the_output_as_the_form_says(name):
    schedule, solvers = ((1,), (1,), (0,), (1,), (0,), (0,), (1,)), [LINE, COPY]
    bands = {"transform": name, "cutoff": 0.4, "grid": [4, 6] if name == "dct" else None}
    spec = {"of_channel": [1, 0, 0, 1]} if name == "clusters" else bands
    form = {"clusters" if name == "clusters" else "bands": spec | {"predictors": [s.as_json() for s in solvers]}}
    made = dataclasses.replace(
        plan(form, schedule), model=fingerprint(tiny.module("flux")), levels=tiny.levels("flux"), sites=("output",)
    )
    outputs = [out for out, _ in tiny.generate("flux", tiny.denoise_with(tiny.base("flux").with_plan(made)), seed=1)]
    for step in (2, 4, 5):
        new, old = made.anchor_steps(step, 0)
        gap = (step - new) / (new - old)
        line, copied = outputs[new] + gap * (outputs[new] - outputs[old]), outputs[new]
        if name == "clusters":
            expected = torch.where(torch.tensor([1, 0, 0, 1]) > 0, copied, line)
        else:
            expected = copied + low_pass(line - copied, name, 0.4, (4, 6))
        torch.testing.assert_close(outputs[step], expected, atol=1e-5, rtol=1e-5)
