"""The README's own code: the method that is shown there works when typed in."""

from __future__ import annotations

import dcc
from dcc.policies import POLICIES

from .documents import README, block, typed_in


def test_a_new_method_takes_under_twenty_lines_and_works_when_typed_in(capsys):
    assert len([line for line in block(README, "@method(").splitlines() if line.strip()]) <= 20
    known = set(POLICIES)
    space: dict[str, object] = {}
    try:
        typed_in(README, "@method(", space)
    finally:
        for name in set(POLICIES) - known:
            del POLICIES[name]
    counts = dcc.compiled(space["pipe"]).sessions.counts
    assert counts.forecast > 5 and counts.computed > 2
    assert "two_blocks" in capsys.readouterr().out
