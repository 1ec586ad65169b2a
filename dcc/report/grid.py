"""A picture of images side by side: uncached, cached, and their difference."""

from __future__ import annotations

import io
import os
import textwrap
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from dcc.files import write_file

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
    """Writes a PNG, atomically: one column per prompt; rows uncached, cached and their difference times `amplify`.

    `reference` and `cached` are [n, 3, h, w] in [0, 1]; `notes` are one line each, below the columns. Without
    `amplify` the factor is the largest power of two that keeps nearly all differences within white; the label says it.
    """
    if not prompts or reference.shape != cached.shape or len(reference) != len(prompts):
        raise ValueError(
            f"{len(prompts)} prompts need as many images, [n, 3, h, w]; "
            f"got reference {list(reference.shape)}, cached {list(cached.shape)}"
        )
    before, after = (images.detach().float().cpu().clamp(0, 1) for images in (reference, cached))
    difference = (after - before).abs()
    factor = amplify or amplification(difference)
    rows = {"uncached": before, "cached": after, f"difference x{factor}": (difference * factor).clamp(0, 1)}
    data = io.BytesIO()
    _draw(prompts, rows, title, notes).savefig(data, format="png", dpi=DPI)
    write_file(path, data.getvalue())


def amplification(difference: Tensor) -> int:
    """The factor at which a difference, values in [0, 1], shows: 1, 2, 4 ... 64, the largest that takes at most one
    value in 200 beyond 1."""
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

    def text(self, text: str, x: float, y: float, **style: Any) -> None:
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
