"""Hybrid policies: tokens, bands, guidance or verification decide besides the schedule."""

from __future__ import annotations

import math

from dcc.policies.base import Cached, Policy, Setting, between, method, whole
from dcc.predictors import Predictor
from dcc.triggers import Coarsest, Verify


@method(
    "hybrid",
    title="SpeCa",
    source="arXiv 2509.11628",
    checked="C",
    sites="blocks before the last",
    trigger="verified forecast of the last block",
    predictor="taylor",
    syncs="1",
)
def speca(
    setting: Setting,
    *,
    base: float = 0.3,
    decay: float = 0.05,
    floor: float = 0.01,
    order: int = 2,
    min_skip: int = 2,
    max_skip: int = 8,
    first: int = 3,
) -> Policy:
    """Forecasts all blocks but the last, computes that one on the draft, and judges the forecast it would have had.

    arXiv 2509.11628, repository Shenyi-Z/Cache4Diffusion: an error above max(base decay^progress, floor) makes the
    next step compute; no step is repeated. The published error is elementwise, which entries near zero dominate; here
    it is the ratio of means, so thresholds are of another scale than the published 7. The block range is one site,
    not a site a branch.
    """
    between(0, math.inf, base=base, floor=floor)
    between(0, 1, decay=decay)
    whole(first=first, max_skip=max_skip)
    whole(0, min_skip=min_skip)
    blocks = setting.numbered(2)
    trigger = Verify(f"blocks[{blocks - 1}:{blocks}]", float(base), float(decay), float(floor), min_skip, max_skip)
    mask = tuple(int(s < first) for s in range(setting.steps))
    return Policy((Cached(f"blocks[0:{blocks - 1}]", mask, Predictor("taylor", order)),), trigger)


@method(
    "hybrid",
    title="MixCache",
    source="arXiv 2508.12691",
    checked="D",
    sites="stack, or the deeper half of the blocks",
    trigger="change of each site at computed steps",
    predictor="copy",
    syncs="at computed steps only",
)
def mixcache(
    setting: Setting, *, threshold: float = 0.1, block_threshold: float = 0.1, interval: int = 2, first: int = 3
) -> Policy:
    """At every computed step picks what to cache next: the whole stack, the deeper half of the blocks, or nothing.

    arXiv 2508.12691 mixes step, guidance and block caches by their impact and leaves the weighing open; here the
    coarsest whose relative change per step is below its threshold is taken. Its guidance level is left out.
    """
    between(0, math.inf, threshold=threshold, block_threshold=block_threshold)
    whole(2, interval=interval)
    whole(2, first=first)
    blocks = setting.numbered(2)
    sites = ("stack", f"blocks[{blocks // 2}:{blocks}]")
    mask = tuple(int(s < first) for s in range(setting.steps))
    trigger = Coarsest(sites, (float(threshold), float(block_threshold)), interval)
    return Policy(tuple(Cached(site, mask) for site in sites), trigger)
