"""The position of a call: its step of the plan, whole at the plan's own noise levels and fractional between them."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping

from torch import Tensor

from dcc.errors import PositionError
from dcc.plans import mapping
from dcc.plans.plan import Plan
from dcc.record.seam import Position

TIME_TOLERANCE = 0.05  # as a share of the smallest gap between two levels


class Positions:
    """Finds the step of each call of a plan's runs; `time` is the path of the input that carries the noise level."""

    def __init__(self, plan: Plan, time: str | None) -> None:
        self.plan, self.time = plan, time

    @functools.cached_property
    def smallest_gap(self) -> float | None:
        """The smallest gap between two of the plan's levels; None where all are equal."""
        gaps = [abs(a - b) for a, b in itertools.pairwise(self.plan.levels) if a != b]
        return min(gaps, default=None)

    def of(self, tensors: Mapping[str, Tensor], context: Position | None, last: float | None) -> float:
        """The step of a call with these tensors, by path: from `cache_context`, or from the noise level.

        Where several steps have the call's level, it is the first of them after `last`. Raises PositionError for a
        step, a level or several levels that do not fit the plan, and where nothing tells the step.
        """
        plan = self.plan
        if context is not None and context.step_index is not None:
            if (context.num_inference_steps or plan.steps) == plan.steps:
                if not 0 <= context.step_index < plan.steps:
                    raise PositionError(
                        f"step {context.step_index} of {context.num_inference_steps} does not fit a plan of "
                        f"{plan.steps} steps"
                    )
                return context.step_index
        if self.time is None:
            raise PositionError(
                "no input of this denoiser carries the noise level; "
                "call it inside cache_context(name, step_index=i, num_inference_steps=n)"
            )
        return self.at(self._level(tensors[self.time]), last)

    def at(self, level: float, last: float | None) -> float:
        """The step at which the noise level is `level`; the first after `last` where there are several."""
        plan = self.plan
        tolerance = TIME_TOLERANCE * (self.smallest_gap or max(abs(level), 1.0))
        fitting = [step for step, own in enumerate(plan.levels) if abs(own - level) <= tolerance]
        if fitting:
            return next((step for step in fitting if last is not None and step > last), fitting[0])
        between = mapping.position(plan.levels, level)
        if between is None:
            raise PositionError(
                f"{self.time} is outside the plan's levels ({plan.levels[0]:.6g} to "
                f"{plan.levels[-1]:.6g}): this run has another scheduler than the plan ({plan.scheduler}); dcc.restore "
                "the pipeline and compile it for this run"
            )
        return between

    def _level(self, time: Tensor) -> float:
        """The one noise level of a call."""
        if time.numel() == 1:
            return float(time)
        values = time.flatten()
        level = float(values[0])
        if not bool((values == level).all()):
            raise PositionError(
                f"input {self.time!r} holds several noise levels in one batch; a static plan serves samples at one step"
            )
        return level
