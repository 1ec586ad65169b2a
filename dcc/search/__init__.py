"""From a budget to the best plan, by runs of the calibration prompts."""
