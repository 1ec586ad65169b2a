"""Channels of a site that move alike from step to step, and which solver forecasts each cluster of them best.

HyCa (arXiv 2510.04188): features of one prompt are described channel by channel and clustered once, and every cluster
gets the solver of least error. Values are [steps, points, channels] in float32, points being samples and tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dcc.kernels.combine import channel_dim
from dcc.plans.predictors import Predictor

ROUNDS = 100  # the most rounds of K-means


def by_points(values: Tensor) -> Tensor:
    """Values [steps, batch, ...] of a site as [steps, points, channels]."""
    return values.float().movedim(channel_dim(values.dim() - 1) + 1, -1).flatten(1, -2)


def descriptors(values: Tensor) -> Tensor:
    """What tells channels apart, [channels, 6], each column of zero mean and unit variance.

    Logarithms of mean squares over steps and points: of the value, its first, second and third difference along the
    steps, the second relative to the first (curvature), and the flatness of the spectrum along the steps (geometric
    over arithmetic mean of its power without the constant).
    """
    tiny = torch.finfo(torch.float32).tiny
    sizes = [torch.diff(values, n=order, dim=0).square().mean((0, 1)).clamp_min(tiny).log() for order in range(4)]
    power = torch.fft.rfft(values, dim=0)[1:].abs().square().mean(1).clamp_min(tiny)
    flatness = power.log().mean(0) - power.mean(0).log()
    columns = torch.stack([*sizes, sizes[2] - sizes[1], flatness], dim=1)
    spread = columns.std(0, correction=0)
    return (columns - columns.mean(0)) / torch.where(spread > 0, spread, 1.0)


def k_means(points: Tensor, clusters: int) -> Tensor:
    """Labels [n] of points [n, d], 0 to at most clusters - 1, each taken at least once; the same at every call.

    Centres start far from each other: the point nearest the mean, then always the one farthest from those chosen.
    """
    centres = points[torch.cdist(points, points.mean(0, keepdim=True))[:, 0].argmin()][None]
    while len(centres) < min(clusters, len(points)):
        centres = torch.cat([centres, points[torch.cdist(points, centres).min(1).values.argmax()][None]])
    labels = torch.zeros(len(points), dtype=torch.int64)
    for _ in range(ROUNDS):
        before, labels = labels, torch.cdist(points, centres).argmin(1)
        kept = labels.unique()
        centres = torch.stack([points[labels == label].mean(0) for label in kept])
        labels = torch.searchsorted(kept, labels)
        if torch.equal(before, labels):
            break
    return labels


def errors(values: Tensor, solvers: Sequence[Predictor], mask: Sequence[int]) -> Tensor:
    """Mean squared error [solvers, channels] of the forecasts that a mask makes, from true anchors."""
    total = torch.zeros(len(solvers), values.shape[-1])
    for step, computed in enumerate(mask):
        anchors = [s for s in range(step - 1, -1, -1) if mask[s]]
        for row, solver in enumerate(solvers) if not computed else ():
            weights = solver.coefficients(step, anchors)
            forecast = sum(w * values[s] for w, s in zip(weights, anchors, strict=False))
            total[row] += (forecast - values[step]).square().mean(0)
    return total / max(len(mask) - sum(map(bool, mask)), 1)


def next_step_errors(values: Tensor, solvers: Sequence[Predictor]) -> Tensor:
    """Mean squared error [solvers, channels] of the forecast of every step from the steps right before it."""
    first, total = max(solver.anchors for solver in solvers), torch.zeros(len(solvers), values.shape[-1])
    for step in range(first, len(values)):
        mask = [1] * step + [0]
        total += errors(values[: step + 1], solvers, mask)
    return total / max(len(values) - first, 1)


def choose(labels: Tensor, error: Tensor) -> tuple[list[int], list[int]]:
    """For every channel the index of its cluster's best solver among the chosen ones; and the chosen ones' indices."""
    best = torch.stack([error[:, labels == label].mean(1).argmin() for label in range(int(labels.max()) + 1)])
    chosen = best.unique()
    return torch.searchsorted(chosen, best[labels]).tolist(), chosen.tolist()
