"""Timestep-adaptive policies: a number that moves from step to step decides whether a whole step computes."""

from __future__ import annotations
