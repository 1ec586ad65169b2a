"""Writing files so that a reader finds the old one or the whole new one, never a part."""

from __future__ import annotations

import os
from pathlib import Path


def write_file(path: str | os.PathLike[str], data: str | bytes) -> None:
    """Writes text (UTF-8) or bytes atomically. Raises OSError, the old file untouched, where it cannot."""
    target = Path(path)
    part = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        part.write_bytes(data.encode() if isinstance(data, str) else data)
        os.replace(part, target)
    finally:
        part.unlink(missing_ok=True)
