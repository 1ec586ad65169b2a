"""The picture of a profile: which steps resemble which, how fast each site moves, and which steps matter."""

from __future__ import annotations

import io
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from dcc.files import write_file

NAMED = 6  # curves with a name and a colour of their own
DARK, GREY, ACCENT = "#22303c", "#b8c0c8", "#c2410c"


@dataclass(frozen=True)
class Curves:
    """What is drawn of a run of S steps.

    `similarity` [S, S] holds cosines between steps of the site `default`; `changes` [S], by site, the relative L1
    change since the step before; `sensitivity` [S] is relative to its mean, and was measured at the steps `probed`.
    """

    title: str
    default: str
    similarity: np.ndarray
    changes: Mapping[str, np.ndarray]
    sensitivity: np.ndarray
    probed: Sequence[int]


def plot(profile: Curves, path: str | os.PathLike[str]) -> None:
    """Writes the picture, atomically; its format follows from the suffix of `path`, PNG where it has none."""
    figure = Figure(figsize=(13, 4.6), layout="constrained")
    left, middle, right = figure.subplots(1, 3, width_ratios=(1.05, 1.35, 1))
    _similarity(figure, left, profile)
    _change(middle, profile)
    _sensitivity(right, profile)
    for axes in (left, middle, right):
        axes.set_xlabel("step")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    for axes in (middle, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#e5e7eb", linewidth=0.8)
        axes.set_axisbelow(True)
    figure.suptitle(profile.title, color=DARK, fontsize=11)
    data = io.BytesIO()
    figure.savefig(data, format=Path(path).suffix[1:] or "png", dpi=130)
    write_file(path, data.getvalue())


def _similarity(figure: Figure, axes: Axes, profile: Curves) -> None:
    values = profile.similarity
    low = max(float(np.quantile(values, 0.02)), -1.0)
    image = axes.imshow(values, cmap="viridis", vmin=min(low, 0.999), vmax=1.0, interpolation="nearest")
    axes.set_title(f"cosine between steps: {_short(profile.default)}", fontsize=10)
    axes.set_ylabel("step")
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    figure.colorbar(image, ax=axes, shrink=0.8, extend="min")


def _change(axes: Axes, profile: Curves) -> None:
    steps = np.arange(1, len(profile.sensitivity))
    named = _named(profile)
    others = [name for name in profile.changes if name not in named]
    for index, name in enumerate(others):
        label = f"{len(others)} other sites" if index == 0 else None
        axes.plot(steps, profile.changes[name][1:], color=GREY, linewidth=0.6, alpha=0.6, label=label)
    colors = colormaps["tab10"].colors  # type: ignore[attr-defined]
    for name, color in zip(named, colors, strict=False):
        curve: dict[str, Any] = {"color": color, "linewidth": 2.2 if name == profile.default else 1.4}
        axes.plot(steps, profile.changes[name][1:], label=_short(name), **curve)
    changes = np.concatenate([values[1:] for values in profile.changes.values()])
    if (changes > 0).any():
        axes.set_yscale("log")
        axes.set_ylim(*np.quantile(changes[changes > 0], (0.005, 0.995)) * (0.8, 1.25))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=None))
    axes.set_title("relative L1 change since the step before", fontsize=10)
    axes.legend(frameon=False, fontsize=8, ncols=2)


def _sensitivity(axes: Axes, profile: Curves) -> None:
    axes.plot(range(len(profile.sensitivity)), profile.sensitivity, color=DARK, linewidth=1.4)
    probed = list(profile.probed)
    axes.plot(probed, profile.sensitivity[probed], "o", color=ACCENT, label=f"measured ({len(probed)} steps)")
    axes.set_ylim(bottom=0)
    axes.set_title("sensitivity of the sample to noise in one step", fontsize=10)
    axes.set_ylabel("relative to the mean")
    axes.legend(frameon=False, fontsize=8)


def _named(profile: Curves) -> list[str]:
    """The default site and other whole-model sites, at most NAMED."""
    whole = [name for name in profile.changes if "/" not in name and "." not in name]
    return list(dict.fromkeys([profile.default, *whole]))[:NAMED]


def _short(name: str) -> str:
    return name if len(name) <= 24 else f"{name[:10]}…{name[-13:]}"
