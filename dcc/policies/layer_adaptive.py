"""Layer-adaptive policies: each block or branch is computed or forecast by its own rule."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from dcc.errors import PolicyError
from dcc.plans.predictors import Predictor
from dcc.plans.triggers import Anchored, Codebook, Layerwise
from dcc.policies.base import (
    DEFAULT_SITE,
    Cached,
    Policy,
    Setting,
    between,
    changes,
    distances,
    given_mask,
    masked,
    method,
    read_table,
    similarity,
    whole,
)


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
    instead of every block's output: less memory, and relative to the present input.
    """
    between(0, math.inf, threshold=threshold)
    between(0, 1, reuse=reuse)
    blocks = setting.numbered()
    gap = 1 + max(1, round(reuse * setting.steps))
    sites = tuple(f"blocks[{i}:{i + 1}]" for i in range(blocks))
    trigger = Codebook(sites, (float(threshold),), (gap,), rate=False, residual=False, late=True)
    return Policy((Cached(DEFAULT_SITE, tuple(int(s < 2) for s in range(setting.steps))),), trigger)


@method(
    "layer_adaptive",
    title="Foresight",
    source="arXiv 2506.00329",
    checked="C",
    sites="value after each block",
    trigger="change of each block's output against its own at warm-up",
    predictor="copy",
    syncs="at computed steps only",
)
def foresight(setting: Setting, *, gamma: float = 0.5, warmup: int | None = None, refresh: int = 2) -> Policy:
    """Skips the blocks up to the last one whose output moves less than `gamma` times what it moved in the warm-up.

    arXiv 2506.00329, repository STAR-Laboratory/foresight: mean squared change between computed steps; as in the
    released code the prefix of blocks is skipped and all after it are computed; every `refresh`-th step computes
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

    Repository vipshop/cache-dit tests every block's input as it comes, one host read per block; here the test is made
    at computed steps for the `max_continuous` steps that follow, which reads once. `keep` names blocks never pruned.
    """
    between(0, math.inf, threshold=threshold)
    whole(warmup=warmup, max_continuous=max_continuous)
    blocks = [block.path for i, block in enumerate(setting.sites.order) if i not in set(keep)]
    if not blocks:
        raise PolicyError("dbprune needs repeated blocks that are not all in keep=; this denoiser has none")
    mask = tuple(int(s < warmup) for s in range(setting.steps))
    trigger = Layerwise(tuple(blocks), 1 + max_continuous, threshold=float(threshold))
    return Policy(tuple(Cached(path, mask) for path in blocks), trigger)


@method(
    "layer_adaptive",
    title="Block Caching",
    source="arXiv 2312.03209",
    checked="D",
    sites="each block on its own",
    trigger="calibrated: accumulated change of the block",
    predictor="copy",
    needs="profile",
)
def block_caching(setting: Setting, *, delta: float = 0.3) -> Policy:
    """Each block is computed again when its changes since it was last computed add up to more than `delta`.

    Changes are the profile's relative L1 between neighbouring steps. The scale and shift that the paper trains per
    block and step to hide artefacts are left out.
    """
    between(0.0, math.inf, delta=delta)
    caches = []
    for site in setting.sites.select("blocks"):
        change, mask, total = changes(setting, site.name), [1], 0.0
        for step in range(1, setting.steps):
            total += change[step]
            mask.append(int(total > delta))
            total = 0.0 if mask[-1] else total
        caches.append(Cached(site.name, tuple(mask)))
    return Policy(tuple(caches))


@method(
    "layer_adaptive",
    title="BAC",
    source="arXiv 2506.13456",
    checked="C3",
    sites="branches, each with steps of its own",
    trigger="calibrated: the most similar steps for a number of updates",
    predictor="copy",
    needs="profile",
)
def bac(setting: Setting, *, interval: int = 3, bu_blocks: int = 3) -> Policy:
    """Each branch gets a share of 1 / `interval` update steps, where copies are most similar, by dynamic programming.

    Maximises the sum of cosines between every step's value and that of its last update. Bubbling union: the
    `bu_blocks` MLPs whose values differ most between all steps are also updated whenever an MLP after them is, so
    that its fresh value is not made from their stale ones. Differences are L2, which the profile holds, where the
    paper takes L1; an MLP joined with attention counts as one.
    """
    whole(interval=interval)
    whole(0, bu_blocks=bu_blocks)
    updates = -(-setting.steps // interval)
    sites = setting.sites.select("innermost")
    masks = {site.name: placed(1 - similarity(setting, site.name), updates) for site in sites}
    mlps = [site.name for site in sites if site.kind in ("mlp", "attn+mlp")]
    ranked = sorted(mlps, key=lambda name: -float(np.mean(distances(setting, name, relative=False))))
    for name in mlps[::-1]:
        if name in ranked[:bu_blocks]:
            after = [masks[other] for other in mlps[mlps.index(name) :]]
            masks[name] = tuple(map(max, zip(*after, strict=True)))
    return Policy(tuple(Cached(name, mask) for name, mask in masks.items()))


def placed(distance: np.ndarray, updates: int) -> tuple[int, ...]:
    """The mask with `updates` ones, the first step among them, of least sum of distances [anchor, step]."""
    steps = len(distance)
    run = np.array([[distance[a, a:b].sum() if b > a else np.inf for b in range(steps + 1)] for a in range(steps)])
    cost, came = run[0].copy(), [np.zeros(steps + 1, dtype=int)]
    for _ in range(min(updates, steps) - 1):
        options = cost[:steps, None] + run  # [last update, end]
        came.append(options.argmin(0))
        cost = options.min(0)
    mask, end = [0] * steps, steps
    for back in reversed(came):
        end = int(back[end])
        mask[end] = 1
    return (1, *mask[1:])


@method(
    "layer_adaptive",
    title="L2C",
    source="arXiv 2406.01733, repository horseee/learning-to-cache",
    checked="C",
    sites="branches",
    trigger="learned mask",
    predictor="copy",
    needs="learned mask",
)
def l2c(setting: Setting, *, mask: Sequence[Sequence[float]] | str, threshold: float = 0.1) -> Policy:
    """Runs a mask that Learning-to-Cache has trained: steps x branches, routers in [0, 1], reused above `threshold`.

    Nested lists or the path of a .json or .safetensors file; branches in execution order.
    """
    return learned(setting, mask, lambda router: int(not router > threshold))


@method(
    "layer_adaptive",
    title="HarmoniCa",
    source="arXiv 2410.01723, repository ModelTC/HarmoniCa",
    checked="C",
    sites="branches",
    trigger="learned mask",
    predictor="copy",
    needs="learned mask",
)
def harmonica(setting: Setting, *, mask: Sequence[Sequence[float]] | str, threshold: float = 0.1) -> Policy:
    """Runs a mask that HarmoniCa has trained along whole trajectories; routers as those of `l2c`."""
    return learned(setting, mask, lambda router: int(not router > threshold))


@method(
    "layer_adaptive",
    title="LazyDiT",
    source="arXiv 2412.12444, repository shawnricecake/lazydit",
    checked="C",
    sites="branches",
    trigger="learned mask",
    predictor="copy",
    needs="learned mask",
)
def lazydit(setting: Setting, *, mask: Sequence[Sequence[float]] | str, threshold: float = 0.5) -> Policy:
    """Runs the gates that LazyDiT has trained, as a table: steps x branches, computed from `threshold` on.

    The trained gates look at each sample's input, one host read per branch; a table of their means over samples reads
    none.
    """
    return learned(setting, mask, lambda gate: int(gate >= threshold))


@method(
    "layer_adaptive",
    title="FEB-Cache",
    source="arXiv 2503.07120, repository aSleepyTree/EB-Cache",
    checked="C",
    sites="attention and MLP branches",
    trigger="a table: full, reuse attention, reuse both",
    predictor="copy",
)
def feb_cache(setting: Setting, *, interval: int = 3, table: Sequence[int] | None = None) -> Policy:
    """A table with 0 (compute), 1 (reuse attention) or 2 (reuse attention and MLPs) for each step.

    The released table is for one model and data set; unless given, every `interval`-th step computes, the step before
    it reuses attention only, and the others both. The scaling of the sampler's output against exposure bias is left
    out.
    """
    whole(interval=interval)
    steps = range(setting.steps)
    rule = [0 if s % interval == 0 else 1 if s % interval == interval - 1 else 2 for s in steps]
    chosen = rule if table is None else list(table) if isinstance(table, Sequence) else []
    if len(chosen) != setting.steps or set(chosen) - {0, 1, 2} or chosen[0] != 0:
        raise PolicyError(f"table must be {setting.steps} numbers 0, 1 or 2, one per step, the first of them 0")
    attention = tuple(int(value == 0) for value in chosen)
    mlp = tuple(int(value != 2) for value in chosen)
    groups = [("self", attention), ("heads", attention), ("cross", attention), ("mlp", mlp), ("joint", mlp)]
    caches = [Cached(site, mask) for site, mask in groups if setting.has(site)]
    if not caches:
        raise PolicyError("feb_cache needs branches on a residual stream; this denoiser shows none")
    return Policy(tuple(caches))


def learned(setting: Setting, mask: Sequence[Sequence[float]] | str, compute: Callable[[float], int]) -> Policy:
    """The policy of a table of routers or gates, steps x branches; the first step computes whatever it says."""
    sites = [site.name for site in setting.sites.select("innermost")]
    rows = enumerate(read_table(mask))
    return masked(setting, sites, [[1] * len(row) if s == 0 else list(map(compute, row)) for s, row in rows])
