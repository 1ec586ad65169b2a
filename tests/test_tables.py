"""Tables for the terminal, at the widths of real terminals."""

from __future__ import annotations

import pytest

from dcc.plans.plan import Plan, make_plan, with_costs
from dcc.plans.predictors import Predictor
from dcc.policies import POLICIES
from dcc.report.report import Report, Row
from dcc.report.tables import demo_table, plan_table, policies_table, policy_table, steps_table
from dcc.text import count, decibels, human_seconds, render


def a_plan(steps: int = 50, full_every: int = 4) -> Plan:
    plan = make_plan(
        model="0123456789abcdef",
        scheduler="FlowMatchEulerDiscreteScheduler",
        levels=[1 - s / steps for s in range(steps)],
        sites=["stack"],
        schedule=[[s % full_every == 0] for s in range(steps)],
        predictors=[Predictor("taylor", 1)],
        policy="taylorseer",
        parameters={"interval": full_every, "site": "blocks[0:2]"},
    )
    return with_costs(plan, {(1,): 10**9, (0,): 10**7}, 40 * 1024)


def a_report() -> Report:
    uncached = Row("uncached", a_plan(full_every=1), seconds=[12.5, 11.0, 13.0])
    cached = Row("cached", a_plan(), [4.1, 4.0, 5.0], [31.5, 28.25, 40.0], [0.9, 0.95, 1.0])
    return Report(uncached, [cached], ["one", "two", "three"], {})


@pytest.mark.parametrize("width", [60, 80, 100])
def test_tables_fit_the_terminal_and_cut_nothing_off(width: int):
    tables = [demo_table(a_report(), a_report()["cached"]), plan_table(a_plan()), steps_table(a_plan())]
    for text in (render(table, width) for table in tables):
        assert max(map(len, text.splitlines())) <= width
        assert "…" not in text


def test_the_demo_table_says_what_was_measured():
    plan, report = a_plan(), a_report()
    text = render(demo_table(report, report["cached"]), 60)
    ratio = 12.5 / 4.1
    for value in ("12.50 s", "4.10 s", f"{ratio:.2f}x", f"{plan.speedup:.2f}x", f"{ratio / plan.speedup:.0%}"):
        assert value in text
    for value in ("33.2 dB", "28.2 dB", "0.9500", "80.0 KiB", "13 of 50", "50 of 50"):
        assert value in text


def test_a_plan_whose_every_step_computes_has_a_table():
    assert "1.00x" in render(plan_table(a_plan(full_every=1)), 60)


def test_plan_tables_show_parameters_mask_and_anchors():
    text = render(plan_table(a_plan(steps=8)), 60)
    assert "taylorseer(interval=4, site=blocks[0:2])" in text
    assert "10001000" in text
    lines = render(steps_table(a_plan(steps=8)), 60).splitlines()
    assert len(lines) == 9
    assert "computed" in lines[1] and "+1 of 0" in lines[2] and "of 4" in lines[6] and "of 0" in lines[6]


def test_the_table_of_policies_breaks_no_word_at_80_columns():
    text = render(policies_table(list(POLICIES.values())), 80)
    assert max(map(len, text.splitlines())) <= 80 and "…" not in text
    printed = set(text.split())
    for method in POLICIES.values():
        facts = (method.name, method.trigger, method.predictor, method.needs.replace("nothing", ""), method.checked)
        assert [word for fact in facts for word in fact.split() if word not in printed] == [], method.name


@pytest.mark.parametrize("method", POLICIES.values(), ids=lambda method: method.name)
def test_a_policy_is_shown_whole_on_a_narrow_terminal(method):
    text = render(policy_table(method), 60)
    assert max(map(len, text.splitlines())) <= 60 and "…" not in text
    for value in (method.title, *(f"{name}=" for name in method.parameters)):
        assert value in text


def test_units():
    assert [human_seconds(s) for s in (0.0421, 0.9999, 2.5)] == ["42 ms", "1.00 s", "2.50 s"]
    assert [decibels(v) for v in (31.24, float("inf"))] == ["31.2 dB", "identical"]
    assert [count(n, "step") for n in (0, 1, 2)] == ["0 steps", "1 step", "2 steps"]
