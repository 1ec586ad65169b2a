"""A plan on other noise levels than it was made for: another step count, a shifted schedule, another resolution.

A position is a fractional step of the plan, interpolated between its levels. An anchor is computed at the call nearest
to its level; coefficients are interpolated within a gap and moved to where the anchors of this run really stand.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from dcc.plan import Plan
from dcc.predictors import newton

REACH = 1.0  # steps beyond either end of the plan's levels that are still served


def position(levels: Sequence[float], value: float) -> float | None:
    """The fractional step at which the noise level is `value`; None where that is more than a step outside the plan.

    `levels` fall or rise strictly, up to repeats (samplers of two evaluations a step), of which the first counts.
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

    A selector is computed where this is more than `served`, the value after the call before (-1 at first). `last` is
    the position of that call: each anchor goes to the nearest call, strides being alike; the first call computes.
    """
    computed = [step for step, row in enumerate(plan.schedule) if row[selector]]
    if last is None:
        return max((step for step in computed if step <= now), default=computed[0])
    half = max(now - last, 0.0) / 2
    return max((step for step in computed if step <= now + half), default=served)


def ends(plan: Plan, last: float, now: float) -> bool:
    """Whether a run whose last calls are at these positions has none left: the next would be past the lowest level."""
    return now + 1.5 * (now - last) > plan.steps - 1 + REACH


def coefficients(plan: Plan, selector: int, now: float, anchors: Sequence[float]) -> list[float]:
    """Weights of the anchors that stand at `anchors` (newest first) for a forecast at `now`.

    The plan's own weights c at `now`, for anchors at its steps a, become the weights w for anchors at u that treat
    every polynomial of degree below their number alike: sum_j w_j u_j^k = sum_j c_j a_j^k.
    """
    computed = [step for step, row in enumerate(plan.schedule) if row[selector]]
    begin = max((step for step in computed if step <= anchors[0] + 0.5), default=computed[0])
    gap = range(begin + 1, min((s for s in computed if s > begin), default=plan.steps))
    if not gap:  # neighbouring anchors in the plan: this run steps more finely, or one was computed early
        return newton(now, list(anchors[:2])).tolist()
    low = min(max(math.floor(now), gap[0]), gap[-1])
    high = min(max(math.ceil(now), gap[0]), gap[-1])
    share = min(max(now - low, 0.0), 1.0) if high > low else 0.0
    own = (1 - share) * np.array(plan.coefficients[low][selector]) + share * np.array(plan.coefficients[high][selector])
    steps = plan.anchor_steps(gap[0], selector)[: len(own)]
    size = min(len(own), len(anchors))
    ours, theirs = np.array(anchors[:size]) - now, np.array(steps, dtype=np.float64) - now
    scale = max(float(np.abs(ours).max()), 1.0)
    powers = np.arange(size)[:, None]
    wanted = ((theirs / scale) ** powers) @ own
    return np.linalg.solve((ours / scale) ** powers, wanted).tolist()
