"""Plans at noise levels that they were not made for."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dcc.plans import mapping
from dcc.plans.plan import Plan, make_plan
from dcc.plans.predictors import Predictor

LEVELS = (1000, 930, 850, 700, 610, 500, 420, 300, 220, 100)
MASK = (1, 1, 0, 1, 0, 0, 0, 1, 0, 0)


def plan(order: int = 2, mask: tuple[int, ...] = MASK) -> Plan:
    return make_plan(
        model="m",
        scheduler="s",
        levels=LEVELS,
        sites=["output"],
        schedule=[[full] for full in mask],
        predictors=[Predictor("newton", order) if order else Predictor("copy")],
        policy="test",
        parameters={},
    )


def walk(chosen: Plan, positions: list[float]) -> list[int]:
    """1 where a run that calls at these positions computes."""
    served, last, result = -1, None, []
    for now in positions:
        reached = mapping.due(chosen, 0, served, last, now)
        result.append(int(reached > served))
        served, last = reached, now
    return result


def test_positions_are_interpolated_between_levels_and_end_one_step_outside() -> None:
    assert [mapping.position(LEVELS, level) for level in LEVELS] == list(range(10))
    assert mapping.position(LEVELS, 965) == 0.5
    assert mapping.position(LEVELS, 40) == pytest.approx(9.5)
    assert mapping.position(LEVELS, 1070) == -1.0
    assert mapping.position(LEVELS, 1071) is None and mapping.position(LEVELS, -21) is None
    assert mapping.position(tuple(-x for x in LEVELS), -965) == 0.5
    assert mapping.position((5.0,), 5.0) is None and mapping.position((1, 3, 2), 2) is None


def test_levels_that_repeat_count_once() -> None:
    assert mapping.position((10, 10, 8, 8, 6, 6), 7) == 3.0


def test_on_its_own_levels_the_plan_is_itself() -> None:
    chosen = plan()
    assert tuple(walk(chosen, [float(s) for s in range(10)])) == MASK
    for step, row in enumerate(chosen.coefficients):
        if row[0]:
            anchors = chosen.anchor_steps(step, 0)[: len(row[0])]
            assert mapping.coefficients(chosen, 0, step, anchors) == pytest.approx(row[0], abs=1e-9)


@given(st.integers(5, 40))
def test_every_anchor_of_the_plan_is_computed_once(steps: int) -> None:
    positions = np.linspace(0, 9, steps).tolist()
    computed = sum(walk(plan(), positions))
    assert computed <= sum(MASK) and computed >= min(sum(MASK), steps // 3)
    if steps >= 10:
        assert computed == sum(MASK)


@given(st.integers(2, 9), st.lists(st.floats(-0.4, 0.4), min_size=2, max_size=2), st.integers(0, 1))
def test_lines_are_forecast_exactly_wherever_the_anchors_stand(step: int, shifts: list[float], degree: int) -> None:
    chosen = plan(order=1)
    if MASK[step]:
        return
    anchors = [a + s for a, s in zip(chosen.anchor_steps(step, 0)[:2], shifts, strict=True)]
    weights = mapping.coefficients(chosen, 0, step, anchors)
    forecast = sum(w * (a - step) ** degree for w, a in zip(weights, anchors, strict=True))
    assert forecast == pytest.approx(0.0**degree, abs=1e-6)


@given(st.lists(st.floats(-0.4, 0.4), min_size=3, max_size=3))
def test_what_a_fit_adds_means_the_same_wherever_the_anchors_stand(shifts: list[float]) -> None:
    added = [0.01, -0.4, 12.0]  # of the value, the first and the second divided difference, at every step of the gap
    gap, own, moved = (8, 9), (7, 3, 1), [a + s for a, s in zip((7.0, 3.0, 1.0), shifts, strict=True)]

    def expected(now: float, anchors: list[float], values: np.ndarray) -> float:
        first = np.diff(values) / np.diff(anchors)
        second = (first[1] - first[0]) / (anchors[2] - anchors[0])
        line = values[0] + first[0] * (now - anchors[0])
        return line + added[0] * values[0] + added[1] * first[0] + added[2] * second

    units = np.eye(3)
    coefficients = {s: [expected(s, list(own), unit) for unit in units] for s in gap}
    chosen = replace(
        plan(), coefficients=tuple((tuple(coefficients.get(s, row[0])),) for s, row in enumerate(plan().coefficients))
    )
    wanted = [expected(8.4, moved, unit) for unit in units]
    assert mapping.coefficients(chosen, 0, 8.4, moved) == pytest.approx(wanted, rel=1e-6, abs=1e-6)


def test_fewer_anchors_than_the_plan_reads_still_forecast() -> None:
    assert len(mapping.coefficients(plan(), 0, 4.3, [2.9])) == 1
    assert len(mapping.coefficients(plan(), 0, 4.3, [2.9, 1.2])) == 2
    assert mapping.coefficients(plan(order=1), 0, 4.3, [2.9, 1.9]) == pytest.approx([2.4, -1.4])


def test_between_two_neighbouring_anchors_the_forecast_is_linear() -> None:
    assert mapping.coefficients(plan(), 0, 0.5, [0.0]) == [1.0]
    assert mapping.coefficients(plan(mask=(1, 1, 1, 1, 1, 1, 1, 1, 1, 0)), 0, 2.5, [2.0, 1.0]) == [1.5, -0.5]


def test_a_run_ends_where_no_level_is_left() -> None:
    chosen = plan()
    assert not mapping.ends(chosen, 8.0, 8.5) and mapping.ends(chosen, 9.0, 9.5)
    assert mapping.ends(chosen, 6.0, 8.0) and not mapping.ends(chosen, 4.0, 6.0)
