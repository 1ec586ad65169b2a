"""Random sequences of changes, prompts, sizes and plans over one compiled denoiser, against a copy never compiled."""

from __future__ import annotations

import functools

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test

import dcc
from dcc.errors import DccError

from .changes import CHANGES
from .judging import COMPUTED, EXPECTED, INSIDE, OUTPUT, compiled, judge, outcome, watched
from .loops import BUILD, LEVELS, Loop
from .parts import knobs
from .table import Undo

# Changes that may be made and undone in any order. The first few ask for graphs of their own; all others are values
# that a graph takes as they are, or modes in which the original runs.
CHANGED = (
    "a number",
    "an entry of a dict",
    "one processor set",
    "a hook that changes a submodule s output",
    "a buffer replaced",
    "a buffer written",
    "a parameter written",
    "a parameter s data replaced",
    "a parameter that requires gradients without any asked",
    "all parameters moved to new storage",
    "gradients of the sample",
    "training mode",
    "a submodule that is not used added",
    "a hook that collects the outputs",
)
assert set(CHANGED) <= set(CHANGES)


@functools.cache
def pair() -> tuple[Loop, Loop]:
    """The denoiser that is compiled, over and over, and its copy that never is."""
    ours = Loop(BUILD["dit"]())
    knobs(ours)
    ours.batch = 2
    return ours, ours.copy()


class Changes(RuleBasedStateMachine):
    """Two denoisers in the same state."""

    def __init__(self) -> None:
        super().__init__()
        self.loops = pair()
        self.undo: dict[str, list[Undo]] = {}
        self.how = COMPUTED

    @initialize(how=st.sampled_from(list(EXPECTED)))
    def begin(self, how: str) -> None:
        """Compiles the denoiser for a plan; first without the changes, where it is refused as they are."""
        self.how = how
        try:
            compiled(self.loops[0], how)
        except DccError:  # no inner sites with hooks, and no compiling in training mode
            assert self.undo, "refused though nothing was changed"
            self.undo_all()
            compiled(self.loops[0], how)

    def undo_all(self) -> None:
        """Undoes whatever is still changed, the last first."""
        for undos in reversed(list(self.undo.values())):
            for undo in undos:
                undo()
        self.undo.clear()

    @rule(how=st.sampled_from(list(EXPECTED)))
    def compile_again(self, how: str) -> None:
        """For another plan, in whatever state it now is."""
        dcc.restore(self.loops[0].net)
        self.begin(how)

    @rule(name=st.sampled_from(CHANGED))
    def change(self, name: str) -> None:
        """Makes a change of both, or undoes it."""
        if name in self.undo:
            for undo in self.undo.pop(name):
                undo()
            return
        made = [CHANGES[name].make(loop) for loop in self.loops]
        self.undo[name] = [undo for undo in made if undo is not None]

    @rule(
        seed=st.integers(0, 3),
        batch=st.sampled_from([1, 2, 3]),
        size=st.sampled_from([24, 18]),
        steps=st.sampled_from([2, 3, 4, 4, 4]),
    )
    def generate(self, seed: int, batch: int, size: int, steps: int) -> None:
        """A generation of both; other numbers of steps than the plan's only where every step is computed."""
        for loop in self.loops:
            loop.batch, loop.size = batch, size
            loop.levels = LEVELS[:steps] if self.how == COMPUTED else LEVELS
        ours, plain = self.loops
        served = watched(ours, seed)
        judge(self.how, {how: outcome(plain, EXPECTED[how], seed) for how in (COMPUTED, OUTPUT, INSIDE)}, served, "")

    def teardown(self) -> None:
        """Undoes all changes and takes the compiled denoiser off."""
        self.undo_all()
        for loop in self.loops:
            loop.batch, loop.size, loop.levels = 2, 24, LEVELS
        dcc.restore(self.loops[0].net)


@pytest.mark.parametrize("runs", [pytest.param(4, marks=pytest.mark.slow), pytest.param(200, marks=pytest.mark.long)])
def test_random_changes_are_served_as_the_original_would(runs: int) -> None:
    run_state_machine_as_test(
        Changes,
        settings=settings(
            max_examples=runs,
            stateful_step_count=6,
            derandomize=True,
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
