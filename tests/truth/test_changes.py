"""Whatever is changed on a denoiser, before or after it is compiled, what runs is the denoiser as it then is.

Right values come from a copy that is never compiled and goes through the same changes; where steps are forecast, from
the oracle on that copy. Every change is tried before and after compiling; it is made, undone and made again.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

import dcc
from dcc.errors import DccError

from .changes import CHANGES
from .judging import COMPUTED, EXPECTED, Outcome, compiled, equal, judge, outcome, watched
from .loops import BUILD, Loop, pipeline
from .table import Change

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


_PLAIN: dict[tuple[str, str], Loop] = {}
_KEPT: dict[tuple[str, str, str], Loop] = {}  # compiled before and restored since, with graphs of their plain state


def plain(change: Change, model: str) -> Loop:
    """A new copy of the denoiser that the change is made to."""
    if change.pipeline:
        return pipeline(model)
    base = change.base.__name__ if change.base else ""
    if (model, base) not in _PLAIN:
        loop = Loop(BUILD[model]())
        if change.base:
            change.base(loop)
        _PLAIN[model, base] = loop
    return _PLAIN[model, base].copy()


def check(change: Change, model: str, order: str) -> str:
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
                lambda loop, how=how: compiled(loop, how),
                watched,
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


# ---------------------------------------------------------------- the table
ROWS = [(name, model, order) for name, row in CHANGES.items() for model in row.models for order in row.orders]
RESULTS: dict[tuple[str, str, str], str] = {}
GOLDEN = Path(__file__).parent.parent / "golden" / "changes.tsv"


def by_default(row: tuple[str, str, str]) -> bool:
    """What the default run tries of a change: one model, after compiling."""
    name, model, order = row
    return model == CHANGES[name].models[0] and order == "after"


@pytest.mark.parametrize(
    ("name", "model", "order"),
    [pytest.param(*row, marks=() if by_default(row) else pytest.mark.long, id="-".join(row)) for row in ROWS],
)
def test_what_runs_is_the_denoiser_as_it_is(name: str, model: str, order: str) -> None:
    if CHANGES[name].peft:
        pytest.importorskip("peft")
    RESULTS[name, model, order] = check(CHANGES[name], model, order)


def test_the_table_says_what_became_of_them(request: pytest.FixtureRequest) -> None:
    """One line for every row that was right: kind, change, model, order, and what ran at the three plans."""
    found = {f"{CHANGES[row[0]].kind}\t" + "\t".join(row): status for row, status in RESULTS.items()}
    written = dict(line.rsplit("\t", 1) for line in GOLDEN.read_text().splitlines()) if GOLDEN.exists() else {}
    if request.config.getoption("--update-golden"):
        written |= found
        GOLDEN.write_text("".join(f"{row}\t{status}\n" for row, status in sorted(written.items())))
    differing = {row: (status, written.get(row)) for row, status in found.items() if written.get(row) != status}
    assert not differing, f"now, and in {GOLDEN.name}; if that is meant, run pytest with --update-golden"
    known = {f"{CHANGES[row[0]].kind}\t" + "\t".join(row) for row in ROWS}
    assert set(written) <= known, "the table has rows that are no more"
