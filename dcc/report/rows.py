"""What an evaluation measured, as data: one row per plan, and how rows compare with the uncached reference."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from dcc.plans.plan import Plan
from dcc.quality import mean_psnr


@dataclass
class Row:
    """One plan as measured. Lists have one number per prompt, `seconds` one per timed run.

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
        """Median seconds per sample; NaN before the first run."""
        return statistics.median(self.seconds) if self.seconds else math.nan

    @property
    def ideal(self) -> float | None:
        """Ratio of denoiser FLOPs, uncached over this: as planned or, under a trigger, as it turned out."""
        return self.realised or (self.plan.speedup if self.plan else None)

    @property
    def full_steps(self) -> str:
        """Full steps out of all steps, as planned or, under a trigger, from the share of calls that computed."""
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
        """The prompt of the lowest PSNR, None before the first is scored."""
        return min(range(len(self.psnr)), key=self.psnr.__getitem__, default=None)

    def keep(self, index: int, reference: Tensor, own: Tensor, shown: int) -> None:
        """Keeps the pictures of a prompt that was just scored, if it is among the first `shown` or the worst so far."""
        self.pictures[index] = reference, own
        self.pictures = {i: pair for i, pair in self.pictures.items() if i < shown or i == self.worst}


@dataclass
class Comparison:
    """The uncached reference and one row per plan, in the order asked for.

    `prompts` are as text; `facts` say by name what was run, how and on which machine; `shown` is how many of the first
    prompts have pictures.
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
        """Median seconds per sample, uncached over `row`, on runs that both made: above 1 where caching is faster."""
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


def _mean_and_worst(name: str, values: list[float]) -> dict[str, float | None]:
    mean = mean_psnr if name.startswith("psnr") else statistics.fmean
    return {f"{name}_mean": mean(values) if values else None, f"{name}_worst": min(values, default=None)}
