"""Plain text of rich renderables, and numbers as people read them."""

from __future__ import annotations

import io
import math
from typing import Any

from rich.console import Console


def render(renderable: Any, width: int = 110) -> str:
    """What `renderable` prints on a terminal of this width, without colours."""
    console = Console(file=io.StringIO(), width=width, color_system=None)
    console.print(renderable)
    return "\n".join(line.rstrip() for line in console.file.getvalue().rstrip().splitlines())  # type: ignore[attr-defined]


def error_line(error: BaseException) -> str:
    """Kind and first line of an error, as `summary()` and tables show what another library raised."""
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), "no message")
    return f"{type(error).__name__}: {line[:200]}"


def human_bytes(size: float) -> str:
    """A number of bytes as people read it: 1536 -> "1.5 KiB"."""
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.2f} GiB"


def human_seconds(seconds: float) -> str:
    """Seconds as people read them: 0.0421 -> "42 ms", 2.5 -> "2.50 s"."""
    return f"{seconds * 1e3:.0f} ms" if seconds < 0.9995 else f"{seconds:.2f} s"


def decibels(value: float) -> str:
    """A PSNR as people read it: 31.24 -> "31.2 dB"; infinite -> "identical"."""
    return "identical" if math.isinf(value) else f"{value:.1f} dB"


def count(number: int, noun: str) -> str:
    """A number with its noun: (1, "step") -> "1 step", (2, "step") -> "2 steps"."""
    return f"{number} {noun}{'' if number == 1 else 's'}"
