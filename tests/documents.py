"""The documents as tests read them: their files, and the blocks of code that they show."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
README, ARCHITECTURE = ROOT / "README.md", ROOT / "dcc" / "README.md"
PYTHON = re.compile(r"```python\n(.*?)```", re.DOTALL)


def block(document: Path, mark: str) -> str:
    """The one Python block of a document that holds this text."""
    (found,) = [code for code in PYTHON.findall(document.read_text()) if mark in code]
    return found


def typed_in(document: Path, mark: str, space: dict[str, Any] | None = None) -> dict[str, Any]:
    """The names that such a block defines when it is typed in; `space` gets them, one by one, if it is given."""
    space = {} if space is None else space
    exec(compile(block(document, mark), str(document), "exec", dont_inherit=True), space)
    return space
