"""Finds the best plan for a budget, by runs of the calibration prompts."""
