"""Draws the survey's evolution: every method of each class, the best of each class, and searched plans.

python benchmarks/evolution.py

Reads benchmarks/results/survey_<pipeline>.json and writes survey.png beside them.
"""

from __future__ import annotations

import json
from typing import Any

import matplotlib
import measure

from dcc.policies import POLICIES

CLASSES = {
    "static": "#8c8c8c",
    "timestep_adaptive": "#c47f17",
    "layer_adaptive": "#2a8f5b",
    "predictive": "#2f6db5",
    "hybrid": "#8e44ad",
}
LOWEST, HIGHEST = 1.05, 10.0  # speed-ups that are drawn


def method_of(row: dict[str, Any]) -> str:
    """The name of a row's method, without its settings."""
    return POLICIES[row["parameters"]["policy"]].title


def front(points: list[tuple[float, float, str]]) -> list[tuple[float, float, str]]:
    """The points that no other of the class beats in both speed-up and PSNR, by speed-up."""
    return [p for p in sorted(points) if not any(q[0] >= p[0] and q[1] > p[1] for q in points)]


def main() -> None:
    """Draws one panel per pipeline."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, figsize=(15, 7))
    for axes, name in zip(panels, ("mmdit", "unet"), strict=True):
        data = json.loads((measure.RESULTS / f"survey_{name}.json").read_text())
        rows = [row for row in data["rows"] if LOWEST < row.get("speedup", 0.0) < HIGHEST]
        for kind, colour in CLASSES.items():
            ran = [row for row in rows if row["family"] == f"survey: {kind}"]
            points = [(row["speedup"], row["psnr"], method_of(row)) for row in ran]
            axes.scatter([x for x, _, _ in points], [y for _, y, _ in points], s=18, color=colour, alpha=0.35)
            best = front(points)
            label = f"{kind.replace('_', '-')}, best of {len({title for _, _, title in points})}"
            axes.plot([x for x, _, _ in best], [y for _, y, _ in best], "o-", ms=4, color=colour, label=label)
            for x, y, title in best[:: max(1, len(best) // 3)]:
                axes.annotate(title, (x, y), xytext=(3, 4), textcoords="offset points", fontsize=7, color=colour)
        ours = sorted((row["speedup"], row["psnr"]) for row in rows if row["family"] == "dcc solver")
        axes.plot([x for x, _ in ours], [y for _, y in ours], "D-", lw=3, color="black", label="searched plan")
        axes.set(xscale="log", xlabel="denoiser FLOPs, uncached over cached", title=name)
        axes.set_xticks([1.5, 2, 3, 4, 5, 7], ["1.5x", "2x", "3x", "4x", "5x", "7x"])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8, loc="upper right")
    panels[0].set_ylabel("PSNR to the uncached image, dB")
    path = measure.RESULTS / "survey.png"
    measure.draw(path, figure, dpi=110)


if __name__ == "__main__":
    main()
