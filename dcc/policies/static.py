"""Static policies: a schedule that neither the prompt nor the features change."""

from __future__ import annotations

from collections.abc import Sequence

from dcc.policies.base import DEFAULT_SITE, Cached, Policy, Setting, every, given_mask, method


@method(
    "static",
    title="Interval",
    source="baseline",
    checked="own",
    sites="any",
    trigger="every N-th step",
    predictor="copy",
)
def interval(
    setting: Setting, *, interval: int = 3, site: str = DEFAULT_SITE, steps_mask: Sequence[int] | None = None
) -> Policy:
    """Computes every `interval`-th step and copies in between; or computes the steps of `steps_mask`."""
    mask = every(setting, interval) if steps_mask is None else given_mask(setting, steps_mask)
    return Policy((Cached(site, mask),))
