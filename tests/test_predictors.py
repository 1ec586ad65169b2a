"""Predictors against the series they must extrapolate and the published formulas of each method."""

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dcc.errors import PolicyError
from dcc.plans.predictors import MAX_ORDER, ORDERS, RULES, Predictor, Switched, Table

ROOT_HALF = math.sqrt(0.5)  # the scale at which Hermite's basis of order 1 is Taylor's
ORDERED = [
    (name, order) for name in ("taylor", "newton", "adams_bashforth", "momentum") for order in range(1, MAX_ORDER + 1)
]
FIXED = [("copy", 0), ("foca", 2), ("goc", 1), ("extrapolate", 1), ("bdf2", 1), ("midpoint", 1), ("adams_moulton", 2)]
EVERY = [*FIXED, *ORDERED]  # those whose coefficients add up to 1


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


def differences(anchors, series):
    """TaylorSeer's recursion on values, anchor after anchor, as its repository writes it: all orders there are."""
    factors: list[float] = []
    before = None
    for now in reversed(anchors):
        fresh = [series(now)]
        for factor in factors:
            fresh.append((fresh[-1] - factor) / (now - before))
        factors, before = fresh, now
    return factors


def published_taylor(step, anchors, order, series):
    """The forecast of TaylorSeer's repository."""
    k = step - anchors[0]
    return sum(d * k**i / math.factorial(i) for i, d in enumerate(differences(anchors, series)[: order + 1]))


@pytest.mark.parametrize(("name", "order"), EVERY)
@given(case=steps_and_anchors())
def test_constant_series_are_exact(name, order, case):
    step, anchors = case
    assert sum(Predictor(name, order).coefficients(step, anchors)) == pytest.approx(1, abs=1e-6)


LINEAR = [  # exact on a line, at any spacing
    ("taylor", 1, {}), ("newton", 1, {}), ("newton", 2, {}), ("newton", 4, {}),
    ("adams_bashforth", 1, {}), ("adams_bashforth", 3, {}), ("foca", 2, {}),
    ("momentum", 1, {}), ("momentum", 3, {}), ("momentum", 4, {"beta": 0.9}),
    ("hermite", 1, {"sigma": ROOT_HALF}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "order", "options"), LINEAR)
@given(case=steps_and_anchors())
def test_linear_series_are_exact(name, order, options, case):
    step, anchors = case
    found = forecast(Predictor(name, order, tuple(options.items())), lambda s: 3 * s - 2, step, anchors)
    assert found == pytest.approx(3 * step - 2, rel=1e-6, abs=1e-6)


@given(case=steps_and_anchors())
def test_an_interval_counts_in_steps_not_in_sign(case):
    """A rule that took the distance with the wrong sign would still add up to 1: the slope tells."""
    step, anchors = case
    for name, order, options in LINEAR:
        predictor = Predictor(name, order, tuple(options.items()))
        moved = forecast(predictor, float, step, anchors) - anchors[0]
        assert moved == pytest.approx(step - anchors[0], rel=1e-6)


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
        ("adams_bashforth", 1, lambda u: [1 + u, -u]),
        ("foca", 2, lambda u: [1 + 1.5 * u, -2 * u, 0.5 * u]),
        ("momentum", 1, lambda u: [1 + u, -u]),
        ("momentum", 2, lambda u: [1 + 2 / 3 * u, -1 / 3 * u, -1 / 3 * u]),
        ("goc", 1, lambda u: [2.2, -1.2]),
        ("extrapolate", 1, lambda u: [1.3, -0.3]),
        ("bdf2", 1, lambda u: [4 / 3, -1 / 3]),
        ("midpoint", 1, lambda u: [1.5, -0.5]),
        ("adams_moulton", 2, lambda u: [55 / 24, -19 / 12, 7 / 24]),
        ("zero", 0, lambda u: [0]),
        ("scaled", 0, lambda u: [1]),
    ],
)
@pytest.mark.parametrize(("interval", "k"), [(4, 3), (5, 1), (6, 5)])
def test_coefficients_at_even_spacing(name, order, table, interval, k):
    predictor = Predictor(name, order)
    anchors = [40 - interval * j for j in range(MAX_ORDER + 1)]
    assert predictor.coefficients(40 + k, anchors) == pytest.approx(table(k / interval))


@pytest.mark.parametrize(("order", "binomials"), [(1, [2, -1]), (2, [3, -3, 1]), (3, [4, -6, 4, -1])])
@pytest.mark.parametrize("interval", [1, 4])
def test_adams_bashforth_one_gap_ahead_has_the_signed_binomials(order, binomials, interval):
    anchors = [20 - interval * j for j in range(order + 1)]
    assert Predictor("adams_bashforth", order).coefficients(20 + interval, anchors) == pytest.approx(binomials)


@given(case=steps_and_anchors(), values=st.lists(st.floats(-10, 10), min_size=3, max_size=3))
def test_foca_is_a_bdf2_prediction_and_the_mean_of_both_slopes(case, values):
    """Against Heun's rule on the slope of the parabola through three values, taken by numpy's fit."""
    step, anchors = case
    anchors = [*anchors, anchors[-1] - 1][:3]
    k = step - anchors[0]

    def slope(steps, series):
        return np.polyder(np.poly1d(np.polyfit(np.subtract(steps, steps[0]), series, 2)))(0.0)

    here = slope(anchors, values)
    weights = np.polyfit(np.subtract([step, *anchors[:2]], step), np.eye(3), 2)[1]  # of the slope at the step
    predicted = (here - weights[1:] @ values[:2]) / weights[0]  # the value whose BDF2 slope is the one here
    ahead = slope([step, *anchors[:2]], [predicted, *values[:2]])
    found = forecast(Predictor("foca", 2), dict(zip(anchors, values, strict=True)).__getitem__, step, anchors)
    assert found == pytest.approx(values[0] + k * (here + ahead) / 2, rel=1e-6, abs=1e-6)


def test_foca_one_gap_ahead_at_even_spacing():
    anchors = [12, 8, 4]
    corrected = Predictor("foca", 2).coefficients(16, anchors)
    assert corrected == pytest.approx([5 / 2, -2, 1 / 2])
    # the slope of BDF2's own prediction (7 F0 - 5 F1 + F2) / 3 is the one at the newest anchor
    predicted, f0, f1, f2 = np.array([7 / 3, -5 / 3, 1 / 3]), *np.eye(3)
    assert (3 * predicted - 4 * f0 + f1) / 2 == pytest.approx((3 * f0 - 4 * f1 + f2) / 2)


@pytest.mark.parametrize("sigma", [0.3, 0.5, 0.71, 1.0])
@pytest.mark.parametrize(("interval", "k"), [(4, 3), (6, 1), (1, 1)])
def test_hermite_coefficients_at_even_spacing(sigma, interval, k):
    anchors = [30, 30 - interval, 30 - 2 * interval]
    u = k / interval
    one = np.array([1, 0]) + 2 * sigma**2 * u * np.array([1, -1])
    assert Predictor("hermite", 1, (("sigma", sigma),)).coefficients(30 + k, anchors) == pytest.approx(one)
    two = np.array([*one, 0]) + (2 * sigma**4 * k**2 - sigma**2) / interval**2 * np.array([1, -2, 1])
    assert Predictor("hermite", 2, (("sigma", sigma),)).coefficients(30 + k, anchors) == pytest.approx(two)


@given(case=steps_and_anchors())
def test_hermite_of_order_one_is_taylor_at_root_half_and_half_its_slope_at_a_half(case):
    step, anchors = case
    taylor = np.array(Predictor("taylor", 1).coefficients(step, anchors))
    newest = np.eye(len(taylor))[0]
    same = Predictor("hermite", 1, (("sigma", ROOT_HALF),)).coefficients(step, anchors)
    assert same == pytest.approx(taylor, abs=1e-6)
    half = Predictor("hermite", 1).coefficients(step, anchors)
    assert half == pytest.approx(newest + (taylor - newest) / 2, abs=1e-6)


@pytest.mark.parametrize("order", [1, 2, 3, 4])
@given(case=steps_and_anchors(), sigma=st.floats(0.1, 1.0))
def test_hermite_weighs_the_published_differences(order, case, sigma):
    """sum_i D^i sigma^i H_i(sigma k) / i!, the polynomials by their recursion."""
    step, anchors = case
    anchors = anchors[: order + 1]
    x = sigma * (step - anchors[0])
    polynomials = [1.0, 2 * x]
    for n in range(1, order):
        polynomials.append(2 * x * polynomials[n] - 2 * n * polynomials[n - 1])
    values = [math.sin(s) for s in anchors]
    series = dict(zip(anchors, values, strict=True)).__getitem__
    expected = sum(
        d * sigma**i * h / math.factorial(i)
        for i, (d, h) in enumerate(zip(differences(anchors, series), polynomials, strict=False))
    )
    found = forecast(Predictor("hermite", order, (("sigma", sigma),)), series, step, anchors)
    assert found == pytest.approx(expected, rel=1e-6, abs=1e-6)


def test_bdf2_moves_a_third_of_a_gap_and_is_not_exact_on_a_line():
    assert forecast(Predictor("bdf2", 1), float, 24, [20, 16]) == pytest.approx(20 + 4 / 3)


def test_goc_at_its_gap_is_taylor_of_order_one():
    for k in (1, 2, 3):
        own = Predictor("goc", 1, (("eta", k / 4),)).coefficients(20 + k, [20, 16])
        assert own == pytest.approx(Predictor("taylor", 1).coefficients(20 + k, [20, 16]))


def test_momentum_weighs_newer_slopes_more():
    step, anchors = 12, [10, 9, 5, 4]
    slopes = [3.0, -1.0, 0.5]  # newest first
    values = [1.0]
    for slope, newer, older in zip(slopes, anchors, anchors[1:], strict=False):
        values.append(values[-1] - slope * (newer - older))
    series = dict(zip(anchors, values, strict=True)).__getitem__
    for beta in (0.0, 0.25, 1.0):
        weights = [beta**i for i in range(3)]
        trend = sum(w * s for w, s in zip(weights, slopes, strict=True)) / sum(weights)
        found = forecast(Predictor("momentum", 3, (("beta", beta),)), series, step, anchors)
        assert found == pytest.approx(1.0 + 2 * trend)


@pytest.mark.parametrize(
    ("sigma", "interval", "k", "gain"), [(0.5, 4, 3, 1.97), (0.71, 4, 3, 3.53)], ids=["half", "root half"]
)
def test_noise_gain_of_hermite_two(sigma, interval, k, gain):
    anchors = [20, 20 - interval, 20 - 2 * interval]
    found = Predictor("hermite", 2, (("sigma", sigma),)).coefficients(20 + k, anchors)
    assert sum(map(abs, found)) == pytest.approx(gain, rel=0.02)


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


@pytest.mark.parametrize("name", [name for name, order in FIXED if order > 0])
def test_rules_of_one_order_fall_back_to_a_line_or_a_copy(name):
    order = ORDERS[name][0]
    assert Predictor(name, order).coefficients(9, [7]) == [1]
    if order == 2:
        line = Predictor("newton", 1).coefficients(9, [7, 4])
        assert Predictor(name, order).coefficients(9, [7, 4]) == line


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
    assert str(Predictor("hermite", 2, (("sigma", 0.71),))) == "hermite 2 sigma=0.71"
    assert str(Predictor("scaled", 0, (("scale", 0.9),))) == "scaled scale=0.9"


@pytest.mark.parametrize("name", RULES)
def test_a_predictor_is_written_and_read(name):
    predictor = Predictor(name, ORDERS.get(name, (1, MAX_ORDER))[1], (("sigma", 0.5),) if name == "hermite" else ())
    assert Predictor.from_json(predictor.as_json()) == predictor


@pytest.mark.parametrize("data", [{}, {"name": "copy"}, None, {"name": "copy", "order": 0, "options": 3}], ids=str)
def test_what_is_no_predictor_is_refused(data):
    with pytest.raises(PolicyError, match="needs name, order and options"):
        Predictor.from_json(data)


def test_a_switched_predictor_takes_its_turns():
    goc = Predictor("goc", 1)
    both = Switched(goc, Predictor("copy"), frozenset({3, 5}))
    assert both.anchors == 2
    assert both.coefficients(3, [2, 0]) == goc.coefficients(3, [2, 0])
    assert both.coefficients(4, [2, 0]) == [1]


def test_a_table_gives_each_step_its_own():
    table = Table(((), (0.5,), (), (1.5, -0.5)))
    assert table.anchors == 2
    assert table.coefficients(1, [0]) == [0.5]
    assert table.coefficients(3, [2, 0]) == [1.5, -0.5]
    assert table.coefficients(3, [0]) == [1]


def test_unknown_options_name_the_known_ones():
    with pytest.raises(PolicyError, match=r"the hermite predictor has no option 'scale'; it takes: sigma"):
        Predictor("hermite", 2, (("scale", 1.0),))
    with pytest.raises(PolicyError, match=r"the taylor predictor has no option 'sigma'; it takes: none"):
        Predictor("taylor", 1, (("sigma", 1.0),))


@pytest.mark.parametrize("value", [math.nan, math.inf, "0.5", True, None])
def test_options_are_finite_numbers(value):
    with pytest.raises(PolicyError, match=r"sigma=.*finite number"):
        Predictor("hermite", 2, (("sigma", value),))


def test_unknown_name_lists_the_known_ones():
    with pytest.raises(PolicyError, match=r"'spline'.*copy, taylor, newton"):
        Predictor("spline", 1)


@pytest.mark.parametrize(
    ("name", "order"),
    [
        ("copy", 1),
        ("taylor", 0),
        ("taylor", MAX_ORDER + 1),
        ("newton", -1),
        ("newton", 1.0),
        ("taylor", "2"),
        ("foca", 1),
        ("goc", 2),
        ("adams_moulton", 3),
        ("hermite", 0),
    ],
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
