"""Plans: save and load, printing, and every malformed file named with its field."""

import copy
import json
import math
import os
from dataclasses import replace

import pytest

from dcc.errors import PlanError
from dcc.plans.plan import Plan, make_plan, with_costs
from dcc.plans.predictors import Predictor
from dcc.policies import Setting, make_policy

TAYLOR = Predictor("taylor", 1)
LEVELS = (900.0, 700.5, 500.0, 300.0, 100.0)


def planned(schedule=((1,), (1,), (0,), (1,), (0,)), predictors=(TAYLOR,), sites=("stack",), **changes):
    facts = {
        "model": "0123456789abcdef",
        "scheduler": "FlowMatchEulerDiscreteScheduler",
        "levels": LEVELS,
        "policy": "taylorseer",
        "parameters": {"interval": 2, "first": 2},
    } | changes
    return make_plan(schedule=schedule, predictors=predictors, sites=sites, **facts)


def costed(plan):
    return with_costs(plan, {row: 10**9 * (1 + 9 * sum(row)) for row in plan.rows}, 2**20)


MIXED = {
    "sites": ("stack", "blocks.0"),
    "predictors": (Predictor("copy"), Predictor("newton", 2)),
    "schedule": ((1, 1), (0, 1), (1, 1), (0, 0), (1, 0)),
}


def test_coefficients_follow_from_the_predictor():
    plan = planned()
    assert plan.coefficients == (((),), ((),), ((2.0, -1.0),), ((),), ((1.5, -0.5),))
    assert plan.anchors == 2
    assert plan.steps == 5
    assert plan.rows == [(1,), (0,)]
    assert plan.anchor_steps(4, 0) == [3, 1]
    assert plan.anchor_steps(1, 0) == [0]
    assert plan.anchor_steps(0, 0) == []


def test_mixed_selectors_have_their_own_predictors():
    plan = planned(**MIXED)
    assert plan.coefficients[1] == ((1.0,), ())
    assert plan.coefficients[3] == ((1.0,), pytest.approx((3.0, -3.0, 1.0)))
    assert plan.coefficients[4] == ((), pytest.approx((6.0, -8.0, 3.0)))
    assert plan.rows == [(1, 1), (1, 0), (0, 1), (0, 0)]
    assert plan.steps_mask == [1, 0, 1, 0, 0]
    assert plan.anchors == 3


def test_interval_one_is_all_compute_with_one_row():
    policy = make_policy("interval", Setting(range(5)), {"interval": 1})
    plan = costed(planned([[v] for v in policy.caches[0].mask], [policy.caches[0].predictor]))
    assert plan.rows == [(1,)]
    assert plan.steps_mask == [1] * 5
    assert plan.coefficients == (((),),) * 5
    assert plan.anchors == 1
    assert plan.speedup == 1
    assert plan.cache_bytes == 0


def test_all_compute_row_comes_first_even_when_no_step_uses_it():
    assert planned(**MIXED | {"schedule": ((1, 1), *((0, 1), (1, 0)) * 2)}).rows[0] == (1, 1)


def test_costs():
    plan = costed(planned())
    assert (plan.flops, plan.flops_uncached, plan.cache_bytes) == (32 * 10**9, 50 * 10**9, 2 * 2**20)
    assert plan.speedup == pytest.approx(50 / 32)
    assert planned().speedup == pytest.approx(5 / 3)  # by steps while no costs are known
    free = with_costs(planned(), {(1,): 0, (0,): 0}, 0)
    assert free.speedup == pytest.approx(5 / 3)


def test_speedup_of_a_run_without_any_work_is_infinite():
    plan = costed(planned())
    assert replace(plan, flops=0).speedup == math.inf


@pytest.mark.parametrize("k", [0, 1])
def test_a_forecast_at_step_zero_is_refused(k):
    first = [1, 1]
    first[k] = 0
    with pytest.raises(PlanError, match=rf"step 0 forecasts '{MIXED['sites'][k]}'.*compute step 0"):
        planned(**MIXED | {"schedule": (first, *[(1, 1)] * 4)})


@pytest.mark.parametrize(
    "plan", [planned(), costed(planned()), costed(planned(**MIXED))], ids=["plain", "costed", "mixed"]
)
def test_save_and_load_give_the_same_plan(plan, tmp_path):
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan
    assert Plan.load(str(tmp_path / "plan.json")) == plan


@pytest.mark.parametrize("given", [[1, 1, 0, 0, 1], (1, 1, 0, 0, 1)], ids=["list", "tuple"])
def test_steps_mask_in_and_out(given, tmp_path):
    policy = make_policy("taylorseer", Setting(range(5)), {"steps_mask": given})
    plan = planned([[v] for v in policy.caches[0].mask], [policy.caches[0].predictor], parameters={"steps_mask": given})
    assert plan.steps_mask == [1, 1, 0, 0, 1]
    plan.save(tmp_path / "plan.json")
    loaded = Plan.load(tmp_path / "plan.json")
    assert loaded == plan
    again = make_policy("interval", Setting(range(5)), {"steps_mask": loaded.steps_mask})
    assert again.caches[0].mask == (1, 1, 0, 0, 1)


def test_the_file_is_readable_json(tmp_path):
    planned().save(tmp_path / "plan.json")
    data = json.loads((tmp_path / "plan.json").read_text())
    assert data["dcc_plan"] == 1
    assert data["schedule"] == [[1], [1], [0], [1], [0]]
    assert data["parameters"] == {"interval": 2, "first": 2}


def test_save_replaces_the_old_file(tmp_path):
    path = tmp_path / "plan.json"
    planned().save(path)
    costed(planned(**MIXED)).save(path)
    assert Plan.load(path) == costed(planned(**MIXED))
    assert os.listdir(tmp_path) == ["plan.json"]


def test_a_failing_save_keeps_the_old_file(tmp_path):
    path = tmp_path / "plan.json"
    planned().save(path)
    with pytest.raises(TypeError):
        planned(parameters={"interval": object()}).save(path)
    assert Plan.load(path) == planned()
    assert os.listdir(tmp_path) == ["plan.json"]  # and leaves no half-written one behind


def test_printed_form():
    assert str(costed(planned())) == (
        "plan: taylorseer(interval=2, first=2)\n"
        "  scheduler   FlowMatchEulerDiscreteScheduler, 5 steps, levels 900 to 100\n"
        "  steps mask  11010  (3 full steps of 5)\n"
        "  site        stack: 11010\n"
        "  expected    1.56x fewer FLOPs (50.00 to 32.00 GFLOP per run and stream), 2.00 MiB of anchors, 2 variants"
    )


def test_printed_form_shows_every_selector():
    lines = str(planned(**MIXED)).splitlines()
    assert lines[2] == "  steps mask  10100  (2 full steps of 5)"
    assert lines[3:5] == ["  site        stack: 10101", "  site        blocks.0: 11100"]


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(PlanError, match=r"nowhere\.json: cannot be read: No such file"):
        Plan.load(tmp_path / "nowhere.json")


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "not JSON"),
        (b'{"dcc_plan": 1, "mod', "not JSON"),
        (b"a photo of a cat", "not JSON"),
        (b"\xff\xfe\x00\x01", "not JSON"),
        (b"[1, 2]", "'dcc_plan' is missing"),
        (b"3", "'dcc_plan' is missing"),
        (b"{}", "'dcc_plan' is missing"),
        (b'{"dcc_plan": 2}', "version 1"),
        (b'{"dcc_plan": "1"}', "version 1"),
        (b'{"dcc_plan": 1}', "'model'"),
    ],
    ids=["empty", "truncated", "prose", "binary", "list", "number", "no version", "version 2", "'1'", "version only"],
)
def test_files_that_are_no_plan(content, problem, tmp_path):
    path = tmp_path / "odd.json"
    path.write_bytes(content)
    with pytest.raises(PlanError, match=rf"odd\.json: .*{problem}"):
        Plan.load(path)


def put(*keys_and_value):
    """An edit of plan data: put("schedule", 2, 0, 5) sets data["schedule"][2][0] = 5."""
    *keys, last, value = keys_and_value

    def edit(data):
        for key in keys:
            data = data[key]
        data[last] = value

    return edit


def without(field):
    return lambda data: data.pop(field)


def shorter(field):
    return lambda data: data[field].pop()


MALFORMED = {
    "missing model": (without("model"), "model"),
    "missing schedule": (without("schedule"), "schedule"),
    "unknown field": (put("colour", 1), "colour"),
    "model is a number": (put("model", 3), "model"),
    "scheduler is null": (put("scheduler", None), "scheduler"),
    "policy is a list": (put("policy", ["a"]), "policy"),
    "levels are a string": (put("levels", "900, 700"), "levels"),
    "a level is a string": (put("levels", 1, "700"), "levels"),
    "a level is NaN": (put("levels", 1, math.nan), "levels"),
    "a level is infinite": (put("levels", 1, math.inf), "levels"),
    "a level is true": (put("levels", 1, True), "levels"),
    "a level is no float": (put("levels", 1, 10**400), "levels"),
    "no levels": (put("levels", []), "levels"),
    "sites are a string": (put("sites", "stack"), "sites"),
    "no sites": (put("sites", []), "sites"),
    "a site is a number": (put("sites", 0, 7), "sites"),
    "measured is a list": (put("measured", [1]), "measured"),
    "measured without a PSNR": (put("measured", {"prompts": 3, "psnr_mean": 30.0}), "measured"),
    "measured is NaN": (put("measured", {"prompts": 3, "psnr_mean": math.nan, "psnr_worst": 1.0}), "measured"),
    "limits too short": (put("limits", [0.5]), "limits"),
    "a limit is a string": (put("limits", ["x"] * 5), "limits"),
    "limits are an object": (put("limits", {}), "limits"),
    "schedule is an object": (put("schedule", {}), "schedule"),
    "schedule too short": (shorter("schedule"), "schedule"),
    "schedule row too long": (put("schedule", 1, [1, 1]), "schedule"),
    "schedule row is a number": (put("schedule", 1, 1), "schedule"),
    "schedule holds 2": (put("schedule", 1, [2]), "schedule"),
    "schedule holds a string": (put("schedule", 1, ["1"]), "schedule"),
    "schedule holds a list": (put("schedule", 1, [[1]]), "schedule"),
    "coefficients too short": (shorter("coefficients"), "coefficients"),
    "coefficients are null": (put("coefficients", None), "coefficients"),
    "coefficients of a site are a number": (put("coefficients", 2, 0, 1.0), "coefficients"),
    "coefficients at a computed step": (put("coefficients", 1, 0, [1.0]), "coefficients"),
    "no coefficients at a forecast step": (put("coefficients", 2, 0, []), "coefficients"),
    "too many coefficients": (put("coefficients", 2, 0, [1.0, 1.0, -1.0]), "coefficients"),
    "a coefficient is NaN": (put("coefficients", 2, 0, 1, math.nan), "coefficients"),
    "a coefficient is a string": (put("coefficients", 2, 0, 1, "1"), "coefficients"),
    "forecast at step 0": (put("schedule", 0, [0]), "coefficients"),
    "parameters are a list": (put("parameters", [1]), "parameters"),
    "flops are negative": (put("flops", -1), "flops"),
    "flops are a fraction": (put("flops", 1.5), "flops"),
    "flops_uncached are a string": (put("flops_uncached", "9"), "flops_uncached"),
    "cache_bytes are null": (put("cache_bytes", None), "cache_bytes"),
}


@pytest.mark.parametrize(("edit", "field"), MALFORMED.values(), ids=MALFORMED)
def test_malformed_plans_name_the_file_and_the_field(edit, field, tmp_path):
    path = tmp_path / "bad.json"
    planned().save(path)
    data = json.loads(path.read_text())
    before = copy.deepcopy(data)
    edit(data)
    assert json.dumps(data) != json.dumps(before)
    path.write_text(json.dumps(data))
    with pytest.raises(PlanError, match=rf"bad\.json: .*'{field}'"):
        Plan.load(path)
