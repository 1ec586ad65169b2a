"""What each call does: which row of the plan it runs, and with which coefficients it weighs its anchors."""

from __future__ import annotations

import functools
from collections.abc import Hashable
from dataclasses import dataclass

from dcc.decisions import Decision
from dcc.plans import mapping
from dcc.plans.forms import split
from dcc.plans.plan import Plan, forecast_in, is_full
from dcc.plans.predictors import newton
from dcc.serve.session import Sessions, Stream
from dcc.variants.build import Family

Weights = tuple[tuple[float, ...], ...]
NEAR = 2  # anchors of the line that forecasts the rest of a gap that the guard gave another anchor


@dataclass(frozen=True)
class Turn:
    """What one call does: the row of the schedule, and the coefficients of each selector that it forecasts.

    `key` is equal for turns of equal coefficients, and quick to hash.
    """

    row: tuple[int, ...]
    weights: Weights = ()
    key: Hashable = None


class Schedule:
    """Decides by a plan for one stream at a time; counts what it decided in `sessions`."""

    def __init__(self, plan: Plan, sessions: Sessions) -> None:
        self.plan, self.sessions = plan, sessions
        self.full = Turn((1,) * len(plan.sites))

    def decide(self, family: Family, stream: Stream, step: float) -> Turn:
        """The plan's turn, or the all-compute one where anchors that the plan counts on are missing."""
        if stream.served or not mapping.is_planned(self.plan, step):
            return self._between(family, stream, step)
        turn = self.planned(int(step))
        if step in stream.extra:
            self.sessions.count("guarded", "computed")
            return self.full
        if stream.extra and is_full(turn.row):
            stream.forget_extra()  # later gaps are forecast from the planned anchors alone, as they were fitted
        elif stream.extra.intersection(self._kept(family, stream, 0)):  # the rest of a gap that got another anchor
            self.sessions.count("forecast")
            return self._near(family, stream, step, turn.row)
        for k, needed in self._needed(int(step)):
            if any(stream.steps(site.name)[: len(needed)] != needed for site in family.selectors[k]):
                if stream.step is not None and stream.step < step - 1:  # a coarser run, whose levels are all the plan's
                    return self._between(family, stream, step)
                self.sessions.count("missed")
                return self.full
        self.sessions.count("computed" if is_full(turn.row) else "forecast")
        return turn

    @functools.cached_property
    def _turns(self) -> list[Turn]:
        turns = []
        for step, row in enumerate(self.plan.schedule):
            weights = tuple(self.plan.coefficients[step][k] for k in forecast_in(row))
            turns.append(Turn(row, weights, step))
        return turns

    def planned(self, step: int) -> Turn:
        """The plan's turn for a step."""
        return self._turns[step]

    @functools.cached_property
    def _anchors_needed(self) -> dict[int, list[tuple[int, list[float]]]]:
        return {}

    def _needed(self, step: int) -> list[tuple[int, list[float]]]:
        """By forecast selector, the steps whose values the plan's coefficients of a step weigh, newest first."""
        known = self._anchors_needed
        if step not in known:
            plan = self.plan
            known[step] = [
                (k, list(plan.anchor_steps(step, k)[: len(plan.weights(step, k)[0])]))
                for k in forecast_in(plan.schedule[step])
            ]
        return known[step]

    def rows(self, turn: Turn) -> list[tuple[float, ...]]:
        """Rows of coefficients of the selectors that a turn forecasts, as many per selector as its form has parts."""
        pairs = zip(forecast_in(turn.row), turn.weights, strict=True)
        return [part for k, values in pairs for part in split(values, self.plan.parts(k))]

    def _near(self, family: Family, stream: Stream, step: float, row: tuple[int, ...]) -> Turn:
        near = min(NEAR, self.plan.anchors)
        weights = tuple(
            tuple(newton(step, self._kept(family, stream, k)[:near]).tolist()) * self.plan.parts(k)
            for k in forecast_in(row)
        )
        return Turn(row, weights, weights)

    def _between(self, family: Family, stream: Stream, step: float) -> Turn:
        """The turn of a call at a noise level between the plan's (plans/mapping.py)."""
        plan, last = self.plan, stream.step
        served = stream.served or [
            -1 if last is None else mapping.due(plan, k, -1, last, last) for k in range(len(plan.sites))
        ]
        reached = [mapping.due(plan, k, served[k], last, step) for k in range(len(plan.sites))]
        row = tuple(
            int(new > old or not self._kept(family, stream, k))
            for k, (new, old) in enumerate(zip(reached, served, strict=True))
        )
        planned = plan.schedule[mapping.nearest(plan, step)]
        row = tuple(
            near if own == Decision.FORECAST and near != Decision.COMPUTE else own
            for own, near in zip(row, planned, strict=True)
        )
        if row not in family.variants:
            row = self.full.row
        stream.served = reached
        self.sessions.count("mapped", "computed" if is_full(row) else "forecast")
        weights = tuple(
            tuple(mapping.coefficients(plan, k, step, self._kept(family, stream, k))) for k in forecast_in(row)
        )
        return Turn(row, weights, weights)

    @staticmethod
    def _kept(family: Family, stream: Stream, selector: int) -> list[float]:
        """Positions of the anchors of a selector's sites, newest first."""
        return stream.steps(family.selectors[selector][0].name)
