"""Triggers as pure state machines: decisions written out by hand, and what a plan file may hold."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from dcc.errors import PolicyError
from dcc.plans.triggers import (
    IDLE,
    Accumulate,
    AlignedProbe,
    Anchored,
    Coarsest,
    Codebook,
    Layerwise,
    Measure,
    Memory,
    TransformRate,
    Trigger,
    Verify,
)

EXAMPLES: list[Trigger] = [
    Accumulate("modulated", 0.3, (2.0, 0.0)),
    Anchored("blocks[0:1]", 0.1, max_skip=2, max_skips=5),
    AlignedProbe("blocks[0:1]", 0.4),
    TransformRate(0.05),
    Codebook(("a", "b"), (0.1, 0.2), (4, 2)),
    Verify("blocks[3:4]", 0.3, 0.05, 0.01),
    Layerwise(("a", "b", "c"), 3, threshold=0.1),
    Coarsest(("stack", "blocks[1:2]"), (0.1, 0.2)),
]


def run(trigger: Trigger, steps: list[dict[str, float]], forced: tuple[int, ...] = (0,)) -> list[object]:
    """Decisions over a run whose step s measures steps[s], before and after alike; forced steps compute."""
    memory, decisions = Memory(len(steps)), []
    for step, values in enumerate(steps):
        decision = True if step in forced else trigger.decide(memory, step, values)
        decisions.append(decision)
        trigger.observe(memory, step, decision is True, {} if step == 0 else values)
    return decisions


def series(trigger: Trigger, *columns: list[float]) -> list[dict[str, float]]:
    return [dict(zip((m.name for m in trigger.measures), row, strict=True)) for row in zip(*columns, strict=True)]


def test_accumulate_sums_scores_and_computing_clears_them():
    trigger = Accumulate("modulated", 0.25)
    assert run(trigger, series(trigger, [0, 0.1, 0.1, 0.1, 0.1, 0.1, 0.3, 0.2])) == [
        True, False, False, True, False, False, True, False,
    ]  # fmt: skip


def test_accumulate_compares_strictly_and_scores_by_its_polynomial():
    trigger = Accumulate("modulated", 0.5, (1.0, 2.0, 0.0))  # x^2 + 2x
    memory = Memory(9)
    name = trigger.measures[0].name
    assert trigger.decide(memory, 1, {name: 0.2}) is False  # 0.44
    assert trigger.decide(memory, 1, {name: 0.25}) is True  # 0.5625
    assert replace(trigger, polynomial=(1.0, 0.0)).decide(memory, 1, {name: 0.5}) is True  # equal computes
    assert replace(trigger, polynomial=(-9.0, 0.0)).decide(memory, 1, {name: 0.5}) is False  # floored at 0


@pytest.mark.parametrize("trigger", EXAMPLES[:4], ids=lambda t: t.kind)
def test_a_threshold_of_zero_always_computes(trigger):
    none = [0.0] * 6
    assert run(replace(trigger, threshold=0.0), series(trigger, *[none] * len(trigger.measures))) == [True] * 6


def test_anchored_does_not_accumulate_and_counts_what_it_skips():
    trigger = Anchored("blocks[0:1]", 0.1)
    values = series(trigger, [0, 0.09, 0.09, 0.09, 0.11, 0.09])
    assert run(trigger, values) == [True, False, False, False, True, False]
    assert run(replace(trigger, max_skip=2), values) == [True, False, False, True, True, False]
    assert run(replace(trigger, max_skips=1), values) == [True, False, True, True, True, True]


def test_aligned_probe_weighs_two_anchors_by_how_far_the_probe_moved():
    trigger = AlignedProbe("blocks[0:1]", 10.0)
    previous, anchor, older = (m.name for m in trigger.measures)
    memory = Memory(9)
    trigger.observe(memory, 0, True, {})
    assert trigger.weights(memory, 1, {previous: 0, anchor: 1.0, older: 0}) == [1.0]  # one anchor: a copy
    trigger.observe(memory, 1, True, {previous: 0, anchor: 2.0, older: 0})  # |P1 - P2| = 2
    assert trigger.weights(memory, 2, {previous: 0, anchor: 0, older: 2.5}) == [1.25, -0.25]
    assert trigger.weights(memory, 2, {previous: 0, anchor: 0, older: 1.0}) == [1.0, 0.0]  # clipped below
    assert trigger.weights(memory, 2, {previous: 0, anchor: 0, older: 9.0}) == [1.5, -0.5]  # and above


def test_transform_rate_follows_the_paper_by_hand():
    trigger = TransformRate(0.5)
    moved, between, changed, size = (m.name for m in trigger.measures)
    memory = Memory(9)
    trigger.observe(memory, 0, True, {size: 4.0})
    assert trigger.decide(memory, 1, {moved: 0.1}) is True  # no rate yet
    trigger.observe(memory, 1, True, {moved: 1.0, between: 1.0, changed: 2.0, size: 4.0})  # k = 2, |v| = 4
    assert trigger.decide(memory, 2, {moved: 0.9}) is False  # 2 * 0.9 / 4 = 0.45
    trigger.observe(memory, 2, False, {moved: 0.9})
    assert trigger.decide(memory, 3, {moved: 0.2}) is True  # 0.45 + 0.1 > 0.5
    trigger.observe(memory, 3, True, {moved: 0.2, between: 1.0, changed: 1.0, size: 5.0})
    assert memory.total == 0.0 and memory.numbers == {"rate": 1.0, "size": 5.0}


def test_codebook_divides_by_the_steps_between_and_looks_the_gap_up():
    trigger = Codebook(("a",), (0.1, 0.2), (4, 2))
    values = series(trigger, [0, 0.9, 0.05, 0, 0, 0.6, 0.5, 0.9, 0])
    # step 1 changes by 0.9: gap 1; step 2 by 0.05: gap 4, so steps 3 to 5 copy; step 6 by 0.5 / 4 = 0.125: gap 2
    assert run(trigger, values) == [True, True, True, False, False, False, True, False, True]


def test_codebook_without_rate_spares_the_last_half_after_the_first_reuse():
    trigger = Codebook(("a", "b"), (0.15,), (3,), rate=False, late=True)
    low = [0.1] * 12
    decisions = run(trigger, series(trigger, low, low), forced=(0, 1))
    assert decisions == [True, True, False, False, True, False, False, True, True, True, True, True]


def test_verify_computes_the_step_behind_a_bad_draft():
    trigger = Verify("blocks[3:4]", 0.3, 0.5, 0.01, min_skip=1, max_skip=3)
    values = series(trigger, [0, 0.1, 0.5, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1])
    assert run(trigger, values) == [True, False, False, True, False, False, False, True, False]


def test_verify_tightens_over_the_run():
    trigger = Verify("blocks[3:4]", 0.3, 0.5, 0.2, min_skip=1)
    for step, limit in ((0, 0.3), (4, 0.3 * 0.5**0.5), (8, 0.2)):
        memory = Memory(9)
        trigger.observe(memory, step, False, {trigger.measures[0].name: 0.25})
        assert memory.numbers["limit"] == pytest.approx(limit)
        assert trigger.decide(memory, step + 1, {}) is (limit < 0.25)


def test_layerwise_prunes_what_stands_still_until_the_next_full_step():
    trigger = Layerwise(("a", "b", "c"), 3, threshold=0.1)
    values = series(trigger, [0, 0.05, 0, 0, 0.2, 0], [0, 0.2, 0, 0, 0.2, 0], [0, 0.1, 0, 0, 0.2, 0])
    assert run(trigger, values, forced=(0, 1)) == [True, True, (0, 1, 0), (0, 1, 0), True, True]


def test_layerwise_prefix_skips_all_before_the_last_block_within_its_own_limit():
    trigger = Layerwise(("a", "b", "c"), 2, gamma=0.5, warmup=2, norm="mse", prefix=True)
    values = series(trigger, [0, 1.0, 0.4, 0], [0, 1.0, 0.5, 0], [0, 1.0, 0.6, 0])
    assert run(trigger, values, forced=(0, 1, 2)) == [True, True, True, (IDLE, 0, 1)]
    assert trigger.sample_row(3) == (IDLE, IDLE, 0)


def test_coarsest_takes_the_first_site_within_its_bound():
    trigger = Coarsest(("stack", "blocks[1:2]"), (0.1, 0.2), gap=2)
    values = series(trigger, [0, 0.3, 0.15, 0, 0.1, 0, 0.9, 0], [0, 0.3, 0.15, 0, 0.9, 0, 0.9, 0])
    # step 2 changes by 0.15, within the second bound; step 4 by 0.1 / 2, within the first; step 6 by too much
    assert run(trigger, values) == [True, True, True, (IDLE, 0), True, (0, IDLE), True, True]


@pytest.mark.parametrize("trigger", EXAMPLES, ids=lambda t: t.kind)
def test_a_trigger_survives_json(trigger):
    assert Trigger.from_json(json.loads(json.dumps(trigger.as_json()))) == trigger


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"kind": "magic"}, "unknown trigger.*accumulate, anchored"),
        ({}, "unknown trigger"),
        ("accumulate", "unknown trigger"),
        ({"kind": "anchored", "site": "x", "threshold": 1, "colour": 2}, "'anchored' has no field colour; it has: max"),
        ({"kind": "anchored", "site": "x"}, "'anchored'.*threshold"),
    ],
    ids=str,
)
def test_malformed_triggers(data, message):
    with pytest.raises(PolicyError, match=message):
        Trigger.from_json(data)


@pytest.mark.parametrize("wrong", [{"against": "tomorrow"}, {"norm": "l7"}, {"when": "never"}], ids=str)
def test_malformed_measures(wrong):
    with pytest.raises(PolicyError, match="there are: "):
        Measure(**({"site": "stack", "against": "anchor"} | wrong))
