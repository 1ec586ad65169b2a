"""Predictive policies: a schedule, and forecasts from several anchors instead of a copy of the newest."""

from __future__ import annotations

from collections.abc import Sequence

from dcc.policies.base import DEFAULT_SITE, Cached, Policy, Setting, every, given_mask, method
from dcc.predictors import Predictor


@method(
    "predictive",
    title="TaylorSeer",
    source="arXiv 2503.06923",
    checked="C",
    sites="any; branches in the paper, one site is its Lite form",
    trigger="every N-th step",
    predictor="taylor",
)
def taylorseer(
    setting: Setting,
    *,
    interval: int = 5,
    order: int = 1,
    first: int = 3,
    site: str = DEFAULT_SITE,
    steps_mask: Sequence[int] | None = None,
) -> Policy:
    """Computes the `first` steps and then every `interval`-th, forecasts with the published Taylor form of `order`.

    arXiv 2503.06923; defaults of diffusers' TaylorSeer hook. On one site for the whole stack this is TaylorSeer-Lite;
    site="branches" is the paper's per-branch placement.
    """
    mask = every(setting, interval, first) if steps_mask is None else given_mask(setting, steps_mask)
    return Policy((Cached(site, mask, Predictor("taylor", order)),))
