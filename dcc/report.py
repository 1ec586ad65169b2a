"""Evidence for people: a picture of images side by side, and tables of what a plan and a comparison say."""

from __future__ import annotations

import math
import os
import statistics
import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.table import Table
from rich.text import Text
from torch import Tensor

from dcc.evaluate import Comparison
from dcc.plan import Plan
from dcc.text import human_bytes

# The picture's geometry, in pixels. Panels are whole multiples of the image, so that each pixel stays a square.
PANEL = 256  # small images are enlarged to about this side
LARGEST = 512  # large ones are shrunk to this side
COLUMNS = 8  # prompts in one band of three rows; more prompts make more bands
GAP = 12
LABEL = 48  # left of the rows
DPI = 144
FONT = 9.5  # points
LINE = round(1.35 * FONT * DPI / 72)
CHARACTER = 0.6 * FONT * DPI / 72  # width of a character: captions are lower-case text, narrower than this on average

Pixels = tuple[int, int, int, int]  # left, top, width, height


def save_grid(
    path: str | os.PathLike[str],
    prompts: Sequence[str],
    reference: Tensor,
    cached: Tensor,
    title: str = "",
    notes: Sequence[str] = (),
    amplify: int | None = None,
) -> None:
    """Writes a PNG, atomically: a column a prompt; rows uncached, cached and their difference times `amplify`.

    `reference` and `cached` are [n, 3, h, w] in [0, 1]; `notes` are one line each, below the columns. Without
    `amplify` the factor is the largest power of two that keeps nearly all differences within white; the row says it.
    """
    if not prompts or reference.shape != cached.shape or len(reference) != len(prompts):
        raise ValueError(
            f"{len(prompts)} prompts need as many images, [n, 3, h, w]; "
            f"got reference {list(reference.shape)}, cached {list(cached.shape)}"
        )
    before, after = (images.detach().float().cpu().clamp(0, 1) for images in (reference, cached))
    difference = (after - before).abs()
    factor = amplify or _amplification(difference)
    rows = {"uncached": before, "cached": after, f"difference x{factor}": (difference * factor).clamp(0, 1)}
    _write(path, _draw(prompts, rows, title, notes))


def demo_table(comparison: Comparison, plan: Plan, title: str | None = None) -> Table:
    """Latency, fidelity and cost of a plan, compiled uncached against compiled cached; 54 columns wide."""
    share = comparison.ratio / plan.speedup
    table = Table(title=title, title_justify="left")
    table.add_column("", no_wrap=True)
    table.add_column("uncached", justify="right", no_wrap=True)
    table.add_column("cached", justify="right", no_wrap=True)
    latencies = [human_seconds(timing.median) for timing in (comparison.reference, comparison.cached)]
    table.add_row("latency per image (median)", *latencies)
    table.add_row("full steps", f"{plan.steps} of {plan.steps}", f"{sum(plan.steps_mask)} of {plan.steps}")
    table.add_row("cache", "none", human_bytes(plan.cache_bytes), end_section=True)
    table.add_row("[bold]speed-up[/]", "", f"[bold]{comparison.ratio:.2f}x[/]")
    table.add_row("ideal speed-up (denoiser FLOPs)", "", f"{plan.speedup:.2f}x")
    table.add_row("share of the ideal", "", f"{share:.0%}", end_section=True)
    table.add_row("PSNR, mean", "", f"[bold]{decibels(statistics.fmean(comparison.psnr))}[/]")
    table.add_row("PSNR, worst image", "", decibels(min(comparison.psnr)))
    table.add_row("SSIM, mean", "", f"{statistics.fmean(comparison.ssim):.4f}")
    return table


def plan_table(plan: Plan) -> Table:
    """What a plan decides and expects, as names and values that wrap at any width."""
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(no_wrap=True, style="dim")
    table.add_column(overflow="fold")
    parameters = ", ".join(f"{name}={value}" for name, value in plan.parameters.items())
    table.add_row("policy", Text(f"{plan.policy}({parameters})"))
    table.add_row("model", Text(plan.model))
    table.add_row("scheduler", Text(f"{plan.scheduler}, levels {plan.levels[0]:.4g} to {plan.levels[-1]:.4g}"))
    table.add_row("full steps", f"{sum(plan.steps_mask)} of {plan.steps}, {len(plan.rows)} variants")
    for k, site in enumerate(plan.sites):
        table.add_row("site", Text(f"{site}, up to {plan.anchors} anchors"))
        # full steps stand out by weight and, without colours, as 1 against 0
        mask = Text()
        for row in plan.schedule:
            mask.append(str(row[k]), "bold green" if row[k] else "dim")
        table.add_row("  steps", mask)
    table.add_row("expected", f"{plan.speedup:.2f}x fewer denoiser FLOPs")
    table.add_row("", f"{plan.flops_uncached / 1e9:.2f} to {plan.flops / 1e9:.2f} GFLOP a run and stream")
    table.add_row("cache", f"{human_bytes(plan.cache_bytes)} a stream")
    return table


def steps_table(plan: Plan) -> Table:
    """Each step of a plan: its noise level, what it does with each site, and the weights of the anchors it reads."""
    table = Table(box=None, pad_edge=False)
    table.add_column("step", justify="right")
    table.add_column("level", justify="right")
    for site in plan.sites:
        table.add_column(Text(site))
    for step, level in enumerate(plan.levels):
        cells = []
        for k in range(len(plan.sites)):
            weights = plan.coefficients[step][k]
            terms = [f"{w:+.3g} of {s}" for w, s in zip(weights, plan.anchor_steps(step, k), strict=False)]
            cells.append(Text(", ".join(terms), "dim") if weights else Text("computed", "green"))
        table.add_row(str(step), f"{level:.4g}", *cells)
    return table


def human_seconds(seconds: float) -> str:
    """0.0421 -> "42 ms", 2.5 -> "2.50 s"."""
    return f"{seconds * 1e3:.0f} ms" if seconds < 0.9995 else f"{seconds:.2f} s"


def decibels(value: float) -> str:
    """31.24 -> "31.2 dB"; infinite -> "identical"."""
    return "identical" if math.isinf(value) else f"{value:.1f} dB"


def _amplification(difference: Tensor) -> int:
    """1, 2, 4 ... 64: the largest that takes at most one value in 200 beyond 1."""
    high = float(np.quantile(difference.numpy(), 0.995))
    return max((factor for factor in (1, 2, 4, 8, 16, 32, 64) if factor * high <= 1), default=1)


def _draw(prompts: Sequence[str], rows: dict[str, Tensor], title: str, notes: Sequence[str]) -> Figure:
    """The figure of all panels at exact pixel positions, in bands of at most COLUMNS prompts."""
    width, height = _panel_size(*next(iter(rows.values())).shape[-2:])
    bands = [range(i, min(i + COLUMNS, len(prompts))) for i in range(0, len(prompts), COLUMNS)]
    captions = [textwrap.wrap(prompt, max(int(width / CHARACTER), 8)) for prompt in prompts]
    heads = [max(len(captions[i]) for i in band) * LINE + GAP for band in bands]
    titles = textwrap.wrap(title, int(LABEL + len(bands[0]) * (width + GAP) / CHARACTER)) if title else []
    top = GAP + (len(titles) * LINE + GAP if titles else 0)
    below = (LINE if notes else 0) + GAP
    total_height = top + sum(head + len(rows) * (height + GAP) + below for head in heads)
    total_width = LABEL + len(bands[0]) * (width + GAP)
    figure = Figure(figsize=(total_width / DPI, total_height / DPI), dpi=DPI, facecolor="white")
    FigureCanvasAgg(figure)
    canvas = _Canvas(figure, total_width, total_height)
    canvas.text("\n".join(titles), GAP, GAP, weight="bold", va="top")
    for band, head in zip(bands, heads, strict=True):
        for row, (label, images) in enumerate(rows.items()):
            y = top + head + row * (height + GAP)
            canvas.text(label, LABEL / 2, y + height / 2, rotation=90, ha="center", va="center")
            for column, i in enumerate(band):
                canvas.image(images[i], (LABEL + column * (width + GAP), y, width, height))
        for column, i in enumerate(band):
            x = LABEL + column * (width + GAP)
            canvas.text("\n".join(captions[i]), x, top + head - GAP / 2, va="bottom")
            if i < len(notes):
                canvas.text(notes[i], x, top + head + len(rows) * (height + GAP), va="top", color="dimgrey")
        top += head + len(rows) * (height + GAP) + below
    return figure


class _Canvas:
    """A figure addressed in pixels from its top left corner."""

    def __init__(self, figure: Figure, width: int, height: int) -> None:
        self.figure, self.width, self.height = figure, width, height

    def text(self, text: str, x: float, y: float, **style: object) -> None:
        style = {"size": FONT, "linespacing": 1.15, "parse_math": False} | style
        self.figure.text(x / self.width, 1 - y / self.height, text, **style)

    def image(self, image: Tensor, at: Pixels) -> None:
        """`image` [3, h, w] in [0, 1] at these pixels, enlarged without smoothing."""
        left, top, width, height = at
        bottom = self.height - top - height
        axes = self.figure.add_axes(
            (left / self.width, bottom / self.height, width / self.width, height / self.height), frameon=False
        )
        interpolation = "antialiased" if width < image.shape[-1] else "nearest"
        axes.imshow(image.permute(1, 2, 0).numpy(), interpolation=interpolation, aspect="auto")
        axes.set_axis_off()


def _panel_size(height: int, width: int) -> tuple[int, int]:
    """Width and height in pixels at which an image of this height and width is shown."""
    longer = max(height, width)
    scale = max(PANEL // longer, 1) if longer <= LARGEST else LARGEST / longer
    return max(round(width * scale), 1), max(round(height * scale), 1)


def _write(path: str | os.PathLike[str], figure: Figure) -> None:
    """The figure as PNG: `path` holds the old file or the whole new one."""
    target = Path(path)
    part = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        figure.savefig(part, format="png", dpi=DPI)
        os.replace(part, target)
    finally:
        part.unlink(missing_ok=True)
