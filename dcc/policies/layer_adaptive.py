"""Layer-adaptive policies: each block or branch is computed or forecast by its own rule."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from dcc.errors import PolicyError
from dcc.policies.base import Cached, Policy, Setting, between, given_mask, method, whole
from dcc.predictors import Predictor
from dcc.triggers import Anchored, Codebook, Layerwise


@method(
    "layer_adaptive",
    title="DBCache",
    source="repository vipshop/cache-dit",
    checked="C",
    sites="blocks between the first and last ones",
    trigger="change of the first blocks' residual since the last computed step",
    predictor="copy, or taylor",
    syncs="1",
)
def dbcache(
    setting: Setting,
    *,
    threshold: float = 0.08,
    front: int = 8,
    back: int = 0,
    warmup: int = 8,
    max_cached: int | None = None,
    max_continuous: int | None = None,
    order: int = 0,
    steps_mask: Sequence[int] | None = None,
) -> Policy:
    """Computes the first `front` and last `back` blocks; forecasts those between while the first ones hold still.

    Repository vipshop/cache-dit (F8B0, threshold 0.08, 8 warm-up steps by default). `order` above 0 forecasts with
    Taylor's form instead of a copy. `steps_mask` replaces the trigger by a schedule (its static policy). A denoiser of
    few blocks needs a smaller `front`.
    """
    between(0, math.inf, threshold=threshold)
    whole(front=front, warmup=warmup)
    whole(0, back=back, order=order)
    blocks = setting.numbered(front + back + 1)
    site = f"blocks[{front}:{blocks - back}]"
    predictor = Predictor("taylor", order) if order else Predictor("copy")
    if steps_mask is not None:
        return Policy((Cached(site, given_mask(setting, steps_mask), predictor),))
    mask = tuple(int(s < warmup) for s in range(setting.steps))
    trigger = Anchored(f"blocks[0:{front}]", float(threshold), max_continuous, max_cached)
    return Policy((Cached(site, mask, predictor),), trigger)


@method(
    "layer_adaptive",
    title="AdaCache",
    source="arXiv 2411.02397",
    checked="C",
    sites="branches",
    trigger="gap looked up from the change of a middle block's attention",
    predictor="copy",
    syncs="at computed steps only",
)
def adacache(
    setting: Setting, *, codebook: Mapping[float, int] | None = None, site: str = "branches", metric: str | None = None
) -> Policy:
    """At a computed step, the change of one attention branch since the last one decides how many steps are copied.

    arXiv 2411.02397, repository AdaCache-DiT/AdaCache: relative L1 over the steps between, looked up in `codebook`
    (bound to gap; default the fast one for 30 steps); the first and the last two steps compute. The metric is taken
    before its gate, as the cached branches are; motion regularisation, for videos, is left out. `metric` is the
    branch of the middle block unless named.
    """
    book = codebook or {0.08: 6, 0.16: 5, 0.24: 4, 0.32: 3, 0.40: 2}
    for bound, gap in book.items():
        between(0, math.inf, bound=bound)
        whole(gap=gap)
    setting.sites.select(site)
    if metric is None:
        branches = setting.sites.select("attn")
        metric = branches[len(branches) // 2].name
    bounds = sorted(book)
    mask = tuple(int(s == 0 or s >= setting.steps - 2) for s in range(setting.steps))
    trigger = Codebook((metric,), tuple(map(float, bounds)), tuple(book[bound] for bound in bounds))
    return Policy((Cached(site, mask),), trigger)


@method(
    "layer_adaptive",
    title="BWCache",
    source="arXiv 2509.13789",
    checked="D",
    sites="stack",
    trigger="mean change of all blocks' outputs",
    predictor="copy",
    syncs="at computed steps only",
)
def bwcache(setting: Setting, *, threshold: float = 0.15, reuse: float = 0.1) -> Policy:
    """While the blocks' outputs change little from one computed step to the next, copies for `reuse` of the steps.

    arXiv 2509.13789: mean relative L1 over all blocks below `threshold`; after the first reuse, the last half of the
    steps that were left then compute. All blocks are reused together, so one residual of the whole stack is kept
    instead of every block's output: the same numbers in less memory, but relative to the present input.
    """
    between(0, math.inf, threshold=threshold)
    between(0, 1, reuse=reuse)
    blocks = setting.numbered()
    gap = 1 + max(1, round(reuse * setting.steps))
    sites = tuple(f"blocks[{i}:{i + 1}]" for i in range(blocks))
    trigger = Codebook(sites, (float(threshold),), (gap,), rate=False, residual=False, late=True)
    return Policy((Cached("stack", tuple(int(s < 2) for s in range(setting.steps))),), trigger)


@method(
    "layer_adaptive",
    title="Foresight",
    source="arXiv 2506.00329",
    checked="C",
    sites="value behind each block",
    trigger="change of each block's output against its own at warm-up",
    predictor="copy",
    syncs="at computed steps only",
)
def foresight(setting: Setting, *, gamma: float = 0.5, warmup: int | None = None, refresh: int = 2) -> Policy:
    """Skips the blocks up to the last one whose output moves less than `gamma` times what it moved in the warm-up.

    arXiv 2506.00329, repository STAR-Laboratory/foresight: mean squared change between computed steps; as in the
    released code the prefix of blocks is skipped and all behind it are computed; every `refresh`-th step computes
    all. Warm-up is 15% of the steps, at least 3 (its limit needs two changes), unless given.
    """
    between(0, math.inf, gamma=gamma)
    steps = max(3, round(0.15 * setting.steps)) if warmup is None else warmup
    whole(3, warmup=steps)
    whole(refresh=refresh)
    sites = tuple(f"after:{i}" for i in range(setting.numbered()))
    mask = tuple(int(s < steps) for s in range(setting.steps))
    trigger = Layerwise(sites, refresh, gamma=float(gamma), warmup=steps, norm="mse", prefix=True)
    return Policy(tuple(Cached(site, mask) for site in sites), trigger)


@method(
    "layer_adaptive",
    title="DBPrune",
    source="repository vipshop/cache-dit",
    checked="C",
    sites="each block",
    trigger="change of each block's residual",
    predictor="copy",
    syncs="at computed steps only",
)
def dbprune(
    setting: Setting,
    *,
    threshold: float = 0.08,
    warmup: int = 8,
    max_continuous: int = 2,
    keep: Sequence[int] = (),
) -> Policy:
    """Prunes single blocks: one whose residual moved less than `threshold` is copied until the next computed step.

    Repository vipshop/cache-dit tests every block's input as it comes, one host read a block; here the test is made at
    computed steps for the `max_continuous` steps that follow, which reads once. `keep` names blocks never pruned.
    """
    between(0, math.inf, threshold=threshold)
    whole(warmup=warmup, max_continuous=max_continuous)
    blocks = [block.path for i, block in enumerate(setting.sites.order) if i not in set(keep)]
    if not blocks:
        raise PolicyError("dbprune needs repeated blocks that are not all in keep=; this denoiser has none")
    mask = tuple(int(s < warmup) for s in range(setting.steps))
    trigger = Layerwise(tuple(blocks), 1 + max_continuous, threshold=float(threshold))
    return Policy(tuple(Cached(path, mask) for path in blocks), trigger)
