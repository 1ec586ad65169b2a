"""What an evaluation measured: for the terminal, as JSON and CSV for programs, and as one HTML file for people."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import statistics
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from dcc.files import write_file
from dcc.quality import mean_psnr
from dcc.report.rows import Comparison, Row
from dcc.text import count, human_seconds, render

VERSION = 1


class Report(Comparison):
    """A comparison that prints as a table of at most 80 columns, and can be written for programs and for people."""

    def to_json(self, path: str | os.PathLike[str]) -> None:
        """Writes everything but the pictures, atomically. Numbers that JSON lacks are "Infinity" and "NaN"."""

        def entry(row: Row) -> dict[str, Any]:
            plan = {"sites": row.plan.sites, "schedule": row.plan.schedule} if row.plan else {}
            parameters = row.plan.parameters if row.plan else {}
            samples = {name: getattr(row, name) for name in ("seconds", "psnr", "ssim", "psnr_raw", "ssim_raw")}
            return self.summary(row) | {"notes": row.notes, "parameters": parameters, **plan, "samples": samples}

        data = {"dcc_report": VERSION, "facts": self.facts, "prompts": self.prompts, "reference": entry(self.reference)}
        text = json.dumps(_finite(data | {"rows": [entry(row) for row in self.rows]}), indent=1, allow_nan=False)
        write_file(path, text)

    def to_csv(self, path: str | os.PathLike[str]) -> None:
        """Writes one line per plan, the reference first, atomically; the columns are those of `summary`."""
        text = io.StringIO()
        writer = csv.DictWriter(text, list(self.summary(self.reference)))
        writer.writeheader()
        writer.writerows(self.summary(row) for row in (self.reference, *self.rows))
        write_file(path, text.getvalue())

    def save_html(self, path: str | os.PathLike[str]) -> None:
        """Writes one self-contained HTML file, atomically: tables, plots, schedules and samples side by side."""
        from dcc.report.page import page  # matplotlib and jinja2 only for those who want the page

        write_file(path, page(self))

    def __rich__(self) -> Group:
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
        table.add_column("plan", overflow="fold", ratio=1)
        for head in ("full", "FLOPs", "time", "PSNR", "worst", "SSIM"):
            table.add_column(head, justify="right", no_wrap=True)
        for row in self.rows:
            table.add_row(Text(row.name, "red" if row.error else ""), *self._cells(row))
        lines = [
            Text(
                f"{count(len(self.prompts), 'prompt')}, {self.facts.get('backend', '')}; uncached "
                f"{human_seconds(self.reference.latency)} per sample. FLOPs and time: speed-up. PSNR in dB.",
                "dim",
            )
        ]
        for row in (self.reference, *self.rows):
            lines += [Text(f"{row.name}: failed: {row.error}", "red")] if row.error else []
            lines += [Text(f"{row.name}: note: {note}", "yellow") for note in row.notes]
        return Group(table, *lines)

    def __str__(self) -> str:
        return render(self, 80)

    def _cells(self, row: Row) -> list[str]:
        planned = [row.full_steps, f"{row.ideal:.2f}x" if row.ideal else "-"]
        if row.error:
            return [*planned, "failed", "-", "-", "-"]
        similar = f"{statistics.fmean(row.ssim):.3f}" if row.ssim else "-"
        return [*planned, f"{self.speedup(row):.2f}x", _short(mean_psnr(row.psnr)), _short(min(row.psnr)), similar]


def _short(value: float) -> str:
    return "same" if math.isinf(value) else f"{value:.1f}"


def _finite(value: Any) -> Any:
    """The value with infinite and undefined numbers as text that float() reads."""
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value
