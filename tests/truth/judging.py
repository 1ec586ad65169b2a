"""What is right, what a compiled denoiser made of it, and whether the two agree."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

import dcc

from ..oracle import Cached, History, Oracle
from .loops import INNER, STEPS, Denoise, Loop, inner

MASK = tuple(1 - step % 2 for step in range(STEPS))
THEN_COMPUTED = (1, 0, *[1] * (STEPS - 2))  # where the original runs from the middle of the run on
TOLERANCE = 1e-5  # of the largest value: an inner forecast is base + (value - base), which rounds
COMPUTED, OUTPUT, INSIDE = "computed", "output", "inside"  # every step; every other step forecast, at one of two sites


# ---------------------------------------------------------------- right values
def uncached(loop: Loop) -> Denoise | None:
    """Calls the denoiser as the loop does."""
    return None


def held(loop: Loop, mask: tuple[int, ...] = MASK) -> Denoise:
    """Calls it at the steps of a mask only, and keeps the output for the steps after each."""
    kept: list[Tensor] = []

    def denoise(step: int, kwargs: dict[str, Any]) -> Tensor:
        if mask[step]:
            kept[:] = [loop.call(**kwargs)]
        return kept[0]

    return denoise


def forecast_inside(loop: Loop, mask: tuple[int, ...] = MASK) -> Denoise:
    """The oracle at the inner site."""
    oracle, history = Oracle(loop.net, [Cached(inner(loop.net), mask)]), History()
    return lambda step, kwargs: oracle(history, step, kwargs)


EXPECTED: dict[str, Callable[[Loop], Denoise | None]] = {
    COMPUTED: uncached, OUTPUT: held, INSIDE: forecast_inside,
}  # fmt: skip
IN_MID_RUN: dict[str, Callable[[Loop], Denoise | None]] = {
    f"{OUTPUT}, then computed": functools.partial(held, mask=THEN_COMPUTED),
    f"{INSIDE}, then computed": functools.partial(forecast_inside, mask=THEN_COMPUTED),
}
LATE = "the denoiser changed in the middle of a run"
Outcome = list[Tensor] | type[Exception]


def outcome(loop: Loop, how: Callable[[Loop], Denoise | None] = uncached, seed: int = 1) -> Outcome:
    """The results of one generation, or the type of what it raised."""
    try:
        return loop(seed, how(loop))
    except Exception as error:
        return type(error)


def equal(ours: Outcome, right: Outcome, tolerance: float = 0.0) -> bool:
    """Whether two outcomes agree bit for bit, or to a share of the largest value."""
    if isinstance(ours, type) or isinstance(right, type):
        return ours is right
    if len(ours) != len(right):
        return False
    for a, b in zip(ours, right, strict=True):
        if a.shape != b.shape or a.dtype != b.dtype or a.is_meta or b.is_meta:
            return a.is_meta and b.is_meta and a.shape == b.shape
        bound = tolerance * float(b.abs().nan_to_num().max()) if tolerance else 0.0
        if not torch.allclose(a, b, rtol=0.0, atol=bound, equal_nan=True):
            return False
    return True


# ---------------------------------------------------------------- what dcc made of it
LOGGED: list[str] = []  # the lines that dcc logged since the last compile


class Lines(logging.Handler):
    """Keeps what is logged."""

    def emit(self, record: logging.LogRecord) -> None:
        LOGGED.append(record.getMessage())


logging.getLogger("dcc").addHandler(Lines(logging.WARNING))


@dataclass
class Served:
    """What a compiled denoiser made of one generation."""

    outcome: Outcome
    originals: int  # calls of the original during it
    problems: tuple[str, ...]
    warned: tuple[str, ...]  # lines logged since it was compiled
    late: bool = False  # it was said for the first time, when the generation was over, that the denoiser had changed

    @property
    def said(self) -> list[str]:
        """Why something ran otherwise than as a captured graph."""
        return [line for line in self.problems if line.startswith(("the original ran", "not exported"))]

    @property
    def status(self) -> str:
        if isinstance(self.outcome, type):
            return "raises as the original"
        if self.originals:
            return "original"
        return "output only" if any(line.startswith("not exported") for line in self.problems) else "served"


def watched(loop: Loop, seed: int = 1) -> Served:
    """One generation of the compiled denoiser."""
    before = dcc.summary(loop.net)
    found = outcome(loop, seed=seed)
    summary = dcc.summary(loop.net)
    late = LATE in "".join(summary.problems) and LATE not in "".join(before.problems)
    return Served(found, summary.originals - before.originals, summary.problems, tuple(LOGGED), late)


def compiled(loop: Loop, how: str) -> None:
    """Compiles the loop's denoiser in place."""
    LOGGED.clear()
    options = {
        COMPUTED: {"interval": 1},
        OUTPUT: {"interval": 2, "site": "output"},
        INSIDE: {"interval": 2, "site": INNER[loop.model]},
    }
    loop.compile(policy="interval", **options[how])


def judge(how: str, right: dict[str, Outcome], served: Served, where: str) -> None:
    """Compares with the right value of what ran; whatever ran otherwise than as planned must have been said.

    What changes in the middle of a run for the first time is noticed when that run is over. Where the original ran at
    the computed steps, or a state could not be exported, the output is what is forecast.
    """
    if how == COMPUTED or served.originals >= STEPS:
        expected = [COMPUTED]
    elif served.originals:
        expected = [OUTPUT, *(kind for kind in (f"{how}, then computed",) if kind in right)]
    else:
        expected = [how, OUTPUT] if served.status == "output only" else [how]
    if served.late:
        assert any(LATE in line for line in served.warned), f"{where}: nothing was logged"
        return
    if not any(equal(served.outcome, right[kind], TOLERANCE if INSIDE in kind else 0.0) for kind in expected):
        wrong = explain(served.outcome, right[expected[0]])
        pytest.fail(f"{where}: {wrong}; status: {served.status}; problems: {served.problems}", pytrace=False)
    if served.originals:
        reasons = [line for line in served.said if line.startswith("the original ran")]
        assert reasons, f"{where}: the original ran {served.originals} calls, which no problem says: {served.problems}"
        assert served.warned, f"{where}: the original ran, and nothing was logged"
        assert len(set(served.warned)) == len(served.warned), f"{where}: one line was logged twice: {served.warned}"


def explain(ours: Outcome, right: Outcome) -> str:
    """How two outcomes differ."""
    if isinstance(ours, type) or isinstance(right, type):
        said = [value.__name__ if isinstance(value, type) else "a sample" for value in (ours, right)]
        return f"got {said[0]}, right is {said[1]}"
    if len(ours) != len(right):
        return f"got {len(ours)} tensors, right are {len(right)}"
    differences = [
        f"{float((a.double() - b.double()).abs().max()):.2g}" if a.shape == b.shape else f"{a.shape} {b.shape}"
        for a, b in zip(ours, right, strict=True)
    ]
    return f"silently wrong by {', '.join(differences)}"
