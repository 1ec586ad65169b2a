"""What an evaluation measured: for the terminal, as JSON and CSV for programs, and as one HTML file for people."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import statistics
from dataclasses import dataclass, field
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text
from torch import Tensor

from dcc.files import write_file
from dcc.plans.plan import Plan
from dcc.quality import mean_psnr
from dcc.text import count, human_seconds, render

VERSION = 1


@dataclass
class Row:
    """One plan as measured. Lists have a number a prompt, `seconds` one a timed run.

    `psnr` (dB, infinite where identical) and `ssim` compare final samples with the uncached ones, `psnr_raw` and
    `ssim_raw` the same before the final clamp; SSIM is empty where samples are no images. `computed`, `forecast` and
    `missed` are denoiser calls of all runs, warm-up included; `cache_bytes` is the most held at a time. `error` says
    why a plan was given up: its numbers are those until then. `notes` are what did not go as asked, such as
    fallbacks. `pictures` are (reference, own), each float16 [3, h, w] in [0, 1], by prompt.
    """

    name: str
    plan: Plan | None = None
    seconds: list[float] = field(default_factory=list)
    psnr: list[float] = field(default_factory=list)
    ssim: list[float] = field(default_factory=list)
    psnr_raw: list[float] = field(default_factory=list)
    ssim_raw: list[float] = field(default_factory=list)
    computed: int = 0
    forecast: int = 0
    missed: int = 0
    cache_bytes: int = 0
    notes: list[str] = field(default_factory=list)
    error: str | None = None
    realised: float | None = None  # ratio of denoiser FLOPs of all runs, where a trigger decided them
    pictures: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict, repr=False)

    @property
    def latency(self) -> float:
        """Median seconds a sample; NaN before the first run."""
        return statistics.median(self.seconds) if self.seconds else math.nan

    @property
    def ideal(self) -> float | None:
        """Ratio of denoiser FLOPs, uncached over this: as planned or, under a trigger, as it turned out."""
        return self.realised or (self.plan.speedup if self.plan else None)

    @property
    def full_steps(self) -> str:
        """Full steps of all steps, as planned or, under a trigger, as the share of calls that it turned out to be."""
        if self.plan is None:
            return "-"
        if self.plan.trigger:
            calls = self.computed + self.forecast
            return (
                f"{self.computed / calls * self.plan.steps:.1f}/{self.plan.steps}" if calls else f"?/{self.plan.steps}"
            )
        return f"{sum(self.plan.steps_mask)}/{self.plan.steps}"

    @property
    def worst(self) -> int | None:
        """The prompt of the lowest PSNR, None before the first."""
        return min(range(len(self.psnr)), key=self.psnr.__getitem__, default=None)

    def keep(self, index: int, reference: Tensor, own: Tensor, shown: int) -> None:
        """Keeps the pictures of a prompt that was just scored, if it is among the first `shown` or the worst so far."""
        self.pictures[index] = reference, own
        self.pictures = {i: pair for i, pair in self.pictures.items() if i < shown or i == self.worst}


@dataclass
class Report:
    """The uncached reference and one row a plan, in the order asked for; prints as a table of at most 80 columns.

    `prompts` are as text; `facts` say by name what was run, how and on which machine;
    `shown` is how many of the first prompts have pictures.
    """

    reference: Row
    rows: list[Row]
    prompts: list[str]
    facts: dict[str, str]
    shown: int = 4

    def __getitem__(self, name: str) -> Row:
        """The row of this name. Raises KeyError where there is none."""
        for row in self.rows:
            if row.name == name:
                return row
        raise KeyError(f"{name!r}; there are: {', '.join(row.name for row in self.rows)}")

    def speedup(self, row: Row) -> float:
        """Median seconds a sample, uncached over `row`, on the runs that both made: above 1 where caching is faster."""
        reference = self.reference.seconds[: len(row.seconds)]
        return statistics.median(reference) / row.latency if row.seconds else math.nan

    def summary(self, row: Row) -> dict[str, Any]:
        """A row as numbers by name; None for what was not measured. Seconds, bytes, dB and ratios."""
        plan = row.plan
        return {
            "name": row.name,
            "policy": plan.policy if plan else None,
            "steps": plan.steps if plan else None,
            "full_steps": sum(plan.steps_mask) if plan else None,
            "speedup_flops": row.ideal,
            "speedup_measured": self.speedup(row) if row.seconds else None,
            "latency_seconds": row.latency if row.seconds else None,
            **_mean_and_worst("psnr", row.psnr),
            **_mean_and_worst("ssim", row.ssim),
            **_mean_and_worst("psnr_raw", row.psnr_raw),
            **_mean_and_worst("ssim_raw", row.ssim_raw),
            "worst_prompt": row.worst,
            "cache_bytes": row.cache_bytes,
            "computed": row.computed,
            "forecast": row.forecast,
            "missed": row.missed,
            "error": row.error,
            "notes": "; ".join(row.notes) or None,
        }

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
        """Writes a line a plan, the reference first, atomically; the columns are those of `summary`."""
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
                f"{human_seconds(self.reference.latency)} a sample. FLOPs and time: speed-up. PSNR in dB.",
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


def _mean_and_worst(name: str, values: list[float]) -> dict[str, float | None]:
    mean = mean_psnr if name.startswith("psnr") else statistics.fmean
    return {f"{name}_mean": mean(values) if values else None, f"{name}_worst": min(values, default=None)}


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
