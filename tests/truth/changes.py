"""The table of changes: every row of it, collected."""

from __future__ import annotations

from . import adapters, modes, patches, pipelines, values
from .table import TABLE, Change

CHANGES: dict[str, Change] = {change.name: change for change in TABLE}
FILES = (values, patches, adapters, modes, pipelines)
assert len(CHANGES) == len(TABLE), "two changes have one name"
