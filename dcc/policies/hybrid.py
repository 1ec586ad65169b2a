"""Hybrid policies: tokens, bands, guidance or verification decide besides the schedule."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from dcc.errors import PolicyError
from dcc.plans.predictors import Predictor
from dcc.plans.triggers import Coarsest, Verify
from dcc.policies import channel_clusters
from dcc.policies.base import (
    COPY,
    DEFAULT_SITE,
    Cached,
    Policy,
    Setting,
    between,
    ends,
    every,
    gram_of,
    listed,
    method,
    whole,
)
from dcc.variants.guidance import weighed_bands
from dcc.variants.refresh import holds_output_tokens

if TYPE_CHECKING:
    from dcc.passes.base import Site

SOLVERS = (  # HyCa's pool of predictors
    COPY,
    Predictor("midpoint", 1),
    Predictor("taylor", 1),
    Predictor("foca", 2),
    Predictor("bdf2", 1),
    Predictor("adams_moulton", 2),
)


TIE = 1e-6  # as a share of the total: what rounding makes of the second difference of equal values


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
    not a site per branch.
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
    sites = (setting.sites.default, f"blocks[{blocks // 2}:{blocks}]")
    mask = tuple(int(s < first) for s in range(setting.steps))
    trigger = Coarsest(sites, (float(threshold), float(block_threshold)), interval)
    return Policy(tuple(Cached(site, mask) for site in sites), trigger)


@method(
    "hybrid",
    title="ToCa",
    source="arXiv 2410.05317",
    checked="C",
    sites="attention and MLP branches",
    trigger="every N-th step, more often towards the end; tokens by norm and age",
    predictor="copy",
)
def toca(
    setting: Setting,
    *,
    interval: int = 3,
    ratio: float = 0.07,
    first: int = 1,
    select: str = "norm",
    age_weight: float = 0.25,
    sensitive: tuple[float, float] = (0.2, 0.4),
) -> Policy:
    """Between full steps copies attention outputs, and of each MLP computes the tokens of the highest score.

    arXiv 2410.05317, repository Shenyi-Z/ToCa (DiT, 50 steps): a token scores by importance plus age_weight * age /
    interval; the share of tokens is `ratio` times 2.5 for an MLP (0 for attention) times 1.8 in the first block to
    0.2 in the last. The interval is divided by 0.6 in the first step to 1.4 in the last, and is 2 where the share of
    steps left lies in `sensitive`. Importance is published as the attention that a token receives, which fused
    attention does not give: here the norm of its cached value, large ones first (select="norm"; "small_norm" takes
    small ones first, and "random" leaves it to chance). The factor of the step, 1 on average, would need a variant per
    step and is left out, as is the bonus of the best token of each 2x2 window.
    """
    between(0, 1, ratio=ratio)
    mask = toca_mask(setting, interval, first, sensitive)
    scored = _scored(select, age_weight / interval)
    inner = tuple(v or (2 if ratio else 0) for v in mask)
    return Policy(_by_tokens(setting, mask, inner, _ratios(setting, ratio, scored)))


def toca_mask(setting: Setting, interval: int, first: int, sensitive: tuple[float, float]) -> tuple[int, ...]:
    """The full steps of ToCa. The interval in force is set anew at each of them."""
    whole(interval=interval, first=first)
    low, high = sensitive
    between(0, 1, low=low, high=high)
    steps, due, mask = setting.steps, 0, []
    for step in range(steps):
        left = steps - 1 - step
        mask.append(int(interval == 1 or step < first or step >= due))
        if mask[-1]:
            due = step + (2 if low * steps <= left < high * steps else toca_interval(interval, left, steps))
    return tuple(mask)


def toca_interval(interval: int, left: int, steps: int) -> int:
    """ToCa's interval where `left` of `steps` steps are left."""
    return round(interval / (1.4 - 0.8 * left / steps))


@method(
    "hybrid",
    title="DuCa",
    source="arXiv 2412.18911",
    checked="C",
    sites="attention and MLP branches, and the stack",
    trigger="full, conservative and aggressive steps in turn; tokens by norm",
    predictor="copy",
)
def duca(
    setting: Setting,
    *,
    interval: int = 3,
    ratio: float = 0.05,
    first: int = 1,
    select: str = "norm",
    age_weight: float = 0.25,
    site: str = DEFAULT_SITE,
) -> Policy:
    """A cycle of `interval` steps: a full one, then conservative (ToCa's) and aggressive ones (all blocks copied).

    arXiv 2412.18911. Odd steps of the cycle are conservative, even ones copy what all blocks add, as the conservative
    step before left it. Published scores are 1 - ||v||, v the attention's value vector, or chance; here v is the
    branch's own cached value, and large norms come first (select="norm"), which was 0.6 dB better on the multimodal
    demo pipeline than "small_norm". `site` is what aggressive steps copy.
    """
    between(0, 1, ratio=ratio)
    mask = every(setting, interval, first)
    phase = [0] * setting.steps
    for step in range(1, setting.steps):
        phase[step] = 0 if mask[step] else phase[step - 1] + 1
    inner = tuple(1 if p == 0 else 2 if p % 2 and ratio else 0 for p in phase)
    caches = _by_tokens(setting, mask, inner, _ratios(setting, ratio, _scored(select, age_weight / interval)))
    return Policy((Cached(site, tuple(int(p == 0 or p % 2 == 1) for p in phase)), *caches))


@method(
    "hybrid",
    title="ClusCa",
    source="arXiv 2509.10312",
    checked="C",
    sites="attention and MLP branches",
    trigger="every N-th step; one token per cluster",
    predictor="taylor",
)
def clusca(
    setting: Setting, *, interval: int = 5, order: int = 1, first: int = 3, clusters: int = 16, share: float = 0.005
) -> Policy:
    """TaylorSeer on every branch, and in each MLP one random token of every cluster of tokens computed afresh.

    arXiv 2509.10312, repository Shenyi-Z/Cache4Diffusion: K-means at full steps on the tokens after the last block,
    L1 distance; the other tokens of a cluster follow its fresh one by `share`. Published centres start from the last
    ones and take up to 100 rounds; here they start from evenly spaced tokens and take 10, so that the graph is static.
    Each set of tokens (image, text, both) is clustered by itself. Published code scatters fresh tokens under the trend
    of the forecast; here a fresh token is what it is, and later forecasts add the trend to it.
    """
    whole(clusters=clusters)
    between(0, 1, share=share)
    mask = every(setting, interval, first)
    forms = [
        {"tokens": {"select": "cluster", "clusters": min(clusters, site.shapes[0][1]), "share": share}}
        for site in _mlps(setting)
    ]
    return Policy(_by_tokens(setting, mask, tuple(v or 2 for v in mask), forms, Predictor("taylor", order)))


@method(
    "hybrid",
    title="RAS",
    source="arXiv 2502.10389",
    checked="C",
    sites="MLP branches and the output",
    trigger="tokens by the spread of the output before; dense steps in between",
    predictor="copy",
)
def ras(
    setting: Setting,
    *,
    ratio: float = 0.5,
    first: int = 4,
    dense: Sequence[float] = (0.4, 0.733),
    starvation: float = 0.1,
    high: bool = True,
) -> Policy:
    """Gives a `ratio` of the image tokens to the denoiser; the others keep the noise predicted for them before.

    arXiv 2502.10389, repository microsoft/RAS: tokens are chosen at the end of a step for the next one, by the
    standard deviation of the output over its channels; the first steps and the shares `dense` of the run (steps 12
    and 22 of 30) compute all. Large deviations times exp(starvation * drops) come first, which is what the paper is
    after: regions of little change wait, and none for ever. The released code keeps the largest stale instead;
    high=False does so, with the sign of the weight that brings a dropped token back, and was 6 dB worse on the
    multimodal demo pipeline. Drops are counted from the last dense step. Attention stays dense, so inactive tokens
    give keys and values of their present state instead of cached ones; text tokens are always active.
    """
    between(0.01, 1, ratio=ratio)
    between(0, 1, starvation=starvation, **{f"dense[{i}]": share for i, share in enumerate(dense)})
    whole(first=first)
    output = setting.sites["output"]
    if len(output.shapes[0]) != 3:
        raise PolicyError(f"ras needs an output [batch, tokens, channels]; this denoiser's is {list(output.shapes[0])}")
    full = {round(share * setting.steps) for share in dense}
    mask = tuple(1 if step < first or step in full or ratio == 1 else 2 for step in range(setting.steps))
    form = {"tokens": {"select": "noise", "ratio": ratio, "starvation": starvation, "sign": 1 if high else -1}}
    sites = [site for site in _mlps(setting) if holds_output_tokens(setting.sites, site)]
    return Policy(tuple(Cached(site.name, mask, COPY, form) for site in (*sites, output)))


def _mlps(setting: Setting) -> list[Site]:
    """The MLPs of the transformer blocks, and the branches in which one is joined with attention."""
    found = [site for site in setting.sites if site.kind in ("mlp", "attn+mlp")]
    if not found:
        raise PolicyError("this needs transformer blocks with an MLP branch, to compute some tokens of; there are none")
    return found


def _by_tokens(
    setting: Setting,
    attention: tuple[int, ...],
    mlp: tuple[int, ...],
    forms: list[dict[str, Any]],
    predictor: Predictor = COPY,
) -> tuple[Cached, ...]:
    """Attention outputs under one mask, MLPs under another with a form each; a joint branch counts as both."""
    mlps = _mlps(setting)
    blocks = {site.name.rpartition("/")[0] for site in mlps}
    heads = [f"{site.name.rpartition('/')[0]}/heads" for site in mlps if site.kind == "attn+mlp"]
    beside = [s.name for s in setting.sites if s.kind in ("attn", "cross") and s.name.rpartition("/")[0] in blocks]
    return (
        *(Cached(name, attention, predictor) for name in (*beside, *heads)),
        *(Cached(site.name, mlp, predictor, form) for site, form in zip(mlps, forms, strict=True)),
    )


def _ratios(setting: Setting, ratio: float, scored: dict[str, Any]) -> list[dict[str, Any]]:
    """ToCa's form of each MLP: more tokens in the first blocks. Nothing is refreshed at ratio 0."""
    blocks = [site.name.rpartition("/")[0] for site in _mlps(setting)]
    order = list(dict.fromkeys(blocks))
    factors = [2.5 * (1.8 - 1.6 * order.index(block) / max(len(order) - 1, 1)) for block in blocks]
    return [{"tokens": {**scored, "ratio": min(ratio * factor, 1.0)}} if ratio else {} for factor in factors]


def _scored(select: str, age: float) -> dict[str, Any]:
    """The form of ToCa's scores, without the ratio."""
    signs = {"norm": 1, "small_norm": -1}
    if select not in (*signs, "random"):
        raise PolicyError(f"select={select!r}; there are: {', '.join(signs)}, random")
    return {"select": "norm", "sign": signs[select], "age": age} if select in signs else {"select": select}


@method(
    "hybrid",
    title="OmniCache",
    source="arXiv 2508.16212",
    checked="D",
    sites="stack",
    trigger="calibrated: steps of highest curvature of the trajectory",
    predictor="copy",
    needs="profile",
)
def omnicache(setting: Setting, *, interval: int = 3, site: str = DEFAULT_SITE) -> Policy:
    """Computes where the sampling trajectory bends most, one step in `interval` on the whole, spread over the run.

    The curvature is the second difference of the raw output between steps, from the profile's Gram matrix, over its
    norm; the run is cut into pieces of equal total curvature and the first step of each computes. The paper leaves
    open how reuse is spread over all stages; here the mean curvature is added to every step's own, so that no gap
    grows beyond twice the interval. Its estimate of the noise that caching adds, and the filter, are left out.
    """
    whole(interval=interval)
    gram, steps = gram_of(setting, "output"), setting.steps
    bend = np.zeros(steps)
    for s in range(1, steps - 1):
        weights = np.zeros(steps)
        weights[s - 1 : s + 2] = 1.0, -2.0, 1.0
        bend[s] = math.sqrt(max(weights @ gram @ weights, 0.0) / max(gram[s, s], np.finfo(float).tiny))
    even = interval == 1 or not bend.any()
    total = np.arange(1.0, steps + 1) if even else np.cumsum(bend + bend.mean())
    bounds = np.linspace(0, total[-1], -(-steps // interval) + 1)[:-1]
    bounds = bounds + TIE * total[-1]  # a bound that falls on a step's total is decided the same on every machine
    nodes = sorted({int(np.searchsorted(total, bound, side="right")) for bound in bounds})
    return Policy((Cached(site, listed(setting, [min(node, steps - 1) for node in nodes])),))


@method(
    "hybrid",
    title="ProfilingDiT",
    source="arXiv 2504.03140, repository GeekGuru123/ProfilingDiT",
    checked="C",
    sites="ranges of background blocks",
    trigger="refresh steps",
    predictor="copy",
    needs="list or profile",
)
def profiling_dit(
    setting: Setting,
    *,
    background: Sequence[int] | None = None,
    share: float = 0.5,
    interval: int = 6,
    first: int = 6,
    refresh: Sequence[int] | None = None,
) -> Policy:
    """Caches what runs of `background` blocks add; foreground blocks are computed at every step.

    Refreshes at every `interval`-th step after the `first` ones, or at the `refresh` steps. Which blocks draw the
    background is read off attention maps in the paper; unless given, they are the `share` of blocks whose residual
    changes least from step to step in the profile.
    """
    between(0.0, 1.0, share=share)
    blocks = setting.numbered(2)
    if background is None:
        profile = setting.profile
        change = [float(profile.neighbours[:, profile.sites.index(b.path)].mean()) for b in setting.sites.order]
        background = sorted(range(blocks), key=change.__getitem__)[: max(1, round(share * blocks))]
    bad = [index for index in background if not isinstance(index, int) or not 0 <= index < blocks]
    if bad or not background:
        raise PolicyError(f"background={list(background)!r}: name one block or more, from 0 to {blocks - 1}")
    mask = every(setting, interval, first) if refresh is None else listed(setting, [*range(first), *refresh])
    chosen = set(background)
    starts = [index for index in sorted(chosen) if index - 1 not in chosen]
    ends = [next(end for end in range(start, blocks + 1) if end not in chosen) for start in starts]
    ranges = zip(starts, ends, strict=True)
    return Policy(tuple(Cached(f"blocks[{start}:{end}]", mask) for start, end in ranges))


@method(
    "hybrid",
    title="FasterCache",
    source="arXiv 2410.19355, repository Vchitect/FasterCache",
    checked="C",
    sites="attention branches; uncond where guidance is merged",
    trigger="every N-th step, late in the run",
    predictor="F0 + w (F0 - F1)",
)
def fastercache(
    setting: Setting,
    *,
    interval: int = 2,
    weight: float = 0.3,
    start: float = 0.3,
    guidance_interval: int = 5,
    guidance: bool | None = None,
    low_weight: float = 1.1,
    high_weight: float = 1.1,
    low_window: Sequence[float] = (99, 901),
    high_window: Sequence[float] = (-1, 301),
) -> Policy:
    """Extrapolates attention between the last two computed steps, and reuses what guidance adds.

    Attention computes at every `interval`-th step from the `start` share of the run on. The difference of the
    unconditional to the conditional output is computed every `guidance_interval` steps and copied at those between that
    extrapolate attention, at which only half the batch runs. Its low and high frequencies are multiplied by
    `low_weight` and `high_weight` at every reuse inside their windows of timesteps, of 1000, as diffusers does.
    `guidance` None does so where the batch is merged, True refuses any other run, False caches attention only.
    """
    whole(interval=interval, guidance_interval=guidance_interval)
    between(0.0, 1.0, start=start)
    between(0.0, 2.0, weight=weight, low_weight=low_weight, high_weight=high_weight)
    first = max(2, round(start * setting.steps))
    mask = every(setting, interval, first)
    rule = Predictor("extrapolate", 1, (("weight", float(weight)),))
    caches = [Cached(group, mask, rule) for group in ("self", "heads", "cross") if setting.has(group)]
    if not caches:
        raise PolicyError("fastercache needs attention branches on a residual stream; this denoiser shows none")
    if guidance or (guidance is None and "uncond" in setting.sites):
        fresh = tuple(max(a, b) for a, b in zip(mask, every(setting, guidance_interval, first), strict=True))
        windows = (ends(low_window, "low_window"), ends(high_window, "high_window"))
        form = weighed_bands(setting.sites, setting.levels, (low_weight, high_weight), windows)
        caches.append(Cached("uncond", fresh, form=form))
    return Policy(tuple(caches))


@method(
    "hybrid",
    title="HyCa",
    source="arXiv 2510.04188",
    checked="D",
    sites="hidden: the value after the last block; branches in the paper too",
    trigger="every N-th step",
    predictor="the best solver of a pool for each cluster of channels",
    needs="one run",
)
def hyca(
    setting: Setting,
    *,
    interval: int = 5,
    clusters: int = 4,
    judged: str = "next",
    first: int = 3,
    site: str | None = None,
) -> Policy:
    """Clusters the channels of a site by how they move in one uncached run, and forecasts each by its best solver.

    The pool is a copy, Runge-Kutta 2, Taylor, Adams-Bashforth 2 (2.5, -2, 0.5 one gap ahead, FoCa's rule), BDF2 and
    Adams-Moulton. A cluster takes the one of least squared error on the next step from the steps right before it; with
    judged="schedule", on the forecasts that this schedule makes. The paper leaves the descriptors' scaling open; here
    they are standardised logarithms (policies/channel_clusters.py). Clusters that choose the same solver become one.
    """
    whole(clusters=clusters)
    if judged not in ("next", "schedule"):
        raise PolicyError(f"judged={judged!r}; there are: next, schedule")
    mask = every(setting, interval, first)
    name = site or ("hidden" if setting.has("hidden") else "output")
    if all(mask):
        return Policy((Cached(name, mask),))
    caches = []
    for own in setting.sites.select(name):
        values = channel_clusters.by_points(setting.values(own.name))
        labels = channel_clusters.k_means(channel_clusters.descriptors(values), clusters)
        if judged == "next":
            error = channel_clusters.next_step_errors(values, SOLVERS)
        else:
            error = channel_clusters.errors(values, SOLVERS, mask)
        of_channel, chosen = channel_clusters.choose(labels, error)
        pool = [SOLVERS[index] for index in chosen]
        form = {"clusters": {"of_channel": of_channel, "predictors": [solver.as_json() for solver in pool]}}
        caches.append(Cached(own.name, mask, pool[0], form if len(pool) > 1 else {}))
    return Policy(tuple(caches))
