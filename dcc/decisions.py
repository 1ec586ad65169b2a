"""What a step of a schedule does with a site: the numbers that plans, policies and triggers write."""

from __future__ import annotations

from enum import IntEnum


class Decision(IntEnum):
    """A whole number, as plan files hold it; compares equal to that number."""

    FORECAST = 0  # made of what was kept
    COMPUTE = 1  # computed, and kept
    REFRESH = 2  # forecast, but for some tokens that are computed; where the site's form has tokens
    IDLE = -1  # neither: nothing that the step computes needs it; a run-time trigger's alone
