"""The JSON schema of plan files: it is the one that is shipped, good files satisfy it, and bad ones do not."""

import json
from pathlib import Path

import jsonschema
import pytest

import dcc
from dcc.plans import schema
from dcc.plans.plan import make_plan
from dcc.plans.predictors import Predictor
from dcc.plans.triggers import Layerwise, Verify

RELEASED = Path(__file__).resolve().parent.parent / "benchmarks" / "results" / "plans"
SHIPPED = Path(schema.__file__).with_name("plan.schema.json")
VALIDATOR = jsonschema.Draft202012Validator(json.loads(SHIPPED.read_text()))
COPY = Predictor("copy")
FORMS = [
    {},
    {"bands": {"transform": "dct", "cutoff": 0.1, "grid": [4, 6], "predictors": [COPY.as_json()] * 2}},
    {"clusters": {"of_channel": [0, 0, 1], "predictors": [COPY.as_json()] * 2}},
    {"tokens": {"select": "random", "ratio": [0.5]}},
    {"tokens": {"select": "cluster", "clusters": 3, "share": 0.1}},
    {"corrector": {"kind": "low_rank", "rank": 4, "channels": None}},
    {"corrector": {"kind": "linear", "weights": "weights.safetensors"}},
]


def plan(**changes):
    facts = {
        "model": "m", "scheduler": "s", "levels": (2.0, 1.0), "sites": ["h"], "schedule": [[1], [0]],
        "predictors": [COPY], "policy": "test", "parameters": {},
    }  # fmt: skip
    return make_plan(**facts | changes)


def test_the_shipped_schema_is_the_one_of_the_dataclasses():
    assert json.loads(SHIPPED.read_text()) == schema.plan_schema(), "run: python -m dcc.plans.schema > the file"
    jsonschema.Draft202012Validator.check_schema(schema.plan_schema())


@pytest.mark.parametrize("path", sorted(RELEASED.rglob("*.json")), ids=lambda path: path.stem)
def test_plans_of_earlier_versions_satisfy_it(path):
    VALIDATOR.validate(json.loads(path.read_text()))
    assert dcc.Plan.load(path).steps > 0


@pytest.mark.parametrize("form", FORMS, ids=lambda form: next(iter(form), "plain"))
def test_every_form_is_written_as_it_was_given_and_satisfies_it(form):
    data = plan(forms=[form]).as_json()
    assert data["forms"] == ([form] if form else [])
    VALIDATOR.validate(json.loads(json.dumps(data)))


@pytest.mark.parametrize("trigger", [Verify("h", 0.1, 0.1, 0.1), Layerwise(("h",), 3)], ids=lambda t: t.kind)
def test_triggers_satisfy_it(trigger):
    VALIDATOR.validate(json.loads(json.dumps(plan(trigger=trigger).as_json())))


@pytest.mark.parametrize(
    "change",
    [
        {"dcc_plan": 2},
        {"schedule": [[1], [3]]},
        {"levels": ["high", 1.0]},
        {"sites": "h"},
        {"forms": [{"bands": {"cutoff": 0.1}}]},
        {"forms": [{"magic": {}}]},
        {"trigger": {"kind": "sometimes"}},
        {"predictors": [{"name": "spline", "order": 1, "options": {}}]},
        {"more": 1},
    ],
    ids=str,
)
def test_malformed_files_do_not(change):
    data = json.loads(json.dumps(plan().as_json())) | change
    assert list(VALIDATOR.iter_errors(data))
