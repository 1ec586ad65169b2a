"""Training-free predictors: rules that turn the steps of anchors into coefficients.

Every rule returns a vector a with forecast(step) = sum_j a[j] * A_j, where A_0 is the newest anchor. Positions are step
indices; all arithmetic is float64 on the host.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from dcc.errors import PolicyError
from dcc.plans.fields import finite, whole

MAX_ORDER = 4
RULES: dict[str, Callable[..., np.ndarray]] = {}  # by name; `rule` adds to both
ORDERS: dict[str, tuple[int, int]] = {}  # the lowest and highest order, where they are not 1 and MAX_ORDER

Rule = TypeVar("Rule", bound=Callable[..., np.ndarray])


def rule(low: int = 1, high: int = MAX_ORDER) -> Callable[[Rule], Rule]:
    """Makes a function `(step, anchors, **options) -> coefficients` a predictor of these orders, by its own name."""

    def add(function: Rule) -> Rule:
        RULES[function.__name__] = function
        if (low, high) != (1, MAX_ORDER):
            ORDERS[function.__name__] = (low, high)
        return function

    return add


def orders_of(name: str) -> tuple[int, int]:
    """The lowest and the highest order of a rule."""
    return ORDERS.get(name, (1, MAX_ORDER))


@dataclass(frozen=True)
class Predictor:
    """A rule, its order and its other numbers; it uses at most `anchors` past values, fewer while fewer exist."""

    name: str
    order: int = 0
    options: tuple[tuple[str, float], ...] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or self.name not in RULES:
            raise PolicyError(f"unknown predictor {self.name!r}; there are: {', '.join(RULES)}")
        low, high = orders_of(self.name)
        if not whole(self.order) or not low <= self.order <= high:
            raise PolicyError(f"order={self.order!r}: the {self.name} predictor takes an order from {low} to {high}")
        known = _options(self.name)
        for name, value in self.options:
            if name not in known:
                takes = ", ".join(known) or "none"
                raise PolicyError(f"the {self.name} predictor has no option {name!r}; it takes: {takes}")
            if not finite(value):
                raise PolicyError(f"{name}={value!r}: an option of the {self.name} predictor is a finite number")

    @property
    def anchors(self) -> int:
        """How many anchors the rule uses at full order."""
        return self.order + 1

    def coefficients(self, step: float, anchors: Sequence[float]) -> list[float]:
        """Coefficients for `step`, given the steps of the anchors, newest first; as many as anchors are used.

        With fewer anchors than the order needs, the order drops. Raises ValueError where there is no anchor, or where
        the anchors are not strictly decreasing steps before `step`, PolicyError where its options make infinity.
        """
        used = list(anchors)[: self.anchors]
        if not used:
            raise ValueError("a forecast needs at least one anchor")
        if not all(a > b for a, b in zip([step, *used], used, strict=False)):
            raise ValueError(f"anchors {used} must be strictly decreasing steps before {step}")
        try:
            found = [float(a) for a in RULES[self.name](step, used, **dict(self.options))]
        except (OverflowError, ZeroDivisionError):  # options that are far too large, or a power of zero
            found = [math.inf]
        if not all(map(math.isfinite, found)):
            raise PolicyError(f"the predictor {self} gives no finite coefficients at step {step}; change its options")
        return found

    def as_json(self) -> dict[str, Any]:
        """What `from_json` reads."""
        return {"name": self.name, "order": self.order, "options": dict(self.options)}

    @classmethod
    def from_json(cls, data: Any) -> Predictor:
        """The predictor that `as_json` wrote. Raises PolicyError for anything else."""
        if isinstance(data, Predictor):
            return data
        names = {"name", "order", "options"}
        if not isinstance(data, Mapping) or set(data) != names or not isinstance(data["options"], Mapping):
            raise PolicyError(f"a predictor needs name, order and options; got {data!r:.80}")
        return cls(data["name"], data["order"], tuple(data["options"].items()))

    def __str__(self) -> str:
        text = self.name if orders_of(self.name) == (0, 0) else f"{self.name} {self.order}"
        return " ".join([text, *(f"{name}={value:g}" for name, value in self.options)])


@dataclass(frozen=True)
class Switched:
    """One predictor at the given steps, another at all others."""

    chosen: Predictor
    other: Predictor
    steps: frozenset[int]

    @property
    def anchors(self) -> int:
        """How many anchors the rules use at most."""
        return max(self.chosen.anchors, self.other.anchors)

    def coefficients(self, step: int, anchors: Sequence[float]) -> list[float]:
        """Coefficients of the predictor whose turn it is."""
        return (self.chosen if step in self.steps else self.other).coefficients(step, anchors)


@dataclass(frozen=True)
class Table:
    """Coefficients that were calibrated for every step, newest anchor first, for one schedule."""

    values: tuple[tuple[float, ...], ...]

    @property
    def anchors(self) -> int:
        """The largest number of anchors that any step uses."""
        return max(map(len, self.values), default=1) or 1

    def coefficients(self, step: int, anchors: Sequence[float]) -> list[float]:
        """The step's own coefficients, or a copy of the newest anchor where fewer anchors exist than they need."""
        own = list(self.values[step])
        return own if 0 < len(own) <= len(anchors) else [1.0]


@rule(0, 0)
def copy(step: float, anchors: Sequence[float]) -> np.ndarray:
    """The newest anchor as it is."""
    return np.eye(len(anchors))[0]


@rule()
def taylor(step: float, anchors: Sequence[float]) -> np.ndarray:
    """TaylorSeer in its published form (arXiv 2503.06923; repository Shenyi-Z/TaylorSeer, taylor_utils).

    D^0 = A_0 and D^{i+1} = (D^i_now - D^i_before) / (s_now - s_before), recursively at every anchor with the last
    spacing only; the forecast is sum_i D^i k^i / i! with k = step - s_now. On uneven anchors this differs from the
    exact divided differences of `newton`, and at even spacing it is a damped version of them.
    """
    return _sum(_differences(anchors), lambda i: (step - anchors[0]) ** i / math.factorial(i))


@rule()
def newton(step: float, anchors: Sequence[float]) -> np.ndarray:
    """The polynomial through all used anchors at `step` (Newton's and Lagrange's form are the same numbers)."""
    weights = np.ones(len(anchors))
    for j, own in enumerate(anchors):
        for m, other in enumerate(anchors):
            if m != j:
                weights[j] *= (step - other) / (own - other)
    return weights


@rule()
def hermite(step: float, anchors: Sequence[float], sigma: float = 0.5) -> np.ndarray:
    """HiCache (arXiv 2508.16984; repository fenglang918/HiCache): Taylor's differences on a scaled Hermite basis.

    The forecast is D^0 + sum_i D^i h_i(k) / i! with h_i(k) = sigma^i H_i(sigma k) and H_i the physicists' Hermite
    polynomials. At order 1 sigma = sqrt(1/2) is Taylor's form, and smaller ones damp it.
    """
    k = step - anchors[0]

    def basis(i: int) -> float:
        if i == 0:
            return 1.0
        return sigma**i * float(np.polynomial.hermite.hermval(sigma * k, np.eye(i + 1)[i])) / math.factorial(i)

    return _sum(_differences(anchors), basis)


def newton_through(step: float, anchors: Sequence[float], count: int) -> np.ndarray:
    """`newton` through the newest `count` anchors; the older ones weigh nothing."""
    weights = np.zeros(len(anchors))
    weights[:count] = newton(step, anchors[:count])
    return weights


@rule()
def adams_bashforth(step: float, anchors: Sequence[float]) -> np.ndarray:
    """AB-Cache (arXiv 2504.10540): the newest output is a linear combination of those before it.

    At even spacing the next step has the signed binomials, 2 F0 - F1 at order 1 and 3 F0 - 3 F1 + F2 at order 2. The
    paper leaves forecasts several steps ahead of uneven anchors open; here they are the polynomial through the
    anchors, which is what the binomials evaluate one gap ahead. So this is `newton` by the paper's name.
    """
    return newton(step, anchors)


@rule(2, 2)
def foca(step: float, anchors: Sequence[float]) -> np.ndarray:
    """FoCa (arXiv 2508.16211): the feature as the solution of an ODE; a BDF2 prediction, then a Heun correction.

    The slope f at the newest anchor is BDF2's, that of the parabola through three anchors: at even spacing h it is
    (3 F0 - 4 F1 + F2) / 2h. BDF2 then predicts the value whose own slope is f again, (7 F0 - 5 F1 + F2) / 3 one gap
    ahead, so Heun's mean of both slopes is f, and the corrected value k steps ahead is F0 + k f: one gap ahead
    (5 F0 - 4 F1 + F2) / 2. Exact on a line at any spacing. With fewer anchors, a line or a copy.
    """
    if len(anchors) < 3:
        return newton(step, anchors)
    new, old = anchors[0] - anchors[1], anchors[1] - anchors[2]
    slope = np.array([1 / new + 1 / (new + old), -1 / new - 1 / old, new / (old * (new + old))])
    return np.eye(3)[0] + (step - anchors[0]) * slope


@rule()
def momentum(step: float, anchors: Sequence[float], beta: float = 0.5) -> np.ndarray:
    """FeMo (openreview ih1oyr0j6y): the trend is a running mean of the slopes between anchors, not high derivatives.

    The paper's coefficients are not public; here a slope weighs `beta` times the next newer one, and the order is the
    number of slopes. Exact on a line at any spacing.
    """
    slopes = -np.diff(np.eye(len(anchors)), axis=0) / -np.diff(anchors)[:, None]
    weights = beta ** np.arange(len(slopes))
    return np.eye(len(anchors))[0] + (step - anchors[0]) * (weights @ slopes) / max(weights.sum(), 1.0)


@rule(1, 1)
def goc(step: float, anchors: Sequence[float], eta: float = 1.2) -> np.ndarray:
    """Gradient-optimised cache (arXiv 2503.05156; repository qiujx0520/GOC_ICCV2025): F0 + eta (F0 - F1)."""
    return _leaning(anchors, eta)


@rule(1, 1)
def extrapolate(step: float, anchors: Sequence[float], weight: float = 0.3) -> np.ndarray:
    """FasterCache's attention (arXiv 2410.19355; repository Vchitect/FasterCache): F0 + weight (F0 - F1)."""
    return _leaning(anchors, weight)


@rule(1, 1)
def bdf2(step: float, anchors: Sequence[float]) -> np.ndarray:
    """4/3 F0 - 1/3 F1: one of HyCa's solvers (arXiv 2510.04188), a damped step; not exact on a line."""
    return _leaning(anchors, 1 / 3)


@rule(1, 1)
def midpoint(step: float, anchors: Sequence[float]) -> np.ndarray:
    """3/2 F0 - 1/2 F1, half a step ahead: HyCa's Runge-Kutta 2 (arXiv 2510.04188)."""
    return _leaning(anchors, 1 / 2)


@rule(2, 2)
def adams_moulton(step: float, anchors: Sequence[float]) -> np.ndarray:
    """HyCa's implicit solver (arXiv 2510.04188): F0 + 5/12 (P - F0) + 2/3 (F0 - F1) - 1/12 (F1 - F2).

    P = 5/2 F0 - 2 F1 + 1/2 F2 is the explicit forecast; with fewer than three anchors a line.
    """
    if len(anchors) < 3:
        return newton(step, anchors)
    forecast, f0, f1, f2 = np.array([2.5, -2.0, 0.5]), *np.eye(3)
    return f0 + 5 / 12 * (forecast - f0) + 2 / 3 * (f0 - f1) - 1 / 12 * (f1 - f2)


@rule(0, 0)
def zero(step: float, anchors: Sequence[float]) -> np.ndarray:
    """Zero: what would be forecast is left out, as T-GATE leaves out guidance after its gate."""
    return np.zeros(1)


@rule(0, 0)
def scaled(step: float, anchors: Sequence[float], scale: float = 1.0) -> np.ndarray:
    """The newest anchor times a constant."""
    return np.array([scale])


@rule(0, 0)
def growing(
    step: float, anchors: Sequence[float], rate: float = 1.1, since: float = 0, until: float = math.inf
) -> np.ndarray:
    """FasterCache's guidance (arXiv 2410.19355): the newest anchor times `rate` for each forecast in a window of steps.

    In the released code and in diffusers the kept difference itself is multiplied at every step of [since, until) that
    reuses it, so the weight compounds until the difference is computed anew.
    """
    return np.array([rate ** max(0.0, min(step, until - 1) - max(anchors[0], since - 1))])


def _leaning(anchors: Sequence[float], weight: float) -> np.ndarray:
    """F0 + weight (F0 - F1), however far ahead; the newest anchor as it is where there is no other."""
    return np.array([1.0]) if len(anchors) < 2 else np.array([1.0 + weight, -weight])


def _differences(anchors: Sequence[float]) -> list[np.ndarray]:
    """TaylorSeer's differences at the newest anchor, from order 0 on, each as weights of the anchors."""
    size = len(anchors)
    history: list[np.ndarray] = []
    for index in reversed(range(size)):
        current = [np.eye(size)[index]]
        for level in range(min(len(history), size - 1)):
            spacing = anchors[index] - anchors[index + 1]
            current.append((current[level] - history[level]) / spacing)
        history = current
    return history


def _sum(differences: Sequence[np.ndarray], factor: Callable[[int], float]) -> np.ndarray:
    total = np.zeros(len(differences[0]))
    for i, difference in enumerate(differences):
        total = total + difference * factor(i)
    return total


def _options(name: str) -> list[str]:
    return list(inspect.signature(RULES[name]).parameters)[2:]
