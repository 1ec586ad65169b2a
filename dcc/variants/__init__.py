"""Makes the variants of a plan from a captured graph: the rewritten graphs of its rows, and what they cost."""
