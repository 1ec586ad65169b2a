"""Anchors that a profile suggests, by dynamic programming over one-step errors.

Such errors alone rank plans badly, because they move the trajectory; what comes out is one more mask to start from.
"""

from __future__ import annotations

import numpy as np

from dcc.measure.profile import Profile


def propose(profile: Profile, site: str, full: int) -> tuple[int, ...]:
    """The step mask with `full` ones, step 0 among them, of least weighted squared error of linear extrapolation.

    Errors come from the profile's Gram matrix, weights from its sensitivities. Takes about S^2 x `full` vector
    operations for S steps.
    """
    gram = profile.matrix(site).numpy()
    weights = np.square(profile.sensitivity.double().numpy())
    steps = len(gram)
    if full >= steps:
        return (1,) * steps
    # gaps[a, b, n]: error of steps b+1 .. n-1 forecast from anchors a < b; a = b stands for a copy of b alone
    gaps = np.full((steps, steps, steps + 1), np.inf)
    for b in range(steps):
        s = np.arange(b + 1, steps)
        for a in range(b + 1):
            slope = (s - b) / (b - a) if a < b else np.zeros(len(s))
            new, old = 1 + slope, -slope
            squared = gram[s, s] - 2 * (new * gram[s, b] + old * gram[s, a])
            squared += new**2 * gram[b, b] + 2 * new * old * gram[a, b] + old**2 * gram[a, a]
            gaps[a, b, b + 1 :] = np.concatenate([[0.0], np.cumsum(weights[s] * np.maximum(squared, 0.0))])
    cost = np.full((steps, steps), np.inf)  # by the last two anchors
    cost[0, 0] = 0.0
    parents = []
    for _ in range(full - 1):
        through = cost[:, :, None] + gaps[:, :, :steps]
        parents.append(through.argmin(0))
        cost = through.min(0)  # [b, n]: the last two anchors are b and n
        cost[np.tril_indices(steps)] = np.inf
    b, n = np.unravel_index(int((cost + gaps[:, :, steps]).argmin()), cost.shape)
    anchors = [int(n)]
    for parent in reversed(parents):
        anchors.append(int(b))
        b, n = parent[b, n], b
    return tuple(int(step in anchors) for step in range(steps))
