"""Predictors against the series they must extrapolate and the published formulas (arXiv 2503.06923)."""

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dcc.errors import PolicyError
from dcc.predictors import MAX_ORDER, Predictor

ORDERED = [("taylor", order) for order in range(1, MAX_ORDER + 1)] + [
    ("newton", order) for order in range(1, MAX_ORDER + 1)
]
EVERY = [("copy", 0), *ORDERED]


def forecast(predictor, series, step, anchors):
    """The predictor's value at `step` for a series known at the anchors."""
    coefficients = predictor.coefficients(step, anchors)
    return sum(a * series(s) for a, s in zip(coefficients, anchors, strict=False))


@st.composite
def steps_and_anchors(draw):
    """A step and uneven, strictly decreasing anchors before it, newest first."""
    gaps = draw(st.lists(st.integers(1, 9), min_size=2, max_size=7))
    anchors = np.cumsum([0, *gaps[1:]])[::-1].tolist()
    return anchors[0] + gaps[0], anchors


def published_taylor(step, anchors, order, series):
    """TaylorSeer's recursion on values, anchor after anchor, as its repository writes it."""
    factors: dict[int, float] = {}
    before = None
    for now in reversed(anchors):
        fresh = {0: series(now)}
        for i in range(order):
            if i not in factors:
                break
            fresh[i + 1] = (fresh[i] - factors[i]) / (now - before)
        factors, before = fresh, now
    k = step - anchors[0]
    return sum(factor * k**i / math.factorial(i) for i, factor in factors.items())


@pytest.mark.parametrize(("name", "order"), EVERY)
@given(case=steps_and_anchors())
def test_constant_series_are_exact(name, order, case):
    step, anchors = case
    assert sum(Predictor(name, order).coefficients(step, anchors)) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize(("name", "order"), [("taylor", 1), ("newton", 1), ("newton", 2), ("newton", 4)])
@given(case=steps_and_anchors())
def test_linear_series_are_exact(name, order, case):
    step, anchors = case
    found = forecast(Predictor(name, order), lambda s: 3 * s - 2, step, anchors)
    assert found == pytest.approx(3 * step - 2, rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("order", [1, 2, 3, 4])
@pytest.mark.parametrize("interval", [1, 4, 6])
def test_taylor_is_exact_on_linear_series_at_even_spacing(order, interval):
    anchors = [20 - interval * j for j in range(order + 1)]
    for k in range(1, interval):
        found = forecast(Predictor("taylor", order), lambda s: 0.5 * s + 1, 20 + k, anchors)
        assert found == pytest.approx(0.5 * (20 + k) + 1)


@given(case=steps_and_anchors())
def test_newton_two_is_exact_on_quadratic_series(case):
    step, anchors = case
    anchors = [*anchors, anchors[-1] - 1]  # three at least
    found = forecast(Predictor("newton", 2), lambda s: s * s - 5 * s + 3, step, anchors)
    assert found == pytest.approx(step * step - 5 * step + 3, rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("interval", [2, 4, 9])
def test_published_error_of_taylor_two_on_quadratic_series(interval):
    anchors = [30, 30 - interval, 30 - 2 * interval]
    second_difference = 2 * interval**2  # of s**2, at this spacing
    for k in range(1, interval):
        truth = (30 + k) ** 2
        error = truth - forecast(Predictor("taylor", 2), lambda s: s * s, 30 + k, anchors)
        assert error == pytest.approx(k / interval / 2 * second_difference)
        assert forecast(Predictor("newton", 2), lambda s: s * s, 30 + k, anchors) == pytest.approx(truth)


@pytest.mark.parametrize(
    ("name", "order", "table"),
    [
        ("copy", 0, lambda u: [1]),
        ("taylor", 1, lambda u: [1 + u, -u]),
        ("taylor", 2, lambda u: [1 + u + u**2 / 2, -u - u**2, u**2 / 2]),
        ("newton", 1, lambda u: [1 + u, -u]),
        ("newton", 2, lambda u: [1 + 1.5 * u + 0.5 * u**2, -2 * u - u**2, 0.5 * u + 0.5 * u**2]),
    ],
)
@pytest.mark.parametrize(("interval", "k"), [(4, 3), (5, 1), (6, 5)])
def test_coefficients_at_even_spacing(name, order, table, interval, k):
    predictor = Predictor(name, order)
    anchors = [40 - interval * j for j in range(MAX_ORDER + 1)]
    assert predictor.coefficients(40 + k, anchors) == pytest.approx(table(k / interval))


@pytest.mark.parametrize(
    ("name", "gains"), [("taylor", [2.5, 3.62, 4.19, 4.40]), ("newton", [2.5, 5.1, 9.9, 19])], ids=["taylor", "newton"]
)
def test_noise_gain_three_steps_behind_an_interval_of_four(name, gains):
    anchors = [20, 16, 12, 8, 4]
    found = [sum(map(abs, Predictor(name, order).coefficients(23, anchors))) for order in (1, 2, 3, 4)]
    assert found == pytest.approx(gains, rel=0.02)


@pytest.mark.parametrize("order", [1, 2, 3, 4])
@given(case=steps_and_anchors(), values=st.lists(st.floats(-10, 10), min_size=7, max_size=7))
def test_taylor_is_the_published_recursion(order, case, values):
    step, anchors = case
    series = dict(zip(anchors, values, strict=False)).__getitem__
    expected = published_taylor(step, anchors, order, series)
    found = forecast(Predictor("taylor", order), series, step, anchors)
    assert found == pytest.approx(expected, rel=1e-6, abs=1e-6)


def test_taylor_two_differs_from_newton_two_on_uneven_anchors():
    anchors = [10, 9, 5]
    taylor, newton = (Predictor(name, 2).coefficients(12, anchors) for name in ("taylor", "newton"))
    assert taylor != pytest.approx(newton)


@given(case=steps_and_anchors())
def test_copy_takes_the_newest_anchor(case):
    step, anchors = case
    assert Predictor("copy").coefficients(step, anchors) == [1]


@pytest.mark.parametrize(("name", "order"), ORDERED)
@given(case=steps_and_anchors())
def test_order_drops_with_few_anchors(name, order, case):
    step, anchors = case
    for count in range(1, len(anchors) + 1):
        used = min(count, order + 1)
        found = Predictor(name, order).coefficients(step, anchors[:count])
        assert len(found) == used
        lower = Predictor(name, used - 1) if used > 1 else Predictor("copy")
        assert found == lower.coefficients(step, anchors)


@given(case=steps_and_anchors())
def test_newton_passes_through_its_anchors(case):
    """Seen from the newest anchor itself, the weights of the older ones vanish; and steps may be fractions."""
    _, anchors = case
    close = Predictor("newton", 2).coefficients(anchors[0] + 1e-9, anchors)
    assert close == pytest.approx([1, *[0] * (len(close) - 1)], abs=1e-6)


@pytest.mark.parametrize(("name", "order"), EVERY)
def test_anchors_are_one_more_than_the_order(name, order):
    assert Predictor(name, order).anchors == order + 1


def test_printed_form():
    assert str(Predictor("copy")) == "copy"
    assert str(Predictor("taylor", 2)) == "taylor 2"


def test_unknown_name_lists_the_known_ones():
    with pytest.raises(PolicyError, match=r"'spline'.*copy, taylor, newton"):
        Predictor("spline", 1)


@pytest.mark.parametrize(
    ("name", "order"),
    [("copy", 1), ("taylor", 0), ("taylor", MAX_ORDER + 1), ("newton", -1), ("newton", 1.0), ("taylor", "2")],
)
def test_bad_orders_name_the_range(name, order):
    with pytest.raises(PolicyError, match=rf"order=.*{name} predictor takes an order from \d to \d"):
        Predictor(name, order)


def test_no_anchor():
    with pytest.raises(ValueError, match="at least one anchor"):
        Predictor("copy").coefficients(3, [])


@pytest.mark.parametrize("anchors", [[5], [6], [3, 3], [2, 4], [4, 3, 3], [math.nan]])
def test_anchors_must_decrease_from_the_step(anchors):
    with pytest.raises(ValueError, match="strictly decreasing"):
        Predictor("taylor", 2).coefficients(5, anchors)


@given(case=steps_and_anchors())
def test_coefficients_are_python_floats(case):
    step, anchors = case
    assert all(type(a) is float for a in Predictor("taylor", 2).coefficients(step, anchors))
    assert all(newer > older for newer, older in pairwise(anchors))
