"""Whatever is changed on a denoiser, before or after it is compiled, what runs is the denoiser as it then is.

Right values come from a copy that is never compiled and goes through the same changes; where steps are forecast, from
the oracle on that copy. Every change is tried before and after compiling; it is made, undone and made again.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

import dcc
from dcc.errors import DccError

from .changes import CHANGES
from .judging import COMPUTED, EXPECTED, IN_MID_RUN, INSIDE, Outcome, compiled, equal, judge, outcome, watched
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


pytestmark = pytest.mark.usefixtures("graphs")
NO_SITE = re.compile(r"no site '[\w:]+'(: this denoiser is cached at its 'output' only| in this denoiser)")
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
    for how, right_value in (EXPECTED | (IN_MID_RUN if change.kind == "in mid run" else {})).items():
        right[how] = walk(
            change, plain(change, model), order, lambda loop: None, lambda loop, how=right_value: outcome(loop, how)
        )
    for how in EXPECTED:
        if not change.exact and how != COMPUTED:
            ours = plain(change, model)
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
            if how == INSIDE and NO_SITE.match(str(error)):  # in this state it is cached at its output only
                statuses.append("refused")
                continue
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
GOLDEN = Path(__file__).parent.parent / "golden" / "changes.tsv"


def line(name: str, model: str, order: str) -> str:
    """The head of a row's line in the table."""
    return "\t".join((CHANGES[name].kind, name, model, order))


def table() -> dict[str, str]:
    """The table as it is written."""
    lines = GOLDEN.read_text().splitlines() if GOLDEN.exists() else []
    return dict(line.rsplit("\t", 1) for line in lines)  # pyright: ignore[reportReturnType]


# What the default run tries after compiling: of most kinds one, on one of the models. A row takes 3 to 8 seconds.
BY_DEFAULT = {
    ("a hook that changes a submodule s output", "dit"),
    ("a hook that collects features", "unet"),
    ("one processor set", "dit"),
    ("processors set while the loop runs", "unet"),
    ("freeu", "unet"),
    ("the forward of a submodule s class replaced", "dit"),
    ("the class of a submodule", "unet"),
    ("a submodule replaced by the identity", "dit"),
    ("an element of a list", "dit"),
    ("a buffer replaced", "unet"),
    ("a parameter written", "dit"),
    ("a parametrization", "unet"),
    ("to bfloat16", "dit"),
    ("autocast", "unet"),
    ("training mode of a dropout", "dit"),
    ("gradients of the sample", "unet"),
    ("first block cache", "dit"),
    ("a lora loaded", "unet"),
    ("its scale", "dit"),
    ("a hook added in mid run", "unet"),
}
assert {name for name, _ in BY_DEFAULT} <= set(CHANGES)


def marks(name: str, model: str, order: str) -> tuple[pytest.MarkDecorator, ...]:
    """All but the default rows are long; those that the table does not have yet are run to be put into it."""
    if order == "after" and (name, model) in BY_DEFAULT:
        return (pytest.mark.slow,)
    new = pytest.mark.skipif("not config.getoption('--update-golden')", reason="not in the table")
    return (pytest.mark.long,) if line(name, model, order) in table() else (pytest.mark.long, new)


@pytest.mark.parametrize(
    ("name", "model", "order"),
    [pytest.param(*row, marks=marks(*row), id="-".join(row)) for row in ROWS],
)
def test_what_runs_is_the_denoiser_as_it_is(name: str, model: str, order: str, request: pytest.FixtureRequest) -> None:
    """And it is what the table says: one line for every row with its kind and what ran at each of three plans."""
    if CHANGES[name].peft:
        pytest.importorskip("peft")
    status = check(CHANGES[name], model, order)
    row, written = line(name, model, order), table()
    if request.config.getoption("--update-golden"):
        written[row] = status
        GOLDEN.write_text("".join(f"{row}\t{status}\n" for row, status in sorted(written.items())))
    assert status == written.get(row), f"{GOLDEN.name} has {written.get(row)}; if that is meant, use --update-golden"


def test_the_table_has_no_rows_that_are_no_more() -> None:
    assert set(table()) <= {line(*row) for row in ROWS}
    assert len(CHANGES) >= 60
