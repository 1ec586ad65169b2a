"""A plan on other noise levels than it was made for: another step count, a shifted schedule, another resolution.

A position is a fractional step of the plan, interpolated between its levels. An anchor is computed at the call nearest
to its level. What the plan's coefficients add to linear extrapolation is expressed in divided differences of its
anchors, which mean the same wherever anchors are, and is added to the linear extrapolation of this run's anchors.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from dcc.decisions import Decision
from dcc.plans.plan import Plan
from dcc.plans.predictors import newton_through

LINE = 2  # anchors of the linear extrapolation
REACH = 1.0  # steps beyond either end of the plan's levels that are still served


def position(levels: Sequence[float], value: float) -> float | None:
    """The fractional step at which the noise level is `value`; None where that is more than a step outside the plan.

    `levels` fall or rise strictly, up to repeats (samplers of two evaluations per step), of which the first counts.
    """
    steps = [0, *(s for s in range(1, len(levels)) if levels[s] != levels[s - 1])]
    if len(steps) < 2:
        return None
    knots = np.array([levels[s] for s in steps], dtype=np.float64)
    sign = 1.0 if knots[-1] > knots[0] else -1.0
    if not (np.diff(knots) * sign > 0).all():
        return None
    low, high = 2 * knots[0] - knots[1], 2 * knots[-1] - knots[-2]  # one step more at either end
    xs = np.concatenate([[low], knots, [high]]) * sign
    us = np.concatenate([[steps[0] - REACH], steps, [steps[-1] + REACH]])
    tolerance = 1e-6 * max(abs(low), abs(high))
    if not xs[0] - tolerance <= value * sign <= xs[-1] + tolerance:
        return None
    return float(np.interp(value * sign, xs, us))


def due(plan: Plan, selector: int, served: int, last: float | None, now: float) -> int:
    """The latest step of the plan whose anchor has been computed once the call at `now` is made.

    A selector is computed where this is more than `served`, which is what the call before gave (-1 at first). `last` is
    the position of that call, None at the first call, which computes. Each anchor goes to the nearest call, if the next
    stride is as long as this one.
    """
    computed = [step for step, row in enumerate(plan.schedule) if row[selector] == Decision.COMPUTE]
    if last is None:
        return max((step for step in computed if step <= now), default=computed[0])
    half = max(now - last, 0.0) / 2
    return max((step for step in computed if step <= now + half), default=served)


def is_planned(plan: Plan, position: float) -> bool:
    """Whether a position is one of the plan's own steps: not between two of them, nor before or after all."""
    return position == int(position) and 0 <= position < plan.steps


def nearest(plan: Plan, position: float) -> int:
    """The step of the plan nearest to a position."""
    return min(max(round(position), 0), plan.steps - 1)


def ends(plan: Plan, last: float | None, now: float) -> bool:
    """Whether a run whose last two calls are at these positions is over: the next would be past the plan's levels.

    `last` is None at the first call.
    """
    if last is None:
        return now >= plan.steps - 1
    return now + 1.5 * (now - last) > plan.steps - 1 + REACH


def coefficients(plan: Plan, selector: int, now: float, anchors: Sequence[float]) -> list[float]:
    """Weights of the anchors at the positions `anchors` (newest first) for a forecast at `now`.

    They are linear extrapolation from where the anchors of this run really are, plus what the plan's own weights add to
    the linear extrapolation of its anchors at this noise level, as multiples of their divided differences (of which a
    Newton polynomial is made too). Chosen by measurement over adding those weights as they are, which costs up to 4.6
    dB where anchors move, over scaling the multiples to the length of the gap, and over polynomials alone. A form of
    several parts has the weights of each, one after another.
    """
    parts = range(plan.parts(selector))
    return [weight for part in parts for weight in _coefficients(plan, selector, part, now, anchors)]


def _coefficients(plan: Plan, selector: int, part: int, now: float, anchors: Sequence[float]) -> list[float]:
    computed = [step for step, row in enumerate(plan.schedule) if row[selector] == Decision.COMPUTE]
    begin = max((step for step in computed if step <= anchors[0] + 0.5), default=computed[0])
    gap = range(begin + 1, min((s for s in computed if s > begin), default=plan.steps))
    count = min(len(anchors), plan.anchors)
    weights = newton_through(now, anchors[:count], LINE)
    if gap:  # else the plan has no forecast between these anchors: this run takes finer steps
        low, high = (min(max(step, gap[0]), gap[-1]) for step in (math.floor(now), math.ceil(now)))
        share = min(max(now - low, 0.0), 1.0) if high > low else 0.0
        added = (1 - share) * _added(plan, selector, part, low) + share * _added(plan, selector, part, high)
        used = min(count, len(added))
        weights[:used] += added[:used] @ _divided_differences(anchors[:used])
    return weights.tolist()


def _added(plan: Plan, selector: int, part: int, step: int) -> np.ndarray:
    """What the plan's weights at a forecast step add to linear extrapolation, as factors of divided differences."""
    own = plan.anchor_steps(step, selector)
    added = -newton_through(step, own, LINE)
    values = plan.weights(step, selector)[part]
    added[: len(values)] += values
    return np.linalg.solve(_divided_differences(own).T, added)


def _divided_differences(anchors: Sequence[float]) -> np.ndarray:
    """Row k holds the weights of the k-th divided difference of the anchors, newest first."""
    points = np.array(anchors, dtype=np.float64)
    rows = np.zeros((len(points), len(points)))
    for k in range(len(points)):
        for j in range(k + 1):
            rows[k, j] = 1.0 / np.prod(points[j] - np.delete(points[: k + 1], j))
    return rows
