"""Timestep-adaptive policies: a number that moves from step to step decides whether a whole step computes."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from dcc.errors import PolicyError
from dcc.policies.base import DEFAULT_SITE, Cached, Policy, Setting, between, forced, method, whole
from dcc.predictors import Predictor
from dcc.triggers import Accumulate, AlignedProbe, Anchored, TransformRate


@method(
    "timestep_adaptive",
    title="TeaCache",
    source="arXiv 2411.19108",
    checked="C",
    sites="stack",
    trigger="accumulated change of the modulated input",
    predictor="copy",
    needs="polynomial, or a profile to fit it",
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
    if coefficients is None:
        coefficients = _fitted(setting)
    return Policy(
        (Cached(site, forced(setting)),), Accumulate("modulated", float(threshold), tuple(map(float, coefficients)))
    )


def _fitted(setting: Setting) -> list[float]:
    profile = setting.profile
    changes = [profile.neighbours[:, profile.sites.index(site), 1:].flatten() for site in ("modulated", "output")]
    degree = min(4, len(set(changes[0].tolist())) - 1)
    return np.polyfit(*(change.double().numpy() for change in changes), max(degree, 0)).tolist()


@method(
    "timestep_adaptive",
    title="FBCache",
    source="ParaAttention; diffusers FirstBlockCache",
    checked="C",
    sites="blocks behind the first",
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
