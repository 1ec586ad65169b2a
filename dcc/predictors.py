"""Training-free predictors: rules that turn the steps of anchors into coefficients.

Every rule returns a vector a with forecast(step) = sum_j a[j] * A_j, where A_0 is the newest anchor (DESIGN contract
3). Positions are step indices; all arithmetic is float64 on the host.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dcc.errors import PolicyError

MAX_ORDER = 4


@dataclass(frozen=True)
class Predictor:
    """A rule, its order and its further numbers; uses at most `anchors` past values, fewer while fewer exist."""

    name: str
    order: int = 0
    options: tuple[tuple[str, float], ...] = ()

    def __post_init__(self) -> None:
        if self.name not in RULES:
            raise PolicyError(f"unknown predictor {self.name!r}; there are: {', '.join(RULES)}")
        low, high = (0, 0) if self.name == "copy" else (1, MAX_ORDER)
        if not isinstance(self.order, int) or not low <= self.order <= high:
            raise PolicyError(f"order={self.order!r}: the {self.name} predictor takes an order from {low} to {high}")

    @property
    def anchors(self) -> int:
        """How many anchors the rule uses at full order."""
        return self.order + 1

    def coefficients(self, step: float, anchors: Sequence[float]) -> list[float]:
        """Coefficients for `step`, given the steps of the anchors, newest first; as many as anchors are used.

        With fewer anchors than the order needs, the order drops. Raises ValueError where there is no anchor, or where
        the anchors are not strictly decreasing steps before `step`.
        """
        used = list(anchors)[: self.anchors]
        if not used:
            raise ValueError("a forecast needs at least one anchor")
        if not all(a > b for a, b in zip([step, *used], used, strict=False)):
            raise ValueError(f"anchors {used} must be strictly decreasing steps before {step}")
        return [float(a) for a in RULES[self.name](step, used, **dict(self.options))]

    def as_json(self) -> dict[str, Any]:
        """What `Predictor.of` reads."""
        return {"name": self.name, "order": self.order, "options": dict(self.options)}

    @classmethod
    def of(cls, data: dict[str, Any]) -> Predictor:
        """The predictor that `as_json` wrote. Raises PolicyError for anything else."""
        try:
            return cls(data["name"], data["order"], tuple(data["options"].items()))
        except (KeyError, TypeError, AttributeError) as error:
            raise PolicyError(f"a predictor needs name, order and options; got {data!r:.80}") from error

    def __str__(self) -> str:
        return self.name if self.name == "copy" else f"{self.name} {self.order}"


def copy(step: float, anchors: Sequence[float]) -> np.ndarray:
    """The newest anchor as it is."""
    return np.eye(len(anchors))[0]


def taylor(step: float, anchors: Sequence[float]) -> np.ndarray:
    """TaylorSeer in its published form (arXiv 2503.06923; repository Shenyi-Z/TaylorSeer, taylor_utils).

    D^0 = A_0 and D^{i+1} = (D^i_now - D^i_before) / (s_now - s_before), recursively at every anchor with the last
    spacing only; the forecast is sum_i D^i k^i / i! with k = step - s_now. On uneven anchors this differs from the
    exact divided differences of `newton`, and at even spacing it is a damped version of them.
    """
    size = len(anchors)
    order = size - 1
    history: list[np.ndarray] = []  # differences of order 0.. after each anchor, as rows over the anchors
    for index in reversed(range(size)):
        current = [np.eye(size)[index]]
        for level in range(min(len(history), order)):
            spacing = anchors[index] - anchors[index + 1]
            current.append((current[level] - history[level]) / spacing)
        history = current
    k = step - anchors[0]
    return sum((difference * (k**i / math.factorial(i)) for i, difference in enumerate(history)), np.zeros(size))


def newton(step: float, anchors: Sequence[float]) -> np.ndarray:
    """The polynomial through all used anchors at `step` (Newton's and Lagrange's form are the same numbers)."""
    weights = np.ones(len(anchors))
    for j, own in enumerate(anchors):
        for m, other in enumerate(anchors):
            if m != j:
                weights[j] *= (step - other) / (own - other)
    return weights


RULES: dict[str, Callable[..., np.ndarray]] = {"copy": copy, "taylor": taylor, "newton": newton}
