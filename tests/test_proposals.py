"""Anchors from a profile."""

from __future__ import annotations

import itertools
import time
from typing import Any

import numpy as np
import pytest
import torch

from dcc.search.proposals import propose


class Made:
    """Stands in for a profile of one site: its features [S, d] and the sensitivities."""

    def __init__(self, features: torch.Tensor, sensitivity: torch.Tensor | None = None) -> None:
        self.gram = features.double() @ features.double().T
        self.sensitivity = torch.ones(len(features)) if sensitivity is None else sensitivity

    def matrix(self, site: str) -> torch.Tensor:
        return self.gram


def total(features: np.ndarray, mask: tuple[int, ...]) -> float:
    """Squared error of linear extrapolation over all forecast steps."""
    error = 0.0
    for step in range(len(mask)):
        before = [s for s in range(step - 1, -1, -1) if mask[s]][:2]
        if not mask[step]:
            b, a = before[0], before[-1]
            slope = (step - b) / (b - a) if a < b else 0.0
            error += float(np.square(features[step] - features[b] - slope * (features[b] - features[a])).sum())
    return error


@pytest.mark.parametrize("full", [1, 2, 3, 5])
def test_it_is_the_best_of_all_masks(full: int) -> None:
    features = torch.randn(9, 4).cumsum(0).cumsum(0)
    masks = [
        tuple(int(s == 0 or s in chosen) for s in range(9)) for chosen in itertools.combinations(range(1, 9), full - 1)
    ]
    best = min(masks, key=lambda mask: total(features.numpy(), mask))
    found = propose(Made(features), "output", full)
    assert sum(found) == full
    assert total(features.numpy(), found) == pytest.approx(total(features.numpy(), best), rel=1e-6)


def test_anchors_go_where_the_feature_bends_and_it_matters() -> None:
    features = torch.zeros(12, 1)
    features[6:, 0] = torch.tensor([1.0, -1.0, 2.0, -2.0, 1.0, 0.0])
    assert sum(propose(Made(features), "output", 6)[6:]) >= 4
    weights = torch.tensor([1.0] * 6 + [1e-4] * 6)
    features[2:6, 0] = torch.tensor([3.0, -3.0, 3.0, -3.0])
    assert sum(propose(Made(features, weights), "output", 6)[:7]) >= 5


def test_as_many_full_steps_as_steps_is_all() -> None:
    assert propose(Made(torch.randn(4, 2)), "output", 7) == (1, 1, 1, 1)


def test_fifty_steps_take_well_under_ten_seconds() -> None:
    made: Any = Made(torch.randn(50, 8).cumsum(0))
    start = time.perf_counter()
    for site in range(4):
        for full in (7, 12, 25):
            propose(made, str(site), full)
    assert time.perf_counter() - start < 10
