"""The README's own code: the method that is shown there works when typed in."""

from __future__ import annotations

import re
from pathlib import Path

import dcc
from dcc.policies import POLICIES

README = Path(__file__).resolve().parent.parent / "README.md"


def test_a_new_method_takes_under_twenty_lines_and_works_when_typed_in(capsys):
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    (block,) = [block for block in blocks if "@method(" in block]
    assert len([line for line in block.splitlines() if line.strip()]) <= 20
    known = set(POLICIES)
    space: dict[str, object] = {}
    try:
        exec(block, space)
    finally:
        for name in set(POLICIES) - known:
            del POLICIES[name]
    counts = dcc.compiled(space["pipe"]).sessions.counts
    assert counts.forecast > 5 and counts.computed > 2
    assert "two_blocks" in capsys.readouterr().out
