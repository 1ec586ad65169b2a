"""The plot of fidelity against speed-up, with labels that keep clear of each other."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox

SIZE = (11, 4.4)  # inches
INK, FAINT = "#1f2937", "#9ca3af"
LONGEST = 34  # characters of a label
# Where a label may stand around its point: (dx, dy) in points, the alignment follows from the signs.
PLACES = [
    (r * dx, r * dy)
    for r in (7, 13, 22, 34)
    for dx, dy in ((1, 0.6), (-1, 0.6), (1, -0.6), (-1, -0.6), (0, 1), (0, -1))
]


@dataclass(frozen=True)
class Point:
    """A plan in the plot: speed-up, PSNR in dB (mean and worst; infinite where identical) and its colour."""

    name: str
    speedup: float
    mean: float
    worst: float
    colour: str


def scatter(panels: dict[str, Sequence[Point]]) -> str:
    """An SVG with one panel per kind of speed-up, in which the points that no other beats both ways are joined."""
    with rc_context({"font.size": 9, "svg.hashsalt": "dcc", "axes.edgecolor": FAINT, "font.family": "DejaVu Sans"}):
        figure = Figure(figsize=SIZE, layout="constrained")
        canvas = FigureCanvasAgg(figure)
        axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
        heights = [v for points in panels.values() for p in points for v in (p.mean, p.worst) if math.isfinite(v)]
        low, high = min(heights, default=0.0), max(heights, default=1.0)
        margin = 0.12 * (high - low) or 1.0
        identical = any(math.isinf(p.mean) for points in panels.values() for p in points)
        top = high + 2 * margin * identical  # where identical samples stand
        for panel, (title, points) in zip(axes, panels.items(), strict=True):
            panel.set_ylim(low - margin, top + margin)
            _draw(panel, title, points, top)
        axes[0].set_ylabel("PSNR of the final sample, dB", color=INK)
        canvas.draw()  # settles the layout, which labels need
        for panel, points in zip(axes, panels.values(), strict=True):
            _label(panel, canvas, points, top)
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None})
    return text.getvalue()


def _draw(panel: Axes, title: str, points: Sequence[Point], top: float) -> None:
    front = [p for p in points if not any(_beats(q, p) for q in points)]
    front.sort(key=lambda p: p.speedup)
    panel.plot([p.speedup for p in front], [min(p.mean, top) for p in front], color=FAINT, lw=1, ls="--", zorder=1)
    for p in points:
        mean, worst = min(p.mean, top), min(p.worst, top)
        panel.plot([p.speedup, p.speedup], [worst, mean], color=p.colour, lw=1.2, alpha=0.5, zorder=2)
        panel.plot(p.speedup, worst, "_", color=p.colour, ms=7, alpha=0.6, zorder=2)
        panel.plot(p.speedup, mean, "^" if math.isinf(p.mean) else "o", color=p.colour, ms=7, zorder=3)
    speedups = [1.0, *(p.speedup for p in points)]
    margin = 0.1 * (max(speedups) - min(speedups)) or 0.1
    panel.set_xlim(min(speedups) - margin, max(speedups) + 2 * margin)
    panel.set_xlabel(f"{title}, times", color=INK)
    panel.axvline(1, color=FAINT, lw=0.8, ls=":", zorder=0)
    panel.grid(color="#e5e7eb", lw=0.6)
    panel.set_axisbelow(True)
    panel.spines[["top", "right"]].set_visible(False)
    panel.tick_params(colors="#4b5563")


def _beats(a: Point, b: Point) -> bool:
    """Whether `a` is in nothing worse than `b`, and in something better."""
    return a.speedup >= b.speedup and a.mean >= b.mean and (a.speedup, a.mean) != (b.speedup, b.mean)


def _label(panel: Axes, canvas: FigureCanvasAgg, points: Sequence[Point], top: float) -> None:
    """Names every point at the first place that hits no point, no other label and no border; else at the best one."""
    renderer = canvas.get_renderer()
    taken = []
    for p in points:
        (x, y), (_, bottom) = (panel.transData.transform((p.speedup, min(v, top))) for v in (p.mean, p.worst))
        taken += [Bbox.from_extents(x - 6, y - 6, x + 6, y + 6), Bbox.from_extents(x - 1, bottom, x + 1, y)]
    for p in sorted(points, key=lambda p: p.speedup):
        name = p.name if len(p.name) <= LONGEST else f"{p.name[: LONGEST - 1]}…"
        name += " (identical)" if math.isinf(p.mean) else ""
        label = panel.annotate(
            name,
            (p.speedup, min(p.mean, top)),
            (0, 0),
            textcoords="offset points",
            color=p.colour,
            parse_math=False,
            bbox={"facecolor": "white", "alpha": 0.75, "linewidth": 0, "pad": 0.8},
            arrowprops={"arrowstyle": "-", "color": p.colour, "lw": 0.5, "alpha": 0.5, "shrinkB": 4},
        )
        best: tuple[int, tuple[float, float], str, str, Bbox] | None = None
        for dx, dy in PLACES:
            horizontal, vertical = "left" if dx > 0 else "right" if dx < 0 else "center", "bottom" if dy > 0 else "top"
            label.set(position=(dx, dy), horizontalalignment=horizontal, verticalalignment=vertical)
            box = Bbox.from_bounds(*label.get_window_extent(renderer).bounds)
            hits = sum(box.overlaps(other) for other in taken) + 2 * (not _inside(box, panel.bbox))
            if best is None or hits < best[0]:
                best = (hits, (dx, dy), horizontal, vertical, box)
            if not hits:
                break
        assert best is not None  # there are places
        _, place, horizontal, vertical, box = best
        label.set(position=place, horizontalalignment=horizontal, verticalalignment=vertical)
        taken.append(box)


def _inside(box: Bbox, border: Bbox) -> bool:
    return box.x0 >= border.x0 and box.x1 <= border.x1 and box.y0 >= border.y0 and box.y1 <= border.y1
