"""Policies: published methods as schedules and predictors over the same primitives. Each is one short function."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from dcc.errors import PolicyError
from dcc.predictors import Predictor

DEFAULT_POLICY = "taylorseer"
DEFAULT_SITE = "auto"  # the residual of all blocks where there is one, else the U-Net cut, else the raw output


@dataclass(frozen=True)
class Policy:
    """What a policy decides for a run of given length: one step mask for all its sites, and their predictor."""

    mask: tuple[int, ...]
    predictor: Predictor
    site: str


def interval(
    steps: int, *, interval: int = 3, site: str = DEFAULT_SITE, steps_mask: Sequence[int] | None = None
) -> Policy:
    """Computes every `interval`-th step and copies in between (FORA, arXiv 2407.01425; DeepCache, arXiv 2312.00858)."""
    return Policy(_mask(steps, interval, 1, steps_mask), Predictor("copy"), site)


def taylorseer(
    steps: int,
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
    return Policy(_mask(steps, interval, first, steps_mask), Predictor("taylor", order), site)


POLICIES: dict[str, Callable[..., Policy]] = {"interval": interval, "taylorseer": taylorseer}


def make_policy(name: str, steps: int, parameters: dict[str, Any]) -> Policy:
    """The named policy for a run of `steps` steps. Raises PolicyError for an unknown name, parameter or value."""
    known = parameter_names(name)
    unknown = [key for key in parameters if key not in known]
    if unknown:
        raise PolicyError(
            f"policy {name!r} takes no parameter {', '.join(map(repr, unknown))}; it takes: {', '.join(known)}"
        )
    return POLICIES[name](steps, **parameters)


def parameter_names(name: str) -> list[str]:
    """The keyword parameters of a policy. Raises PolicyError for an unknown name."""
    if name not in POLICIES:
        raise PolicyError(f"unknown policy {name!r}; there are: {', '.join(POLICIES)}")
    return [p.name for p in inspect.signature(POLICIES[name]).parameters.values() if p.kind is p.KEYWORD_ONLY]


def _mask(steps: int, interval: int, first: int, steps_mask: Sequence[int] | None) -> tuple[int, ...]:
    """The given mask, checked; else `first` full steps and every `interval`-th step after the last of them."""
    if steps_mask is not None:
        mask = list(steps_mask) if isinstance(steps_mask, Sequence) else [steps_mask]
        if len(mask) != steps or any(v not in (0, 1) for v in mask):
            raise PolicyError(f"steps_mask must be {steps} numbers 0 or 1, one a step; got {len(mask)}: {mask}")
        if not mask[0]:
            raise PolicyError("steps_mask must begin with 1: there is nothing to forecast the first step from")
        return tuple(int(v) for v in mask)
    if not isinstance(interval, int) or interval < 1:
        raise PolicyError(f"interval={interval!r} must be a whole number of 1 or more")
    if not isinstance(first, int) or first < 1:
        raise PolicyError(f"first={first!r} must be a whole number of 1 or more: the first step has no anchors")
    return tuple(int(s < first or (s - first + 1) % interval == 0) for s in range(steps))
