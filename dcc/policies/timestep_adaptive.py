"""Timestep-adaptive policies: a number that moves from step to step decides whether a whole step computes."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from dcc.errors import PolicyError
from dcc.plans.predictors import Predictor, Table
from dcc.plans.triggers import Accumulate, AlignedProbe, Anchored, TransformRate
from dcc.policies.base import (
    DEFAULT_SITE,
    Cached,
    Policy,
    Setting,
    between,
    distances,
    every,
    forced,
    gram_of,
    method,
    whole,
)


@method(
    "timestep_adaptive",
    title="TeaCache",
    source="arXiv 2411.19108",
    checked="C",
    sites="stack",
    trigger="accumulated change of the modulated input",
    predictor="copy",
    needs="polynomial or profile",
    syncs="1",
)
def teacache(
    setting: Setting,
    *,
    threshold: float = 0.25,
    coefficients: Sequence[float] | None = None,
    site: str = DEFAULT_SITE,
) -> Policy:
    """Accumulates a polynomial of the change of the first block's modulated input; copies while below `threshold`.

    arXiv 2411.19108, equations 4 to 6; the first and last step compute. `coefficients` are numpy.poly1d's, highest
    power first, as published per model; without them a polynomial of degree 4 is fitted to the profile: the relative
    change of the raw output over that of the modulated input.
    """
    between(0, math.inf, threshold=threshold)
    if not setting.has("modulated"):
        raise PolicyError("teacache needs blocks that modulate what they take by the timestep; this denoiser has none")
    if coefficients is None:
        coefficients = _fitted(setting)
    return Policy(
        (Cached(site, forced(setting)),), Accumulate("modulated", float(threshold), tuple(map(float, coefficients)))
    )


def _fitted(setting: Setting) -> list[float]:
    profile = setting.profile
    changes = [profile.neighbours[:, profile.sites.index(site), 1:].flatten() for site in ("modulated", "output")]
    degree = min(4, len(set(changes[0].tolist())) - 1)
    taken, given = (change.double().numpy() for change in changes)
    if not len(taken):  # a run of one step, in which nothing changes
        return [1.0, 0.0]
    return np.polyfit(taken, given, max(degree, 0)).tolist()


@method(
    "timestep_adaptive",
    title="FBCache",
    source="ParaAttention; diffusers FirstBlockCache",
    checked="C",
    sites="blocks after the first",
    trigger="change of the first block's residual since the last computed step",
    predictor="copy",
    syncs="1",
)
def fbcache(setting: Setting, *, threshold: float = 0.05) -> Policy:
    """Computes the first block; copies what the others add while the first one's residual stays within `threshold`.

    Repository chengzeyi/ParaAttention and diffusers' FirstBlockCache hook: relative L1 to the last computed step, of
    the sample's stream; nothing is forced but the first step.
    """
    between(0, math.inf, threshold=threshold)
    blocks = setting.numbered(2)
    return Policy((Cached(f"blocks[1:{blocks}]", forced(setting, last=0)),), Anchored("blocks[0:1]", float(threshold)))


@method(
    "timestep_adaptive",
    title="DiCache",
    source="arXiv 2508.17356",
    checked="C",
    sites="stack",
    trigger="accumulated change of a shallow probe",
    predictor="two anchors weighed by the probe",
    syncs="1",
)
def dicache(setting: Setting, *, threshold: float = 0.4, probe: int = 1, retention_ratio: float = 0.2) -> Policy:
    """Runs the first `probe` blocks at every step, accumulates their change, and aligns two cached residuals to them.

    arXiv 2508.17356, repository Bujiazi/DiCache, published defaults for image models. The first `retention_ratio` of
    the steps and the last step compute; a computed step goes on from the probe, so the probe costs nothing then.
    """
    between(0, math.inf, threshold=threshold)
    between(0, 1, retention_ratio=retention_ratio)
    whole(probe=probe)
    setting.numbered(probe + 1)
    first = max(1, int(retention_ratio * setting.steps))
    mask = forced(setting, first)
    trigger = AlignedProbe(f"blocks[0:{probe}]", float(threshold))
    return Policy((Cached(DEFAULT_SITE, mask, Predictor("newton", 1)),), trigger)


@method(
    "timestep_adaptive",
    title="EasyCache",
    source="arXiv 2507.02860",
    checked="C",
    sites="delta: output minus latent",
    trigger="accumulated predicted change of the output",
    predictor="copy",
    syncs="1",
)
def easycache(setting: Setting, *, threshold: float = 0.05, first: int = 5) -> Policy:
    """Predicts the output's change from how the latent moved, and copies output minus latent while that is little.

    arXiv 2507.02860, repository H-EmbodVis/EasyCache: thresholds 0.025 to 0.3 and 5 to 10 `first` steps are published;
    the last step computes. Streams of guidance called apart decide apart here, where the paper lets the first decide.
    """
    between(0, math.inf, threshold=threshold)
    if "delta" not in setting.sites:
        raise PolicyError("easycache needs an output shaped like the latent (site 'delta'); this denoiser has none")
    return Policy((Cached("delta", forced(setting, first)),), TransformRate(float(threshold)))


@method(
    "timestep_adaptive",
    title="MagCache",
    source="arXiv 2506.09045, repository Zehong-Ma/MagCache",
    checked="C",
    sites="stack",
    trigger="calibrated magnitude ratios, accumulated on the host",
    predictor="copy",
    needs="ratios or profile",
)
def magcache(
    setting: Setting,
    *,
    threshold: float = 0.06,
    max_skip: int = 3,
    retention_ratio: float = 0.2,
    ratios: Sequence[float] | None = None,
    forbidden: Sequence[int] = (),
    strict: bool = False,
    site: str = DEFAULT_SITE,
) -> Policy:
    """Copies the residual while the drift of its magnitude, known from calibration, stays within `threshold`.

    Multiplies the ratios |r_s| / |r_{s-1}| since the last computed step, adds up |1 - product|, and forecasts while the
    sum is at most `threshold` (below it if `strict`) for at most `max_skip` steps; the first `retention_ratio` of the
    steps and the `forbidden` ones compute. `ratios` are one per step (the first is not used), or one less; for another
    number of steps the nearest are taken. Without them they are those of the norms in the profile, where the paper
    averages the ratios of single tokens. All of it is known before the run: a static mask. Defaults of diffusers' hook.
    """
    between(0.0, math.inf, threshold=threshold)
    between(0.0, 1.0, retention_ratio=retention_ratio)
    whole(0, max_skip=max_skip)
    if ratios is None:
        sizes = np.sqrt(np.diag(gram_of(setting, setting.sites.default if site == DEFAULT_SITE else site)))
        ratios = [1.0, *(sizes[1:] / np.maximum(sizes[:-1], np.finfo(float).tiny))]
    curve = [1.0, *ratios] if len(ratios) == setting.steps - 1 else list(ratios)
    if not curve or not all(isinstance(r, (int, float)) and math.isfinite(r) for r in curve):
        raise PolicyError(f"ratios must be finite numbers, one per step; got {len(curve)} of them")
    if len(curve) != setting.steps:
        nearest = np.linspace(0, len(curve) - 1, setting.steps).round().astype(int)
        curve = [curve[index] for index in nearest]
    retained, mask = int(retention_ratio * setting.steps + 0.5), []
    product, drift, skipped = 1.0, 0.0, 0
    for step, ratio in enumerate(curve):
        if step == 0 or step < retained:
            mask.append(1)
            continue
        product, skipped = product * ratio, skipped + 1
        drift += abs(1.0 - product)
        within = drift < threshold if strict else drift <= threshold
        mask.append(int(not (within and threshold > 0 and skipped <= max_skip) or step in forbidden))
        if mask[-1]:
            product, drift, skipped = 1.0, 0.0, 0
    return Policy((Cached(site, tuple(mask)),))


@method(
    "timestep_adaptive",
    title="ERTACache",
    source="arXiv 2508.21091",
    checked="D",
    sites="delta: output minus latent",
    trigger="calibrated: error of a copy within a bound",
    predictor="copy, scaled per step",
    needs="profile",
)
def ertacache(setting: Setting, *, threshold: float = 0.1) -> Policy:
    """Copies output minus latent at the steps where calibration found the error below `threshold`, rescaled.

    The error is the relative distance to the last computed step (L2, which the profile holds, where the paper takes
    L1). The paper corrects a copy by an affine map fitted in closed form; here by its scale alone, the least-squares
    one of each step, which is a coefficient. The correction of the sampler's step size is left out: it changes the
    sampler.
    """
    between(0.0, math.inf, threshold=threshold)
    if "delta" not in setting.sites:
        raise PolicyError("ertacache needs an output shaped like the latent (site 'delta'); this denoiser has none")
    gram, distance = gram_of(setting, "delta"), distances(setting, "delta")
    mask, values, anchor = [], [], 0
    for step in range(setting.steps):
        mask.append(int(step == 0 or not distance[anchor, step] < threshold))
        anchor = step if mask[-1] else anchor
        values.append(() if mask[-1] else (float(gram[anchor, step] / gram[anchor, anchor]),))
    return Policy((Cached("delta", tuple(mask), Table(tuple(values))),))


@method(
    "timestep_adaptive",
    title="TaoCache",
    source="arXiv 2508.08978",
    checked="D",
    sites="output",
    trigger="every N-th step late in the run",
    predictor="increments scaled by calibrated cosine and norm ratio",
    needs="profile",
)
def taocache(setting: Setting, *, interval: int = 3, start: float = 0.3) -> Policy:
    """Forecasts the output's increment from the last one, by how increments turned and shrank in calibration.

    The forecast is F0 + c (F0 - F1) with c the cosine times the norm ratio of the two increments in the profile's Gram
    matrix. The paper aims at late, consecutive steps: those before the `start` share compute, after them every
    `interval`-th; its own schedule and window are open.
    """
    whole(interval=interval)
    between(0.0, 1.0, start=start)
    first = max(2, round(start * setting.steps))
    mask, gram = every(setting, interval, first), gram_of(setting, "output")
    values, anchors = [], []
    for step, full in enumerate(mask):
        values.append(() if full else (1.0 + _turn(gram, step, *anchors[:2]), -_turn(gram, step, *anchors[:2])))
        anchors = [step, *anchors] if full else anchors
    return Policy((Cached("output", mask, Table(tuple(values))),))


def _turn(gram: np.ndarray, step: int, newest: int, before: int) -> float:
    """<F_s - F_a, F_a - F_b> / |F_a - F_b|^2 for the step s and the anchors a and b before it."""
    product = gram[step, newest] - gram[step, before] - gram[newest, newest] + gram[newest, before]
    square = gram[newest, newest] + gram[before, before] - 2 * gram[newest, before]
    return float(product / square) if square > 0 else 0.0
