"""What a step of a schedule does with a site: the numbers that plans, policies and triggers write."""

from __future__ import annotations

from enum import IntEnum


class Decision(IntEnum):
    """What is done with one site at one step: a whole number, as plan files hold it, and equal to that number."""

    FORECAST = 0  # made from its anchors
    COMPUTE = 1  # computed, and kept as an anchor
    REFRESH = 2  # forecast, except for some tokens that are computed; only where the site's form has tokens
    IDLE = -1  # neither: nothing that the step computes needs it; only run-time triggers decide so
