"""Odd modules, each beside a twin that is never compiled: the same answers bit for bit, the same state, nothing silent.

At interval 1 a compiled module is the original: it gives what the twin gives, over four prompts and two sizes, and
leaves in itself what the twin leaves in itself; compiling alone leaves nothing. At interval 2 it is the twin with a
cache of one output written by hand.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

import dcc
from dcc.errors import DccError
from dcc.record import seam

from . import (
    odd_branches,
    odd_classes,
    odd_containers,
    odd_control,
    odd_counters,
    odd_crossed,
    odd_hooks,
    odd_memory,
    odd_random,
    odd_state,
)
from .odd_modules import ODD, Odd, Prompt, seed
from .snapshots import Snapshot, differences, generators, snapshot, traces

KINDS = (
    odd_state,
    odd_counters,
    odd_branches,
    odd_random,
    odd_hooks,
    odd_containers,
    odd_memory,
    odd_control,
    odd_classes,
    odd_crossed,
)
EXPECTED = "this plan computes every step"  # what the summary says of every plan of interval 1
ORIGINAL = ("not exported", "the original ran")
CALIBRATION = 4  # the number of a prompt that is not served
SHOWN = 4


@dataclass(frozen=True)
class Outcome:
    """What became of one odd module: "served" by a graph, run by the "original" and said, or "refused"."""

    status: str
    said: tuple[str, ...]
    faults: tuple[str, ...]


def calls_of(one: Odd, net: Any, prompts: Sequence[int], call: Any = None) -> list[Snapshot]:
    """What a user sees who generates these prompts, call by call; an error ends its generation and is seen."""
    seed(1)
    seen: list[Snapshot] = []
    for index in prompts:
        one.between(net)
        if isinstance(call, ByHand):
            call.steps = 0
        kept: list[Any] = []

        def see(*values: Any, kept: list[Any] = kept) -> None:
            seen.append(snapshot(list(values)))
            kept.append(values)

        try:
            with one.around(net):
                final = one.loop(call or net, Prompt.of(index), see)
        except Exception as error:  # the twin's errors are part of what is compared
            final = f"{type(error).__name__}: {error}"
        seen.append(snapshot([final, kept]))
    return seen


class ByHand:
    """Interval 2 as a person writes it: every other step gives the last answer again, from a copy of its own."""

    def __init__(self, net: Any) -> None:
        self.net, self.steps, self.last = net, 0, None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.steps += 1
        if self.steps % 2 == 0:
            return copied(self.last)
        out = self.net(*args, **kwargs)
        self.last = copied(out)
        return out


def copied(answer: Any) -> Any:
    """The same answer in memory of its own; a tensor that stands in it twice is one tensor there too."""
    copies = {id(leaf): leaf.clone() for leaf in tree_leaves(answer) if isinstance(leaf, Tensor)}
    return tree_map(lambda leaf: copies.get(id(leaf), leaf), answer)


def state_of(net: Any) -> Snapshot:
    """The state of a module without what compiling has set on it, compiled or not."""
    with seam.installed(net, None):
        return snapshot(net)


def compiled(one: Odd, net: Any, interval: int) -> None:
    def sample(module: Any, prompt: Any) -> Any:
        with one.around(module):
            return one.loop(module, prompt, lambda *values: None)

    options: dict[str, Any] = {"policy": "interval", "interval": interval, "backend": "eager"}
    dcc.compile(net, [Prompt.of(CALIBRATION)], sample=sample, **options)


def first_lines(what: str, found: Sequence[str]) -> list[str]:
    """At most a few of these lines, each told what it is about."""
    more = [f"{what}: and {len(found) - SHOWN} more"] if len(found) > SHOWN else []
    return [f"{what}: {line}" for line in found[:SHOWN]] + more


def not_equal(what: str, ours: Sequence[Snapshot], right: Sequence[Snapshot], memory: bool = True) -> list[str]:
    """What differs between what two users saw."""
    found = [f"{len(ours)} looks, right: {len(right)}"] if len(ours) != len(right) else []
    for number, (a, b) in enumerate(zip(ours, right, strict=False)):
        found += [f"look {number} {line}" for line in differences(a, b, memory=memory)]
    return first_lines(what, found)


def problems_of(net: Any) -> tuple[tuple[str, ...], int]:
    """What the summary says besides that every step is computed; how often the original ran outside of a plan."""
    summary = dcc.summary(net)
    said = tuple(problem for problem in summary.problems if EXPECTED not in problem)
    return said, getattr(summary, "originals", 0)


@functools.cache
def outcome(name: str) -> Outcome:
    """Compiles and serves an odd module at interval 1 beside its twin; then at interval 2."""
    one = ODD[name]
    net, twin = one.build(), one.build()
    one.between(twin)
    try:
        faults = faults_of_compiling(one, net, interval=1)
    except DccError as error:
        refusal = f"{type(error).__name__}: {error}"
        found = first_lines("the refusal changed the module", differences(snapshot(net), snapshot(twin), outside=False))
        if not one.refused or one.refused.lower() not in refusal.lower():
            found.append(f"refused: {refusal[:300]}")
        return Outcome("refused", (refusal,), tuple(found))
    except Exception as error:  # whatever it is, it is a fault of the table and not the end of it
        return Outcome("crashed", (), (f"compile raised {type(error).__name__}: {str(error)[:300]}",))

    one.start(net)
    ours, drawn, watched = calls_of(one, net, range(4)), generators(), snapshot(one.watched())
    state = state_of(net)
    said, originals = problems_of(net)
    dcc.restore(net)
    restored = snapshot(net)

    one.start(twin)
    right = calls_of(one, twin, range(4))
    faults += not_equal("interval 1", ours, right)
    faults += first_lines("interval 1 drew other numbers", differences(drawn, generators()))
    faults += first_lines("interval 1 left elsewhere", differences(watched, snapshot(one.watched())))
    faults += first_lines("interval 1 left another state", differences(state, snapshot(twin)))
    faults += first_lines("restored with another state", differences(restored, snapshot(twin)))
    entries = [set(vars(module)) for module in (net, twin)]
    if entries[0] != entries[1]:
        faults.append(f"restored with other attributes: {sorted(entries[0] ^ entries[1])}")
    by_original = any(problem.startswith(ORIGINAL) for problem in said)
    if originals and not by_original:
        faults.append(f"{originals} calls ran the original, and the summary does not say why: {said}")
    fresh = faults or one.outside
    faults += faults_at_interval_2(one, one.build() if fresh else net, 0 if fresh else 4)
    return Outcome("original" if by_original else "served", said, tuple(faults))


def faults_of_compiling(one: Odd, net: Any, interval: int) -> list[str]:
    """Compiles a module, and finds what compiling alone has changed."""
    one.between(net)
    seed(5)
    before, drawn = snapshot(net), generators()
    compiled(one, net, interval)
    after = state_of(net)
    faults = first_lines("compile moved a generator", differences(generators(), drawn))
    faults += first_lines("compile changed the module", differences(after, before, outside=False))
    return faults + first_lines("compile left a trace", traces(after))


def faults_at_interval_2(one: Odd, net: Any, before: int) -> list[str]:
    """The module at interval 2 beside a cache written by hand, and beside the plain one; `before` prompts were served.

    Where reusing an answer cannot be right the module may also be run at every step, if the summary says so.
    """
    twins = [one.build(), one.build()]
    for twin in twins:
        one.between(twin)
        one.start(twin)
        calls_of(one, twin, range(before))
    try:
        faults = faults_of_compiling(one, net, interval=2)
    except Exception as error:  # as above; interval 1 was not refused
        return [f"interval 2: compile raised {type(error).__name__}: {str(error)[:300]}"]
    one.start(net)
    looks, state = calls_of(one, net, (0, 1, 2)), state_of(net)
    said, _ = problems_of(net)
    sites = dcc.compiled(net).plan.sites
    dcc.restore(net)
    if one.uncacheable and not said:
        faults.append("interval 2: the summary does not say that the module cannot be cached rightly")
    found = []
    for twin, call in zip(twins, (ByHand(twins[0]), None), strict=True):
        one.start(twin)
        right = calls_of(one, twin, (0, 1, 2), call)
        errors = [error_of(look) for look in looks if error_of(look)]
        if errors and errors != [error_of(look) for look in right if error_of(look)]:
            return [*faults, f"interval 2: raised {errors[0]}"]
        others = not_equal("interval 2", looks, right, memory=False)
        found.append(others + first_lines("interval 2 state", differences(state, snapshot(twin), memory=False)))
    by_hand, plain = found
    comparable = one.by_hand and sites == ("output",)
    return faults + (by_hand if comparable and (plain or not said) else [])


def error_of(look: Snapshot) -> str:
    """The error that ended a generation, if one did."""
    final = look.get("[0]", "")
    return final if isinstance(final, str) and "Error" in final else ""


def table() -> str:
    """Name, kind and status of every odd module, then how many there are of each status."""
    rows = [(one.name, one.kind, outcome(one.name).status) for one in ODD.values()]
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    lines = [f"{name:<{widths[0]}}  {kind:<{widths[1]}}  {status}" for name, kind, status in rows]
    statuses = [status for _, _, status in rows]
    counts = ", ".join(f"{statuses.count(status)} {status}" for status in sorted(set(statuses)))
    return "\n".join([*lines, f"{len(rows)} modules: {counts}", ""])


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.long] if one.long else []) for name, one in ODD.items()]
)
def test_the_compiled_module_is_the_twin(name: str):
    found = outcome(name)
    assert not found.faults, "\n".join((f"{found.status}; the summary says: {found.said}", *found.faults))


@pytest.mark.long
def test_the_table_of_odd_modules(golden: Any):
    golden(table())


def test_there_are_enough_of_every_kind():
    kinds = [one.kind for one in ODD.values()]
    assert len(kinds) >= 60
    assert {kind: kinds.count(kind) for kind in kinds if kinds.count(kind) < 6} == {}
    assert len(set(kinds)) == len(KINDS)


def test_a_wrong_answer_and_a_wrong_state_are_found():
    """The comparison itself: a twin that counts or answers otherwise is no twin."""
    one = ODD["keeps text"]
    nets = [one.build(), one.build()]
    right = [calls_of(one, net, (0, 2)) for net in nets]
    assert not_equal("same", *right) == []
    assert differences(snapshot(nets[0]), snapshot(nets[1])) == []
    nets[1].out.bias.data[0] += 1e-6  # type: ignore[union-attr, operator]
    assert isinstance(nets[1].out.bias, Tensor)
    assert len(differences(snapshot(nets[0]), snapshot(nets[1]))) == 1
    assert not_equal("moved", calls_of(one, nets[1], (0, 2)), right[0])
