"""The guard: adds full steps for a prompt that turns out harder than those a plan was made for; it never removes any.

At an anchor the true value is known, so the forecast that the anchors before it would have given can be judged. Where
it is worse than on any calibration prompt, the next gap gets one more anchor in its middle. This costs one host
synchronisation per anchor.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from dcc.plans.plan import Plan
from dcc.plans.predictors import newton
from dcc.serve.session import Anchors, Stream

SLACK = 1.1  # a prompt counts as harder above this many times the largest error on the calibration prompts


class Guard:
    """Adds a step to a stream whose forecasts turn out worse than the plan's limits."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan

    def watch(self, anchors: Anchors | None, stream: Stream, step: int) -> None:
        """Judges, at the anchor `step` of a stream, the forecast that its newest value would have got."""
        error = _newest_error(anchors, step)
        if error is not None and (extra := extra_step(self.plan, step, float(error.max()))) is not None:
            stream.extra.add(extra)


@dataclass
class Errors:
    """Collects by step, and for every sample, the errors that a guard would judge; changes nothing."""

    found: dict[int, list[float]] = field(default_factory=dict)

    def watch(self, anchors: Anchors | None, stream: Stream, step: int) -> None:
        """Notes the error at the anchor `step`."""
        error = _newest_error(anchors, step)
        if error is not None:
            self.found.setdefault(step, []).extend(error.tolist())


def _newest_error(anchors: Anchors | None, step: int) -> Tensor | None:
    if anchors is None or not anchors.steps or anchors.steps[0] != step:
        return None
    return anchor_error(list(zip(anchors.steps, anchors.values, strict=True)))


def anchor_error(anchors: Sequence[tuple[float, tuple[Tensor, ...]]]) -> Tensor | None:
    """Relative error [batch] of extrapolating the newest anchor from the one or two before it; None without any.

    `anchors` are (step, values), newest first; the first value [batch, ...] is judged.
    """
    (step, (truth, *_)), *before = anchors[:3]
    if not before:
        return None
    weights = newton(step, [s for s, _ in before])
    forecast = sum(float(w) * values[0].float() for w, (_, values) in zip(weights, before, strict=True))
    difference = (forecast - truth.float()).flatten(1).norm(dim=1)
    return difference / truth.float().flatten(1).norm(dim=1).clamp_min(1e-12)


def limits(errors: dict[int, list[float]], steps: int) -> tuple[float, ...]:
    """The error per step above which a prompt is harder than all that were measured; 0 where none was measured."""
    if not errors:
        return ()
    return tuple(SLACK * max(errors[step]) if errors.get(step) else 0.0 for step in range(steps))


def extra_step(plan: Plan, step: int, error: float) -> int | None:
    """The step to compute besides the planned ones, None where `error` at the anchor `step` is within its limit."""
    if not plan.limits or not plan.limits[step] or error <= plan.limits[step]:
        return None
    mask = plan.steps_mask
    after = next((s for s in range(step + 1, plan.steps) if mask[s]), plan.steps)
    return (step + after) // 2 if after - step > 1 and (step + after) // 2 > step else None
