"""Hybrid policies, continued: blocks are not forecast but replaced by something cheaper."""

from __future__ import annotations

import math

from dcc.errors import PolicyError
from dcc.plans.predictors import Predictor
from dcc.policies.base import Cached, Policy, Setting, between, changes, every, method, whole


@method(
    "hybrid",
    title="FastCache",
    source="arXiv 2505.20353, repository NoakLiu/FastCache-xDiT",
    checked="C",
    sites="the residual of each block",
    trigger="calibrated: change of the block since the step before",
    predictor="zero",
    needs="weights and profile",
)
def fastcache(
    setting: Setting,
    *,
    weights: str | None = None,
    threshold: float = 0.05,
    interval: int | None = None,
    first: int = 1,
) -> Policy:
    """Replaces a block by a linear map of its input at steps where it changed little since the step before.

    `weights` is a safetensors file of fitted maps, `<block>.weight` [C, C] and `<block>.bias` [C]
    (variants/correctors.py), from what enters the block to what leaves it; the published code fills them at random and
    leaves their fitting open, so without a file this refuses. The published test is the relative change of the block's
    input against the larger of 0.05 and a chi-square bound; here it is the mean relative change of what the block adds,
    off the profile, so that the schedule is static. With `interval` the maps serve all but every `interval`-th step
    instead. The split of still tokens from moving ones is left out.
    """
    between(0.0, math.inf, threshold=threshold)
    whole(first=first)
    setting.numbered()
    if weights is None:
        raise PolicyError(
            "fastcache needs weights=<safetensors file>, the linear map fitted to each block: `<block>.weight` [C, C] "
            "and `<block>.bias` [C]; a map that was not fitted would only add noise"
        )
    form = {"corrector": {"kind": "linear", "weights": weights}}
    blocks = [block.path for block in setting.sites.order if block.path in setting.sites]
    if interval is not None:
        masks = [every(setting, interval, first)] * len(blocks)
    else:
        moved = [changes(setting, block) for block in blocks]
        masks = [tuple(int(s < first or not v < threshold) for s, v in enumerate(change.tolist())) for change in moved]
    pairs = zip(blocks, masks, strict=True)
    return Policy(tuple(Cached(block, mask, Predictor("zero"), form) for block, mask in pairs))
