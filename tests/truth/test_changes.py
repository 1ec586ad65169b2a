"""Whatever is changed on a denoiser, before or after it is compiled, what runs is the denoiser as it then is.

Right values come from a copy that is never compiled and goes through the same changes; where steps are forecast, from
the oracle on that copy. Every change is tried before and after compiling; it is made, undone and made again.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

import dcc
from dcc.errors import DccError

from ..oracle import Cached, History, Oracle
from .changes import CHANGES
from .loops import BUILD, INNER, STEPS, Denoise, Loop, inner
from .table import Change

MASK = tuple(1 - step % 2 for step in range(STEPS))
TOLERANCE = 1e-5  # of the largest value: an inner forecast is base + (value - base), which rounds
COMPUTED, OUTPUT, INSIDE = "computed", "output", "inside"  # every step; every other step forecast, at one of two sites


# ---------------------------------------------------------------- right values
def uncached(loop: Loop) -> Denoise | None:
    """Calls the denoiser as the loop does."""
    return None


def held(loop: Loop) -> Denoise:
    """Calls it at every other step only, and keeps the output for the step after it."""
    kept: list[Tensor] = []

    def denoise(step: int, kwargs: dict[str, Any]) -> Tensor:
        if MASK[step]:
            kept[:] = [loop.call(**kwargs)]
        return kept[0]

    return denoise


def forecast_inside(loop: Loop) -> Denoise:
    """The oracle at the inner site."""
    oracle, history = Oracle(loop.net, [Cached(inner(loop.net), MASK)]), History()
    return lambda step, kwargs: oracle(history, step, kwargs)


EXPECTED: dict[str, Callable[[Loop], Denoise | None]] = {
    COMPUTED: uncached, OUTPUT: held, INSIDE: forecast_inside,
}  # fmt: skip
Outcome = list[Tensor] | type[Exception]


def outcome(loop: Loop, how: Callable[[Loop], Denoise | None] = uncached) -> Outcome:
    """The results of one generation, or the type of what it raised."""
    try:
        return loop(denoise=how(loop))
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


# ---------------------------------------------------------------- one change, step by step
Observe = Callable[[Loop], Any]


def walk(change: Change, loop: Loop, order: str, begin: Observe, observe: Observe) -> dict[str, Any]:
    """Goes through the phases of an order; `begin` compiles (or does not), `observe` looks at every phase.

    Whatever happens the change is undone at the end, where it can be.
    """
    seen: dict[str, Any] = {}
    with ExitStack() as undoing:
        if order == "after":
            begin(loop)
            seen["plain"] = observe(loop)
        undo = change.make(loop)
        if undo is not None:
            undoing.callback(undo)
        if order == "before":
            begin(loop)
        seen["changed"] = observe(loop)
        if undo is not None:
            undoing.pop_all().close()
            seen["undone"] = observe(loop)
            undo = change.make(loop)
            if undo is not None:
                undoing.callback(undo)
            seen["changed again"] = observe(loop)
    return seen


@dataclass
class Served:
    """What a compiled denoiser made of one generation."""

    outcome: Outcome
    originals: int  # calls of the original during it
    problems: tuple[str, ...]
    warned: tuple[str, ...]  # lines logged since it was compiled

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


def watched(loop: Loop, caplog: pytest.LogCaptureFixture) -> Served:
    """One generation of the compiled denoiser."""
    before = dcc.summary(loop.net).originals
    found = outcome(loop)
    summary = dcc.summary(loop.net)
    lines = tuple(record.getMessage() for record in caplog.records if record.name.partition(".")[0] == "dcc")
    return Served(found, summary.originals - before, summary.problems, lines)


def compiled(loop: Loop, how: str, caplog: pytest.LogCaptureFixture) -> None:
    """Compiles the loop's denoiser in place."""
    caplog.clear()
    options = {COMPUTED: {"interval": 1}, OUTPUT: {"interval": 2}, INSIDE: {"interval": 2, "site": INNER[loop.model]}}
    dcc.compile(loop.net, [0], sample=lambda net, prompt: loop()[0], policy="interval", backend="eager", **options[how])


_PLAIN: dict[tuple[str, str], Loop] = {}
_KEPT: dict[tuple[str, str, str], Loop] = {}  # compiled before and restored since, with graphs of their plain state


def plain(change: Change, model: str) -> Loop:
    """A new copy of the denoiser that the change is made to."""
    base = change.base.__name__ if change.base else ""
    if (model, base) not in _PLAIN:
        loop = Loop(BUILD[model]())
        if change.base:
            change.base(loop)
        _PLAIN[model, base] = loop
    return _PLAIN[model, base].copy()


def check(change: Change, model: str, order: str, caplog: pytest.LogCaptureFixture) -> str:
    """Walks a compiled denoiser and plain copies through the change; returns what became of the changed state.

    After compiling, denoisers are used for several changes, one after the other, because the capture of their plain
    state takes longer than all the rest.
    """
    key = model, change.base.__name__ if change.base else "", change.kind
    ours = (_KEPT.pop(key, None) if order == "after" else None) or plain(change, model)
    statuses = []
    right: dict[str, dict[str, Outcome]] = {}
    for how, right_value in EXPECTED.items():
        right[how] = walk(
            change, plain(change, model), order, lambda loop: None, lambda loop, how=right_value: outcome(loop, how)
        )
        if how == COMPUTED and order == "after" and change.effect is not None:
            same = equal(right[how]["plain"], right[how]["changed"])
            assert same is not change.effect, f"this change {'has no' if same else 'has an'} effect on the sample"
        try:
            seen = walk(
                change,
                ours,
                order,
                lambda loop, how=how: compiled(loop, how, caplog),
                lambda loop: watched(loop, caplog),
            )
        except DccError as error:
            assert order in change.refused, f"refused: {error}"
            assert len(str(error)) > 20
            return "refused"
        for phase, served in seen.items():
            judge(how, {kind: outcomes[phase] for kind, outcomes in right.items()}, served, f"{how}, {phase}")
        statuses.append(seen["changed"].status)
        dcc.restore(ours.net)
    plainly = right[COMPUTED]
    if order == "after" and "undone" in plainly and equal(plainly["plain"], plainly["undone"]):
        _KEPT[key] = ours
    return ", ".join(statuses)


def judge(how: str, right: dict[str, Outcome], served: Served, where: str) -> None:
    """Compares with the right value of what ran; whatever ran otherwise than as planned must have been said."""
    if how == COMPUTED or served.originals >= STEPS:
        expected = COMPUTED
    else:
        expected = OUTPUT if served.originals or served.status == "output only" else how
    tolerance = TOLERANCE if expected == INSIDE else 0.0
    if not equal(served.outcome, right[expected], tolerance):
        wrong = explain(served.outcome, right[expected])
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


# ---------------------------------------------------------------- the table
ROWS = [(name, model, order) for name, row in CHANGES.items() for model in row.models for order in row.orders]
RESULTS: dict[tuple[str, str, str], str] = {}


def by_default(row: tuple[str, str, str]) -> bool:
    """What the default run tries of a change: one model, after compiling."""
    name, model, order = row
    return model == CHANGES[name].models[0] and order == "after"


@pytest.mark.parametrize(
    ("name", "model", "order"),
    [pytest.param(*row, marks=() if by_default(row) else pytest.mark.long, id="-".join(row)) for row in ROWS],
)
def test_what_runs_is_the_denoiser_as_it_is(
    name: str, model: str, order: str, caplog: pytest.LogCaptureFixture
) -> None:
    if CHANGES[name].peft:
        pytest.importorskip("peft")
    with caplog.at_level("WARNING", "dcc"):
        status = RESULTS[name, model, order] = check(CHANGES[name], model, order, caplog)
    print(f"{CHANGES[name].kind}\t{name}\t{model}\t{order}\t{status}")
