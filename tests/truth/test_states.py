"""What a change costs: two states that alternate, values that no graph holds, and a number that changes often."""

from __future__ import annotations

import pytest

import dcc
from dcc.serve.denoiser import MOST_STATES

from .adapters import load
from .changes import CHANGES
from .judging import COMPUTED, EXPECTED, compiled, equal, explain, judge, outcome, watched
from .loops import BUILD, Loop
from .parts import block
from .table import Change
from .test_changes import plain


def needed(change: Change) -> None:
    """Skips where peft is needed and not there."""
    if change.peft:
        pytest.importorskip("peft")


def both(change: Change, model: str) -> tuple[Loop, Loop]:
    """A denoiser that is compiled to compute every step, and a copy that is not."""
    ours = plain(change, model)
    compiled(ours, COMPUTED)
    return ours, plain(change, model)


@pytest.mark.parametrize(
    "name",
    ["the other lora", *(pytest.param(name, marks=pytest.mark.long) for name in ("a number", "one processor set"))],
)
def test_two_states_that_alternate_are_captured_once_each(name: str) -> None:
    change = CHANGES[name]
    needed(change)
    ours, right = both(change, "dit")
    for _ in range(2):
        undo = []
        for loop in (ours, right):
            made = change.make(loop)
            assert made is not None
            undo.append(made)
        judge(COMPUTED, {COMPUTED: outcome(right)}, watched(ours), "changed")
        for back in undo:
            back()
        judge(COMPUTED, {COMPUTED: outcome(right)}, watched(ours), "as before")
    summary = dcc.summary(ours.net)
    assert (summary.captures, summary.originals) == (2, 0)


@pytest.mark.parametrize(
    "name",
    [
        "a lora hot swapped",
        *(
            pytest.param(name, marks=pytest.mark.long)
            for name in (
                "a parameter written",
                "a parameter s data replaced",
                "a buffer written",
                "a state dict loaded",
                "another image",
                "another guidance scale",
                "latents changed by a callback",
                "a parameter that requires gradients without any asked",
                "inference mode",
            )
        ),
    ],
)
def test_values_need_no_new_capture(name: str) -> None:
    change = CHANGES[name]
    needed(change)
    ours, right = both(change, change.models[0])
    before = dcc.summary(ours.net)
    for loop in (ours, right):
        change.make(loop)
    judge(COMPUTED, {COMPUTED: outcome(right)}, watched(ours), "changed")
    summary = dcc.summary(ours.net)
    assert (summary.captures, summary.originals) == (before.captures, before.originals)


@pytest.mark.parametrize("model", ["dit", pytest.param("unet", marks=pytest.mark.long)])
def test_a_scale_that_changes_often_is_an_input(model: str) -> None:
    """From its second value on one graph serves all of them, at every plan."""
    pytest.importorskip("peft")
    ours, right = Loop(BUILD[model]()), Loop(BUILD[model]())
    for loop in (ours, right):
        load(loop, "a", 1)
    for how in EXPECTED:
        compiled(ours, how)
        for value in [0.05 * k for k in range(1, MOST_STATES + 3)]:
            for loop in (ours, right):
                loop.net.set_adapters(["a"], [value])
            judge(how, {how: outcome(right, EXPECTED[how])}, watched(ours), f"{how}, {value}")
        summary = dcc.summary(ours.net)
        assert (summary.captures, summary.originals) == (2, 0)
        dcc.restore(ours.net)


@pytest.mark.long
def test_a_whole_number_that_changes_often_is_captured_up_to_a_limit() -> None:
    """Past that many values the original runs, and the summary says why."""
    change = CHANGES["a number"]
    ours, right = both(change, "dit")
    for value in range(2, MOST_STATES + 3):
        for loop in (ours, right):
            block(loop).ff.whole = value
        found, expected = outcome(ours), outcome(right, EXPECTED[COMPUTED])
        assert equal(found, expected), f"{value}: {explain(found, expected)}"
    summary = dcc.summary(ours.net)
    assert summary.captures == MOST_STATES and summary.originals > 0
    assert any(f"more than {MOST_STATES} states" in line for line in summary.problems)
