"""Hybrid policies: tokens, bands, guidance or verification decide besides the schedule."""

from __future__ import annotations
