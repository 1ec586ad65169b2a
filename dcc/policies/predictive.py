"""Predictive policies: a schedule, and forecasts from several anchors instead of a copy of the newest."""

from __future__ import annotations

import math
from collections.abc import Sequence

from dcc.discover.token_grid import token_grid
from dcc.errors import PolicyError
from dcc.plans.predictors import MAX_ORDER, Predictor, Switched
from dcc.policies.base import (
    COPY,
    DEFAULT_SITE,
    Cached,
    Policy,
    Setting,
    between,
    every,
    given_mask,
    listed,
    method,
    whole,
)


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


@method(
    "predictive",
    title="TaylorSeer-Lite",
    source="arXiv 2503.06923, repository Shenyi-Z/Cache4Diffusion",
    checked="C",
    sites="hidden: the value after the last block",
    trigger="every N-th step",
    predictor="taylor",
)
def taylorseer_lite(setting: Setting, *, interval: int = 5, order: int = 2, first: int = 3) -> Policy:
    """TaylorSeer on one value, the hidden state after the last block; what follows it is computed at every step."""
    return Policy((Cached(_hidden(setting), every(setting, interval, first), Predictor("taylor", order)),))


@method(
    "predictive",
    title="HiCache",
    source="arXiv 2508.16984",
    checked="C",
    sites="any; branches in the paper",
    trigger="every N-th step",
    predictor="hermite",
)
def hicache(
    setting: Setting,
    *,
    interval: int = 5,
    order: int = 2,
    sigma: float = 0.5,
    first: int = 3,
    site: str = DEFAULT_SITE,
) -> Policy:
    """TaylorSeer's schedule, with its differences on Hermite polynomials scaled by `sigma`, which damps them.

    arXiv 2508.16984, repository fenglang918/HiCache: order 2, sigma 0.5 (0.7 in its launcher).
    """
    between(0.0, 1.0, sigma=sigma)
    rule = Predictor("hermite", order, (("sigma", float(sigma)),))
    return Policy((Cached(site, every(setting, interval, first), rule),))


@method(
    "predictive",
    title="AB-Cache",
    source="arXiv 2504.10540",
    checked="D",
    sites="any; the raw output unless named",
    trigger="every N-th step",
    predictor="adams_bashforth",
)
def ab_cache(setting: Setting, *, interval: int = 3, order: int = 2, first: int = 3, site: str = "output") -> Policy:
    """Adams-Bashforth's linear dependence of consecutive outputs (arXiv 2504.10540).

    `order` counts past outputs, as in the paper: 2 is 2 F0 - F1, which its analysis starts from.
    """
    whole(2, order=order)
    between(2, MAX_ORDER + 1, order=order)
    return Policy((Cached(site, every(setting, interval, first), Predictor("adams_bashforth", order - 1)),))


@method(
    "predictive",
    title="FoCa",
    source="arXiv 2508.16211",
    checked="C3",
    sites="any",
    trigger="every N-th step",
    predictor="foca",
)
def foca(setting: Setting, *, interval: int = 5, first: int = 3, site: str = DEFAULT_SITE) -> Policy:
    """A BDF2 prediction with a Heun correction from the last three computed steps (arXiv 2508.16211)."""
    return Policy((Cached(site, every(setting, interval, first), Predictor("foca", 2)),))


@method(
    "predictive",
    title="GOC",
    source="arXiv 2503.05156",
    checked="C",
    sites="any; attention and MLP branches in the paper",
    trigger="every N-th step, or listed steps",
    predictor="goc",
)
def goc(
    setting: Setting,
    *,
    interval: int = 2,
    eta: float = 1.2,
    gradient_steps: Sequence[int] | None = None,
    site: str = "branches",
) -> Policy:
    """Forecasts F0 + eta (F0 - F1) at the `gradient_steps`, and copies at the other cached steps.

    arXiv 2503.05156, repository qiujx0520/GOC_ICCV2025: eta 1.2 over FORA's schedule, at listed steps ({3, 5, 7, 9} of
    20) before a model's inflection point; unless given, the cached steps of the first half.
    """
    between(0.0, 10.0, eta=eta)
    mask = every(setting, interval)
    chosen = range(setting.steps // 2) if gradient_steps is None else gradient_steps
    listed(setting, list(chosen))
    rule = Predictor("goc", 1, (("eta", float(eta)),))
    return Policy((Cached(site, mask, Switched(rule, COPY, frozenset(chosen))),))


@method(
    "predictive",
    title="FeMo",
    source="openreview ih1oyr0j6y",
    checked="D",
    sites="any",
    trigger="every N-th step",
    predictor="momentum",
)
def femo(
    setting: Setting,
    *,
    interval: int = 5,
    order: int = 3,
    beta: float = 0.5,
    first: int = 3,
    site: str = DEFAULT_SITE,
) -> Policy:
    """Forecasts along a running mean of the last `order` slopes, `beta` times less for each older one.

    "Accelerate Diffusion Transformers with Feature Momentum": the trend of past features in place of high derivatives.
    Its coefficients are not public, and the search of one per sample (Adapted-FeMo) is left out.
    """
    between(0.0, 1.0, beta=beta)
    rule = Predictor("momentum", order, (("beta", float(beta)),))
    return Policy((Cached(site, every(setting, interval, first), rule),))


def _hidden(setting: Setting) -> str:
    return "hidden" if "hidden" in setting.sites else "output"


@method(
    "predictive",
    title="FreqCa",
    source="arXiv 2510.08669, repository Tammytcl/FreqCa",
    checked="C",
    sites="hidden: the value after the last block",
    trigger="every N-th step",
    predictor="low frequencies copied, high ones hermite",
)
def freqca(
    setting: Setting,
    *,
    interval: int = 6,
    order: int = 2,
    sigma: float = 0.71,
    low_order: int = 0,
    cutoff: float = 0.1,
    transform: str = "auto",
    grid: Sequence[int] | None = None,
    first: int = 3,
    site: str | None = None,
) -> Policy:
    """Splits the value after the last block by spatial frequency: copies the low band, forecasts the high one.

    The released code cuts a 2-D DCT over the image tokens at `cutoff` of its largest radius, or a 1-D FFT along the
    tokens at `cutoff` of its largest frequency, by model; transform="auto" takes "dct" where the tokens' `grid` (rows,
    columns) is given or known from the denoiser's inputs, and else "fft". The plan says which.
    """
    between(0.0, 1.0, sigma=sigma, cutoff=cutoff)
    name = site or _hidden(setting)
    if transform not in ("auto", "dct", "fft"):
        raise PolicyError(f"transform={transform!r}; there are: auto, dct, fft")
    shape = max(setting.sites.select(name)[0].shapes, key=math.prod)
    known = list(grid) if grid is not None else token_grid(setting.sites, shape[1]) if len(shape) == 3 else None
    if grid is not None and (len(shape) != 3 or math.prod(grid) != shape[1]):
        raise PolicyError(f"grid={list(grid)}: {name!r} has shape {list(shape)}, whose tokens do not fill that grid")
    chosen = transform if transform != "auto" else "dct" if known or len(shape) > 3 else "fft"
    if chosen == "dct" and len(shape) == 3 and known is None:
        raise PolicyError(
            f"the grid of the {shape[1]} tokens of {name!r} is not known from the denoiser's inputs; give "
            'grid=[rows, columns], or transform="fft"'
        )
    high = Predictor("hermite", order, (("sigma", float(sigma)),))
    low = Predictor("taylor", low_order) if low_order else COPY
    bands = {
        "transform": chosen,
        "cutoff": float(cutoff),
        "grid": list(known) if chosen == "dct" and known else None,
        "predictors": [low.as_json(), high.as_json()],
    }
    return Policy((Cached(name, every(setting, interval, first), high, {"bands": bands}),))
